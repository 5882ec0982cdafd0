"""Make Qwen3-30B-A3B, or another Qwen3-MoE, fit into 16 GB, and measure what that costs on held-out text.

    python examples/qwen3_moe_16gb.py --calibration corpus.txt --text held_out.jsonl --output out
    python examples/qwen3_moe_16gb.py --stand-in --output out

61 GB in bfloat16 become 16: every expert gets fewer neurons, a low rank, or eight or four bits, whatever loses the
least for its bytes; all else stays in bfloat16. The result loads in transformers with this package. --stand-in takes
the small model of this repository and as large a share of its experts' bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor
from optimum_moe.evaluation import evaluate_many

REFERENCE = Path(__file__).parents[1] / "tests" / "data" / "reference"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-30B-A3B", help="Hub id or folder")
    parser.add_argument("--target-size", default="16GB", help='of the weight files, such as "16GB" or "50%%"')
    parser.add_argument("--calibration", help="text, another than --text")
    parser.add_argument("--text", help="held-out text")
    parser.add_argument("--tokens", type=int, default=65536, help="of the calibration text, and of the held-out text")
    parser.add_argument("--output", required=True)
    parser.add_argument("--stand-in", action="store_true", help="the small model of this repository, offline")
    arguments = parser.parse_args()
    if arguments.stand_in:
        # A fifth of the bytes of its experts remains, as of those of Qwen3-30B-A3B at 16 GB.
        arguments.model, arguments.target_size = str(REFERENCE / "model"), "35%"
        arguments.calibration, arguments.text = str(REFERENCE / "calibration.jsonl"), str(REFERENCE / "held_out.jsonl")
    elif not (arguments.calibration and arguments.text):
        parser.error("Give --calibration and --text, or --stand-in.")

    compressor = MoECompressor.from_pretrained(
        arguments.model,
        ByteBudget(target_size=arguments.target_size, runs_in="transformers", bits=[8, 4]),
        CalibrationConfig(arguments.calibration, max_tokens=arguments.tokens),
        device_map="auto",
    )
    compressor.apply()
    compressor.save_pretrained(arguments.output)
    print(compressor.measured())

    load = AutoModelForCausalLM.from_pretrained
    models = {name: load(folder) for name, folder in (("before", arguments.model), ("after", arguments.output))}
    results = evaluate_many(
        models,
        arguments.text,
        reference=models["before"],
        tokenizer=AutoTokenizer.from_pretrained(arguments.model),
        calibration=arguments.calibration,
        tasks=["perplexity", "agreement"],
        max_tokens=arguments.tokens,
    )
    for name, result in results.items():
        print(f"{name:<6}", *(f" {key} {score.value:.4f}" for key, score in result.scores.items()))


if __name__ == "__main__":
    main()
