"""Blocks whose experts are stock ones: all of them, or fewer behind a routing map."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from optimum_moe.vllm_plugin.blocks import CompressedBlock
from optimum_moe.vllm_plugin.loading import OwnTensors, mapped, refuse_missing
from optimum_moe.vllm_plugin.refusals import refuse_other_count, refuse_parallelism


class StockExpertsMethod(UnquantizedFusedMoEMethod):
    """Stock experts, with the check that vLLM leaves out for checkpoints that name a quantization method.

    Args:
        moe: vLLM's `FusedMoEConfig`.
        block: Name of the block, for messages.
    """

    def __init__(self, moe: Any, block: str) -> None:
        super().__init__(moe)
        self.block = block

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """As in vLLM, filled with NaN, which no checkpoint holds."""
        super().create_weights(layer, *args, **kwargs)
        for part in self._stored(layer).values():
            part.fill_(float("nan"))

    def refuse_incomplete(self, layer: Any) -> None:
        """Refuse experts of which a part has not come.

        Raises:
            ValueError: With their numbers.
        """
        missing = [
            f"{name} of expert {int(expert)}"
            for name, part in self._stored(layer).items()
            for expert in part.isnan().flatten(1).any(1).nonzero().flatten()
        ]
        if missing:
            refuse_missing(self.block, missing)

    def process_weights_after_loading(self, layer: Any) -> None:
        """As in vLLM.

        Raises:
            ValueError: If something has not come.
        """
        self.refuse_incomplete(layer)
        super().process_weights_after_loading(layer)

    def _stored(self, layer: Any) -> dict[str, torch.Tensor]:
        """The part of each parameter that the checkpoint fills, which some backends pad."""
        neurons, hidden = self.moe.intermediate_size_per_partition_unpadded, self.moe.hidden_dim_unpadded
        halves = 2 if self.moe.is_act_and_mul else 1
        found = {
            "w13_weight": layer.w13_weight.data.unflatten(1, (halves, -1))[:, :, :neurons, :hidden],
            "w2_weight": layer.w2_weight.data[:, :hidden, :neurons],
        }
        if self.moe.has_bias:
            found["w13_bias"] = layer.w13_bias.data.unflatten(1, (halves, -1))[:, :, :neurons]
            found["w2_bias"] = layer.w2_bias.data[:, :hidden]
        return found


class MappedExpertsMethod(StockExpertsMethod):
    """G stock experts behind a router of N rows; ids are mapped on the device, and all shapes are static.

    Args:
        moe: vLLM's `FusedMoEConfig`.
        block: The block.

    Raises:
        ValueError: If the engine runs experts in a way that the map does not allow.
    """

    def __init__(self, moe: Any, block: CompressedBlock) -> None:
        refuse_parallelism(block.name, moe)
        super().__init__(moe, block.name)
        self._sizes = block
        if self.is_monolithic:
            raise ValueError(
                f"{block.name} has a routing map, and the MoE backend {self.unquantized_backend.value} routes inside "
                "of its kernel. Choose another one, such as --moe-backend triton."
            )

    def create_weights(self, layer: Any, num_experts: int, **kwargs: Any) -> None:
        """The stock parameters with G experts, and the map."""
        refuse_other_count(self._sizes, num_experts)
        super().create_weights(layer, num_experts=self._sizes.num_groups, **kwargs)
        layer.global_num_experts = layer.local_num_experts = self._sizes.num_groups
        self._own = OwnTensors(self.block, layer)
        self._own.add_map(self._sizes)

    def refuse_incomplete(self, layer: Any) -> None:
        """Refuse a block of which a part has not come.

        Raises:
            ValueError: With what has not come.
        """
        self._own.check()
        super().refuse_incomplete(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """As in vLLM.

        Raises:
            ValueError: If something has not come.
        """
        super().process_weights_after_loading(layer)
        self._own.drop()

    def apply(self, layer: Any, x: torch.Tensor, topk_weights: Any, topk_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM, with the ids of groups."""
        if self._sizes.has_map:
            topk_ids = mapped(layer, topk_ids)
        return super().apply(layer, x, topk_weights, topk_ids, *args, **kwargs)
