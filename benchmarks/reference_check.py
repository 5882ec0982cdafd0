"""Shows that the bundled reference models are language models whose experts and routing matter.

    python benchmarks/reference_check.py [--output benchmarks/results/reference_models.md]

On held-out text, for each model of `reference.REFERENCES`: its perplexity, that of a unigram model (counted on the
training text, add-one), the perplexity with shuffled routing (a fixed random permutation of the selected expert ids in
each block) and with a random half of the experts pruned, and how evenly the tokens spread over the experts of each
block. Exits with 1 if a model misses a bound. The training text comes from `reference_text.py`, which downloads it on
the first call.
"""

from __future__ import annotations

import argparse
import math
import statistics as stats
import warnings
from pathlib import Path

import torch
import transformers
from reference import HELD_OUT, REFERENCES, Reference
from reference_text import load_documents, split_documents
from train_reference import token_stream

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor
from optimum_moe.evaluation import evaluate_many
from optimum_moe.evaluation.heldout import prepare
from optimum_moe.surgeons import find_blocks

UNIGRAM_BOUND = 3.0
SHUFFLED_BOUND = 1.2
PRUNED_BOUND = 1.1
SEEDS = (0, 1, 2)
ORIGINAL, SHUFFLED = "original", "shuffled"


def unigram_perplexity(tokenizer: transformers.PreTrainedTokenizerBase, max_tokens: int) -> float:
    """Of add-one counts on the training text, on the tokens that `evaluate` has the models predict."""
    training, _, _ = split_documents(load_documents())
    counts_V = torch.bincount(token_stream(tokenizer, training), minlength=len(tokenizer)).double() + 1
    held_out = prepare(str(HELD_OUT), tokenizer, max_tokens=max_tokens, sequence_length=256, batch_size=8, seed=0)
    predicted_T = torch.cat([batch["input_ids"][:, 1:].flatten() for batch in held_out.windows])
    return math.exp(-(counts_V / counts_V.sum()).log()[predicted_T].mean())


@torch.no_grad()
def shuffled(reference: Reference) -> transformers.PreTrainedModel:
    """The model whose routers select other experts: permuted weights are permuted ids."""
    model = transformers.AutoModelForCausalLM.from_pretrained(reference.model)
    generator = torch.Generator().manual_seed(0)
    for found in find_blocks(model):
        order_E = torch.randperm(found.info.num_experts, generator=generator)
        for weight_EXY in found.surgeon.expert_parameters(found.module(model)):
            weight_EXY.copy_(weight_EXY[order_E])
    return model


def perplexities(reference: Reference, max_tokens: int) -> dict[str, float]:
    """Of the original, the shuffled model and one pruned model for each of `SEEDS`."""
    models = {
        ORIGINAL: transformers.AutoModelForCausalLM.from_pretrained(reference.model),
        SHUFFLED: shuffled(reference),
    }
    method = ExpertPruning(num_experts=reference.num_experts // 2, saliency="random")
    for seed in SEEDS:
        compressor = MoECompressor.from_pretrained(reference.model, method, seed=seed, progress=False)
        models[f"pruned, seed {seed}"] = compressor.apply()
    results = evaluate_many(
        models,
        str(HELD_OUT),
        max_tokens=max_tokens,
        tasks=("perplexity",),
        progress=False,
        tokenizer=transformers.AutoTokenizer.from_pretrained(reference.model),
    )
    return {name: result.scores["perplexity"].value for name, result in results.items()}


def load_variations(reference: Reference, max_tokens: int) -> list[float]:
    """Standard deviation over mean of the experts' loads, block by block, on held-out text."""
    data = CalibrationConfig(str(HELD_OUT), sequence_length=256, max_tokens=max_tokens)
    method = ExpertPruning(keep_ratio=0.5, saliency="frequency")
    statistics = MoECompressor.from_pretrained(reference.model, method, data, progress=False).calibrate()
    shares = [block.frequency_E for block in statistics.blocks.values()]
    return [float(share_E.std(correction=0) / share_E.mean()) for share_E in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-tokens", type=int, default=32768, help="of held-out text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    lines = [
        "The bundled reference models, by benchmarks/reference_check.py on "
        f"{arguments.max_tokens:,} tokens of whole held-out documents. Factors are perplexities relative to the "
        f"original; bounds: unigram at least x{UNIGRAM_BOUND:g}, shuffled x{SHUFFLED_BOUND:g}, random half "
        f"x{PRUNED_BOUND:g} (mean and least of {len(SEEDS)} seeds). Load variation: standard deviation / mean of the "
        "experts' loads in each block.",
        "",
        "| model | bytes | perplexity | unigram | shuffled routing | random half of the experts | load variation |",
        "|---" * 7 + "|",
    ]
    missed = False
    for name, reference in REFERENCES.items():
        size = (reference.model / "model.safetensors").stat().st_size
        found = perplexities(reference, arguments.max_tokens)
        original = found.pop(ORIGINAL)
        shuffle = found.pop(SHUFFLED) / original
        unigram = unigram_perplexity(transformers.AutoTokenizer.from_pretrained(reference.model), arguments.max_tokens)
        pruned = [perplexity / original for perplexity in found.values()]
        variation = ", ".join(f"{value:.2f}" for value in load_variations(reference, arguments.max_tokens))
        lines.append(
            f"| {name}: {reference.description} | {size:,} | {original:.1f} | {unigram:.1f} (x{unigram / original:.1f})"
            f" | x{shuffle:.2f} | x{stats.mean(pruned):.2f} (x{min(pruned):.2f}) | {variation} |"
        )
        missed |= unigram < UNIGRAM_BOUND * original or shuffle < SHUFFLED_BOUND or min(pruned) < PRUNED_BOUND
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    raise SystemExit(int(missed))


if __name__ == "__main__":
    main()
