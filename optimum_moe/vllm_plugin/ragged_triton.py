"""Packed experts on a GPU: four launches whatever the mixture of widths, ranks and formats.

    right factors of gate and up -> gate, up and the activation -> right factor of down -> down

Tables on the device say where each expert's matrices lie and how large they are; the host knows every shape and reads
nothing back, so that the layer can be captured in a CUDA graph. `sorted_pairs` gives every expert's pairs rows of their
own, padded to the height of a block; blocks and columns that have nothing to do return at once.

Shape letters as in `packed_experts`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from optimum_moe.vllm_plugin.activations import GELU, GELU_TANH, RELU_SQUARED, SWISH
from optimum_moe.vllm_plugin.packed_experts import Matrix, PackedExperts

_KINDS = (SWISH, GELU, GELU_TANH, RELU_SQUARED)


@triton.jit
def _product(
    rows_ptr,
    matrix_ptr,
    inputs,
    is_row,
    is_column,
    column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32 product of rows that start at `rows_ptr` with an (O, X) matrix."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        is_k = k + start < inputs
        x = tl.load(rows_ptr[:, None] + (k + start)[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
        w = tl.load(
            matrix_ptr + column[None, :] * inputs + (k + start)[:, None],
            mask=is_column[None, :] & is_k[:, None],
            other=0.0,
        )
        total += tl.dot(x, w, input_precision="ieee")
    return total


@triton.jit
def right_kernel(
    input_ptr,
    flat_ptr,
    output_ptr,
    slot_ptr,
    owner_ptr,
    offset_ptr,
    outputs_ptr,
    inputs_ptr,
    num_slots,
    input_stride,
    output_stride,
    top_k,
    ROWS_ARE_TOKENS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """V x of every pair of an expert that has such a factor."""
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(owner_ptr + row_block)
    if expert < 0:
        return
    outputs = tl.load(outputs_ptr + expert)
    if column_block * BLOCK_N >= outputs:
        return
    inputs = tl.multiple_of(tl.load(inputs_ptr + expert), ALIGNMENT)
    slot = tl.load(slot_ptr + row_block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_row = slot < num_slots
    row = (slot // top_k if ROWS_ARE_TOKENS else slot).to(tl.int64)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < outputs
    matrix_ptr = flat_ptr + tl.multiple_of(tl.load(offset_ptr + expert), 16)
    total = _product(
        input_ptr + row * input_stride, matrix_ptr, inputs, is_row, is_column, column, BLOCK_M, BLOCK_N, BLOCK_K
    )
    out_ptr = output_ptr + slot.to(tl.int64)[:, None] * output_stride + column[None, :]
    tl.store(out_ptr, total.to(output_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _entering(
    input_ptr,
    inner_ptr,
    flat_ptr,
    slot,
    expert,
    offset_ptr,
    inputs_ptr,
    first_ptr,
    bias_ptr,
    input_stride,
    inner_stride,
    top_k,
    is_row,
    is_column,
    column,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gate or up with its bias: of the input, or of the products of the right factors."""
    inputs = tl.multiple_of(tl.load(inputs_ptr + expert), ALIGNMENT)
    first = tl.load(first_ptr + expert)
    if first >= 0:
        rows_ptr = inner_ptr + slot.to(tl.int64) * inner_stride + tl.multiple_of(first, ALIGNMENT)
    else:
        rows_ptr = input_ptr + (slot // top_k).to(tl.int64) * input_stride
    matrix_ptr = flat_ptr + tl.multiple_of(tl.load(offset_ptr + expert), 16)
    total = _product(rows_ptr, matrix_ptr, inputs, is_row, is_column, column, BLOCK_M, BLOCK_N, BLOCK_K)
    bias = tl.load(bias_ptr + expert)
    if bias >= 0:
        total += tl.load(flat_ptr + bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def hidden_kernel(
    input_ptr,
    inner_ptr,
    flat_ptr,
    output_ptr,
    slot_ptr,
    owner_ptr,
    width_ptr,
    gate_offset_ptr,
    gate_inputs_ptr,
    gate_first_ptr,
    gate_bias_ptr,
    up_offset_ptr,
    up_inputs_ptr,
    up_first_ptr,
    up_bias_ptr,
    num_slots,
    input_stride,
    inner_stride,
    output_stride,
    top_k,
    KIND: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Hidden neurons of every pair: act(gate) * (up + beta), or act(up)."""
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(owner_ptr + row_block)
    if expert < 0:
        return
    width = tl.load(width_ptr + expert)
    if column_block * BLOCK_N >= width:
        return
    slot = tl.load(slot_ptr + row_block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_row = slot < num_slots
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < width
    up = _entering(
        input_ptr,
        inner_ptr,
        flat_ptr,
        slot,
        expert,
        up_offset_ptr,
        up_inputs_ptr,
        up_first_ptr,
        up_bias_ptr,
        input_stride,
        inner_stride,
        top_k,
        is_row,
        is_column,
        column,
        ALIGNMENT,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if IS_GATED:
        curved = _entering(
            input_ptr,
            inner_ptr,
            flat_ptr,
            slot,
            expert,
            gate_offset_ptr,
            gate_inputs_ptr,
            gate_first_ptr,
            gate_bias_ptr,
            input_stride,
            inner_stride,
            top_k,
            is_row,
            is_column,
            column,
            ALIGNMENT,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        if HAS_LIMIT:
            curved = tl.minimum(curved, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    else:
        curved = up
    if KIND == 0:
        curved = curved * tl.sigmoid(ALPHA * curved)
    elif KIND == 1:
        curved = 0.5 * curved * (1.0 + tl.erf(curved * 0.7071067811865476))
    elif KIND == 2:
        inner = 0.7978845608028654 * (curved + 0.044715 * curved * curved * curved)
        curved = curved * tl.sigmoid(2.0 * inner)
    else:
        curved = tl.maximum(curved, 0.0)
        curved = curved * curved
    hidden = curved * (up + BETA) if IS_GATED else curved
    out_ptr = output_ptr + slot.to(tl.int64)[:, None] * output_stride + column[None, :]
    tl.store(out_ptr, hidden.to(output_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def down_kernel(
    hidden_ptr,
    inner_ptr,
    flat_ptr,
    output_ptr,
    weight_ptr,
    slot_ptr,
    owner_ptr,
    offset_ptr,
    inputs_ptr,
    first_ptr,
    bias_ptr,
    hidden_size,
    num_slots,
    hidden_stride,
    inner_stride,
    output_stride,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Output of every pair times its routing weight; an expert without neurons gives its bias, or zeros."""
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(owner_ptr + row_block)
    if expert < 0:
        return
    inputs = tl.multiple_of(tl.load(inputs_ptr + expert), ALIGNMENT)
    slot = tl.load(slot_ptr + row_block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_row = slot < num_slots
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < hidden_size
    if tl.load(first_ptr + expert) >= 0:
        rows_ptr = inner_ptr + slot.to(tl.int64) * inner_stride
    else:
        rows_ptr = hidden_ptr + slot.to(tl.int64) * hidden_stride
    matrix_ptr = flat_ptr + tl.multiple_of(tl.load(offset_ptr + expert), 16)
    total = _product(rows_ptr, matrix_ptr, inputs, is_row, is_column, column, BLOCK_M, BLOCK_N, BLOCK_K)
    bias = tl.load(bias_ptr + expert)
    if bias >= 0:
        total += tl.load(flat_ptr + bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    total *= tl.load(weight_ptr + slot, mask=is_row, other=0.0).to(tl.float32)[:, None]
    out_ptr = output_ptr + slot.to(tl.int64)[:, None] * output_stride + column[None, :]
    tl.store(out_ptr, total.to(output_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def sorted_pairs(index_TK: torch.Tensor, num_experts: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots by expert, each expert's padded to whole blocks of rows, and the expert of each block (-1 for none).

    Args:
        index_TK: (T, K) experts.
        num_experts: G.
        height: Rows of a block.
    """
    expert_S = index_TK.reshape(-1).long()
    slots, device = len(expert_S), expert_S.device
    sorted_S, order_S = torch.sort(expert_S, stable=True)
    ends_G = torch.searchsorted(sorted_S, torch.arange(num_experts, device=device), right=True)
    starts_G = torch.cat([ends_G.new_zeros(1), ends_G[:-1]])
    padded_ends_G = ((ends_G - starts_G + height - 1) // height * height).cumsum(0)
    padded_starts_G = torch.cat([padded_ends_G.new_zeros(1), padded_ends_G[:-1]])
    total = (min(slots, num_experts) * (height - 1) + slots + height - 1) // height * height
    padded = torch.full((total,), slots, dtype=torch.int32, device=device)
    padded[padded_starts_G[sorted_S] + torch.arange(slots, device=device) - starts_G[sorted_S]] = order_S.int()
    owner = torch.searchsorted(padded_ends_G, torch.arange(0, total, height, device=device), right=True)
    return padded, torch.where(owner < num_experts, owner, -1).int()


@dataclass(frozen=True)
class Tiles:
    """Rows, columns and depth of the blocks of one launch."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# For few tokens and for many, after what `benchmarks/results/ragged_experts.txt` shows of similar kernels on a GPU.
_FEW, _MANY, _FEW_TOKENS = Tiles(16, 32, 64, 4, 4), Tiles(64, 64, 64, 4, 3), 64


class RaggedExperts:
    """Runs packed experts on the device that holds them.

    Args:
        packed: The experts, with their buffer in its last place.
        tiles: For all numbers of tokens; by default chosen by them.
    """

    def __init__(self, packed: PackedExperts, tiles: Tiles | None = None) -> None:
        self._packed, self._tiles = packed, tiles
        places, device = packed.experts, packed.flat.device

        def table(numbers: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(numbers, dtype=dtype, device=device)

        def of_matrices(matrices: list[Matrix]) -> dict[str, torch.Tensor]:
            return {
                "offset": table([m.offset for m in matrices], torch.int64),
                "outputs": table([m.outputs for m in matrices]),
                "inputs": table([m.inputs for m in matrices]),
                "first": table([-1 if m.first is None else m.first for m in matrices]),
            }

        self._right = of_matrices([place.right for place in places])
        self._gate = of_matrices([place.gate for place in places])
        self._up = of_matrices([place.up for place in places])
        self._down_right = of_matrices([place.down_right for place in places])
        self._down = of_matrices([place.down for place in places])
        for name, own in (("gate", self._gate), ("up", self._up), ("down", self._down)):
            own["bias"] = table([place.biases.get(name, -1) for place in places], torch.int64)
        self._width = table([place.width for place in places])
        self._widest = max(place.width for place in places)
        self._most_right = max(place.right.outputs for place in places)
        self._most_down_right = max(place.down_right.outputs for place in places)
        sizes = [m.inputs for p in places for m in (p.right, p.gate, p.up, p.down_right, p.down)]
        sizes += [m.first or 0 for p in places for m in (p.gate, p.up)]
        # Loads are as wide as the divisor that the compiler knows.
        self._alignment = 8 if all(size % 8 == 0 for size in sizes) else 1

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
        (tokens, top_k), hidden_size, flat = index_TK.shape, input_TH.shape[1], self._packed.flat
        slots, activation = tokens * top_k, self._packed.activation
        tiles = self._tiles or (_FEW if tokens <= _FEW_TOKENS else _MANY)
        pairs, owner = sorted_pairs(index_TK, len(self._packed.experts), tiles.rows)
        input_TH, weights_TK = input_TH.contiguous(), weights_TK.contiguous()
        launch = {
            "ALIGNMENT": self._alignment,
            "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.columns,
            "BLOCK_K": tiles.depth,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

        def grid(columns: int) -> tuple[int, int]:
            return triton.cdiv(columns, tiles.columns), len(owner)

        def room(columns: int) -> torch.Tensor:
            return input_TH.new_empty(slots, -(-max(columns, 1) // 16) * 16)

        inner_SR, hidden_Sn = room(self._most_right), room(self._widest)
        if self._most_right:
            right_kernel[grid(self._most_right)](
                input_TH,
                flat,
                inner_SR,
                pairs,
                owner,
                self._right["offset"],
                self._right["outputs"],
                self._right["inputs"],
                slots,
                input_TH.stride(0),
                inner_SR.stride(0),
                top_k,
                ROWS_ARE_TOKENS=True,
                **launch,
            )
        if self._widest:
            hidden_kernel[grid(self._widest)](
                input_TH,
                inner_SR,
                flat,
                hidden_Sn,
                pairs,
                owner,
                self._width,
                *(self._gate[name] for name in ("offset", "inputs", "first", "bias")),
                *(self._up[name] for name in ("offset", "inputs", "first", "bias")),
                slots,
                input_TH.stride(0),
                inner_SR.stride(0),
                hidden_Sn.stride(0),
                top_k,
                KIND=_KINDS.index(activation.kind),
                IS_GATED=activation.is_gated,
                HAS_LIMIT=activation.limit is not None,
                LIMIT=activation.limit or 0.0,
                ALPHA=activation.alpha,
                BETA=activation.beta,
                **launch,
            )
        down_SR = room(self._most_down_right)
        if self._most_down_right:
            right_kernel[grid(self._most_down_right)](
                hidden_Sn,
                flat,
                down_SR,
                pairs,
                owner,
                self._down_right["offset"],
                self._down_right["outputs"],
                self._down_right["inputs"],
                slots,
                hidden_Sn.stride(0),
                down_SR.stride(0),
                top_k,
                ROWS_ARE_TOKENS=False,
                **launch,
            )
        output_SH = input_TH.new_empty(slots, hidden_size)
        down_kernel[grid(hidden_size)](
            hidden_Sn,
            down_SR,
            flat,
            output_SH,
            weights_TK,
            pairs,
            owner,
            self._down["offset"],
            self._down["inputs"],
            self._down["first"],
            self._down["bias"],
            hidden_size,
            slots,
            hidden_Sn.stride(0),
            down_SR.stride(0),
            output_SH.stride(0),
            **launch,
        )
        return output_SH.view(tokens, top_k, -1).sum(1, dtype=torch.float32).to(input_TH.dtype)
