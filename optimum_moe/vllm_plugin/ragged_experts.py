"""Packed experts on a GPU: a few launches of Triton for any mixture of widths, ranks and sparse rows."""

from __future__ import annotations

import torch

from optimum_moe.kernels.ragged_matmul import RaggedMatmul, RaggedMatrix, Tiles, routed_slots
from optimum_moe.vllm_plugin.packed_experts import Matrix, PackedExpert, PackedExperts


class RaggedExperts:
    """Runs packed experts on the device that holds them.

    Args:
        packed: The experts, with their buffer in its last place.
        tiles: For all numbers of tokens; by default chosen by them.
    """

    def __init__(self, packed: PackedExperts, tiles: Tiles | None = None) -> None:
        self._packed, self._tiles = packed, tiles
        places, hidden_size, base = packed.experts, packed.hidden_size, packed.flat

        def entering(name: str) -> list[RaggedMatrix]:
            return [_ragged(getattr(place, name), place, name) for place in places]

        self._right = RaggedMatmul([[_ragged(place.right) for place in places]], base)
        self._entering = RaggedMatmul([entering(name) for name in _names(packed)], base)
        self._down_right = RaggedMatmul([[_ragged(place.down_right) for place in places]], base)
        # An expert without neurons gives its bias, or zeros.
        down = [_ragged(place.down, place, "down", hidden_size) for place in places]
        self._down = RaggedMatmul([down], base, none=RaggedMatrix(outputs=hidden_size))

    def __call__(
        self, input_TH: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor, scales_input: bool = False
    ) -> torch.Tensor:
        """(T, H) weighted sum of the selected experts, as `PackedExperts` gives it.

        Args:
            input_TH: (T, H).
            weights_TK: (T, K) routing weights.
            index_TK: (T, K) experts.
            scales_input: Whether routing weights multiply the input instead of the output; with K = 1 only.
        """
        if scales_input:
            input_TH, weights_TK = (input_TH * weights_TK).to(input_TH.dtype), torch.ones_like(weights_TK)
        slots = routed_slots(index_TK, len(self._packed.experts), input_TH.dtype, self._tiles)
        input_TH, weights_TK = input_TH.contiguous(), weights_TK.contiguous()
        inner_SR = self._right(input_TH, slots, rows_are_tokens=True)
        projected = self._entering(input_TH, slots, True, inner_SR)
        gate_Sn, up_Sn = projected.chunk(2, dim=-1) if self._packed.activation.is_gated else (None, projected)
        hidden_Sn = self._packed.activation(gate_Sn, up_Sn).contiguous()
        down_SR = self._down_right(hidden_Sn, slots, rows_are_tokens=False)
        output_SH = self._down(hidden_Sn, slots, False, down_SR, weights_TK, is_exact=True)
        return output_SH.view(*index_TK.shape, -1).sum(1, dtype=torch.float32).to(input_TH.dtype)


def _names(packed: PackedExperts) -> tuple[str, ...]:
    return ("gate", "up") if packed.activation.is_gated else ("up",)


def _ragged(
    matrix: Matrix, place: PackedExpert | None = None, projection: str = "", outputs: int | None = None
) -> RaggedMatrix:
    bias = None if place is None else place.biases.get(projection)
    outputs = matrix.outputs if outputs is None else outputs
    return RaggedMatrix(matrix.offset, matrix.inputs, outputs, matrix.inputs, matrix.first, bias)
