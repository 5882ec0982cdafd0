"""Loading of a block's own tensors: each of them is one parameter, and none may be missing or of another shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, Protocol, runtime_checkable

import torch
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from optimum_moe.hf.structure import METHOD
from optimum_moe.vllm_plugin.blocks import GUARD, MAP, CompressedBlock

Take = Callable[[torch.Tensor], None]

_NOT_LOADED = "not initialized from checkpoint"
"""In vLLM's message for parameters that have not come."""


@runtime_checkable
class CheckedMethod(Protocol):
    """A quantization method that knows what its layer needs."""

    def refuse_incomplete(self, layer: Any) -> None:
        """Raise a ValueError if something has not come."""


class OwnTensors:
    """The parameters that one block's own tensors are loaded into.

    Args:
        block: Name of the block in the files.
        layer: vLLM's `RoutedExperts`.
    """

    def __init__(self, block: str, layer: Any) -> None:
        self._block, self._layer = block, layer
        self._missing: set[str] = set()
        self._names: set[str] = set()
        self.add(GUARD, (1,), lambda tensor: None)
        self._missing.clear()
        stock = layer.load_weights
        layer.load_weights = lambda weights: self._load(weights, stock)

    def add(self, name: str, shape: tuple[int, ...], take: Take, target: torch.Tensor | None = None) -> None:
        """Register one.

        Args:
            name: Of the parameter.
            shape: Of the tensor in the files.
            take: Called with the tensor, which has this shape.
            target: What the parameter holds; by default nothing, as `take` fills other memory.
        """

        def load(parameter: torch.nn.Parameter, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{self._block}: the checkpoint has a tensor of shape {tuple(tensor.shape)} for {name}, where "
                    f"config.json says {shape}. Download the checkpoint again, or restore its config.json."
                )
            take(tensor)
            self._missing.discard(name)

        parameter = torch.nn.Parameter(torch.empty(0) if target is None else target, requires_grad=False)
        parameter.weight_loader = load  # type: ignore[attr-defined]
        self._layer.register_parameter(name, parameter)
        self._names.add(name)
        self._missing.add(name)

    def add_map(self, block: CompressedBlock) -> None:
        """Register the map from the N rows of a router to G experts, where there is one."""
        if not block.has_map:
            return
        map_N = torch.zeros(block.num_experts, dtype=torch.int64)

        def take(tensor: torch.Tensor) -> None:
            if not 0 <= int(tensor.min()) <= int(tensor.max()) < block.num_groups:
                raise ValueError(
                    f"{block.name}: the checkpoint maps experts to {int(tensor.min())} to {int(tensor.max())}, where "
                    f"config.json says {block.num_groups} groups. Download the checkpoint again."
                )
            map_N.copy_(tensor)

        self.add(MAP, tuple(map_N.shape), take, map_N)

    def check(self) -> None:
        """Refuse an incomplete block.

        Raises:
            ValueError: If a tensor has not come.
        """
        if self._missing:
            refuse_missing(self._block, sorted(self._missing))

    def drop(self) -> None:
        """Remove all parameters but the map: what the others stood for lies in other memory."""
        for name in self._names - {MAP}:
            delattr(self._layer, name)

    def _load(
        self, weights: Iterable[tuple[str, torch.Tensor]], stock: Callable[[Any], Iterable[str]]
    ) -> Iterator[str]:
        for name, tensor in weights:
            own = name.removeprefix("routed_experts.")
            if own == name:
                yield from stock([(name, tensor)])
            elif own in self._names:
                parameter: Any = self._layer.get_parameter(own)
                parameter.weight_loader(parameter, tensor)
                yield own
            else:
                raise ValueError(
                    f"{self._block}: the checkpoint has a tensor for {own}, which config.json knows nothing of. "
                    "Download the checkpoint again, or restore its config.json."
                )


def track_loading() -> None:
    """Have vLLM check that every parameter of our checkpoints has come, those outside of compressed blocks included.

    vLLM has this check (`enable_weights_track` of `model_loader_extra_config`) and leaves it out where a quantization
    method is named. Whoever sets it, has it as it is set.
    """
    load = DefaultModelLoader.load_weights

    @wraps(load)
    def load_weights(loader: Any, model: torch.nn.Module, model_config: Any) -> None:
        if model_config.quantization == METHOD and loader.enable_weights_track is None:
            loader.enable_weights_track = True
        try:
            load(loader, model, model_config)
        except ValueError as error:
            if _NOT_LOADED not in str(error) or model_config.quantization != METHOD:
                raise
            for module in model.modules():
                method = getattr(module, "quant_method", None)
                if isinstance(method, CheckedMethod):
                    method.refuse_incomplete(module)
            raise ValueError(f"{error}. The checkpoint is not complete. Download it again.") from error

    DefaultModelLoader.load_weights = load_weights


def refuse_missing(block: str, names: list[str]) -> None:
    """Raise the error for tensors that have not come."""
    raise ValueError(
        f"{block}: {len(names)} tensors that config.json promises are not in the checkpoint ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''}). Download it again, or compress again with the present optimum_moe."
    )


def mapped(layer: Any, topk_ids: torch.Tensor) -> torch.Tensor:
    """The groups that the rows of the router lead to; shape and dtype stay."""
    return layer.get_parameter(MAP)[topk_ids.long()].to(topk_ids.dtype)
