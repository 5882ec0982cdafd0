"""Writes a random checkpoint like Qwen3-MoE with 128 experts, one layer at a time, of any size.

python benchmarks/synthetic_checkpoint.py FOLDER --layers 8
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig

from optimum_moe.checkpoint.shards import write_shard

EXPERTS = 128


def config(layers: int, hidden: int, intermediate: int) -> Qwen3MoeConfig:
    """Shapes of Qwen3-30B-A3B, with other widths."""
    return Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )


def layer_shapes(made: Qwen3MoeConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one layer's tensors, as they are released."""
    prefix, hidden = f"model.layers.{layer}", made.hidden_size
    heads, groups = made.num_attention_heads * made.head_dim, made.num_key_value_heads * made.head_dim
    for name, rows in (("q_proj", heads), ("k_proj", groups), ("v_proj", groups)):
        yield f"{prefix}.self_attn.{name}.weight", (rows, hidden)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, heads)
    for name in ("q_norm", "k_norm"):
        yield f"{prefix}.self_attn.{name}.weight", (made.head_dim,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{name}.weight", (hidden,)
    yield f"{prefix}.mlp.gate.weight", (EXPERTS, hidden)
    for expert in range(EXPERTS):
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.mlp.experts.{expert}.{name}.weight", (made.moe_intermediate_size, hidden)
        yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (hidden, made.moe_intermediate_size)


def layer_bytes(layers: int, hidden: int, intermediate: int) -> int:
    """Bytes of one decoder layer."""
    shapes = layer_shapes(config(layers, hidden, intermediate), 0)
    return 2 * sum(torch.Size(shape).numel() for _, shape in shapes)


def write(folder: Path, layers: int, hidden: int = 1024, intermediate: int = 384) -> int:
    """Write the checkpoint; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    made = config(layers, hidden, intermediate)
    made.save_pretrained(folder)
    outside = [(f"{name}.weight", (made.vocab_size, hidden)) for name in ("model.embed_tokens", "lm_head")]
    parts = [list(layer_shapes(made, layer)) for layer in range(layers)]
    parts.append([*outside, ("model.norm.weight", (hidden,))])
    generator, weight_map, size = torch.Generator().manual_seed(0), {}, 0
    # One pool of numbers for all: what is measured does not depend on them, and drawing each would take hours.
    pool = torch.randn(64 << 20, generator=generator).mul_(0.02).to(torch.bfloat16)
    for number, shapes in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors, start = {}, 977 * number
        for name, shape in shapes:
            numel = int(torch.Size(shape).numel())
            if start + numel > len(pool):
                start = 977 * number
            tensors[name] = (
                torch.ones(shape, dtype=pool.dtype) if "norm" in name else pool[start : start + numel].view(shape)
            )
            start += numel
        size += write_shard(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=384)
    args = parser.parse_args()
    print(f"{write(args.folder, args.layers, args.hidden, args.intermediate):,} bytes")
