"""Compress a model to a share of its experts' bytes, and measure what that costs on held-out text.

python examples/byte_budget.py org/model --share 0.5 --calibration corpus.txt --text held_out.jsonl --output out
"""

from __future__ import annotations

import argparse

from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("--share", type=float, default=0.5, help="of the experts' bytes that remains")
    parser.add_argument("--runs-in", default="any", help="any for what loads the original, or transformers")
    parser.add_argument("--calibration", required=True, help="text, another than --text")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--output", required=True)
    parser.add_argument("--max-tokens", type=int, default=65536, help="of held-out text")
    arguments = parser.parse_args()
    compressor = MoECompressor.from_pretrained(
        arguments.model,
        ByteBudget(share=arguments.share, runs_in=arguments.runs_in),
        CalibrationConfig(arguments.calibration),
    )
    print(compressor.preview())
    compressor.apply()
    compressor.save_pretrained(arguments.output)
    result = evaluate(
        arguments.output,
        arguments.text,
        reference=arguments.model,
        calibration=arguments.calibration,
        tasks=["perplexity", "agreement"],
        max_tokens=arguments.max_tokens,
    )
    for name, score in result.scores.items():
        print(f"{name}: {score.value:.4f} [{score.low:.4f}, {score.high:.4f}]")


if __name__ == "__main__":
    main()
