"""What a byte budget loses, of two versions of this package beside each other: KL to the original on held-out text.

Both bundled models, several sizes and seeds of the sampled tokens; each run in a process of its own with the package of
its checkout, measured by the same lines. The ratio of a size is the geometric mean over the seeds, paired.

    python benchmarks/budget_versions.py --against ../before [--shares 50 25 10] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import warnings
from pathlib import Path

import torch
import transformers
from checkouts import measured
from reference import CALIBRATION, HELD_OUT, REFERENCES, ROOT, text_of

LENGTH = 512


def held_out(model: Path, tokens: int) -> torch.Tensor:
    """(N, 512) token ids of the held-out text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = torch.tensor(tokenizer(text_of(HELD_OUT))["input_ids"])
    every = max(1, len(ids) // tokens)
    return ids[: len(ids) // LENGTH * LENGTH].unflatten(0, (-1, LENGTH))[::every]


@torch.no_grad()
def measure(name: str, share: float, seed: int, runs_in: str, tokens: int) -> None:
    """Print the KL of one compression; what the other processes do."""
    from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = REFERENCES[name].model
    original = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    data = CalibrationConfig(str(CALIBRATION), max_tokens=16384)
    recipe = ByteBudget(share=share / 100, runs_in=runs_in)
    with torch.enable_grad():
        compressor = MoECompressor.from_pretrained(str(path), recipe, data, seed=seed, progress=False)
        student = compressor.apply().eval()
    found, count = 0.0, 0
    for batch in held_out(path, tokens).split(8):
        teacher_BTV, student_BTV = (model(batch).logits.double().log_softmax(-1) for model in (original, student))
        found += float((teacher_BTV.exp() * (teacher_BTV - student_BTV)).sum())
        count += batch.numel()
    print(json.dumps(found / count))


def run(checkout: Path, arguments: argparse.Namespace, name: str, share: float, seed: int) -> float:
    """The KL of one compression by the package of a checkout."""
    given = ["--measure", name, str(share), str(seed)]
    given += ["--runs-in", arguments.runs_in, "--max-tokens", str(arguments.max_tokens)]
    return float(measured(checkout, __file__, given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--on", nargs="+", choices=REFERENCES, default=list(REFERENCES))
    parser.add_argument("--shares", type=float, nargs="+", default=[50, 25, 10], help="per cent of the experts' bytes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs-in", default="transformers")
    parser.add_argument("--max-tokens", type=int, default=8192, help="about as many held-out tokens")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, share, seed = arguments.measure
        measure(name, float(share), int(seed), arguments.runs_in, arguments.max_tokens)
        return
    if arguments.against is None:
        parser.error("--against is needed: the checkout to compare with.")
    print(f"runs_in={arguments.runs_in!r}, seeds {arguments.seeds}, torch {torch.__version__}.\n")
    print("| model | bytes | KL | before | ratio | of each seed |\n|---|---|---|---|---|---|")
    every: list[float] = []
    for name in arguments.on:
        for share in arguments.shares:
            own, before = [], []
            for seed in arguments.seeds:
                own.append(run(ROOT, arguments, name, share, seed))
                before.append(run(arguments.against, arguments, name, share, seed))
            ratios = [o / b for o, b in zip(own, before, strict=True)]
            every += ratios
            cells = f"{stats.mean(own):.4f} | {stats.mean(before):.4f} | {stats.geometric_mean(ratios):.3f}"
            each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"| {REFERENCES[name].description} | {share:g}% | {cells} | {each} |", flush=True)
    print(f"\nGeometric mean of all: {stats.geometric_mean(every):.3f}.")


if __name__ == "__main__":
    main()
