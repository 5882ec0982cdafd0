"""Compare merging and pruning on one observation of a model: KL to the original on held-out text, at equal size.

    python examples/compare_methods.py org/model --keep-ratio 0.5 --calibration corpus.txt --text held_out.jsonl

Which one wins depends on how evenly a model uses its experts, so it is worth measuring before a long run.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE
from optimum_moe.evaluation import evaluate_many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--max-tokens", type=int, default=65536, help="of held-out text")
    arguments = parser.parse_args()
    methods = {
        "M-SMoE": MSMoE(keep_ratio=arguments.keep_ratio),
        "REAP": ExpertPruning(keep_ratio=arguments.keep_ratio, saliency="reap"),
        "frequency": ExpertPruning(keep_ratio=arguments.keep_ratio, saliency="frequency"),
        "random": ExpertPruning(keep_ratio=arguments.keep_ratio, saliency="random"),
    }
    data, statistics, models = CalibrationConfig(arguments.calibration), None, {}
    for name, method in methods.items():
        compressor = MoECompressor.from_pretrained(arguments.model, method, data)
        statistics = statistics or compressor.calibrate()
        models[name] = compressor.apply(statistics=statistics)
    results = evaluate_many(
        models,
        arguments.text,
        reference=AutoModelForCausalLM.from_pretrained(arguments.model),
        tokenizer=AutoTokenizer.from_pretrained(arguments.model),
        calibration=arguments.calibration,
        tasks=["agreement"],
        max_tokens=arguments.max_tokens,
    )
    for name, result in results.items():
        kl = result.scores["kl"]
        print(f"{name:<12} KL {kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}]")


if __name__ == "__main__":
    main()
