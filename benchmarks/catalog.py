"""Every method side by side at equal bytes of the experts, on the bundled models; the best of them at three sizes.

    python benchmarks/catalog.py [--on reference] [--output benchmarks/results/catalog.md]
    python benchmarks/catalog.py --best 10 --seeds 0 1 2 --output benchmarks/results/catalog_best.md

Without `--best`: everything at 50% of the bytes of the experts. With it: so many of those with the least KL there that
store no more than they were asked for, and beside them pruning at random, by frequency and by REAP, M-SMoE and MC-SMoE,
at 75, 50 and 25%. Perplexity relative to the original, KL and top-1 agreement on held-out text, multiple choice,
generation agreement and loop rate, as the mean over calibration seeds and the spread (largest minus smallest). One
calibration serves all rows of a model and seed; nothing is trained. Results are kept in `.cache/catalog`, so that an
interrupted run continues.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from byte_budget import BUDGETS, ORIGINAL, Setting, Variant, cells_of, measure, pruned, reference_setting
from merges import MERGES, merged
from reference import REFERENCES, ROOT, Reference

from optimum_moe import BlockDrop, LayerDrop
from optimum_moe.evaluation import EvaluationResult

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
BASELINES = ("prune: random", "prune: frequency", "prune: reap", "merge: M-SMoE", "factorize: MC-SMoE")
"""Compared at every size, however they did at half of the bytes."""
SLACK = 0.01
"""Of the experts' bytes, which a method may store over what it was asked for: scales of rounded weights."""
BEST_SHARES = (75, 50, 25)
SEVERAL = ("experts only", "ranks only", "neurons only", "byte budget", "byte budget, 8 and 4 bits too")
"""Of the byte budgets for transformers, those that are listed."""
COLUMNS = "| expert bytes | method | stored | loads plainly | perplexity | KL | top-1 | choice | generation | loops |"


def methods(reference: Reference) -> dict[str, Variant]:
    """All rows by name, in the order of the table."""
    found: dict[str, Variant] = {f"prune: {name}": partial(pruned, reference, name) for name in CRITERIA}
    for name in ("frequency", "reap", "razor", "fisher"):
        found[f"prune: {name}, global"] = partial(pruned, reference, name, allocation="global")
    for name in ("frequency", "reap", "mone", "fisher"):
        found[f"prune: {name}, constants"] = partial(pruned, reference, name, leaves="constant")
        left = partial(pruned, reference, name, leaves="low_rank", rank=RANK)
        found[f"prune: {name}, maps of rank {RANK}"] = left
    found |= {f"merge: {name}": partial(merged, reference, merge) for name, merge in MERGES.items()}
    found["drop: experts of whole layers"] = lambda share: LayerDrop(keep_ratio=share)
    found["drop: whole layers"] = lambda share: BlockDrop(keep_ratio=share)
    others = reference_setting(reference).variants
    for name in ("MC-SMoE", "base + delta", "plain SVD", "whitened SVD"):
        found[f"factorize: {name}"] = others[name]
    listed = [name for name in others if name not in BUDGETS or name in SEVERAL]
    for name in listed[listed.index("whole experts by loss") :]:
        found[f"budget: {name.removeprefix('byte budget, ')}"] = others[name]
    found["round: eight bits"] = others["all in eight bits"]
    return found


def setting_of(reference: Reference) -> Setting:
    return replace(reference_setting(reference), variants=methods(reference))


def best_of(found: dict[tuple[float, str], list[EvaluationResult]], number: int) -> list[str]:
    """So many names with the least KL at half of the bytes in the first seed, and the baselines, in their order."""
    at_half = {name: results[0] for (share, name), results in found.items() if share == 50}
    fair = [name for name, result in at_half.items() if result.data["stored_share"] <= 0.5 + SLACK]
    fair.sort(key=lambda name: at_half[name].scores["kl"].value)
    chosen = {*fair[:number], *BASELINES}
    return [name for name in at_half if name in chosen]


def table(
    found: dict[tuple[float, str], list[EvaluationResult]], names: Sequence[str], shares: Sequence[float]
) -> list[str]:
    """Lines of a Markdown table, with the best KL of each size first."""
    lines = [COLUMNS, "|---" * COLUMNS.count(" | ") + "|---|"]
    for share in shares:
        rows = {name: found[share, name] for name in names if (share, name) in found}
        for name in sorted(rows, key=lambda row: sum(r.scores["kl"].value for r in rows[row])):
            results = rows[name]
            stored = sum(r.data["stored_share"] for r in results) / len(results)
            plain = "yes" if all(r.data["is_plain"] for r in results) else "no"
            cells = [f"{share:g}%", name, f"{stored:.1%}", plain, *cells_of(results, found[100, ORIGINAL])]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, nargs="+", default=list(REFERENCES))
    parser.add_argument("--best", type=int, help="number of methods to compare at 75, 50 and 25%%")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "catalog")
    parser.add_argument("--output", type=Path, help="also write the tables there (.md)")
    arguments = parser.parse_args()
    lines: list[str] = []
    for name in arguments.on:
        setting = setting_of(REFERENCES[name])
        everything = argparse.Namespace(
            **{**vars(arguments), "seeds": arguments.seeds[:1], "shares": [50], "variants": list(setting.variants)}
        )
        found, names, shares = measure(setting, everything), list(setting.variants), [50]
        if arguments.best:
            names, shares = best_of(found, arguments.best), list(BEST_SHARES)
            arguments.shares, arguments.variants = shares, names
            found = measure(setting, arguments)
        original = found[100, ORIGINAL][0].scores
        seeds = len(arguments.seeds) if arguments.best else 1
        lines += [
            setting.source,
            "",
            f"Original: perplexity {original['perplexity'].value:.3f}, choice {original['choice_accuracy'].value:.3f}, "
            f"loops {original['loop_rate'].value:.3f}. {seeds} calibration seed{'s' * (seeds > 1)} of "
            f"{setting.calibration_tokens:,} tokens; nothing is trained.",
            "",
            *table(found, names, shares),
            "",
        ]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
