"""Experts of any width and rank in one grouped matmul: a Triton kernel beside torch's, on a GPU.

    python benchmarks/ragged_experts.py [--hidden 2048] [--width 768] [--experts 128] [--top-k 8]

All matrices of a block lie in one flat buffer; tables on the device say where each expert's lie, its width and rank.
Two launches (three where gate and up have a common right factor) serve any mixture, every shape is known on the host
and nothing is read back, so that the layer can be captured in a CUDA graph. `sorted_pairs` gives every expert's pairs
rows of their own, padded to the height of a block.

Beside it torch's `grouped_mm` on dense experts of the full width, as the stock layer runs them. Times are medians of
single runs, and of replays of a CUDA graph. The error is that of the norm against float64.
Needs a GPU and Triton; TRITON_INTERPRET=1 runs tiny sizes on a CPU for the error alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl


@triton.jit
def gate_up_kernel(
    input_ptr,
    weight_ptr,
    output_ptr,
    slot_ptr,
    owner_ptr,
    offset_ptr,
    width_ptr,
    inputs_ptr,
    num_slots,
    input_stride,
    output_stride,
    top_k,
    ROWS_ARE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """silu(x Wg^T) * (x Wu^T) of every pair; an expert's Wu (n, k) follows its Wg (n, k), both row-major."""
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(owner_ptr + row_block)
    if expert < 0:
        return
    width = tl.load(width_ptr + expert)
    if column_block * BLOCK_N >= width:
        return
    # Loads are as wide as the divisor that the compiler knows.
    inputs = tl.multiple_of(tl.load(inputs_ptr + expert), 8)
    offset = tl.multiple_of(tl.load(offset_ptr + expert), 8)
    slot = tl.load(slot_ptr + row_block * BLOCK_M + tl.arange(0, BLOCK_M))
    live = slot < num_slots
    row = (slot // top_k if ROWS_ARE_TOKENS else slot).to(tl.int64)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_column = column < width
    x_ptr = input_ptr + row[:, None] * input_stride + k[None, :]
    gate_ptr = weight_ptr + offset + column[None, :] * inputs + k[:, None]
    up_ptr = gate_ptr + width * inputs
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        is_k = k + start < inputs
        x = tl.load(x_ptr + start, mask=live[:, None] & is_k[None, :], other=0.0)
        mask = is_column[None, :] & is_k[:, None]
        gate += tl.dot(x, tl.load(gate_ptr + start, mask=mask, other=0.0))
        up += tl.dot(x, tl.load(up_ptr + start, mask=mask, other=0.0))
    hidden = gate * tl.sigmoid(gate) * up
    out_ptr = output_ptr + slot.to(tl.int64)[:, None] * output_stride + column[None, :]
    tl.store(out_ptr, hidden.to(output_ptr.dtype.element_ty), mask=live[:, None] & is_column[None, :])


@triton.jit
def matmul_kernel(
    input_ptr,
    weight_ptr,
    output_ptr,
    scale_ptr,
    slot_ptr,
    owner_ptr,
    offset_ptr,
    width_ptr,
    inputs_ptr,
    num_slots,
    input_stride,
    output_stride,
    top_k,
    ROWS_ARE_TOKENS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x W^T of every pair, times its routing weight where SCALED; W (n, k) row-major."""
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    expert = tl.load(owner_ptr + row_block)
    if expert < 0:
        return
    width = tl.load(width_ptr + expert)
    if column_block * BLOCK_N >= width:
        return
    inputs = tl.multiple_of(tl.load(inputs_ptr + expert), 8)
    offset = tl.multiple_of(tl.load(offset_ptr + expert), 8)
    slot = tl.load(slot_ptr + row_block * BLOCK_M + tl.arange(0, BLOCK_M))
    live = slot < num_slots
    row = (slot // top_k if ROWS_ARE_TOKENS else slot).to(tl.int64)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_column = column < width
    x_ptr = input_ptr + row[:, None] * input_stride + k[None, :]
    w_ptr = weight_ptr + offset + column[None, :] * inputs + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        is_k = k + start < inputs
        x = tl.load(x_ptr + start, mask=live[:, None] & is_k[None, :], other=0.0)
        w = tl.load(w_ptr + start, mask=is_column[None, :] & is_k[:, None], other=0.0)
        total += tl.dot(x, w)
    if SCALED:
        total = total * tl.load(scale_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
    out_ptr = output_ptr + slot.to(tl.int64)[:, None] * output_stride + column[None, :]
    tl.store(out_ptr, total.to(output_ptr.dtype.element_ty), mask=live[:, None] & is_column[None, :])


def sorted_pairs(index_TK: torch.Tensor, num_experts: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (slots) by expert, each expert's padded to whole blocks, and the expert of each block (-1 for none)."""
    expert_S = index_TK.reshape(-1).long()
    slots, device = len(expert_S), expert_S.device
    order_S = torch.argsort(expert_S, stable=True)
    sorted_S = expert_S[order_S]
    ends_E = torch.searchsorted(sorted_S, torch.arange(num_experts, device=device), right=True)
    starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    padded_ends_E = ((ends_E - starts_E + height - 1) // height * height).cumsum(0)
    padded_starts_E = torch.cat([padded_ends_E.new_zeros(1), padded_ends_E[:-1]])
    total = (min(slots, num_experts) * (height - 1) + slots + height - 1) // height * height
    padded = torch.full((total,), slots, dtype=torch.int32, device=device)
    padded[padded_starts_E[sorted_S] + torch.arange(slots, device=device) - starts_E[sorted_S]] = order_S.int()
    owner = torch.searchsorted(padded_ends_E, torch.arange(0, total, height, device=device), right=True)
    return padded, torch.where(owner < num_experts, owner, -1).int()


@dataclass(frozen=True)
class Tiles:
    """Block sizes of the launches: rows, columns and depth of gate and up, columns and depth of the others."""

    rows: int
    columns: int
    depth: int
    other_columns: int
    other_depth: int
    warps: int
    stages: int


class RaggedExperts:
    """Random experts of given widths and ranks (0: gate and up are dense) in one buffer."""

    def __init__(
        self, hidden: int, widths: Sequence[int], ranks: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.hidden, self.widths, self.ranks = hidden, widths, ranks
        at, offsets = 0, {"right": [], "gate_up": [], "down": []}
        for width, rank in zip(widths, ranks, strict=True):
            for name, numbers in (
                ("right", rank * hidden),
                ("gate_up", 2 * width * (rank or hidden)),
                ("down", hidden * width),
            ):
                offsets[name].append(at)
                at += numbers
        self.flat = torch.empty(at, device=device, dtype=dtype).normal_(0, 0.03)
        self.offsets = offsets
        self.tables = {n: torch.tensor(v, dtype=torch.int64, device=device) for n, v in offsets.items()}
        counts = {"width": widths, "rank": ranks, "hidden": [hidden] * len(widths)}
        self.tables |= {n: torch.tensor(v, dtype=torch.int32, device=device) for n, v in counts.items()}

    def __call__(
        self, input_TH: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor, tiles: Tiles
    ) -> torch.Tensor:
        """(T, H) weighted sum of the selected experts."""
        (tokens, top_k), table = index_TK.shape, self.tables
        slots, most, rank = tokens * top_k, max(self.widths), max(self.ranks)
        pairs, owner = sorted_pairs(index_TK, len(self.widths), tiles.rows)
        launch = {"num_warps": tiles.warps, "num_stages": tiles.stages}
        other = tiles.rows, tiles.other_columns, tiles.other_depth

        def columns(count: int, width: int) -> tuple[int, int]:
            return triton.cdiv(count, width), len(owner)

        entering, inputs, of_tokens = input_TH, table["hidden"], True
        if rank:
            entering, inputs, of_tokens = input_TH.new_empty(slots, rank), table["rank"], False
            matmul_kernel[columns(rank, tiles.other_columns)](
                input_TH,
                self.flat,
                entering,
                weights_TK,
                pairs,
                owner,
                table["right"],
                table["rank"],
                table["hidden"],
                slots,
                self.hidden,
                rank,
                top_k,
                True,
                False,
                *other,
                **launch,
            )
        hidden_Sn = input_TH.new_empty(slots, most)
        gate_up_kernel[columns(most, tiles.columns)](
            entering,
            self.flat,
            hidden_Sn,
            pairs,
            owner,
            table["gate_up"],
            table["width"],
            inputs,
            slots,
            entering.shape[1],
            most,
            top_k,
            of_tokens,
            tiles.rows,
            tiles.columns,
            tiles.depth,
            **launch,
        )
        output_SH = input_TH.new_empty(slots, self.hidden)
        matmul_kernel[columns(self.hidden, tiles.other_columns)](
            hidden_Sn,
            self.flat,
            output_SH,
            weights_TK,
            pairs,
            owner,
            table["down"],
            table["hidden"],
            table["width"],
            slots,
            most,
            self.hidden,
            top_k,
            False,
            True,
            *other,
            **launch,
        )
        return output_SH.view(tokens, top_k, -1).sum(1, dtype=torch.float32).to(input_TH.dtype)

    def reference(self, input_TH: torch.Tensor, weights_TK: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """The same in float64, expert by expert."""
        output_TH, flat = torch.zeros_like(input_TH, dtype=torch.float64), self.flat.double()

        def matrix(name: str, expert: int, rows: int, columns: int) -> torch.Tensor:
            return flat[self.offsets[name][expert] :][: rows * columns].view(rows, columns)

        for expert, (width, rank) in enumerate(zip(self.widths, self.ranks, strict=True)):
            token_P, slot_P = (index_TK == expert).nonzero(as_tuple=True)
            input_PX = input_TH[token_P].double()
            if rank:
                input_PX = input_PX @ matrix("right", expert, rank, self.hidden).T
            gate_Pn, up_Pn = (input_PX @ matrix("gate_up", expert, 2 * width, rank or self.hidden).T).chunk(2, -1)
            output_PH = torch.nn.functional.silu(gate_Pn) * up_Pn @ matrix("down", expert, self.hidden, width).T
            output_TH.index_add_(0, token_P, output_PH * weights_TK[token_P, slot_P, None].double())
        return output_TH


def stock(
    gate_up_EIH: torch.Tensor,
    down_EHI: torch.Tensor,
    input_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    index_TK: torch.Tensor,
) -> torch.Tensor:
    """Dense experts through `grouped_mm`, as transformers runs them."""
    tokens, top_k = index_TK.shape
    expert_S, order_S = torch.sort(index_TK.reshape(-1), stable=True)
    every_E = torch.arange(len(down_EHI), device=expert_S.device)
    ends_E = torch.searchsorted(expert_S, every_E, right=True, out_int32=True)
    grouped_mm = torch.nn.functional.grouped_mm
    gate_SI, up_SI = grouped_mm(input_TH[order_S // top_k], gate_up_EIH.transpose(1, 2), offs=ends_E).chunk(2, -1)
    output_SH = grouped_mm(torch.nn.functional.silu(gate_SI) * up_SI, down_EHI.transpose(1, 2), offs=ends_E)
    output_SH = output_SH * weights_TK.reshape(-1)[order_S, None]
    back_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    return output_SH[back_S].view(tokens, top_k, -1).sum(1)


def milliseconds(run: Callable[[], object]) -> float:
    times = []
    for step in range(23):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times += [time.perf_counter() - start] if step > 2 else []
    return 1e3 * statistics.median(times)


def report(label: str, tokens: int, run: Callable[[], torch.Tensor], expected: torch.Tensor | None, size: int) -> None:
    found = run()
    error = "" if expected is None else f"{float((found.double() - expected).norm() / expected.norm()):.1e}"
    if not found.is_cuda:
        print(f"{label:<34}{tokens:>7}{error:>10}")
        return
    alone = milliseconds(run)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    print(
        f"{label:<34}{tokens:>7}{error:>10}{alone:>10.3f}{milliseconds(graph.replay):>10.3f}{size / 1e6:>9.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    for name, size in (("hidden", 2048), ("width", 768), ("experts", 128), ("top-k", 8)):
        parser.add_argument(f"--{name}", type=int, default=size if on_gpu else size // 32 + 2 * (name == "top-k"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 4096] if on_gpu else [5])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    hidden, width, experts, top_k = arguments.hidden, arguments.width, arguments.experts, arguments.top_k
    draw = random.Random(0)
    forms = {
        "dense": ([width] * experts, [0] * experts),
        "widths of all kinds": ([draw.randrange(8, width + 1, 8) for _ in range(experts)], [0] * experts),
        "widths and ranks of all kinds": (
            [draw.randrange(16, width + 1, 8) for _ in range(experts)],
            [draw.randrange(8, width // 2 + 1, 8) for _ in range(experts)],
        ),
    }
    few, many = Tiles(16, 32, 64, 64, 64, 4, 5), Tiles(128, 128, 64, 128, 64, 8, 3)
    print(torch.cuda.get_device_name() if on_gpu else "CPU", f"torch {torch.__version__}, triton {triton.__version__}")
    print(f"{experts} experts, hidden {hidden}, width {width}, top-{top_k}, {dtype}")
    print(f"{'form':<34}{'tokens':>7}{'error':>10}{'ms':>10}{'graph ms':>10}{'MB':>9}")
    for tokens in arguments.tokens:
        input_TH = torch.randn(tokens, hidden, device=device, dtype=dtype)
        index_TK = torch.rand(tokens, experts, device=device).argsort(-1)[:, :top_k]
        weights_TK = torch.rand(tokens, top_k, device=device, dtype=dtype)
        if on_gpu:
            gate_up_EIH = torch.randn(experts, 2 * width, hidden, device=device, dtype=dtype) * 0.03
            down_EHI = torch.randn(experts, hidden, width, device=device, dtype=dtype) * 0.03
            size = (gate_up_EIH.numel() + down_EHI.numel()) * dtype.itemsize
            routed = input_TH, weights_TK, index_TK
            report("stock: dense, grouped_mm", tokens, partial(stock, gate_up_EIH, down_EHI, *routed), None, size)
            del gate_up_EIH, down_EHI
        for name, (widths, ranks) in forms.items():
            made = RaggedExperts(hidden, widths, ranks, device, dtype)
            routed = input_TH, weights_TK, index_TK
            expected = made.reference(*routed)
            tiles = (few if tokens <= 64 else many) if on_gpu else Tiles(16, 16, 16, 16, 16, 4, 2)
            size = made.flat.numel() * dtype.itemsize
            report(name, tokens, partial(made, *routed, tiles), expected, size)


if __name__ == "__main__":
    main()
