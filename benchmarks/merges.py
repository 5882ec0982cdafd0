"""Merges against each other and against pruning, at equal bytes of the experts, on a bundled reference model.

    python benchmarks/merges.py [--on reference] [--seeds 0] [--output benchmarks/results/merges_reference.md]
    python benchmarks/merges.py --on reference_deepseek --output benchmarks/results/merges_reference_deepseek.md

For 75, 50 and 25% of the experts: perplexity relative to the original, KL and top-1 agreement on held-out text,
multiple choice, generation agreement and loop rate, as the mean over calibration seeds and the spread (largest minus
smallest). All variants of a seed share one pass over the calibration data. Nothing is trained. Results are kept in
`.cache/byte_budget`, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from byte_budget import ORIGINAL, Setting, Variant, measure, pruned, reference_setting, table
from reference import REFERENCES, ROOT, Reference

from optimum_moe import ExpertMerging
from optimum_moe.stages import Stage

SHARES = (75, 50, 25)
REAM = ExpertMerging(
    num_experts=1,
    similarity="router_logits_and_outputs",
    grouping="saliency",
    weighting="reap",
    align_by="both",
    routing="reduce",
    router_rows="dominant",
)
MERGES: dict[str, ExpertMerging] = {
    "M-SMoE": ExpertMerging(num_experts=1),
    "M-SMoE + group refit (MergeMoE)": ExpertMerging(num_experts=1, refit="group"),
    "M-SMoE + block refit": ExpertMerging(num_experts=1, refit="block"),
    "M-SMoE, aligned by activations": ExpertMerging(num_experts=1, align_by="activations"),
    "M-SMoE, aligned by both": ExpertMerging(num_experts=1, align_by="both"),
    "HC-SMoE": ExpertMerging(num_experts=1, similarity="expert_outputs", grouping="average_linkage", align=False),
    "REAM": REAM,
    "REAM, mapped": replace(REAM, routing="map", router_rows="fit"),
    "M-SMoE groups, neurons": ExpertMerging(num_experts=1, merge="neurons", refit="block"),
    "dominants by loss, neurons": ExpertMerging(num_experts=1, grouping="loss", merge="neurons", refit="block"),
    "merge": ExpertMerging(
        num_experts=1, similarity="damage", grouping="complete_linkage", merge="neurons", refit="block"
    ),
}


def merged(reference: Reference, merge: ExpertMerging, share: float) -> Stage | None:
    """As many merged experts; None where a router with a row for each of them could not select among so few."""
    reduces = merge.routing == "reduce"
    count = reference.experts_at(share) if reduces else int(reference.num_experts * share)
    return None if count is None else replace(merge, num_experts=count)


def setting_of(reference: Reference) -> Setting:
    """Merges, and pruning by the criteria that they are compared with."""
    variants: dict[str, Variant] = {name: partial(merged, reference, merge) for name, merge in MERGES.items()}
    variants |= {f"{name} pruning": partial(pruned, reference, name) for name in ("random", "frequency", "reap")}
    return replace(reference_setting(reference), variants=variants)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, default="reference")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="per cent of the experts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "byte_budget")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    setting = setting_of(REFERENCES[arguments.on])
    arguments.variants = list(setting.variants)
    found = measure(setting, arguments)
    original = found[100, ORIGINAL][0].scores["perplexity"].value
    seeds = f"calibration seed{'s' * (len(arguments.seeds) > 1)} {', '.join(map(str, arguments.seeds))}"
    lines = [setting.source, "", f"Original: perplexity {original:.3f}. {seeds}; nothing is trained.", ""]
    lines += table(setting, found, arguments.shares)
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
