"""CPU hours that a byte budget takes on models of 30B and 235B parameters, added up from measured parts of one layer.

The model has one layer of the true shape, with random weights. Measured: observing (a forward and a backward pass over
`--tokens` random tokens), and for an expert finding its candidates and building the chosen one, on its share of the
sampled tokens. The first experts of a block, which try all candidates, and others are measured, as in
`budget_speed.py`. What is added up is each layer's observation for 65,536 tokens and its experts; embeddings and the
head are left out. "floor" is a forward pass alone; "sampled" are the tokens that candidates are measured on, all of
them where there is room for their hidden states and gradients.

    python benchmarks/budget_scale.py [--shapes 30B 235B] [--runs-in any transformers]
"""

from __future__ import annotations

import argparse
import gc
import statistics as stats
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from budget_speed import FIRST, OTHERS, mean_of_block, timed_block
from candidate_speed import draw_expert
from synthetic_checkpoint import EXPERTS, config
from transformers import Qwen3MoeForCausalLM

from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor
from optimum_moe.formats import build_expert, choose

CALIBRATION_TOKENS = 65536
SELECTED = 8


@dataclass(frozen=True)
class Shape:
    """A model: its layers, and the widths of one."""

    layers: int
    hidden: int
    inner: int


SHAPES = {"30B": Shape(48, 2048, 768), "235B": Shape(94, 4096, 1536)}


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def observation(shape: Shape, tokens: int) -> tuple[float, float]:
    """CPU seconds a token of a forward pass alone, and of observing with gradients."""
    model = Qwen3MoeForCausalLM._from_config(config(1, shape.hidden, shape.inner), dtype=torch.bfloat16)
    ids = torch.randint(0, 2048, (tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    data = CalibrationConfig([{"input_ids": row[None]} for row in ids])
    with torch.no_grad():
        model(ids[:1])
        floor = seconds(lambda: [model(row[None]) for row in ids])
    recipe = ByteBudget(share=0.5, runs_in="transformers")
    compressor = MoECompressor.from_pretrained(model, recipe, data, progress=False)
    return floor / ids.numel(), seconds(compressor.calibrate) / ids.numel()


def an_expert(shape: Shape, tokens: int, formats: list[str] | None) -> float:
    """CPU seconds of an expert of a block: its candidates and the chosen one, at half of the bytes."""
    drawn = [draw_expert(shape.hidden, shape.inner, tokens, number) for number in range(FIRST + OTHERS)]
    found, first, others = timed_block(drawn, formats)
    chosen = choose(found, 0.5 * sum(own[-1].bytes for own in found))
    built = [
        seconds(lambda own=own, point=point: build_expert(*own, point.candidate))
        for own, point in zip(drawn, chosen, strict=True)
    ]
    return mean_of_block(first, others, EXPERTS) + stats.mean(built)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=2048, help="random tokens that are observed")
    parser.add_argument("--sampled", nargs="+", type=int, default=[16384, 32768, CALIBRATION_TOKENS])
    parser.add_argument("--runs-in", nargs="+", default=["any", "transformers"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {CALIBRATION_TOKENS:,} tokens, half of the experts' bytes.\n")
    print("| model | runs in | sampled | floor, h | observing, h | an expert, s | experts, h | in all, CPU h |")
    print("|---" * 8 + "|")
    for name in arguments.shapes:
        shape = SHAPES[name]
        floor, observed = (
            value * CALIBRATION_TOKENS * shape.layers / 3600 for value in observation(shape, arguments.tokens)
        )
        gc.collect()
        for runs_in in arguments.runs_in:
            formats = list(ByteBudget(share=0.5, runs_in=runs_in).tried_formats)
            for sampled in arguments.sampled:
                each = an_expert(shape, sampled * SELECTED // EXPERTS, formats)
                experts = each * EXPERTS * shape.layers / 3600
                cells = f"{floor:.2f} | {observed:.2f} | {each:.2f} | {experts:.2f} | {observed + experts:.1f}"
                print(f"| {name} | {runs_in} | {sampled:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
