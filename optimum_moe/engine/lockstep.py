"""Lockstep: every batch runs the ordinary forward pass in its own thread, and all pass one layer before the next.

This needs no code per architecture: masks, positions and states remain in the frames of the paused threads. Only one
thread computes at a time, so the results are the same as for one batch after another. Backward passes that follow go
through the layers together too, from the last to the first. The layers themselves run in the main thread, because
libraries keep compiled kernels and freed memory for each thread that they ran in.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import Cache

from optimum_moe.calibration.boundaries import named_arguments
from optimum_moe.engine.layer_backward import LayerCall, Save, run_without_graph

_here = threading.local()
_REHEARSED = object()
"""Stands for the output of a layer that is to run again."""


class _Stopped(BaseException):
    """Raised in a thread to end its forward pass early."""


@dataclass(frozen=True)
class Turn:
    """A place where a thread waits.

    Args:
        layer: Path of the layer that it enters next.
        back: Whether it does so in its backward pass.
    """

    layer: str
    back: bool = False


@dataclass(frozen=True)
class Backward:
    """How the layers take part in backward passes.

    Args:
        starts: Paths of the layers in which gradients may begin.
        save: Stores a tensor that enters a layer until the backward pass.
    """

    starts: Collection[str]
    save: Save


class Runner(threading.Thread):
    """The thread of one batch's forward pass.

    Args:
        call: The forward pass.
        settings: Called first in the thread, to restore thread-local settings of torch.
    """

    def __init__(self, call: Callable[[], Any], settings: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.at: Turn | None = None
        self.error: BaseException | None = None
        self.stopping = False
        self._call, self._settings = call, settings
        self._work: Callable[[], Any] | None = None
        self._result: Any = None
        self._turn, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._context = contextvars.copy_context()

    def run(self) -> None:
        """Wait for the first turn, then run the forward pass to its end."""
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

    def park(self, turn: Turn, work: Callable[[], Any]) -> Any:
        """Wait until it is this thread's turn to enter a layer, and return what the main thread got from `work()`.

        Called in the thread of the forward pass, whose grad mode and context variables the work sees.
        """
        context, gradients = contextvars.copy_context(), torch.is_grad_enabled()

        def in_context() -> Any:
            with torch.set_grad_enabled(gradients):
                return context.run(work)

        self.at, self._work = turn, in_context
        self._parked.release()
        self._turn.acquire()
        if self.stopping:
            raise _Stopped
        result, self._result = self._result, None
        return result

    def advance(self) -> None:
        """Run the layer that the thread waits for, then the thread to its next layer or end; called by the main thread.

        Raises:
            BaseException: Any exception of the layer or of the forward pass.
        """
        work, self._work = self._work, None
        if work is not None:
            self._result = work()
        self._turn.release()
        self._parked.acquire()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """End the forward pass at its present layer; called by the main thread."""
        self.stopping = True
        self._turn.release()
        self.join()


class Lockstep:
    """Forward passes that go through the layers of a model together; a context manager.

    Args:
        model: The model.
        layers: Paths of the modules to pause at. If threads wait at several, the first in this list has its turn.
        calls: The forward passes, one for each batch.
        keep: Stores the output of a layer while its thread is paused.
        backward: How layers take part in the backward passes of the calls; None if there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        calls: Sequence[Callable[[], Any]],
        keep: Callable[[Any], Any],
        backward: Backward | None = None,
    ) -> None:
        self.model, self.layers, self.keep, self.backward = model, list(layers), keep, backward
        self.last: str | None = None
        """Path of the layer after which forward passes stop."""
        self.run: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any] | None = None
        """Runs the layer whose turn it is: gets its forward and the arguments of a call, and returns its output."""
        self.rehearsed: set[str] = set()
        """Layers that run twice on the same input, the second time in another turn; the first output is dropped."""
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
                # accelerate replaces the forward of a module instance.
                vars(module)["forward"] = original

    def turns(self) -> Iterator[tuple[Turn, list[Runner]]]:
        """Each turn with the runners that wait for it, in the order of the batches; advance them all."""
        for runner in self.runners:
            runner.advance()
        forward = {layer: place for place, layer in enumerate(self.layers)}
        entered: list[str] = []

        def order(turn: Turn) -> tuple[bool, int]:
            # Backward passes wait for all forward passes, and begin with the layer that was entered last.
            return (True, -entered.index(turn.layer)) if turn.back else (False, forward[turn.layer])

        while waiting := {runner.at for runner in self.runners if runner.at is not None}:
            turn = min(waiting, key=order)
            if not turn.back:
                entered.append(turn.layer)
            yield turn, [runner for runner in self.runners if runner.at == turn]

    def _forward(self, layer: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        runner: Runner | None = getattr(_here, "runner", None)
        if runner is None:
            return forward(*args, **kwargs)
        if self.backward is not None:
            run, here, back = partial(self._run, forward), Turn(layer), Turn(layer, back=True)
            call = LayerCall(
                layer, run, partial(runner.park, here), partial(runner.park, back), self.keep, self.backward.save
            )
            return run_without_graph(call, named_arguments(args, kwargs), starts=layer in self.backward.starts)
        output = runner.park(Turn(layer), partial(self._run_or_rehearse, layer, forward, args, kwargs))
        if output is _REHEARSED:
            output = runner.park(Turn(layer), partial(self._run, forward, *args, **kwargs))
        if layer == self.last:
            raise _Stopped
        return self.keep(output)

    def _run_or_rehearse(
        self, layer: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if layer not in self.rehearsed:
            return self._run(forward, *args, **kwargs)
        # The second run would append to a cache again.
        copies = {name: deepcopy(value) if isinstance(value, Cache) else value for name, value in kwargs.items()}
        forward(*(deepcopy(value) if isinstance(value, Cache) else value for value in args), **copies)
        return _REHEARSED

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.run is None else self.run(forward, args, kwargs)

    def _settings(self) -> Callable[[], None]:
        """Thread-local settings of torch that a new thread does not inherit."""
        threads = torch.get_num_threads()
        casts = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        device = torch.cuda.current_device() if torch.cuda.is_available() else None

        def restore() -> None:
            torch.set_num_threads(threads)
            for kind, dtype in casts:
                torch.set_autocast_enabled(kind, True)
                torch.set_autocast_dtype(kind, dtype)
            if device is not None:
                torch.cuda.set_device(device)

        return restore
