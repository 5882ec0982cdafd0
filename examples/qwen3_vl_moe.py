"""Compress a vision model, Qwen3-VL-30B-A3B, on pictures, and show which experts serve them.

    python examples/qwen3_vl_moe.py --calibration photographs.jsonl --output out
    python examples/qwen3_vl_moe.py --stand-in --output out

A line of photographs.jsonl is a chat: {"messages": [{"role": "user", "content": [{"type": "image", "path": "cat.jpg"},
{"type": "text", "text": "What is this?"}]}, {"role": "assistant", "content": "A cat."}]}. The vision tower and the
processor stay as they are. --stand-in takes a small random model and random pictures: its sizes mean something, its
answers do not.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor
from optimum_moe.statistics import MODALITIES

IMAGE, PATCHES, MERGED = 90, 16, 4


def stand_in() -> tuple[str, list[dict[str, torch.Tensor]]]:
    """A small random model, and inputs of 48 tokens with a picture of 16 patches, which are four of the tokens."""
    config = Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 99,
            "hidden_size": 64,
            "intermediate_size": 48,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 4,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=93,
        vision_end_token_id=94,
    )
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    Qwen3VLMoeForConditionalGeneration(config).save_pretrained(folder)
    rows = []
    for _ in range(32):
        ids = torch.randint(3, 89, (1, 48))
        ids[:, 2 : 2 + PATCHES // MERGED] = IMAGE
        rows.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == IMAGE).long(),
                "pixel_values": torch.randn(PATCHES, 3 * 2 * 16),
                "image_grid_thw": torch.tensor([[1, 4, 4]]),
            }
        )
    return folder, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-VL-30B-A3B-Instruct", help="Hub id or folder")
    parser.add_argument("--share", type=float, default=0.5, help="of the experts' bytes that remains")
    parser.add_argument("--calibration", help="chats or rows with pictures")
    parser.add_argument("--output", required=True)
    parser.add_argument("--stand-in", action="store_true", help="a small random model and random pictures, offline")
    arguments = parser.parse_args()
    data: Any = arguments.calibration
    if arguments.stand_in:
        arguments.model, data = stand_in()
    elif not data:
        parser.error("Give --calibration, or --stand-in.")

    recipe, calibration = ByteBudget(share=arguments.share), CalibrationConfig(data)
    compressor = MoECompressor.from_pretrained(arguments.model, recipe, calibration, device_map="auto")
    statistics = compressor.calibrate()
    compressor.apply(statistics)
    compressor.save_pretrained(arguments.output)
    print(compressor.measured())
    print(*compressor.plan.remarks, sep="\n")
    print("Tokens of pictures, by expert (* stays):")
    for name, block in statistics.blocks.items():
        kept = compressor.plan.blocks[name].references_G
        counts = block.modality_count_VE[MODALITIES.index("image")].tolist()
        print(f"{name}:", *(f"{count:.0f}{'*' * (expert in kept)}" for expert, count in enumerate(counts)))


if __name__ == "__main__":
    main()
