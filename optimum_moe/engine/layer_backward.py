"""The backward pass of one layer: what enters the layer is saved, and the layer runs again when its gradients are due.

Like activation checkpointing, but a layer waits for its turn before it runs again, and what it needs is on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from optimum_moe.calibration.boundaries import (
    Arguments,
    call_with,
    entering,
    put_back,
    run_layer_call,
    take_out,
    write_back,
)

Save = Callable[[str, torch.Tensor], Callable[[], torch.Tensor]]
"""Stores a tensor that enters a layer of that name, and returns a function that gives an equal one."""

Gradients = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer by one batch.

    Args:
        layer: Path of the layer.
        run: Its forward pass.
        forward: Calls a function when it is the layer's turn.
        backward: Calls a function when it is the turn of the layer's backward pass.
        keep: Stores an output or a gradient while other batches compute.
        save: Stores what enters the layer until the backward pass.
    """

    layer: str
    run: Callable[..., Any]
    forward: Callable[[Callable[[], Any]], Any]
    backward: Callable[[Callable[[], Any]], Any]
    keep: Callable[[Any], Any]
    save: Save


def run_without_graph(call: LayerCall, arguments: Arguments, starts: bool) -> Any:
    """Run a layer so that gradients pass through it without the graph of its operations.

    Args:
        call: The call.
        arguments: What the layer is called with.
        starts: Whether gradients may begin in it.

    Returns:
        Its output, with the bits that the layer gives with a graph.

    Raises:
        ValueError: If tensors go into or out of the layer in another way, see `run_layer_call`.
    """
    places, tensors = take_out(arguments)
    if not tensors and not starts:
        return call.keep(call.forward(partial(call_with, call.run, arguments)))

    def run(given: Sequence[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
        entered = put_back(places, [entering(tensor) for tensor in given])
        return take_out(run_layer_call(call.layer, call.run, entered))

    # Kernels may depend on whether autograd records them, so it does.
    given = [tensor.detach().requires_grad_() for tensor in tensors]
    results, left = call.forward(partial(run, given))
    if left:
        saved = [call.save(call.layer, tensor.detach()) for tensor in tensors]
        back = partial(_go_back, call, run, saved)
        outputs = [call.keep(tensor.detach()) for tensor in left]
        # Autograd calls back for inputs that require gradients, and where gradients begin there is no other.
        left = _WithoutGraph.apply(back, outputs, torch.zeros(0, requires_grad=starts), *tensors)
    output, written = put_back(results, left)
    write_back(written, arguments)
    return output if left else call.keep(output)


def _go_back(
    call: LayerCall,
    run: Callable[[Sequence[torch.Tensor]], tuple[Any, list[torch.Tensor]]],
    saved: Sequence[Callable[[], torch.Tensor]],
    gradients: Gradients,
) -> list[torch.Tensor | None]:
    """The gradients of what entered the layer, from those of what left it."""

    def compute() -> list[torch.Tensor | None]:
        tensors = [load().requires_grad_() for load in saved]
        with torch.enable_grad(), torch.autograd.set_multithreading_enabled(False):
            _, left = run(tensors)
            pairs = [(out, gradient) for out, gradient in zip(left, gradients, strict=True) if gradient is not None]
            torch.autograd.backward([out for out, _ in pairs], [gradient for _, gradient in pairs])
        return [tensor.grad for tensor in tensors]

    return [None if gradient is None else call.keep(gradient) for gradient in call.backward(compute)]


class _WithoutGraph(torch.autograd.Function):
    """Gives outputs that were computed before, and calls a function for the gradients of the inputs."""

    @staticmethod
    def forward(
        context: Any,
        back: Callable[[Gradients], list[torch.Tensor | None]],
        outputs: list[torch.Tensor],
        start: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        context.back = back
        context.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # The graph keeps this node, which need not keep what it saved.
        back, context.back = context.back, None
        return None, None, None, *back(gradients)
