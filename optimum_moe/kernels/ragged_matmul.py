"""Products of routed rows with the matrices of their experts, which may all differ in size, in one launch of Triton.

Matrices lie anywhere in the memory of a device: a table on that device says where each one starts and how large it is.
Nothing is read on the host, so that a CUDA graph can capture a launch; the shapes of results depend on the largest
matrix only.

Shape letters: T tokens, K top-k, S their pairs (slots), Z matrices of an expert in one launch (gate and up), E experts,
O outputs and X inputs of a matrix, R inputs of left factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl

_NONE = -(1 << 62)


@dataclass(frozen=True)
class RaggedMatrix:
    """Where the matrix of one expert lies, in numbers of the weights' dtype.

    Args:
        offset: Of its first number from that of the table's `base`; any multiple of the dtype's size, also negative.
        stride: Between its rows, as they lie in memory.
        outputs: O; 0 for no product.
        inputs: X; 0 for zeros, or the bias alone.
        first: Column of its first input in `inner`, None where it reads the rows themselves. With
            `left_is_transposed` such a matrix lies as (X, O), all others as (O, X).
        bias: Offset of its (O,) bias, None for none.
    """

    offset: int = 0
    stride: int = 0
    outputs: int = 0
    inputs: int = 0
    first: int | None = None
    bias: int | None = None


@triton.jit
def _product(
    rows_ptr,
    matrix_ptr,
    stride,
    inputs,
    is_row,
    is_column,
    column,
    IS_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32 product of rows that start at `rows_ptr` with a matrix."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        is_k = k + start < inputs
        x = tl.load(rows_ptr[:, None] + (k + start)[None, :], mask=is_row[:, None] & is_k[None, :], other=0.0)
        if IS_TRANSPOSED:
            places = matrix_ptr + (k + start)[:, None] * stride + column[None, :]
        else:
            places = matrix_ptr + column[None, :] * stride + (k + start)[:, None]
        w = tl.load(places, mask=is_column[None, :] & is_k[:, None], other=0.0)
        total += tl.dot(x, w, input_precision="ieee")
    return total


@triton.jit
def ragged_matmul_kernel(
    rows_ptr,
    inner_ptr,
    base_ptr,
    output_ptr,
    weight_ptr,
    table_ptr,
    index_ptr,
    owner_ptr,
    num_slots,
    num_experts,
    rows_stride,
    inner_stride,
    output_stride,
    step,
    top_k,
    NONE: tl.constexpr,
    IS_SORTED: tl.constexpr,
    ROWS_ARE_TOKENS: tl.constexpr,
    HAS_INNER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LEFT_IS_TRANSPOSED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of columns of one block of rows, all of one expert; the third axis of the grid is Z."""
    column_block, row_block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lane = tl.arange(0, BLOCK_M)
    if IS_SORTED:
        expert = tl.load(owner_ptr + row_block)
        if expert < 0:
            return
        slot = tl.load(index_ptr + row_block * BLOCK_M + lane)
    else:
        expert = tl.load(index_ptr + row_block)
        slot = tl.where(lane == 0, row_block, num_slots)
    # Ids beyond the experts' stand for none, which is the last entry of the table.
    expert = tl.minimum(expert, num_experts).to(tl.int64)
    entry_ptr = table_ptr + (part * (num_experts + 1) + expert) * 6
    outputs = tl.load(entry_ptr + 2).to(tl.int32)
    if column_block * BLOCK_N >= outputs:
        return
    offset = tl.multiple_of(tl.load(entry_ptr), ALIGNMENT)
    stride = tl.multiple_of(tl.load(entry_ptr + 1), ALIGNMENT)
    inputs = tl.multiple_of(tl.load(entry_ptr + 3).to(tl.int32), ALIGNMENT)
    first = tl.load(entry_ptr + 4)
    bias = tl.load(entry_ptr + 5)
    is_row = slot < num_slots
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < outputs
    matrix_ptr = base_ptr + offset
    row = (slot // top_k if ROWS_ARE_TOKENS else slot).to(tl.int64)
    source_ptr = rows_ptr + row * rows_stride
    if HAS_INNER:
        if first != NONE:
            inner_rows_ptr = inner_ptr + slot.to(tl.int64) * inner_stride + tl.multiple_of(first, ALIGNMENT)
            total = _product(
                inner_rows_ptr,
                matrix_ptr,
                stride,
                inputs,
                is_row,
                is_column,
                column,
                LEFT_IS_TRANSPOSED,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
        else:
            total = _product(
                source_ptr, matrix_ptr, stride, inputs, is_row, is_column, column, False, BLOCK_M, BLOCK_N, BLOCK_K
            )
    else:
        total = _product(
            source_ptr, matrix_ptr, stride, inputs, is_row, is_column, column, False, BLOCK_M, BLOCK_N, BLOCK_K
        )
    if bias != NONE:
        total += tl.load(base_ptr + bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if HAS_WEIGHT:
        total *= tl.load(weight_ptr + slot, mask=is_row, other=0.0).to(tl.float32)[:, None]
    places = output_ptr + slot.to(tl.int64)[:, None] * output_stride + part * step + column[None, :]
    tl.store(places, total.to(output_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@dataclass(frozen=True)
class Tiles:
    """Rows, columns and depth of the blocks of one launch, its warps and the stages of its loads."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def bytes(self, itemsize: int) -> int:
        """Shared memory that a launch wants: each of its two loops over a matrix has loads of its own."""
        return 2 * (self.rows + self.columns) * self.depth * itemsize * self.stages


# By the rows that an expert gets on average, the fastest first, measured on one H200 by `benchmarks/ragged_tiles.py`;
# those after it want less shared memory.
_TILES = (
    (8, (Tiles(16, 32, 128, 2, 3), Tiles(16, 32, 64, 2, 3))),
    (32, (Tiles(16, 64, 64, 2, 3),)),
    (math.inf, (Tiles(128, 128, 64, 8, 3), Tiles(64, 64, 64, 4, 3))),
)
UNSORTED_SLOTS = 64
"""Slots up to which each is a block of rows of its own, which saves the launches that sort them."""


@dataclass(frozen=True)
class RoutedSlots:
    """The slots of a forward pass in blocks of rows, each of one expert.

    Args:
        index: (B * rows,) int32 slots by expert, each expert's padded to whole blocks with S; or, without `owner`,
            the (S,) experts.
        owner: (B,) expert of each block, -1 for none; None where every slot is a block.
        count: S.
        top_k: K.
        tiles: Of the launches.
    """

    index: torch.Tensor
    owner: torch.Tensor | None
    count: int
    top_k: int
    tiles: Tiles

    @property
    def blocks(self) -> int:
        """Number of blocks of rows (B)."""
        return self.count if self.owner is None else len(self.owner)


@cache
def tiles_for(rows: float, itemsize: int, device: torch.device) -> Tiles:
    """Tiles for a number of rows that experts get on average, which fit the shared memory of a device.

    Args:
        rows: Of an expert.
        itemsize: Bytes of a number.
        device: Where they run.
    """
    fastest_first = next(found for most, found in _TILES if rows <= most)
    if device.type != "cuda":
        return fastest_first[0]
    properties = torch.cuda.get_device_properties(device)
    memory = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    fitting = [tiles for tiles in fastest_first if tiles.bytes(itemsize) <= memory]
    tiles = fitting[0] if fitting else fastest_first[-1]
    while tiles.bytes(itemsize) > memory and tiles.depth > 16:
        tiles = replace(tiles, stages=tiles.stages - 1) if tiles.stages > 2 else replace(tiles, depth=tiles.depth // 2)
    return tiles


def routed_slots(
    index_TK: torch.Tensor, num_experts: int, dtype: torch.dtype, tiles: Tiles | None = None
) -> RoutedSlots:
    """Blocks of rows for the experts of all tokens.

    Args:
        index_TK: (T, K) experts; ids of `num_experts` and above stand for none.
        num_experts: E.
        dtype: Of inputs and weights.
        tiles: For any number of tokens; by default chosen by it.
    """
    slots, top_k = index_TK.numel(), index_TK.shape[1]
    if tiles is None:
        # Few different arguments, so that they are found in the cache.
        rows = next(most for most, _ in _TILES if slots <= most * num_experts)
        tiles = tiles_for(rows, dtype.itemsize, index_TK.device)
    if slots <= UNSORTED_SLOTS:
        return RoutedSlots(index_TK.reshape(-1).contiguous(), None, slots, top_k, tiles)
    padded, owner = sorted_slots(index_TK, num_experts, tiles.rows)
    return RoutedSlots(padded, owner, slots, top_k, tiles)


def sorted_slots(index_TK: torch.Tensor, num_experts: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots by expert, each expert's padded to whole blocks of rows, and the expert of each block (-1 for no block).

    Args:
        index_TK: (T, K) experts; ids of `num_experts` and above stand for none, which has blocks too.
        num_experts: E.
        height: Rows of a block.
    """
    expert_S = index_TK.reshape(-1).long().clamp(max=num_experts)
    slots, device = len(expert_S), expert_S.device
    sorted_S, order_S = torch.sort(expert_S, stable=True)
    ends_E = torch.searchsorted(sorted_S, torch.arange(num_experts + 1, device=device), right=True)
    starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    padded_ends_E = ((ends_E - starts_E + height - 1) // height * height).cumsum(0)
    padded_starts_E = torch.cat([padded_ends_E.new_zeros(1), padded_ends_E[:-1]])
    total = (min(slots, num_experts + 1) * (height - 1) + slots + height - 1) // height * height
    padded = torch.full((total,), slots, dtype=torch.int32, device=device)
    padded[padded_starts_E[sorted_S] + torch.arange(slots, device=device) - starts_E[sorted_S]] = order_S.int()
    owner = torch.searchsorted(padded_ends_E, torch.arange(0, total, height, device=device), right=True)
    return padded, torch.where(owner <= num_experts, owner, -1).int()


class RaggedMatmul:
    """The matrices of all experts of one block that run in one launch.

    Args:
        matrices_ZE: Z lists of the matrices of E experts.
        base: Any tensor in the memory of the device, of the dtype of all matrices; offsets count from it.
        none: What ids beyond the experts' give; by default nothing is written for them.
        left_is_transposed: Whether matrices with `first` lie as (X, O).
    """

    def __init__(
        self,
        matrices_ZE: Sequence[Sequence[RaggedMatrix]],
        base: torch.Tensor,
        none: RaggedMatrix | None = None,
        left_is_transposed: bool = False,
    ) -> None:
        self._base, self._left_is_transposed = base, left_is_transposed
        self._parts, self._num_experts = len(matrices_ZE), len(matrices_ZE[0])
        rows = [astuple(matrix) for own in matrices_ZE for matrix in [*own, none or RaggedMatrix()]]
        self._table = torch.tensor(
            [[_NONE if number is None else number for number in row] for row in rows],
            dtype=torch.int64,
            device=base.device,
        )
        known = [matrix for own in matrices_ZE for matrix in own]
        self.outputs = max(matrix.outputs for matrix in known)
        self._has_inner = any(matrix.first is not None for matrix in known)
        sizes = [n for m in known for n in (m.offset, m.stride, m.inputs, m.first or 0)]
        # Loads are as wide as the divisor that the compiler knows.
        self._alignment = 8 if base.data_ptr() % 16 == 0 and all(size % 8 == 0 for size in sizes) else 1

    @property
    def device(self) -> torch.device:
        """Where the table is."""
        return self._table.device

    @property
    def width(self) -> int:
        """Columns of the result for each of Z: the most outputs, padded to a multiple of 16."""
        return -(-max(self.outputs, 1) // 16) * 16

    def __call__(
        self,
        rows: torch.Tensor,
        slots: RoutedSlots,
        rows_are_tokens: bool,
        inner_SR: torch.Tensor | None = None,
        weights_TK: torch.Tensor | None = None,
        is_exact: bool = False,
    ) -> torch.Tensor:
        """(S, Z * width) products; columns beyond an expert's own outputs are not written.

        Args:
            rows: (T, X) or (S, X) inputs, each row contiguous.
            slots: Of this forward pass.
            rows_are_tokens: Whether `rows` has one row for each token instead of one for each slot.
            inner_SR: (S, R) inputs of the matrices that have `first`.
            weights_TK: (T, K) contiguous factors of the products.
            is_exact: Whether the result has no padded columns.
        """
        width, tiles = self.outputs if is_exact else self.width, slots.tiles
        output = rows.new_empty(slots.count, self._parts * width)
        if not self.outputs:
            return output
        inner = rows if inner_SR is None else inner_SR
        grid = (triton.cdiv(self.outputs, tiles.columns), slots.blocks, self._parts)
        ragged_matmul_kernel[grid](
            rows,
            inner,
            self._base,
            output,
            rows if weights_TK is None else weights_TK,
            self._table,
            slots.index,
            slots.index if slots.owner is None else slots.owner,
            slots.count,
            self._num_experts,
            rows.stride(0),
            inner.stride(0),
            output.stride(0),
            width,
            slots.top_k,
            NONE=_NONE,
            IS_SORTED=slots.owner is not None,
            ROWS_ARE_TOKENS=rows_are_tokens,
            HAS_INNER=self._has_inner,
            HAS_WEIGHT=weights_TK is not None,
            LEFT_IS_TRANSPOSED=self._left_is_transposed,
            ALIGNMENT=self._alignment,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.columns,
            BLOCK_K=tiles.depth,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return output
