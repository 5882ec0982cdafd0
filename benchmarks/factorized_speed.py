"""The rows of `layer_speed.py` for experts in compressed forms, beside what FLOPs and bytes predict.

Two blocks of one architecture with the same router and the same inputs, so that routing is equal: stock experts, and
experts in compressed forms with random factors, put in by the surgeon. `ratio` is the median over rounds of the time of
the compressed block by that of the stock one in the same round, in its faster implementation of `eager` and
`grouped_mm`. `predicted` is

    prefill (512 tokens)    multiply-adds of the routed (token, expert) pairs and of the router
    decode (8 and 1 tokens) bytes of the distinct experts that are hit and of the router

of the compressed block by those of the stock one; `quotient` = ratio / predicted, whose target is at most 1.25 (* marks
what misses it). `matmuls` is the same quotient for torch's bare matmuls with the factors of the experts that are hit,
on random inputs, without router, sorting, gate function, adding up or a single line of this package.

Rounds take turns among inputs. A round of one-token decode is eight tokens after each other, as in a model, where
layers of one kind follow each other; else the compressed block would pay for caches that the stock one before it has
emptied.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from optimum_moe.algorithms.factors import MatrixFactors
from optimum_moe.formats import PROJECTIONS, ExpertsSpec, StoredExpert, StoredExperts, StoredMatrix
from optimum_moe.formats.low_rank import low_rank_matrix
from optimum_moe.formats.sparse_rows import sparse_rows_part
from optimum_moe.formats.stored import stored_matrix
from optimum_moe.plan import keep_all

INPUTS, FEWEST_ROUNDS, PREFILL, TOKENS_A_ROUND = 3, 7, 64, 8
RATIO, STEP, TARGET = 0.25, 8, 1.25

Clock: TypeAlias = Callable[[], float]
NOTES = """
What keeps the quotient from 1.0. Where `matmuls` is above 1, torch's matmuls themselves: on these CPUs a call costs
some 10 us (float32) or 45 us (bfloat16) whatever its size, a factored matrix takes two calls instead of one, and rank
32 is too narrow for full speed in prefill. Beyond `matmuls`: the router, gathering, the gate function, adding up and
the columns of sparse rows, which no prediction counts. They take about as long as in the stock block (`wide`, float32,
512 tokens: 7 to 25 ms of the compressed block, 23 ms of the stock one), so that their share grows as experts shrink."""


@dataclass(frozen=True)
class Form:
    """How the experts of a block are kept."""

    name: str
    sizes: ExpertsSpec


def uniform(layer: Any, rank: int, density: float) -> ExpertsSpec:
    """Every matrix at one rank with the same share of its rows."""
    count, width, hidden = layer.num_experts, layer.intermediate, layer.hidden
    rows = {"gate": (int(density * width),), "up": (int(density * width),), "down": (int(density * hidden),)}
    parts = {"low_rank": dict.fromkeys(PROJECTIONS, (rank,) * count)}
    if density:
        parts["sparse_rows"] = {name: values * count for name, values in rows.items()}
    return ExpertsSpec((width,) * count, PROJECTIONS, parts)


def mixed(layer: Any) -> ExpertsSpec:
    """What a byte budget gives: dense, narrower and empty experts among others, whose matrices have ranks of their own.

    Ranks are multiples of 8 up to about half of the matrix's bytes; widths are multiples of 8.
    """
    draw = random.Random(0)
    most = layer.hidden * layer.intermediate // (layer.hidden + layer.intermediate) // 2
    widths: list[int] = []
    ranks: dict[str, list[int | None]] = {"gate": [], "up": [], "down": []}
    for expert in range(layer.num_experts):
        kind = ("dense", "empty", "narrower", "narrower", "narrower, rank", "rank", "rank", "rank")[expert % 8]
        shares = {"dense": 1.0, "empty": 0.0, "rank": 1.0}
        width = int(shares.get(kind, draw.uniform(0.1, 0.5)) * layer.intermediate) // STEP * STEP
        widths.append(width)
        for values in ranks.values():
            limit = min(most, width // 2)
            values.append(draw.randrange(STEP, limit + 1, STEP) if "rank" in kind else None)
    parts = {"low_rank": {name: tuple(values) for name, values in ranks.items()}}
    return ExpertsSpec(tuple(widths), PROJECTIONS, parts)


def forms(layer: Any) -> Iterator[Form]:
    """The forms to time."""
    quarter = int(RATIO * layer.hidden * layer.intermediate / (layer.hidden + layer.intermediate)) // STEP * STEP
    for rank in (quarter, 32):
        for density in (0.0, 0.1):
            yield Form(f"rank {rank}, density {density:g}", uniform(layer, rank, density))
    yield Form("mixture", mixed(layer))


def random_factors(sizes: ExpertsSpec, hidden: int, dtype: torch.dtype) -> StoredExperts:
    """Random numbers in these sizes."""

    def normal(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape)).to(dtype)

    def matrix(name: str, expert: int) -> StoredMatrix:
        width, parts = sizes.widths[expert], sizes.sizes_of(name, expert)
        outputs, inputs = (hidden, width) if name == "down" else (width, hidden)
        if "dense" in parts:
            return stored_matrix(normal(outputs, inputs))
        rows = parts.get("sparse_rows", 0)
        index = torch.randperm(outputs)[:rows].sort().values
        sparse = [sparse_rows_part(index, normal(rows, inputs))] if rows else []
        factors = MatrixFactors(normal(parts["low_rank"], outputs), normal(parts["low_rank"], inputs))
        return low_rank_matrix(factors, *sparse)

    def expert_of(number: int) -> StoredExpert:
        made = {name: matrix(name, number) for name in sizes.projections}
        return StoredExpert(made["up"], made["down"], made.get("gate"), torch.arange(sizes.widths[number]))

    return StoredExperts(tuple(expert_of(number) for number in range(len(sizes.widths))))


def compressed_block(block: nn.Module, surgeon: Any, factors: StoredExperts, layer: Any) -> nn.Module:
    """A block with the same router and random experts in compressed forms, made by the surgeon."""
    experts = block.experts
    block.experts = None
    made = copy.deepcopy(block)
    block.experts = experts
    with torch.device("meta"):
        made.experts = type(experts)(experts.config)
    for name, stacked in experts.named_parameters(recurse=False):
        # The surgeon reads shapes and dtype only, and then drops them.
        made.experts._parameters[name] = nn.Parameter(stacked.detach(), requires_grad=False)
    surgeon.carry_out(made, replace(keep_all("block", layer.num_experts), factors=factors))
    return made.eval().requires_grad_(False)


def predicted(layer: Any, sizes: ExpertsSpec, indices: Sequence[torch.Tensor], prefill: bool) -> float:
    """Ratio of the multiply-adds, or of the bytes, of the compressed block to those of the stock one."""
    dense, router = 3 * layer.hidden * layer.intermediate, layer.hidden * layer.num_experts
    above = below = 0
    for index_TK in indices:
        hit = index_TK.flatten().tolist() if prefill else index_TK.unique().tolist()
        routers = router * (len(index_TK) if prefill else 1)
        each = sizes.multiply_adds if prefill else sizes.numbers
        above += routers + sum(each(expert, layer.hidden) for expert in hit)
        below += routers + dense * len(hit)
    return above / below


class Matmuls:
    """The bare matmuls with the factors of the experts that each input hits.

    Args:
        factors: Of all experts.
        routing: For each input the (T, K) experts of its tokens.
    """

    def __init__(self, factors: StoredExperts, routing: Mapping[torch.Tensor, torch.Tensor]) -> None:
        self.jobs: dict[torch.Tensor, list[tuple[torch.Tensor, StoredMatrix]]] = {}
        for input_1TH, index_TK in routing.items():
            hit, counts = index_TK.unique(return_counts=True)
            self.jobs[input_1TH] = [
                (torch.randn(count, matrix.shape[1], dtype=input_1TH.dtype), matrix)
                for expert, count in zip(hit.tolist(), counts.tolist(), strict=True)
                for matrix in factors.experts[expert].matrices.values()
                if matrix.shape[0] and matrix.shape[1]
            ]

    def __call__(self, input_1TH: torch.Tensor) -> None:
        """Run them for one of the inputs."""
        for input_PX, matrix in self.jobs[input_1TH]:
            tensors = matrix.tensors
            if matrix.is_dense:
                nn.functional.linear(input_PX, matrix.densified())
                continue
            nn.functional.linear(input_PX, tensors["v"]) @ tensors["u"]
            if "rows" in tensors:
                nn.functional.linear(input_PX, tensors["rows"])


@torch.no_grad()
def measure(
    stock: Any,
    made: Any,
    matmuls: Matmuls,
    inputs: list[list[torch.Tensor]],
    repeats: int,
    limit: float,
    clock: Clock,
) -> tuple[dict[str, list[float]], list[int]]:
    """Seconds in every round, by block and implementation, and which inputs the round had."""
    runs = {"eager": stock, "grouped_mm": stock, "compressed": made, "matmuls": matmuls}
    config, names = stock.experts.config, list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    turns: list[int] = []

    def once(name: str, which: int) -> float:
        config._experts_implementation = "eager" if name == "eager" else "grouped_mm"
        start = clock()
        for input_1TH in inputs[which]:
            runs[name](input_1TH)
        return clock() - start

    for name in names:
        once(name, 0)
    rounds = max(FEWEST_ROUNDS, min(repeats, int(limit / sum(once(name, 0) for name in names))))
    for number in range(rounds):
        random.shuffle(names)
        turns.append(number % len(inputs))
        for name in names:
            seconds[name].append(once(name, turns[-1]))
    return seconds, turns


def run_compressed(name: str, layer: Any, stock: Any, surgeon: Any, args: argparse.Namespace, clock: Clock) -> None:
    """Print the rows of one layer."""
    dtype = stock.gate.weight.dtype
    print(
        f"\n{name} in compressed forms: {layer.num_experts} experts, top-{layer.top_k}, hidden {layer.hidden}, "
        f"intermediate {layer.intermediate}, {dtype}\n"
        f"{'form':<24}{'tokens':>7} |{'stock ms':>10} {'(fastest)':<11}{'compressed ms':>14} |{'ratio':>7}"
        f"{'predicted':>10}{'quotient':>9} {'matmuls':>8}"
    )
    for form in forms(layer):
        factors = random_factors(form.sizes, layer.hidden, dtype)
        made = compressed_block(stock, surgeon, factors, layer)
        assert made.experts.factors.sizes == form.sizes
        for tokens in args.tokens:
            calls = max(1, TOKENS_A_ROUND // tokens)
            inputs = [[torch.randn(1, tokens, layer.hidden).to(dtype) for _ in range(calls)] for _ in range(INPUTS)]
            routing = {input_1TH: stock.gate(input_1TH[0])[2] for group in inputs for input_1TH in group}
            matmuls = Matmuls(factors, routing)
            seconds, turns = measure(stock, made, matmuls, inputs, args.repeats, args.seconds, clock)
            median = {key: statistics.median(values) for key, values in seconds.items()}
            fastest = min(("eager", "grouped_mm"), key=median.__getitem__)
            expected = [predicted(layer, form.sizes, [routing[i] for i in g], tokens >= PREFILL) for g in inputs]
            ratios = [a / b for a, b in zip(seconds["compressed"], seconds[fastest], strict=True)]
            bare = [a / b for a, b in zip(seconds["matmuls"], seconds[fastest], strict=True)]
            quotient, floor = (
                statistics.median(ratio / expected[turn] for ratio, turn in zip(values, turns, strict=True))
                for values in (ratios, bare)
            )
            print(
                f"{form.name:<24}{tokens:>7} |{1e3 * median[fastest] / calls:>10.3f} {fastest:<11}"
                f"{1e3 * median['compressed'] / calls:>14.3f} |{statistics.median(ratios):>7.3f}"
                f"{statistics.median(expected):>10.3f}{quotient:>9.2f}{'*' if quotient > TARGET else ' '}{floor:>8.2f}",
                flush=True,
            )
        del made
