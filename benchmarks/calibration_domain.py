"""What the domain of the calibration text does to pruning, on the bundled models.

    python benchmarks/calibration_domain.py [--on reference] [--max-tokens 4096] [--output benchmarks/results/...]

Half of the experts are removed, chosen on each domain's text alone and on an equal mix of all of them, every time on as
many tokens. For each choice: KL to the original on held-out text of every domain, and how much the kept experts of two
choices have in common (the size of the intersection over that of the union, mean over the blocks).
"""

from __future__ import annotations

import argparse
import json
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import transformers
from reference import CALIBRATION, HELD_OUT, REFERENCES, Reference

from optimum_moe import CalibrationConfig, CompressionPlan, ExpertPruning, MoECompressor
from optimum_moe.evaluation import evaluate_many

DOMAINS = {
    "addresses": ("sotu/",),
    "Bible": ("bible/",),
    "novels": ("moby_dick/", "austen/"),
}
"""Beginnings of the titles of a domain's documents."""
CRITERIA = ("frequency", "reap")
MIX = "mix of all"


def documents(file: Path, domain: str) -> list[str]:
    """Texts of the documents of one domain."""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [row["text"] for row in rows if row["title"].startswith(DOMAINS[domain])]


def calibrations(arguments: argparse.Namespace) -> dict[str, CalibrationConfig]:
    """Calibration data by name: each domain alone, and their mix."""
    sources: dict[str, Any] = {domain: documents(CALIBRATION, domain) for domain in DOMAINS}
    sources[MIX] = [(texts, 1.0) for texts in list(sources.values())]
    return {
        name: CalibrationConfig(
            source, sequence_length=256, max_tokens=arguments.calibration_tokens, seed=arguments.seed
        )
        for name, source in sources.items()
    }


def kept_in_common(one: CompressionPlan, other: CompressionPlan) -> float:
    """Experts that both plans keep over those that either keeps, mean over the blocks."""
    pairs = [(set(one.blocks[name].references_G), set(other.blocks[name].references_G)) for name in one.blocks]
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)


def tables(reference: Reference, saliency: str, arguments: argparse.Namespace) -> list[str]:
    """The two tables of one model and criterion, in Markdown."""
    original = transformers.AutoModelForCausalLM.from_pretrained(reference.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference.model)
    models, plans = {}, {}
    for name, data in calibrations(arguments).items():
        stage = ExpertPruning(keep_ratio=0.5, saliency=saliency)
        compressor = MoECompressor.from_pretrained(reference.model, stage, data, seed=arguments.seed, progress=False)
        models[name] = compressor.apply()
        plans[name] = compressor.plan
    kl = {
        domain: {
            name: result.scores["kl"].value
            for name, result in evaluate_many(
                models,
                documents(HELD_OUT, domain),
                reference=original,
                tokenizer=tokenizer,
                max_tokens=arguments.max_tokens,
                tasks=("agreement",),
                progress=False,
            ).items()
        }
        for domain in DOMAINS
    }
    lines = [
        f"Pruned by {saliency}:",
        "",
        f"| calibrated on | {' | '.join(f'KL on {domain}' for domain in DOMAINS)} | mean |",
        "|---" * (len(DOMAINS) + 2) + "|",
    ]
    for name in models:
        values = [kl[domain][name] for domain in DOMAINS]
        lines.append(f"| {name} | {' | '.join(f'{v:.4f}' for v in [*values, sum(values) / len(values)])} |")
    common = [f"{a} and {b} {kept_in_common(plans[a], plans[b]):.2f}" for a, b in combinations(plans, 2)]
    return [*lines, "", f"Kept experts in common (two random halves have about 0.33): {'; '.join(common)}.", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, nargs="+", default=list(REFERENCES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=4096, help="Held-out tokens of each domain.")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="Of each choice, the mix included.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the tables there (.md)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    lines: list[str] = []
    for name in arguments.on:
        reference = REFERENCES[name]
        lines += [
            reference.source_line,
            "",
            f"Half of the experts, chosen on {arguments.calibration_tokens:,} tokens (seed {arguments.seed}); KL on "
            f"up to {arguments.max_tokens:,} held-out tokens of each domain.",
            "",
        ]
        for saliency in CRITERIA:
            lines += tables(reference, saliency, arguments)
    print("\n".join(lines))
    if arguments.output:
        arguments.output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
