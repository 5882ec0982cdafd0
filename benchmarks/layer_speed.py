"""Wall time of a merged MoE block beside the original block and beside a stock block with as few experts.

Three blocks of one architecture, built by transformers and run with the same experts implementation:

    original   N experts, router with N rows, top-k
    merged     the same block cut by its surgeon to G experts, routing "map": MappedRouter + MergedExpertLayer
    stock      an uncut block with G experts (the merged weights), router with G rows, top-D

All see the same tokens. The routers' rows are orthonormal and the tokens are built from them, so that every router
selects exactly what is planned: each token's k experts lie in exactly D groups, and the stock router selects those D
groups. Hence merged and stock compute the same distinct (token, expert) pairs, and

    overhead = time(merged) / time(stock) - 1

is the price of the N-row router, of the map and of telling repeats apart; `speed-up` is time(original) / time(merged).
D = k means that nothing repeats, D < k that k - D of a token's slots are repeats with weight 0; the D of random routing
is printed. `batched_mm` is left out where the weights that it copies would not fit into --gather-gib.

The three blocks are timed in turns, in a random order; the figures are medians of times and medians of the ratios
within one turn, for these machines are noisy. The last column is the same ratio for stock against itself, a second
block with the same weights: what it differs from 0 is noise.

Below them experts in compressed forms are timed beside dense ones: see factorized_speed.py.

    python benchmarks/layer_speed.py [--threads 2] [--dtype float32] [--repeats 300] [--seconds 20]
    python benchmarks/layer_speed.py --layers --threads 1 --clock cpu --seconds 5     # compressed forms only
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from factorized_speed import NOTES, run_compressed
from torch import nn

from optimum_moe.plan import BlockPlan
from optimum_moe.surgeons import find_blocks

NOISE_SCALE, MARGIN, FEWEST_ROUNDS = 0.02, 4.0, 9


@dataclass(frozen=True)
class Layer:
    """Sizes of one block."""

    family: str
    config: str
    num_experts: int
    top_k: int
    num_groups: int
    hidden: int
    intermediate: int
    distinct: tuple[int, ...]


LAYERS = {
    "qwen3_moe": Layer("Qwen3MoeForCausalLM", "Qwen3MoeConfig", 64, 8, 16, 1024, 768, (8, 4)),
    "mixtral": Layer("MixtralForCausalLM", "MixtralConfig", 8, 2, 4, 1024, 3584, (2, 1)),
}
COMPRESSED = {
    "wide": (Layer("Qwen3MoeForCausalLM", "Qwen3MoeConfig", 32, 4, 32, 2048, 1024, ()), ("float32", "bfloat16")),
    "qwen3_moe": (LAYERS["qwen3_moe"], ("float32",)),
    "mixtral": (LAYERS["mixtral"], ("float32",)),
}
"""Layers whose experts are timed in compressed forms, and in which dtypes."""
BOUNDS = """
What bounds the speed-up: one token costs the reading of its D experts' weights, so only D < k makes it cheaper; a few
tokens that of all distinct experts of the batch, at most G instead of N; many tokens the multiply-adds of the distinct
(token, expert) pairs, k / D times fewer, and the rows of an expert's matmul, N / G times more. What bounds the
overhead: a dozen small operations, whatever the size of the experts."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def build_block(layer: Layer, num_experts: int, top_k: int, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """The MoE block of a one-layer model, and its surgeon."""
    config = getattr(transformers, layer.config)(
        vocab_size=8,
        hidden_size=layer.hidden,
        intermediate_size=layer.intermediate,
        moe_intermediate_size=layer.intermediate,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
    )
    model = getattr(transformers, layer.family)(config).to(dtype).eval().requires_grad_(False)
    found = find_blocks(model)[0]
    return found.module(model), found.surgeon


def cut_block(block: nn.Module, surgeon: Any, layer: Layer) -> None:
    """Merge expert e into group e % G."""
    labels = tuple(e % layer.num_groups for e in range(layer.num_experts))
    weights = torch.full((layer.num_experts,), layer.num_groups / layer.num_experts, dtype=torch.float64)
    surgeon.cut(block, BlockPlan("block", labels, tuple(range(layer.num_groups)), "map", weights))


@dataclass
class Case:
    """The blocks to time, by name, and their common input."""

    blocks: dict[str, Any]
    input_1TH: torch.Tensor


def planned_experts(layer: Layer, distinct: int, tokens: int) -> torch.Tensor:
    """(T, k) experts of each token, in exactly `distinct` groups, the first `distinct` slots in different ones."""
    members = layer.num_experts // layer.num_groups
    groups_TD = torch.rand(tokens, layer.num_groups).argsort(-1)[:, :distinct]
    turns_TGM = torch.rand(tokens, distinct, members).argsort(-1)
    experts_TMD = (groups_TD.unsqueeze(-1) + layer.num_groups * turns_TGM).transpose(1, 2)
    return experts_TMD.reshape(tokens, -1)[:, : layer.top_k]


def build_case(layer: Layer, distinct: int, tokens: int, dtype: torch.dtype, blocks: dict[str, Any]) -> Case:
    """Tokens on which every router selects what is planned; checked on the routers themselves."""
    experts_TK = planned_experts(layer, distinct, tokens)
    rows = [blocks[name].gate.weight.float() for name in ("original", "stock")]
    wanted = [experts_TK, experts_TK[:, :distinct] % layer.num_groups]
    hidden_TH = NOISE_SCALE * torch.randn(tokens, layer.hidden)
    for row_EH, index_TK in zip(rows, wanted, strict=True):
        logits_TE = torch.zeros(tokens, len(row_EH)).scatter(1, index_TK, MARGIN)
        hidden_TH += (logits_TE + 0.1 * torch.randn_like(logits_TE)) @ row_EH
    hidden_TH = hidden_TH.to(dtype)
    selected = {name: block.gate(hidden_TH)[2].sort(-1).values for name, block in blocks.items()}
    assert torch.equal(selected["original"], experts_TK.sort(-1).values)
    for token in range(tokens):
        assert selected["merged"][token].unique().tolist() == selected["stock"][token].tolist()
    return Case(blocks, hidden_TH.unsqueeze(0))


def build_blocks(layer: Layer, dtype: torch.dtype, distinct: int) -> dict[str, Any]:
    """The three blocks and the control, with orthonormal router rows."""
    rows_EH = torch.linalg.qr(torch.randn(layer.hidden, layer.num_experts + layer.num_groups))[0].T
    rows_NH, rows_GH = rows_EH.split([layer.num_experts, layer.num_groups])
    blocks: dict[str, Any] = {}
    for name in ("original", "merged"):
        torch.manual_seed(1)
        blocks[name], surgeon = build_block(layer, layer.num_experts, layer.top_k, dtype)
        blocks[name].gate.weight.copy_(rows_NH)
    cut_block(blocks["merged"], surgeon, layer)
    for name in ("stock", "control"):
        blocks[name], _ = build_block(layer, layer.num_groups, distinct, dtype)
        blocks[name].experts.load_state_dict(blocks["merged"].experts.state_dict())
        blocks[name].gate.weight.copy_(rows_GH)
    return blocks


@torch.no_grad()
def measure(case: Case, implementation: str, repeats: int, limit: float) -> dict[str, list[float]]:
    """Seconds of every block in every round, in random order: what ran before decides what the caches hold."""
    names = list(case.blocks)
    for block in case.blocks.values():
        block.experts.config._experts_implementation = implementation
        block(case.input_1TH)
    start = time.perf_counter()
    for block in case.blocks.values():
        block(case.input_1TH)
    rounds = max(FEWEST_ROUNDS, min(repeats, int(limit / (time.perf_counter() - start))))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            block = case.blocks[name]
            start = time.perf_counter()
            block(case.input_1TH)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def paired_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def gathered_gib(layer: Layer, tokens: int, dtype: torch.dtype) -> float:
    """Weights that `batched_mm` copies together for one projection."""
    return tokens * layer.top_k * 2 * layer.intermediate * layer.hidden * dtype.itemsize / 2**30


def run_layer(name: str, layer: Layer, args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype)
    random_TK = torch.rand(4096, layer.num_experts).argsort(-1)[:, : layer.top_k] % layer.num_groups
    random_distinct = sum(len(row.unique()) for row in random_TK) / len(random_TK)
    print(
        f"\n{name}: N={layer.num_experts} top-{layer.top_k} -> G={layer.num_groups}, hidden {layer.hidden}, "
        f"intermediate {layer.intermediate}; random routing hits D={random_distinct:.2f} groups a token"
    )
    print(
        f"{'implementation':<15}{'tokens':>7}{'k':>3}{'D':>3} |{'original ms':>12}{'stock ms':>10}{'merged ms':>11} |"
        f"{'overhead':>9}{'speed-up':>9} |{'control':>8}"
    )
    for distinct in args.distinct or layer.distinct:
        blocks = build_blocks(layer, dtype, distinct)
        for tokens in args.tokens:
            case = build_case(layer, distinct, tokens, dtype, blocks)
            for implementation in args.implementations:
                if implementation == "batched_mm" and gathered_gib(layer, tokens, dtype) > args.gather_gib:
                    continue
                seconds = measure(case, implementation, args.repeats, args.seconds)
                median = {key: 1e3 * statistics.median(values) for key, values in seconds.items()}
                print(
                    f"{implementation:<15}{tokens:>7}{layer.top_k:>3}{distinct:>3} |{median['original']:>12.3f}"
                    f"{median['stock']:>10.3f}{median['merged']:>11.3f} |"
                    f"{paired_ratio(seconds['merged'], seconds['stock']) - 1:>9.1%}"
                    f"{paired_ratio(seconds['original'], seconds['merged']):>8.2f}x |"
                    f"{paired_ratio(seconds['control'], seconds['stock']) - 1:>8.1%}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=300, help="most rounds of a line")
    parser.add_argument("--seconds", type=float, default=20.0, help="most seconds of a line, but for the fewest rounds")
    parser.add_argument("--layers", nargs="*", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--compressed", nargs="*", choices=list(COMPRESSED), default=list(COMPRESSED))
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: of compressed forms, where others use the machine"
    )
    parser.add_argument("--implementations", nargs="+", default=["eager", "grouped_mm", "batched_mm"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1, 8], help="512 is prefill, 1 and 8 decode")
    parser.add_argument("--distinct", nargs="+", type=int, help="groups that a token's experts lie in (D)")
    parser.add_argument("--gather-gib", type=float, default=1.0, help="limit for what batched_mm copies together")
    for size in ("num-experts", "top-k", "num-groups", "hidden", "intermediate"):
        parser.add_argument(f"--{size}", type=int, help="instead of the layer's own")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    print(f"{args.threads} threads, {args.dtype}, torch {torch.__version__}, transformers {transformers.__version__}")
    for name in args.layers:
        sizes = ("num_experts", "top_k", "num_groups", "hidden", "intermediate")
        given = {size: getattr(args, size) for size in sizes if getattr(args, size) is not None}
        layer = Layer(**(vars(LAYERS[name]) | given))
        run_layer(name, layer, args)
    if args.layers:
        print(BOUNDS)
    for name in args.compressed:
        layer, dtypes = COMPRESSED[name]
        for dtype in dtypes:
            run_compressed(name, layer, *random_block(layer, getattr(torch, dtype)), args, CLOCKS[args.clock])
    print(NOTES)


@torch.no_grad()
def random_block(layer: Layer, dtype: torch.dtype) -> tuple[Any, Any]:
    """A stock block with random numbers, and its surgeon."""
    block, surgeon = build_block(layer, layer.num_experts, layer.top_k, dtype)
    for parameter in block.parameters():
        parameter.normal_(0, 0.02)
    return block, surgeon


if __name__ == "__main__":
    main()
