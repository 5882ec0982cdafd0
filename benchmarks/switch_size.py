"""Bytes and FLOPs of a Switch-base-32-shaped model before and after MC-SMoE: from the files, and by a FLOP counter.

A checkpoint of the shape of google/switch-base-32 with random bf16 weights is written, compressed by the streaming
engine with the presets `mc-smoe` (plain SVD) and `mc-smoe-fast` (calibration only), and measured:

    file bytes   sizes of all safetensors files, from the file system
    preview      what `MoECompressor.preview()` said before any weight was read; must equal the files to 1%
    FLOPs        a token by the package (2 x multiply-adds of all weight matmuls, attention scores excluded), and by
                 torch.utils.flop_counter on a forward pass of N source and N target tokens, without cache: its `mm`
                 and `addmm` over N (attention scores are its `bmm`, printed beside; they do not change)
    zeros        share of stored numbers that are 0, so that nothing is small by counting zeros

Random weights say nothing of quality; sizes and FLOPs do not depend on them. The router drops tokens beyond
`expert_capacity`, and a dropped token runs no expert: it is raised for the FLOP counter, so that none is dropped.

    python benchmarks/switch_size.py [--folder /data/scratch] [--no-align] [--untied]
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration
from transformers.utils import logging

from optimum_moe import CalibrationConfig, MoECompressor, MSMoE
from optimum_moe.checkpoint.shards import write_shard
from optimum_moe.recipe import coerce_recipe

LEAST_SAVED_BYTES, LEAST_SAVED_FLOPS, PREVIEW_TOLERANCE = 0.85, 0.20, 0.01
UNALIGNED = "unaligned (random experts have nothing to align, and no size depends on it)"
WEIGHT_OPS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def config(untied: bool) -> SwitchTransformersConfig:
    """The published config of google/switch-base-32."""
    return SwitchTransformersConfig(
        vocab_size=32128,
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=12,
        num_decoder_layers=12,
        num_sparse_encoder_layers=6,
        num_sparse_decoder_layers=6,
        num_heads=12,
        num_experts=32,
        expert_capacity=64,
        tie_word_embeddings=not untied,
        decoder_start_token_id=0,
        architectures=["SwitchTransformersForConditionalGeneration"],
        dtype="bfloat16",
    )


def write(folder: Path, made: SwitchTransformersConfig) -> None:
    """Write a random checkpoint, one layer at a time."""
    with torch.device("meta"):
        skeleton = SwitchTransformersForConditionalGeneration(made)
    # What is tied is stored once.
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        words = name.split(".")
        parts.setdefault(".".join(words[:3]) if words[1] == "block" else "outside", []).append(name)
    folder.mkdir(parents=True)
    made.save_pretrained(folder)
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, names in enumerate(parts.values(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: random_tensor(name, shapes[name], generator) for name in names}
        write_shard(folder / file, tensors)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": file_bytes(folder)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for norms, else normal of the variance of a linear layer."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).div_(math.sqrt(shape[-1])).to(torch.bfloat16)


def file_bytes(folder: Path) -> int:
    """Bytes of all safetensors files but the plan's, which no model needs to run."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors") if not f.name.startswith("plan"))


def share_of_zeros(folder: Path) -> float:
    """Of the stored numbers, indices excluded."""
    zeros = numbers = 0
    for file in folder.glob("model*.safetensors"):
        for tensor in load_file(file).values():
            if tensor.is_floating_point():
                zeros, numbers = zeros + tensor.numel() - int(tensor.count_nonzero()), numbers + tensor.numel()
    return zeros / numbers


def calibration(made: SwitchTransformersConfig, tokens: int) -> CalibrationConfig:
    """A few random tokens; experts that none of them reaches stay."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            name: torch.randint(2, made.vocab_size, (4, 128), generator=generator)
            for name in ("input_ids", "decoder_input_ids")
        }
        for _ in range(max(1, tokens // 512))
    ]
    return CalibrationConfig(rows, reservoir_tokens=1024, unseen="keep")


@torch.no_grad()
def counted_flops(folder: Path, tokens: int) -> tuple[float, float]:
    """FLOPs of (source, target) token by the counter: of weights, and of attention scores."""
    model = SwitchTransformersForConditionalGeneration.from_pretrained(folder, expert_capacity=tokens).eval()
    generator = torch.Generator().manual_seed(2)
    source, target = torch.randint(2, model.config.vocab_size, (2, 1, tokens), generator=generator)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=source, decoder_input_ids=target, use_cache=False)
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    weights = sum(counts.pop(op) for op in WEIGHT_OPS if op in counts)
    assert set(counts) <= {torch.ops.aten.bmm}, counts
    return weights / tokens, sum(counts.values()) / tokens


def compress(original: Path, out: Path, preset: str, data: CalibrationConfig, align: bool) -> Any:
    """Preview of a preset, and the compressed checkpoint in `out`."""
    recipe = coerce_recipe(preset)
    merge, *following = recipe.stages
    assert isinstance(merge, MSMoE)
    compressor = MoECompressor.from_pretrained(
        original, [replace(merge, align=align), *following], data, engine="streaming", output_dir=out, progress=False
    )
    expected = compressor.preview()
    compressor.apply()
    return expected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "switch_size",
        help="Where checkpoints are written and removed again: 5 GB.",
    )
    parser.add_argument("--presets", nargs="+", default=["mc-smoe", "mc-smoe-fast"])
    parser.add_argument("--tokens", type=int, default=128, help="N source and N target tokens of the FLOP counter")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--untied", action="store_true", help="an lm_head of its own")
    parser.add_argument("--no-align", action="store_true", help="merge unaligned: random experts have nothing to align")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    made, original = config(args.untied), args.folder / "switch-base-32-shaped"
    shutil.rmtree(original, ignore_errors=True)
    write(original, made)
    before, (flops, scores) = file_bytes(original), counted_flops(original, args.tokens)
    print(
        f"Switch-base-32 shape, random bf16 weights, {'untied' if args.untied else 'tied'} embeddings, "
        f"{UNALIGNED if args.no_align else 'aligned'}; {args.calibration_tokens} random calibration tokens\n"
        f"FLOP counter: {args.tokens} source and {args.tokens} target tokens, expert_capacity raised to "
        f"{args.tokens} (none dropped), attention scores {scores:,.0f} a token excluded\n"
    )
    print(
        f"{'':<14}{'file bytes':>15}{'preview':>15}{'off':>7}{'FLOPs, package':>16}{'counted':>14}{'off':>7}"
        f"{'zeros':>8}"
    )
    missed = []
    for preset in args.presets:
        out, began = args.folder / preset, time.monotonic()
        shutil.rmtree(out, ignore_errors=True)
        expected = compress(original, out, preset, calibration(made, args.calibration_tokens), not args.no_align)
        seconds = time.monotonic() - began
        after, (fewer, same_scores) = file_bytes(out), counted_flops(out, args.tokens)
        assert same_scores == scores
        if preset == args.presets[0]:
            print_row("original", before, expected.before, flops, original)
        print_row(preset, after, expected.after, fewer, out)
        saved = 1 - after / before, 1 - fewer / flops
        print(f"  file smaller by {saved[0]:.2%}, counted FLOPs lower by {saved[1]:.2%}; {seconds:.0f} s", flush=True)
        missed += [f"{preset}: bytes"] * (saved[0] < LEAST_SAVED_BYTES)
        missed += [f"{preset}: FLOPs"] * (saved[1] < LEAST_SAVED_FLOPS)
        missed += [f"{preset}: preview"] * (abs(expected.after.bytes / after - 1) > PREVIEW_TOLERANCE)
        shutil.rmtree(out)
    shutil.rmtree(original)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\npeak resident memory {peak / 1e9:.1f} GB, mapped files included")
    print(
        f"targets (file smaller by {LEAST_SAVED_BYTES:.0%}, FLOPs lower by {LEAST_SAVED_FLOPS:.0%}, preview within "
        f"{PREVIEW_TOLERANCE:.0%} of the files): " + (", ".join(missed) + " missed" if missed else "all met")
    )
    if missed:
        raise SystemExit(1)


def print_row(name: str, size: int, cost: Any, counted: float, folder: Path) -> None:
    """One line of the table."""
    print(
        f"{name:<14}{size:>15,}{cost.bytes:>15,}{cost.bytes / size - 1:>7.2%}{cost.flops_per_token:>16,.0f}"
        f"{counted:>14,.0f}{cost.flops_per_token / counted - 1:>7.2%}{share_of_zeros(folder):>8.3%}"
    )


if __name__ == "__main__":
    main()
