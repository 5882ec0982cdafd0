"""Scores against stored bytes: merging, MC-SMoE, shared bases, uniform ranks, pruning, and the byte budget.

    python benchmarks/byte_budget.py [--on reference] [--seeds 0 1 2] [--output benchmarks/results/byte_budget]
    python benchmarks/byte_budget.py --on reference_deepseek
    python benchmarks/smollm2.py && python benchmarks/byte_budget.py --on smollm2

For 75 to 10% of the bytes of the experts' matrices and every variant that reaches them: perplexity relative to the
original, KL and top-1 agreement on held-out text, multiple choice, generation agreement and loop rate, as the mean over
calibration seeds and the spread (largest minus smallest); one table, and one plot of KL and perplexity. Nothing is
trained. Results are kept in `.cache/byte_budget`, so that an interrupted run continues. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import statistics as stats
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from reference import CALIBRATION, HELD_OUT, REFERENCES, ROOT, Reference
from smollm2 import CHECKPOINT, SOURCE

from optimum_moe import (
    ByteBudget,
    CalibrationConfig,
    ExpertPruning,
    LowRankSparse,
    MoECompressor,
    MSMoE,
    Rounding,
    Statistics,
)
from optimum_moe.evaluation import EvaluationResult, evaluate_many
from optimum_moe.recipe import coerce_recipe
from optimum_moe.runtimes import width_step
from optimum_moe.stages import Stage

COLUMNS = ("perplexity", "kl", "top1_agreement", "choice_accuracy", "generation_agreement", "loop_rate")
ORIGINAL = "original"
SHARES = (75, 50, 25, 20, 15, 10)
BUDGET = "byte budget"
BITS = "byte budget, 8 and 4 bits too"
PLAIN = "byte budget, any runtime"
VLLM = "byte budget, vLLM as it is"

Variant = Callable[[float], "Stage | list[Stage] | None"]
"""From a share of the experts' bytes to what is left of that size; None where the variant cannot be so small."""


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        model: Checkpoint.
        source: What it is, and its license.
        variants: What is compared.
        evaluation: Settings of `evaluate`.
        calibration_tokens: Tokens that are observed.
        at_once: Models in memory at a time.
    """

    model: Path
    source: str
    variants: dict[str, Variant]
    evaluation: dict[str, Any]
    calibration_tokens: int = 32768
    at_once: int = 12


def smallest_ratio(hidden_size: int, intermediate_size: int) -> float:
    """The share of an expert's numbers that factors of rank 8 have, the least that is compared."""
    return 8 * (intermediate_size + hidden_size) / (intermediate_size * hidden_size)


def pruned(reference: Reference, saliency: str, share: float, **settings: Any) -> Stage | None:
    """The most salient experts, as many as the bytes allow in equal router groups."""
    count = reference.experts_at(share)
    return None if count is None else ExpertPruning(num_experts=count, saliency=saliency, **settings)


def plain(reference: Reference, share: float) -> Stage | None:
    """The byte budget for stock classes, down to the fewest experts of the least width."""
    least = reference.least_experts * width_step(reference.intermediate_size)
    whole = reference.num_experts * reference.intermediate_size
    return ByteBudget(share=share) if share * whole >= least else None


def whole_experts(reference: Reference, share: float) -> Stage | None:
    """For stock classes, the experts that the loss is expected to miss the most."""
    least = reference.least_experts / reference.num_experts
    return ByteBudget(share=share, formats=[], refit=False) if share >= least else None


def uneven_experts(share: float) -> Stage:
    """The same, with other numbers of experts in each block."""
    return ByteBudget(share=share, runs_in="transformers", formats=[], refit=False)


def merged(reference: Reference, share: float) -> Stage:
    return MSMoE(num_experts=max(1, int(reference.num_experts * share)))


def merged_and_factorized(reference: Reference, share: float) -> list[Stage]:
    """Of equal parts: the share of the experts and the share of the numbers of each, which has a tenth of its rows."""
    total = reference.num_experts
    each = max(share**0.5, smallest_ratio(reference.hidden_size, reference.intermediate_size) + 0.12)
    count = max(1, int(total * share / each))
    return [MSMoE(num_experts=count), LowRankSparse(rank_ratio=total * share / count - 0.11, density=0.1)]


def based(reference: Reference, share: float) -> list[Stage] | None:
    """Bases and differences of equal parts."""
    delta = max(share / 2, smallest_ratio(reference.hidden_size, reference.intermediate_size))
    count = int(reference.num_experts * (share - delta))
    ratio = share - count / reference.num_experts
    return (
        [MSMoE(num_experts=count), LowRankSparse(rank_ratio=ratio, density=None, base="group")] if count > 0 else None
    )


def uniform(smallest: float, whiten: bool) -> Variant:
    def variant(share: float) -> Stage | None:
        return LowRankSparse(rank_ratio=share, density=None, whiten=whiten) if share >= smallest else None

    return variant


def all_rounded(share: float, bits: int, fitted: bool) -> Stage | None:
    """Every expert in as many bits, listed under the share that is the next one below its size."""
    stored = {4: 0.25, 8: 0.5}[bits]
    return Rounding(bits=bits, fitted=fitted) if share == stored else None


BUDGETS: dict[str, Variant] = {
    "experts only": lambda share: ByteBudget(runs_in="transformers", share=share, formats=[]),
    "ranks only": lambda share: ByteBudget(runs_in="transformers", share=share, formats=["low_rank"]),
    "neurons only": lambda share: ByteBudget(runs_in="transformers", share=share, formats=["narrow"]),
    BUDGET: lambda share: ByteBudget(runs_in="transformers", share=share),
    BITS: lambda share: ByteBudget(runs_in="transformers", share=share, bits=[8, 4]),
    "all in four bits, nearest": partial(all_rounded, bits=4, fitted=False),
    "all in four bits, fitted": partial(all_rounded, bits=4, fitted=True),
    "all in eight bits": partial(all_rounded, bits=8, fitted=False),
}
SMOLLM2_SMALLEST = smallest_ratio(hidden_size=576, intermediate_size=192)


def reference_setting(reference: Reference) -> Setting:
    smallest = smallest_ratio(reference.hidden_size, reference.intermediate_size)
    return Setting(
        reference.model,
        reference.source_line,
        {
            "M-SMoE": partial(merged, reference),
            "MC-SMoE": partial(merged_and_factorized, reference),
            "base + delta": partial(based, reference),
            "plain SVD": uniform(smallest, whiten=False),
            "whitened SVD": uniform(smallest, whiten=True),
            "frequency pruning": partial(pruned, reference, "frequency"),
            "REAP pruning": partial(pruned, reference, "reap"),
            "whole experts by loss": partial(whole_experts, reference),
            PLAIN: partial(plain, reference),
            "uneven whole experts by loss": uneven_experts,
            VLLM: lambda share: ByteBudget(share=share, runs_in="vllm"),
            **BUDGETS,
        },
        {"max_tokens": 16384, "num_questions": 100, "num_prompts": 16},
    )


SETTINGS = {
    **{name: reference_setting(reference) for name, reference in REFERENCES.items()},
    "smollm2": Setting(
        CHECKPOINT,
        SOURCE,
        {
            "plain SVD": uniform(SMOLLM2_SMALLEST, whiten=False),
            "whitened SVD": uniform(SMOLLM2_SMALLEST, whiten=True),
            **BUDGETS,
        },
        {"max_tokens": 4096, "num_questions": 16, "num_prompts": 4, "new_tokens": 8},
        calibration_tokens=4096,
        at_once=4,
    ),
}


def key_of(setting: Setting) -> str:
    """Distinguishes results of another model, text or amount of evaluation."""
    digest = hashlib.sha256()
    for path in (*sorted(setting.model.glob("*.safetensors")), CALIBRATION, HELD_OUT):
        digest.update(path.read_bytes())
    digest.update(f"{setting.evaluation} {setting.calibration_tokens}".encode())
    return digest.hexdigest()[:12]


def statistics_of(setting: Setting, seed: int, folder: Path) -> Statistics:
    """Observed once for all variants of a seed, with the backward passes that the byte budget wants."""
    kept = folder / "statistics"
    if not (kept / "statistics.json").is_file():
        config = CalibrationConfig(
            str(CALIBRATION), sequence_length=256, max_tokens=setting.calibration_tokens, seed=seed
        )
        made = [variant(share / 100) for variant in setting.variants.values() for share in SHARES]
        also = frozenset().union(*(coerce_recipe(method).needs for method in made if method)) - {"gradients"}
        MoECompressor.from_pretrained(
            setting.model, ByteBudget(runs_in="transformers", share=0.5), config, seed=seed, progress=False
        ).calibrate(also).save_pretrained(kept)
    return Statistics.from_pretrained(kept)


def run_seed(setting: Setting, seed: int, shares: list[float], arguments: argparse.Namespace) -> None:
    """Measure everything of one calibration seed that was not measured yet."""
    folder = arguments.cache / key_of(setting) / f"seed{seed}"
    wanted = [(share, name) for share in shares for name in setting.variants if name in arguments.variants]
    missing = [(s, n) for s, n in wanted if not file_of(folder, s, n).is_file() and setting.variants[n](s / 100)]
    if not missing and file_of(folder, 100, ORIGINAL).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    statistics = statistics_of(setting, seed, folder)
    original = transformers.AutoModelForCausalLM.from_pretrained(setting.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(setting.model)
    for start in range(0, max(len(missing), 1), setting.at_once):
        models: dict[tuple[float, str], Any] = {(100, ORIGINAL): original} if start == 0 else {}
        sizes: dict[tuple[float, str], dict[str, Any]] = {(100, ORIGINAL): {"stored_share": 1.0, "is_plain": True}}
        for share, name in missing[start : start + setting.at_once]:
            method = setting.variants[name](share / 100)
            compressor = MoECompressor.from_pretrained(setting.model, method, seed=seed, progress=False)
            models[share, name] = compressor.apply(statistics=statistics)
            sizes[share, name] = size_of(compressor)
            print(f"seed {seed}: {name} at {share:g}% made", file=sys.stderr, flush=True)
        results = evaluate_many(
            {f"{share} {name}": model for (share, name), model in models.items()},
            str(HELD_OUT),
            reference=original,
            tokenizer=tokenizer,
            calibration=str(CALIBRATION),
            progress=sys.stderr.isatty(),
            **setting.evaluation,
        )
        for (share, name), result in zip(models, results.values(), strict=True):
            sized = replace(result, data={**result.data, **sizes[share, name]})
            sized.save(file_of(folder, share, name))
        del models
        gc.collect()


def size_of(compressor: MoECompressor) -> dict[str, Any]:
    """Bytes that went, as what is left of those of the experts, and whether stock transformers loads the result."""
    made, blocks = compressor.measured(), compressor.source.info.blocks
    numbers = sum(block.num_experts * block.expert_parameters for block in blocks)
    experts = numbers * made.before.bytes / made.before.parameters
    return {"stored_share": 1 - (made.before.bytes - made.after.bytes) / experts, "is_plain": made.plain}


def measure(setting: Setting, arguments: argparse.Namespace) -> dict[tuple[float, str], list[EvaluationResult]]:
    """Measure what was not measured yet, seed by seed, and read everything."""
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    for seed in arguments.seeds:
        run_seed(setting, seed, arguments.shares, arguments)
    return read(setting, arguments)


def file_of(folder: Path, share: float, name: str) -> Path:
    return folder / f"{share:g}-{name.replace(' ', '_').replace('+', 'and')}.json"


def read(setting: Setting, arguments: argparse.Namespace) -> dict[tuple[float, str], list[EvaluationResult]]:
    """All results by share and variant, one for each seed."""
    found: dict[tuple[float, str], list[EvaluationResult]] = {}
    for seed in arguments.seeds:
        folder = arguments.cache / key_of(setting) / f"seed{seed}"
        for share, name in [(100, ORIGINAL), *((s, n) for s in arguments.shares for n in setting.variants)]:
            if file_of(folder, share, name).is_file():
                found.setdefault((share, name), []).append(EvaluationResult.load(file_of(folder, share, name)))
    return found


def values_of(results: list[EvaluationResult], column: str, base: float) -> list[float]:
    values = [result.scores[column].value for result in results]
    return [value / base for value in values] if column == "perplexity" else values


def cells_of(results: list[EvaluationResult], original: list[EvaluationResult]) -> list[str]:
    """Mean of every score, and its spread over seeds if there are several."""
    base, cells = original[0].scores["perplexity"].value, []
    for column in COLUMNS:
        values = values_of(results, column, base)
        digits, factor = (4, "") if column == "kl" else (3, "x" if column == "perplexity" else "")
        spread = f" ({max(values) - min(values):.{digits}f})" if len(values) > 1 else ""
        cells.append(f"{factor}{stats.mean(values):.{digits}f}{spread}")
    return cells


def table(setting: Setting, found: dict[tuple[float, str], list[EvaluationResult]], shares: list[float]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| expert bytes | variant | perplexity | KL | top-1 | choice | generation | loops |", "|---" * 8 + "|"]
    for share in shares:
        for name in setting.variants:
            if (share, name) in found:
                cells = cells_of(found[share, name], found[100, ORIGINAL])
                lines.append(f"| {share:g}% | {name} | " + " | ".join(cells) + " |")
    return lines


def plot(
    setting: Setting, found: dict[tuple[float, str], list[EvaluationResult]], shares: list[float], path: Path
) -> None:
    """KL and perplexity against the share of the experts' bytes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    base = found[100, ORIGINAL][0].scores["perplexity"].value
    for axis, column, label in zip(
        axes, ("kl", "perplexity"), ("KL (nats a token)", "perplexity / original"), strict=True
    ):
        for name in setting.variants:
            have = [share for share in shares if (share, name) in found]
            means = [stats.mean(values_of(found[share, name], column, base)) for share in have]
            axis.plot(have, means, marker="o", label=name, linewidth=2.5 if name == BUDGET else 1.2)
        axis.set(xlabel="bytes of the experts (%)", ylabel=label, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=SETTINGS, default="reference")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="per cent of the experts' bytes")
    parser.add_argument("--variants", nargs="+", help="default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "byte_budget")
    parser.add_argument("--output", type=Path, help="also write the table (.md) and the plot (.png) there")
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.on]
    arguments.variants = arguments.variants or list(setting.variants)
    found = measure(setting, arguments)
    original = found[100, ORIGINAL][0].scores
    names = ("perplexity", "choice_accuracy", "loop_rate")
    scores = ", ".join(f"{n} {original[n].value:.3f} [{original[n].low:.3f}, {original[n].high:.3f}]" for n in names)
    amount = f"{len(arguments.seeds)} calibration seeds of {setting.calibration_tokens:,} tokens"
    lines = [setting.source, "", f"Original: {scores}. {amount}; nothing is trained.", ""]
    lines += table(setting, found, arguments.shares)
    print("\n".join(lines))
    if arguments.output:
        arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        plot(setting, found, arguments.shares, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
