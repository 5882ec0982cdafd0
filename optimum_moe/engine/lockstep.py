"""Lockstep: every batch runs the ordinary forward pass in a thread of its own, and all pass a layer before the next.

No architecture needs a driver of its own for that: masks, positions and states stay where its forward keeps them, in
the frames of the parked threads. One thread computes at a time, so that results are those of one batch after another.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import Cache

_here = threading.local()


class _Stopped(BaseException):
    """Raised in a thread whose forward pass need not go on."""


class Runner(threading.Thread):
    """One batch in its forward pass.

    Args:
        call: The forward pass.
        settings: Made in the thread before it starts.
    """

    def __init__(self, call: Callable[[], Any], settings: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.at: str | None = None
        self.error: BaseException | None = None
        self.stopping = False
        self._call, self._settings = call, settings
        self._turn, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._context = contextvars.copy_context()

    def run(self) -> None:
        """Wait for the first turn, then run until the end."""
        self._turn.acquire()
        _here.runner = self
        try:
            if not self.stopping:
                self._settings()
                with torch.no_grad():
                    self._context.run(self._call)
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.at = None
            del self._call
            self._parked.release()

    def park(self, layer: str) -> None:
        """Called in the thread: wait before a layer until it is this thread's turn."""
        self.at = layer
        self._parked.release()
        self._turn.acquire()
        if self.stopping:
            raise _Stopped

    def advance(self) -> None:
        """Called by the main thread: run to the next layer or the end.

        Raises:
            BaseException: What the forward pass raised.
        """
        self._turn.release()
        self._parked.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Called by the main thread: end the forward pass where it is."""
        self.stopping = True
        self._turn.release()
        self.join()


class Lockstep:
    """Forward passes that go through the layers of a model together; a context manager.

    Args:
        model: The model.
        layers: Paths of the modules to park at; of several that threads wait at, the first goes first.
        calls: The forward passes, one for each batch.
        keep: What to do with the output of a layer while its thread is parked.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], calls: Sequence[Callable[[], Any]], keep: Callable[[Any], Any]
    ) -> None:
        self.model, self.layers, self.keep = model, list(layers), keep
        self.last: str | None = None
        """After this layer forward passes stop."""
        self.rehearsed: set[str] = set()
        """Layers that run twice on the same input, the second time on a further turn; the first output is dropped."""
        self.runners = [Runner(call, self._settings()) for call in calls]

    def __enter__(self) -> Lockstep:
        for layer in self.layers:
            module = self.model.get_submodule(layer)
            vars(module)["forward"] = partial(self._forward, layer, module.forward)
        for runner in self.runners:
            runner.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for runner in self.runners:
            runner.stop()
        for layer in self.layers:
            module = self.model.get_submodule(layer)
            original = vars(module)["forward"].args[1]
            del vars(module)["forward"]
            if module.forward != original:
                # accelerate puts a forward of its own on a module.
                vars(module)["forward"] = original

    def turns(self) -> Iterator[tuple[str, list[Runner]]]:
        """Each layer with the runners that wait there, in the order of the batches; advance them all."""
        for runner in self.runners:
            runner.advance()
        order = {layer: place for place, layer in enumerate(self.layers)}
        while waiting := [runner.at for runner in self.runners if runner.at is not None]:
            layer = min(waiting, key=order.__getitem__)
            yield layer, [runner for runner in self.runners if runner.at == layer]

    def _forward(self, layer: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        runner: Runner | None = getattr(_here, "runner", None)
        if runner is None:
            return forward(*args, **kwargs)
        runner.park(layer)
        if layer in self.rehearsed:
            # A cache would grow twice.
            copies = {name: deepcopy(value) if isinstance(value, Cache) else value for name, value in kwargs.items()}
            forward(*(deepcopy(value) if isinstance(value, Cache) else value for value in args), **copies)
            runner.park(layer)
        output = forward(*args, **kwargs)
        if layer == self.last:
            raise _Stopped
        return self.keep(output)

    def _settings(self) -> Callable[[], None]:
        """What a new thread does not inherit."""
        threads = torch.get_num_threads()
        casts = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def settle() -> None:
            torch.set_num_threads(threads)
            for kind, dtype in casts:
                torch.set_autocast_enabled(kind, True)
                torch.set_autocast_dtype(kind, dtype)
            if device is not None:
                torch.cuda.set_device(device)

        return settle
