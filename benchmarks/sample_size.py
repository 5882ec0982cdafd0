"""What more calibration text, and a larger sample of its tokens, gain the byte budget, and what they cost.

    python benchmarks/sample_size.py [--on reference] [--observed 131072] [--samples 32768 65536 131072]

Calibrates on random documents of the text that the bundled models were trained on (fetched as for
benchmarks/train_reference.py), of which the bundled calibration text is a small part. Prints for each size of the
sample the KL on held-out text, and the seconds of CPU for the observation and for each compression.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings

import torch
import transformers
from reference import HELD_OUT, REFERENCES
from reference_text import CALIBRATION_CHARACTERS, load_documents, split_documents

from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor
from optimum_moe.evaluation import evaluate_many

RUNTIMES = ("any", "transformers")
SHARES = (50, 25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, default="reference")
    parser.add_argument("--observed", type=int, default=131072, help="tokens that are observed")
    parser.add_argument("--samples", type=int, nargs="+", default=[32768, 65536, 131072])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    reference, seed = REFERENCES[arguments.on], arguments.seed
    # No document is so long that it is most of the text.
    texts = [document.text[:CALIBRATION_CHARACTERS] for document in split_documents(load_documents())[0]]
    random.Random(seed).shuffle(texts)
    original = transformers.AutoModelForCausalLM.from_pretrained(reference.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference.model)
    variants = [(runtime, share) for share in SHARES for runtime in RUNTIMES]
    names = [f"{runtime}, {share}%" for runtime, share in variants]
    print(f"{reference.source_line}\n")
    print(f"| observed | sampled | seconds | {' | '.join(names)} |")
    print("|---" * (3 + len(names)) + "|")
    for sample in arguments.samples:
        data = CalibrationConfig(
            texts, sequence_length=256, max_tokens=arguments.observed, reservoir_tokens=sample, seed=seed
        )
        start = time.process_time()
        observing = ByteBudget(share=0.5)
        statistics = MoECompressor.from_pretrained(
            reference.model, observing, data, seed=seed, progress=False
        ).calibrate()
        observed_in = time.process_time() - start
        cells = []
        for runtime, share in variants:
            start = time.process_time()
            compressor = MoECompressor.from_pretrained(
                reference.model, ByteBudget(share=share / 100, runs_in=runtime), seed=seed, progress=False
            )
            model = compressor.apply(statistics=statistics)
            taken = time.process_time() - start
            result = evaluate_many(
                {"compressed": model},
                str(HELD_OUT),
                reference=original,
                tokenizer=tokenizer,
                max_tokens=16384,
                num_questions=2,
                num_prompts=1,
                progress=False,
            )["compressed"]
            cells.append(f"{result.scores['kl'].value:.4f} ({taken:.0f} s)")
        print(f"| {arguments.observed:,} | {sample:,} | {observed_in:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
