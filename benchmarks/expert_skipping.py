"""What skipping experts saves and costs on a bundled reference model, on held-out text.

    python benchmarks/expert_skipping.py [--on reference] [--max-tokens 16384] [--betas 0 0.25 0.5] [--threads 1]

For each ratio beta, and the medians of the calibration text: experts that a token runs (on the held-out text),
perplexity and KL to the original, and the seconds of CPU of one forward pass over that text divided by those of the
original in the same process (the fastest of three).
"""

from __future__ import annotations

import argparse
import time

import torch
import transformers
from reference import CALIBRATION, HELD_OUT, REFERENCES

from optimum_moe import CalibrationConfig, ExpertSkipping, MoECompressor
from optimum_moe.calibration import batches_for, observe
from optimum_moe.evaluation import evaluate_many
from optimum_moe.surgeons import FoundBlock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, default="reference")
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    reference, seed = REFERENCES[arguments.on], arguments.seed
    original = transformers.AutoModelForCausalLM.from_pretrained(reference.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference.model)
    data = CalibrationConfig(str(CALIBRATION), sequence_length=256, max_tokens=16384, seed=seed)
    held_out = CalibrationConfig(str(HELD_OUT), sequence_length=256, max_tokens=arguments.max_tokens, seed=seed)
    stages = {f"beta {beta:g}": ExpertSkipping(beta=beta) for beta in arguments.betas}
    stages["medians"] = ExpertSkipping()
    print(f"{reference.source_line}\n")
    print("| | experts a token | perplexity | KL | seconds, of the original's |\n|---|---|---|---|---|")
    for name, stage in stages.items():
        compressor = MoECompressor.from_pretrained(reference.model, stage, data, seed=seed, progress=False)
        model = compressor.apply()
        scores = evaluate_many(
            {name: model},
            str(HELD_OUT),
            reference=original,
            tokenizer=tokenizer,
            max_tokens=arguments.max_tokens,
            num_questions=2,
            num_prompts=1,
            progress=False,
        )[name].scores
        batches = batches_for(model, held_out, tokenizer)
        experts = experts_per_token(model, compressor.source.blocks, batches, held_out)
        share = seconds(model, batches) / seconds(original, batches)
        cells = [f"{experts:.2f}", f"{scores['perplexity'].value:.3f}", f"{scores['kl'].value:.4f}", f"{share:.2f}x"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def experts_per_token(
    model: transformers.PreTrainedModel, blocks: tuple[FoundBlock, ...], batches: object, config: CalibrationConfig
) -> float:
    """Mean number of experts that a token runs in a block."""
    observed = observe(model, blocks, batches, config, progress=False, needs=("frequency",)).blocks.values()
    return sum(float(b.token_count_E.sum()) / b.num_tokens for b in observed) / len(observed)


@torch.no_grad()
def seconds(model: transformers.PreTrainedModel, batches: object) -> float:
    """Seconds of CPU of a pass over all batches, the fastest of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        for batch in batches:
            model(**batch, use_cache=False)
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
