"""Prune a model whose router selects groups of experts first, such as DeepSeek-V3, layer by layer from disk.

    python examples/deepseek_groups.py --dequantize --mtp cut --calibration corpus.txt --output out
    python examples/deepseek_groups.py --stand-in --output out

Every router group loses the same number of experts, so that group-limited routing works as before and stock classes
load the result. DeepSeek-V3 is released in FP8 with a layer for multi-token prediction: --dequantize reads its bfloat16
values, --mtp cut prunes that layer's experts too. --stand-in takes the small DeepSeek-V3 of this repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, evaluate

DATA = Path(__file__).parents[1] / "tests" / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-ai/DeepSeek-V3", help="Hub id or folder")
    parser.add_argument("--keep-ratio", type=float, default=0.75)
    parser.add_argument("--dequantize", action="store_true", help="for a release in FP8")
    parser.add_argument("--mtp", default="error", choices=("error", "copy", "cut", "drop"))
    parser.add_argument("--calibration", help="text, another than --text")
    parser.add_argument("--text", help="held-out text; none to measure nothing")
    parser.add_argument("--tokens", type=int, default=65536, help="of the calibration text, and of the held-out text")
    parser.add_argument("--output", required=True)
    parser.add_argument("--stand-in", action="store_true", help="the small model of this repository, offline")
    arguments = parser.parse_args()
    if arguments.stand_in:
        arguments.model = str(DATA / "reference_deepseek" / "model")
        arguments.calibration = str(DATA / "reference" / "calibration.jsonl")
        arguments.text = str(DATA / "reference" / "held_out.jsonl")
    elif not arguments.calibration:
        parser.error("Give --calibration, or --stand-in.")

    compressor = MoECompressor.from_pretrained(
        arguments.model,
        ExpertPruning(keep_ratio=arguments.keep_ratio, saliency="reap"),
        CalibrationConfig(arguments.calibration, max_tokens=arguments.tokens),
        engine="streaming",
        output_dir=arguments.output,
        dequantize=arguments.dequantize,
        mtp=arguments.mtp,
    )
    compressor.apply()
    print(compressor.measured())
    for found in compressor.source.blocks:
        info, kept = found.info, compressor.plan.blocks[found.info.name].references_G
        size = info.num_experts // info.router_groups
        counts = [sum(expert // size == group for expert in kept) for group in range(info.router_groups)]
        print(f"{info.name}: {size} experts in each router group -> {', '.join(map(str, counts))}")

    if arguments.text:
        result = evaluate(
            arguments.output,
            arguments.text,
            reference=arguments.model,
            calibration=arguments.calibration,
            tasks=["perplexity", "agreement"],
            max_tokens=arguments.tokens,
        )
        for name, score in result.scores.items():
            print(f"{name}: {score.value:.4f} [{score.low:.4f}, {score.high:.4f}]")


if __name__ == "__main__":
    main()
