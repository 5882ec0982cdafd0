"""CPU seconds that a byte budget takes for an expert of a block: its candidates, and the choice among them.

The experts of one block, of three kinds: random weights; random weights whose singular values decay; and neurons of
SmolLM2-135M's feed-forward layers, 768 a piece, with the inputs and the gradients that they get on text. In each block
the first experts are tried with all candidates and tell what the others try, so a few of both are measured, and the
block of `--experts` is what they add up to. With `--against` another checkout of the repository is measured on the same
experts, each in a process of its own, and the ratio is that of the two.

    python benchmarks/budget_speed.py [--against ../before] [--formats narrow] [--kinds random decaying smollm2]
    python benchmarks/budget_speed.py --formats narrow    # what is tried for any runtime
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from candidate_speed import draw_expert, swiglu
from checkouts import measured
from reference import CALIBRATION, ROOT, text_of
from safetensors.torch import load_file, save_file

from optimum_moe.algorithms.byte_budget import Point
from optimum_moe.algorithms.expert import Expert, ExpertTokens
from optimum_moe.formats import budget, candidates, choose

KINDS = ("random", "decaying", "smollm2")
HIDDEN, INNER = 2048, 768
TOKENS = (128, 1024)
# Experts of a block that try all candidates (`ByteBudget`), and how many after them are measured.
FIRST, OTHERS = 8, 4
# What is measured of a package whose experts all try everything.
ALIKE = 2
SMOLLM2 = ROOT / ".cache" / "budget_speed.safetensors"


def decaying(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with singular values that fall as the root of their number, at the same norm."""
    left, values_D, right = torch.linalg.svd(matrix, full_matrices=False)
    falling_D = torch.arange(1, len(values_D) + 1).float().rsqrt()
    return left @ torch.diag(falling_D * (values_D.norm() / falling_D.norm())) @ right


def drawn(kind: str, tokens: int, number: int) -> tuple[Expert, ExpertTokens]:
    """One expert of a block, and what it sees."""
    if kind == "smollm2":
        return real_expert(tokens, number)
    expert, seen = draw_expert(HIDDEN, INNER, tokens, number)
    if kind == "decaying":
        assert expert.gate_IH is not None
        expert = Expert(decaying(expert.up_IH), decaying(expert.down_HI), swiglu, decaying(expert.gate_IH))
    return expert, seen


def real_expert(tokens: int, number: int) -> tuple[Expert, ExpertTokens]:
    """The first or the second 768 neurons of a feed-forward layer of SmolLM2, on every other token of the text."""
    layer, half = divmod(number, 2)
    found = {name: load_file(SMOLLM2)[f"{layer}.{name}"] for name in ("gate", "up", "down", "input", "gradient")}
    own, seen = slice(half * INNER, (half + 1) * INNER), slice(half, 2 * tokens, 2)
    expert = Expert(found["up"][own], found["down"][:, own].contiguous(), swiglu, found["gate"][own])
    inputs = found["input"][seen].contiguous()
    return expert, ExpertTokens(inputs, torch.ones(len(inputs)), found["gradient"][seen].contiguous())


def prepare_smollm2(layers: int, tokens: int) -> None:
    """Write the matrices of some layers of SmolLM2, and inputs and gradients of their tokens, into `.cache/`."""
    import smollm2
    import transformers

    path = smollm2.download()
    model = smollm2.load_dense(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer(text_of(CALIBRATION))["input_ids"][:tokens]
    chosen = torch.linspace(0, model.config.num_hidden_layers - 1, layers).int().tolist()
    kept: dict[str, list[torch.Tensor]] = {f"{n}.{name}": [] for n in range(layers) for name in ("input", "gradient")}
    for number, layer in enumerate(chosen):
        mlp = model.model.layers[layer].mlp
        mlp.register_forward_pre_hook(lambda _, given, n=number: kept[f"{n}.input"].append(given[0][0].detach()))
        mlp.register_full_backward_hook(lambda _, __, given, n=number: kept[f"{n}.gradient"].append(given[0][0]))
    generator = torch.Generator().manual_seed(0)
    for batch in torch.tensor(ids).split(256):
        logits = model(batch[None]).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    tensors = {name: torch.cat(pieces) for name, pieces in kept.items()}
    for number, layer in enumerate(chosen):
        for name in ("gate", "up", "down"):
            weight = getattr(model.model.layers[layer].mlp, f"{name}_proj").weight
            tensors[f"{number}.{name}"] = weight.detach().clone()
    save_file(tensors, SMOLLM2)


def timed_block(
    experts: Sequence[tuple[Expert, ExpertTokens]], formats: list[str] | None
) -> tuple[list[list[Point]], float, float]:
    """Candidates of experts of a block, and CPU seconds of one of the first and of one of the others."""
    # An older checkout lets all experts try everything.
    screens = getattr(budget, "worth_trying", None)
    found, seconds, among = [], [], {}
    for number, (expert, seen) in enumerate(experts):
        start = time.process_time()
        if screens and number == FIRST:
            among["among"] = screens(found)
        found.append(candidates(expert, seen, itemsize=2, formats=formats, **among))
        seconds.append(time.process_time() - start)
    return found, stats.mean(seconds[:FIRST]), stats.mean(seconds[FIRST:] or seconds)


def mean_of_block(first: float, others: float, experts: int) -> float:
    """CPU seconds of an expert of a block."""
    return (first * FIRST + others * (experts - FIRST)) / experts


def measure(kind: str, tokens: int, formats: list[str] | None, experts: int) -> None:
    """Print the seconds of one block; what the other processes do."""
    torch.set_num_threads(1)
    candidates(*draw_expert(64, 32, 128))
    number = FIRST + OTHERS if hasattr(budget, "worth_trying") else ALIKE
    found, first, others = timed_block([drawn(kind, tokens, n) for n in range(number)], formats)
    start = time.process_time()
    points = [found[n % len(found)] for n in range(experts)]
    choose(points, 0.5 * sum(own[-1].bytes for own in points))
    allocation = (time.process_time() - start) / experts
    print(json.dumps([first, others, allocation, mean_of_block(first, others, experts) + allocation]))


def run(checkout: Path, kind: str, tokens: int, formats: list[str] | None, experts: int) -> list[float]:
    """Measure one block with the package of a checkout: first ones, others, allocation, mean of the block."""
    arguments = ["--measure", kind, str(tokens), "--experts", str(experts)]
    arguments += [] if formats is None else ["--formats", *formats]
    return [float(value) for value in measured(checkout, __file__, arguments)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), help="tokens of an expert")
    parser.add_argument("--experts", type=int, default=128, help="experts of the block")
    parser.add_argument("--formats", nargs="*", help="what is tried, default all")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], int(arguments.measure[1]), arguments.formats, arguments.experts)
        return
    if "smollm2" in arguments.kinds and not SMOLLM2.is_file():
        prepare_smollm2((FIRST + OTHERS) // 2, 2 * max(TOKENS))
    print(f"torch {torch.__version__}, 1 thread, {arguments.experts} experts, median of {arguments.turns}.\n")
    print("| experts | hidden x neurons | tokens | of the first | of others | allocation | CPU s an expert |", end="")
    print(" before | ratio |" if arguments.against else "")
    print("|---" * (9 if arguments.against else 7) + "|")
    ratios = []
    for kind in arguments.kinds:
        for tokens in arguments.tokens:
            own, before = [], []
            for _ in range(arguments.turns):
                own.append(run(ROOT, kind, tokens, arguments.formats, arguments.experts))
                if arguments.against:
                    before.append(run(arguments.against, kind, tokens, arguments.formats, arguments.experts)[-1])
            cells = [f"{stats.median(column):.3f}" for column in zip(*own, strict=True)]
            if before:
                ratios.append(stats.median(b / o[-1] for b, o in zip(before, own, strict=True)))
                cells += [f"{stats.median(before):.2f}", f"{ratios[-1]:.1f}x"]
            shape = f"{576 if kind == 'smollm2' else HIDDEN} x {INNER}"
            print(f"| {kind} | {shape} | {tokens} | " + " | ".join(cells) + " |", flush=True)
    if ratios:
        print(f"\nRatio: median {stats.median(ratios):.1f}x, least {min(ratios):.1f}x.")


if __name__ == "__main__":
    main()
