"""All criteria of expert pruning side by side, at half of the experts of the bundled models.

    python benchmarks/catalog.py [--on reference] [--seed 0] [--output benchmarks/results/catalog]

For every criterion: perplexity relative to the original, KL and top-1 agreement on held-out text; then one number of
experts that all blocks share, and what removed experts leave. One calibration serves all rows of a model. Nothing is
trained. Every row is kept in `.cache/catalog`, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from reference import CALIBRATION, HELD_OUT, REFERENCES, ROOT, Reference

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, Statistics
from optimum_moe.evaluation import EvaluationResult, evaluate
from optimum_moe.stages import Stage

COLUMNS = ("perplexity", "kl", "top1_agreement")
CRITERIA = (
    "random",
    "aimer",
    "frequency",
    "gate_sum",
    "ean",
    "output_norm",
    "output_norm_squared",
    "reap",
    "easy_ep",
    "rcs",
    "razor",
    "mone",
    "reconstruction",
    "fisher",
)
RANK = 8
"""Of the maps that removed experts leave."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: What it is.
        stage: With the model's number of experts.
    """

    name: str
    stage: Stage


def rows(reference: Reference) -> list[Row]:
    """Criteria, then allocations, then what is left of removed experts."""
    count = reference.num_experts // 2
    found = [Row(name, ExpertPruning(num_experts=count, saliency=name)) for name in CRITERIA]
    found += [
        Row(f"{name}, global", ExpertPruning(num_experts=count, saliency=name, allocation="global"))
        for name in ("frequency", "reap", "razor", "fisher")
    ]
    for name in ("frequency", "reap", "mone", "fisher"):
        found.append(Row(f"{name}, constants", ExpertPruning(num_experts=count, saliency=name, leaves="constant")))
        stage = ExpertPruning(num_experts=count, saliency=name, leaves="low_rank", rank=RANK)
        found.append(Row(f"{name}, maps of rank {RANK}", stage))
    return found


def folder_of(reference: Reference, arguments: argparse.Namespace) -> Path:
    """Where results of this model, text and amount of evaluation are kept."""
    digest = hashlib.sha256()
    for path in (*sorted(reference.model.glob("*.safetensors")), CALIBRATION, HELD_OUT):
        digest.update(path.read_bytes())
    digest.update(f"{arguments.max_tokens} {arguments.calibration_tokens}".encode())
    return Path(arguments.cache) / digest.hexdigest()[:12] / f"seed{arguments.seed}"


def statistics_of(reference: Reference, folder: Path, arguments: argparse.Namespace) -> Statistics:
    """Observed once for all rows, with the backward passes that `fisher` wants."""
    kept = folder / "statistics"
    if not (kept / "statistics.json").is_file():
        config = CalibrationConfig(
            str(CALIBRATION), sequence_length=256, max_tokens=arguments.calibration_tokens, seed=arguments.seed
        )
        stage = ExpertPruning(keep_ratio=0.5, saliency="fisher")
        compressor = MoECompressor.from_pretrained(reference.model, stage, config, seed=arguments.seed, progress=False)
        compressor.calibrate().save_pretrained(kept)
    return Statistics.from_pretrained(kept)


def measured(reference: Reference, arguments: argparse.Namespace) -> dict[str, tuple[EvaluationResult, float]]:
    """Result and share of the experts' numbers by row, the original first; what is missing is measured."""
    folder = folder_of(reference, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    original = transformers.AutoModelForCausalLM.from_pretrained(reference.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference.model)
    results: dict[str, tuple[EvaluationResult, float]] = {}

    def result_of(name: str, make: Callable[[], Any]) -> EvaluationResult:
        file = folder / f"{name.replace(' ', '_').replace(',', '')}.json"
        if not file.is_file():
            found = evaluate(
                make(),
                str(HELD_OUT),
                reference=original,
                tokenizer=tokenizer,
                calibration=str(CALIBRATION),
                max_tokens=arguments.max_tokens,
                tasks=("perplexity", "agreement"),
                progress=False,
            )
            found.save(file)
            print(f"{reference.description}: {name} measured", file=sys.stderr, flush=True)
        return EvaluationResult.load(file)

    results["original"] = result_of("original", lambda: original), 1.0
    for row in rows(reference):
        compressor = MoECompressor.from_pretrained(reference.model, row.stage, seed=arguments.seed, progress=False)
        shown = compressor.preview()
        experts = sum(block.num_experts * block.expert_parameters for block in compressor.source.info.blocks)
        share = 1 - (shown.before.parameters - shown.after.parameters) / experts
        results[row.name] = result_of(row.name, partial(applied, compressor, reference, folder, arguments)), share
    return results


def applied(compressor: MoECompressor, reference: Reference, folder: Path, arguments: argparse.Namespace) -> Any:
    """The compressed model of a row."""
    return compressor.apply(statistics=statistics_of(reference, folder, arguments))


def table(results: dict[str, tuple[EvaluationResult, float]]) -> list[str]:
    """Lines of a Markdown table."""
    base = results["original"][0].scores["perplexity"].value
    lines = ["| pruned by | experts' numbers | perplexity | KL | top-1 |", "|---" * 5 + "|"]
    for name, (result, share) in results.items():
        perplexity, kl, agreement = (result.scores[column].value for column in COLUMNS)
        lines.append(f"| {name} | {share:.1%} | x{perplexity / base:.3f} | {kl:.4f} | {agreement:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, nargs="+", default=list(REFERENCES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "catalog")
    parser.add_argument("--output", type=Path, help="also write the tables there (.md)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    lines: list[str] = []
    for name in arguments.on:
        reference = REFERENCES[name]
        results = measured(reference, arguments)
        original = results["original"][0].scores["perplexity"].value
        lines += [
            reference.source_line,
            "",
            f"Half of the experts, one calibration seed of {arguments.calibration_tokens:,} tokens; perplexity of the "
            f"original {original:.3f}.",
            "",
            *table(results),
            "",
        ]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
