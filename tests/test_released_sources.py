"""Checkpoints as they are released: FP8 and MXFP4, several shards; compressed from their dequantized values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, Mxfp4Config

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE
from optimum_moe.checkpoint.headers import read_headers
from optimum_moe.checkpoint.identity import identity
from optimum_moe.checkpoint.source import open_source
from tests.quantized_checkpoints import dequantize_fp8, edit_config, quantize_mxfp4, to_fp8, to_mxfp4
from tests.tiny_checkpoints import tensors_in
from tests.tiny_models import build, by_name, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

# Sides that are multiples of the block, as the even split of transformers needs.
EVEN = {"intermediate_size": 64, "moe_intermediate_size": 32}
METHODS = {
    "map": MSMoE(num_experts=4),
    "reduce": MSMoE(num_experts=4, routing="reduce"),
    "prune": ExpertPruning(num_experts=4, saliency="aimer"),
}


def written(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    """A quantized checkpoint, beside the unquantized one that it was made from."""
    build(name, dtype=dtype, **fields).save_pretrained(folder / "plain")
    make = to_mxfp4 if name == "gpt_oss" else to_fp8
    return make(folder / "plain", folder / "quantized")


def compressor_of(checkpoint: Path, method: Any = METHODS["prune"], **settings: Any) -> MoECompressor:
    name = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model_type"]
    data = [inputs_for(name, rows=4, length=32, seed=seed) for seed in range(3)]
    return MoECompressor.from_pretrained(checkpoint, method, CalibrationConfig(data), progress=False, **settings)


def dequantized(checkpoint: Path, name: str) -> transformers.PreTrainedModel:
    """The model as transformers itself dequantizes it."""
    config = Mxfp4Config(dequantize=True) if name == "gpt_oss" else FineGrainedFP8Config(dequantize=True)
    cls = getattr(transformers, by_name(name).architecture)
    return cls.from_pretrained(checkpoint, quantization_config=config, dtype="auto")


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k]) or ours[k].dtype != theirs[k].dtype] == []


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_loaded_as_transformers_dequantizes(name: str, tmp_path: Path) -> None:
    checkpoint = written(name, tmp_path, **EVEN)
    model = open_source(checkpoint, dequantize=True).load()
    theirs = dequantized(checkpoint, name).state_dict()
    assert_same(model.state_dict(), theirs)
    original = build(name, dtype=torch.bfloat16, **EVEN).state_dict()
    # FP8 rounds to 1/16 of a number at most, MXFP4 to 1/3 of the largest of a block of 32.
    worst = max(float((theirs[k].float() - original[k].float()).abs().max()) for k in original)
    assert 0 < worst < 0.12


@pytest.mark.parametrize("engine", ["memory", "streaming"])
def test_what_a_class_loads_in_float32_is_foretold(engine: str, tmp_path: Path) -> None:
    """Routers and their biases, in float32 whatever the rest is."""
    build("glm4_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    checkpoint = to_fp8(tmp_path / "plain", tmp_path / "quantized")
    out = tmp_path / "out"
    compressor = compressor_of(checkpoint, dequantize=True, engine=engine, output_dir=out)
    foretold = compressor.preview().after.bytes
    compressor.apply()
    stored = tensors_in(out)
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float32} == {
        f"model.layers.{layer}.mlp.gate.{part}" for layer in (1, 2) for part in ("weight", "e_score_correction_bias")
    }
    assert sum(tensor.nbytes for tensor in stored.values()) == foretold


@pytest.mark.parametrize("block", [(16, 16), (128, 128), (12, 40)])
def test_blocks_at_the_edge_of_a_matrix(block: tuple[int, int], tmp_path: Path) -> None:
    """Sides that are no multiple of the block, like the 576 rows of DeepSeek-V3's kv_a_proj_with_mqa."""
    build("deepseek_v3", dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    checkpoint = to_fp8(tmp_path / "plain", tmp_path / "quantized", block)
    model = open_source(checkpoint, dequantize=True).load()
    tensors = load_file(checkpoint / "model.safetensors")
    state = model.state_dict()
    checked = 0
    for name in tensors:
        scale = tensors.get(f"{name}_scale_inv")
        if scale is not None and ".experts." not in name:
            assert torch.equal(state[name], dequantize_fp8(tensors[name], scale, block).bfloat16()), name
            checked += 1
    assert checked == 24  # 5 of attention in 3 layers, 3 of the dense one, 3 of 2 shared experts
    for expert in range(8):
        names = [f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up")]
        parts = [dequantize_fp8(tensors[n], tensors[f"{n}_scale_inv"], block).bfloat16() for n in names]
        assert torch.equal(state["model.layers.1.mlp.experts.gate_up_proj"][expert], torch.cat(parts))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_compressed_as_the_dequantized_model_in_memory(name: str, method: str, tmp_path: Path) -> None:
    checkpoint = written(name, tmp_path, **(EVEN if name == "gpt_oss" else {}))
    compressor = compressor_of(checkpoint, METHODS[method], dequantize=True)
    model = compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    cls = getattr(transformers, by_name(name).architecture)
    loaded = cls.from_pretrained(tmp_path / "out", dtype="auto")
    assert_same(loaded.state_dict(), model.state_dict())

    open_source(checkpoint, dequantize=True).load().save_pretrained(tmp_path / "dequantized")
    again = compressor_of(tmp_path / "dequantized", METHODS[method])
    assert_same(again.apply().state_dict(), model.state_dict())
    assert torch.equal(logits_of(loaded, inputs_for(name)), logits_of(again.model, inputs_for(name)))

    assert read_headers(tmp_path / "out").itemsize == 2
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert "mxfp4" not in str(config)
    assert "fp8" not in str(config)
    assert ("quantization_config" in config) == (method == "map")
    names = read_headers(tmp_path / "out").tensors
    assert not [n for n in names if n.endswith(("_scale_inv", "_blocks", "_scales"))]


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_sizes_are_those_of_the_dequantized_model(name: str, tmp_path: Path) -> None:
    checkpoint = written(name, tmp_path, **EVEN)
    ours = compressor_of(checkpoint, dequantize=True).preview()
    plain = compressor_of(tmp_path / "plain").preview()
    assert ours.before == plain.before
    assert ours.after == plain.after
    assert ours.before.bytes == 2 * ours.before.parameters
    in_float32 = compressor_of(checkpoint, dequantize=True, dtype="float32").preview()
    assert in_float32.before.bytes == 4 * ours.before.parameters


def test_a_dtype_of_its_own(tmp_path: Path) -> None:
    model = open_source(written("qwen3_moe", tmp_path), dtype="float32", dequantize=True).load()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    tensors = load_file(tmp_path / "quantized" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = dequantize_fp8(tensors[name], tensors[f"{name}_scale_inv"], (16, 16))
    assert torch.equal(model.get_parameter(name), expected)


def test_a_config_without_dtype_gives_bfloat16(tmp_path: Path) -> None:
    checkpoint = written("qwen3_moe", tmp_path)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    del config["dtype"]
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = open_source(checkpoint, dequantize=True)
    assert source.info.bytes == 2 * source.info.parameters
    assert source.load().dtype == torch.bfloat16


def test_quantized_only_with_dequantize_and_the_reverse(tmp_path: Path) -> None:
    checkpoint = written("qwen3_moe", tmp_path)
    message = r"already quantized \(fp8\). Pass dequantize=True to compress its bf16 values\."
    with pytest.raises(ValueError, match=message):
        compressor_of(checkpoint)
    with pytest.raises(ValueError, match=r"dequantize=True is for quantized checkpoints, and this one is not"):
        compressor_of(tmp_path / "plain", dequantize=True)
    with pytest.raises(ValueError, match=r"this model is in memory"):
        MoECompressor.from_pretrained(build("qwen3_moe"), METHODS["prune"], dequantize=True)
    for method in ("compressed-tensors", "gptq", "awq"):
        edit_config(checkpoint, quantization_config={"quant_method": method})
        with pytest.raises(ValueError, match=rf"quantized \({method}\); dequantize=True reads fp8 and mxfp4"):
            compressor_of(checkpoint, dequantize=True)


def test_an_embedding_that_stays_quantized_is_refused(tmp_path: Path) -> None:
    checkpoint = written("qwen3_moe", tmp_path)
    quantization = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    edit_config(checkpoint, quantization_config=quantization | {"modules_to_convert": ["embed_tokens"]})
    with pytest.raises(ValueError, match=r"keeps \['embed_tokens'\] of this checkpoint in fp8"):
        compressor_of(checkpoint, dequantize=True)


def test_mxfp4_blocks_of_the_tests_are_what_transformers_unpacks() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    exact = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 6.0])
    weight_EXR = exact.repeat(2, 3, 2, 2).reshape(2, 3, 64).transpose(1, 2) * torch.tensor([1.0, 0.25, 8.0])
    blocks, scales = quantize_mxfp4(weight_EXR)
    assert blocks.shape == (2, 3, 2, 16)
    assert torch.equal(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32), weight_EXR)


def reshard(checkpoint: Path, shared: bool) -> None:
    """Two shards with an index; one tensor is in both if `shared`."""
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    halves = [names[::2], names[1::2]]
    weight_map = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        weight_map |= dict.fromkeys(half, file)
        part = {name: tensors[name] for name in (half + names[:1] if shared and number == 2 else half)}
        save_file(part, checkpoint / file, metadata={"format": "pt"})
    (checkpoint / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_several_shards_give_the_same_as_one(name: str, shared: bool, tmp_path: Path) -> None:
    """Weights and their scales lie in different shards, and a shard may repeat a tensor of another."""
    checkpoint = written(name, tmp_path, **EVEN)
    one = open_source(checkpoint, dequantize=True)
    expected, before = one.load().state_dict(), identity(one)
    reshard(checkpoint, shared)
    several = open_source(checkpoint, dequantize=True)
    assert len(several.headers.files) == 2
    assert several.info.parameters == one.info.parameters
    assert identity(several) == before
    assert_same(several.load().state_dict(), expected)
