"""What skipping experts saves and costs on a bundled reference model, alone and after pruning, on held-out text.

    python benchmarks/expert_skipping.py [--on reference] [--max-tokens 16384] [--betas 0 0.25 0.5] [--threads 1]

For each ratio beta, and the medians of the calibration text, in the whole model and in one that keeps half of its
experts: share of the weights' bytes that remains, experts that a token runs (on the held-out text), perplexity and KL
to the original, and the seconds of CPU of one forward pass over that text divided by those of the original, which runs
in turn with it in the same process (the fastest of three).
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence

import torch
import transformers
from reference import CALIBRATION, HELD_OUT, REFERENCES

from optimum_moe import CalibrationConfig, ExpertPruning, ExpertSkipping, MoECompressor
from optimum_moe.calibration import batches_for, observe
from optimum_moe.evaluation import evaluate_many
from optimum_moe.stages import Stage
from optimum_moe.surgeons import FoundBlock, find_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, default="reference")
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--saliency", default="frequency", help="Criterion of the pruned rows.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    reference, seed = REFERENCES[arguments.on], arguments.seed
    original = transformers.AutoModelForCausalLM.from_pretrained(reference.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference.model)
    data = CalibrationConfig(str(CALIBRATION), sequence_length=256, max_tokens=16384, seed=seed)
    held_out = CalibrationConfig(str(HELD_OUT), sequence_length=256, max_tokens=arguments.max_tokens, seed=seed)
    skips = {f"beta {beta:g}": ExpertSkipping(beta=beta) for beta in arguments.betas}
    skips["medians"] = ExpertSkipping()
    half = ExpertPruning(keep_ratio=0.5, saliency=arguments.saliency)
    recipes: dict[str, list[Stage]] = {name: [skip] for name, skip in skips.items()}
    recipes["half of the experts"] = [half]
    recipes |= {f"half of the experts, {name}": [half, skip] for name, skip in skips.items()}
    print(f"{reference.source_line}\n")
    print("| | bytes | experts a token | perplexity | KL | seconds, of the original's |\n" + "|---" * 6 + "|")
    for name, stages in recipes.items():
        model = reference.model
        for stage in stages:
            # Routing weights are observed with the experts that are left, so each stage starts from the last result.
            compressor = MoECompressor.from_pretrained(
                model, stage, data, seed=seed, tokenizer=tokenizer, progress=False
            )
            model = compressor.apply()
        scores = evaluate_many(
            {name: model},
            str(HELD_OUT),
            reference=original,
            tokenizer=tokenizer,
            max_tokens=arguments.max_tokens,
            tasks=("perplexity", "agreement"),
            progress=False,
        )[name].scores
        batches = batches_for(model, held_out, tokenizer)
        experts = experts_per_token(model, find_blocks(model), batches, held_out)
        cells = [
            f"{bytes_of(model) / bytes_of(original):.0%}",
            f"{experts:.2f}",
            f"{scores['perplexity'].value:.3f}",
            f"{scores['kl'].value:.4f}",
            f"{share_of_time(model, original, batches):.2f}x",
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def bytes_of(model: transformers.PreTrainedModel) -> int:
    """Bytes of all weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def experts_per_token(
    model: transformers.PreTrainedModel, blocks: Sequence[FoundBlock], batches: object, config: CalibrationConfig
) -> float:
    """Mean number of experts that a token runs in a block."""
    observed = observe(model, blocks, batches, config, progress=False, needs=("frequency",)).blocks.values()
    return sum(float(b.token_count_E.sum()) / b.num_tokens for b in observed) / len(observed)


@torch.no_grad()
def share_of_time(
    model: transformers.PreTrainedModel, original: transformers.PreTrainedModel, batches: object
) -> float:
    """CPU seconds of a pass over all batches over those of the original; of each the fastest of three, in turn."""
    times: dict[str, list[float]] = {"model": [], "original": []}
    for _ in range(3):
        for name, each in (("model", model), ("original", original)):
            start = time.process_time()
            for batch in batches:
                each(**batch, use_cache=False)
            times[name].append(time.process_time() - start)
    return min(times["model"]) / min(times["original"])


if __name__ == "__main__":
    main()
