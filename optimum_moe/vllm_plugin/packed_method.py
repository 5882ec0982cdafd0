"""Blocks whose experts are stored in formats of their own: narrow, of low rank, constant and so on, in any mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.utils.torch_utils import direct_register_custom_op

from optimum_moe.vllm_plugin.activations import activation_of
from optimum_moe.vllm_plugin.blocks import CONSTANT, CompressedBlock, parameter_name
from optimum_moe.vllm_plugin.loading import OwnTensors, mapped
from optimum_moe.vllm_plugin.packed_experts import PackedExperts, Shard
from optimum_moe.vllm_plugin.refusals import refuse_other_count, refuse_parallelism


class PackedExpertsMethod(FusedMoEMethodBase):
    """Experts in a flat buffer.

    Args:
        moe: vLLM's `FusedMoEConfig`.
        block: The block.

    Raises:
        ValueError: If the engine splits experts in a way that is not built.
    """

    def __init__(self, moe: Any, block: CompressedBlock) -> None:
        refuse_parallelism(block.name, moe)
        super().__init__(moe)
        self.block = block

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: nothing is quantized."""

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *_: Any) -> tuple[int, int]:
        """The sizes as they are."""
        return hidden_size, intermediate_size_per_partition

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, params_dtype: torch.dtype, **_: Any
    ) -> None:
        """The buffer, and an empty parameter for each tensor of the checkpoint, whose loader fills a part of it.

        Raises:
            ValueError: If the checkpoint does not fit the model that vLLM builds.
        """
        block, moe = self.block, self.moe
        assert block.spec is not None
        refuse_other_count(block, num_experts)
        block.spec.check(block.name, hidden_size, moe.intermediate_size)
        activation = activation_of(
            block.name, layer.activation.value, layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta
        )
        if activation.is_gated != block.spec.has_gate:
            raise ValueError(
                f"{block.name} has experts with a gate in only one of the model and its quantization_config. Restore "
                "the saved config.json."
            )
        projections = ("gate", "up", "down") if block.spec.has_gate else ("up", "down")
        try:
            self.experts = PackedExperts(
                block.spec,
                hidden_size,
                biases=projections if moe.has_bias else (),
                constants=[expert for expert, projection, _ in block.tensors.values() if projection == CONSTANT],
                activation=activation,
                shard=Shard(moe.tp_rank, moe.tp_size),
                dtype=params_dtype,
            )
        except ValueError as error:
            raise ValueError(f"{block.name}: {error}") from error
        layer.register_buffer("experts_flat", self.experts.flat, persistent=False)
        self._own = OwnTensors(block.name, layer)
        self._own.add_map(block)
        for expert, projection, tensor, shape, take in self.experts.tensors():
            self._own.add(parameter_name(expert, projection, tensor), shape, take)

    def refuse_incomplete(self, layer: Any) -> None:
        """Refuse a block of which a tensor has not come.

        Raises:
            ValueError: With what has not come.
        """
        self._own.check()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Choose what runs the experts, on the device that they are on now.

        Raises:
            ValueError: If a tensor has not come.
        """
        self.refuse_incomplete(layer)
        self._own.drop()
        # The buffer may have been moved.
        self.experts.flat = layer.experts_flat
        self.runner: Callable[..., torch.Tensor] = self.experts
        if layer.experts_flat.is_cuda:
            from optimum_moe.vllm_plugin.ragged_experts import RaggedExperts

            self.runner = RaggedExperts(self.experts)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: Any,
    ) -> torch.Tensor:
        """(T, H) outputs of this process, behind an operator that torch.compile does not look into."""
        return torch.ops.vllm.optimum_moe_experts(x, topk_weights, topk_ids, layer.layer_name)

    def run(self, layer: Any, input_TH: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """(T, H) weighted sum of the selected experts on this process."""
        if self.block.has_map:
            index_TK = mapped(layer, index_TK)
        return self.runner(input_TH, weights_TK, index_TK, layer.apply_router_weight_on_input)


def _experts(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    layer = get_forward_context().no_compile_layers[layer_name].routed_experts
    return layer.quant_method.run(layer, x, topk_weights, topk_ids)


def _experts_fake(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(op_name="optimum_moe_experts", op_func=_experts, fake_impl=_experts_fake)
