"""What a guard on the worst domain refuses, and what a repair changes, on the bundled models.

    python benchmarks/domain_guard.py [--on reference] [--worst 1.3] [--output benchmarks/results/domain_guard.md]

Half of the experts are pruned, chosen on one domain's text alone. Every domain's loss is measured on its own held-out
documents; where the worst one lost more than `--worst` times the mean, the model is calibrated again on as many tokens,
with text of the domains that lost more than the mean added. Rows with training: routers and norms of the model that was
calibrated on one domain, trained on that text and on the repaired mixture.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from calibration_domain import DOMAINS
from reference import CALIBRATION, HELD_OUT, REFERENCES, Reference

from optimum_moe import CalibrationConfig, ExpertPruning, Guard, MoECompressor, compress_guarded, evaluate, recover
from optimum_moe.domain_guard import Guarded, weighted
from optimum_moe.evaluation import EvaluationResult

_EVALUATION = {"max_tokens": 4096, "num_prompts": 16, "tasks": ("perplexity", "agreement", "generation")}
CRITERIA = ("frequency", "reap")


def rows(file: Path, *domains: str) -> list[dict[str, str]]:
    """Documents with the names of their domains."""
    found = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [
        {"text": row["text"], "domain": name}
        for row in found
        for name, titles in DOMAINS.items()
        if row["title"].startswith(titles) and (not domains or name in domains)
    ]


def line(name: str, result: EvaluationResult, limit: float) -> str:
    """A row of the table."""
    worst = result.worst_domain
    assert worst is not None
    cells = [
        f"{result.domains[domain]['kl'].value:.4f} (x{result.domains[domain]['perplexity_ratio'].value:.2f}, "
        f"{result.domains[domain]['loop_rate'].value:.2f})"
        for domain in DOMAINS
    ]
    verdict = "passes" if worst.over_mean <= limit else "refused"
    return f"| {name} | {' | '.join(cells)} | {worst.mean:.4f} | {worst.name} {worst.over_mean:.2f}x | {verdict} |"


def calibration(arguments: argparse.Namespace, domain: str) -> CalibrationConfig:
    """Text of one domain alone."""
    return CalibrationConfig(
        rows(CALIBRATION, domain), sequence_length=256, max_tokens=arguments.calibration_tokens, seed=0
    )


def guarded(
    reference: Reference, stage: ExpertPruning, data: CalibrationConfig, limit: float, repair: object = None
) -> Guarded:
    """A model that passes a limit."""
    guard = Guard(rows(HELD_OUT), limit, repair, evaluation=_EVALUATION)
    return compress_guarded(reference.model, stage, data, guard, progress=False)


def lines_of(reference: Reference, saliency: str, arguments: argparse.Namespace) -> list[str]:
    """The table of one model and criterion."""
    lines = [
        f"Pruned by {saliency}:",
        "",
        f"| calibrated on | {' | '.join(DOMAINS)} | mean KL | worst over mean | worst={arguments.worst:g}x |",
        "|---" * (len(DOMAINS) + 4) + "|",
    ]
    stage = ExpertPruning(keep_ratio=0.5, saliency=saliency)
    for domain in DOMAINS:
        data = calibration(arguments, domain)
        # A limit below the number of domains that hardly anything exceeds: the model as it is.
        first = guarded(reference, stage, data, len(DOMAINS) - 1e-6)
        lines.append(line(domain, first.result, arguments.worst))
        if first.attempts[0].worst.over_mean <= arguments.worst:
            continue
        try:
            repaired = guarded(reference, stage, data, arguments.worst, repair=rows(CALIBRATION))
        except ValueError as error:
            lines.append(f"| {domain}, repaired | {error} |" + " |" * (len(DOMAINS) + 2))
            continue
        weights = ", ".join(f"{name} {weight:.2f}" for name, weight in repaired.attempts[-1].weights.items())
        name = f"{domain} 1.00, {weights} (attempt {len(repaired.attempts)})"
        lines.append(line(name, repaired.result, arguments.worst))
        if saliency == "reap" and arguments.train:
            lines += trained(reference, first, data, repaired.attempts[-1].weights, domain, arguments)
    return [*lines, ""]


def trained(
    reference: Reference,
    first: Guarded,
    data: CalibrationConfig,
    weights: Mapping[str, float],
    domain: str,
    arguments: argparse.Namespace,
) -> list[str]:
    """Rows of the refused model after routers and norms were trained, on one domain and on the mixture."""
    original = transformers.AutoModelForCausalLM.from_pretrained(reference.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference.model)
    plan = first.compressor.plan
    mixture = weighted(data, Guard(rows(HELD_OUT), repair=rows(CALIBRATION)), weights)
    lines = []
    for name, text in {domain: data, "the mixture": mixture}.items():
        compressor = MoECompressor.from_pretrained(reference.model, ExpertPruning(keep_ratio=0.5), progress=False)
        done = recover(
            compressor.apply(plan=plan),
            teacher=original,
            data=replace(text, batch_size=4),
            tokenizer=tokenizer,
            max_tokens=arguments.training_tokens,
            progress=False,
        )
        result = evaluate(done.model, rows(HELD_OUT), original, tokenizer, progress=False, **_EVALUATION)
        lines.append(line(f"{domain}, routers trained on {name}", result, arguments.worst))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, nargs="+", default=list(REFERENCES))
    parser.add_argument("--worst", type=float, default=1.3)
    parser.add_argument("--criteria", choices=CRITERIA, nargs="+", default=list(CRITERIA))
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="Of every choice, repaired ones too.")
    parser.add_argument("--training-tokens", type=int, default=65536)
    parser.add_argument("--no-train", dest="train", action="store_false", help="leave out the rows with training")
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
            f"Half of the experts, chosen on {arguments.calibration_tokens:,} tokens; a cell has the KL to the "
            f"original on up to {_EVALUATION['max_tokens']:,} held-out tokens of the domain, and in brackets the ratio "
            "of perplexities and the loop rate.",
            "",
        ]
        for saliency in arguments.criteria:
            lines += lines_of(reference, saliency, arguments)
            print("\n".join(lines), flush=True)
            if arguments.output:
                arguments.output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
