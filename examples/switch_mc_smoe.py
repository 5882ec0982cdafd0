"""MC-SMoE on Switch Transformers, as in "Merge, Then Compress" (Li et al., ICLR 2024): merge, factorize, distill.

    python examples/switch_mc_smoe.py --model my-fine-tuned-switch-base-32 --text task.txt --output out
    python examples/switch_mc_smoe.py --stand-in --output out

Experts are merged to a quarter, blocks keeping different numbers (M-SMoE); every matrix that is left becomes a low rank
and sparse rows; and the sparse rows are pruned to a tenth while all of it is trained on the original's predictions. The
paper starts from a model that was fine-tuned on its task. --stand-in takes a small random one, whose sizes mean
something and whose predictions do not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from optimum_moe import CalibrationConfig, LowRankSparse, MoECompressor, MSMoE, recover

REFERENCE = Path(__file__).parents[1] / "tests" / "data" / "reference"


def save_stand_in(folder: Path) -> str:
    """A Switch of four sparse layers of 32 experts, with the tokenizer of this repository's model."""
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE / "model")
    config = SwitchTransformersConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_heads=4,
        num_layers=4,
        num_decoder_layers=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_experts=32,
        decoder_start_token_id=0,
    )
    SwitchTransformersForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="google/switch-base-32", help="Hub id or folder")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--final-density", type=float, default=0.1, help="share of the sparse rows that remains")
    parser.add_argument("--text", help="of the task")
    parser.add_argument("--tokens", type=int, default=65536, help="of the text, to observe and to train on")
    parser.add_argument("--output", required=True)
    parser.add_argument("--stand-in", action="store_true", help="a small random model, offline")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    if arguments.stand_in:
        arguments.model = save_stand_in(output / "original")
        arguments.text, arguments.rank = str(REFERENCE / "calibration.jsonl"), 8
    elif not arguments.text:
        parser.error("Give --text, or --stand-in.")

    recipe = [
        MSMoE(keep_ratio=0.25, allocation="adaptive"),
        LowRankSparse(rank=arguments.rank, density=0.5, whiten=False),
    ]
    calibration = CalibrationConfig(arguments.text, max_tokens=arguments.tokens)
    compressor = MoECompressor.from_pretrained(arguments.model, recipe, calibration)
    compressor.apply()
    compressor.save_pretrained(output / "one-shot")
    print(compressor.measured())
    print("experts of the blocks:", *(block.num_groups for block in compressor.plan.blocks.values()))
    trained = recover(
        str(output / "one-shot"),
        teacher=arguments.model,
        data=arguments.text,
        train="experts",
        temperature=2.0,
        final_density=arguments.final_density,
        max_tokens=arguments.tokens,
        output_dir=str(output / "trained"),
    )
    print(f"KL to the original on held-out text: {trained.record.kl_before:.4f} -> {trained.record.kl_after:.4f}")
    for name in ("one-shot", "trained"):
        size = sum(file.stat().st_size for file in (output / name).glob("model*.safetensors"))
        print(f"{name}: {size:,} bytes of weights")


if __name__ == "__main__":
    main()
