"""Packed experts for vLLM: the numbers are those of the checkpoint, and nothing else is changed or left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE, NeuronPruning, Rounding, export
from optimum_moe.algorithms import rounding
from optimum_moe.checkpoint.headers import read_headers
from tests.tiny_checkpoints import tensors_in
from tests.tiny_models import build, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")

SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2}
MATRICES = 2 * 8 * 3


def saved(folder: Path, stages=None, name: str = "qwen3_moe", **fields) -> Path:
    """A checkpoint of a small model in bfloat16, compressed by some stages."""
    model = build(name, dtype=torch.bfloat16, **{**SIZES, **fields})
    if stages is None:
        model.save_pretrained(folder)
        return folder
    data = CalibrationConfig([inputs_for(name, rows=4, length=32, seed=seed) for seed in range(3)])
    compressor = MoECompressor.from_pretrained(model, stages, data, progress=False)
    compressor.apply()
    compressor.save_pretrained(folder)
    return folder


def unpacked(tensors: dict[str, torch.Tensor], module: str, bits: int) -> torch.Tensor:
    """The matrix that the three tensors of a module stand for, written out."""
    outputs, columns = tensors[f"{module}.weight_shape"].tolist()
    scale_OG = tensors[f"{module}.weight_scale"]
    number_OX = torch.zeros(outputs, columns)
    for column in range(columns):
        word_O = tensors[f"{module}.weight_packed"][:, column * bits // 32].long() & 0xFFFFFFFF
        number_OX[:, column] = (word_O >> (column % (32 // bits) * bits)) % 2**bits - 2 ** (bits - 1)
    return number_OX.to(scale_OG.dtype) * scale_OG.repeat_interleave(columns // scale_OG.shape[1], 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_experts_are_exported_as_they_are(bits: int, tmp_path: Path) -> None:
    stages = [ExpertPruning(num_experts=4), Rounding(bits=bits)]
    before = tensors_in(saved(tmp_path / "rounded", stages))
    out = export(tmp_path / "rounded", "compressed-tensors", tmp_path / "out")
    after = tensors_in(out)
    modules = {name.removesuffix(".weight_packed") for name in after if name.endswith(".weight_packed")}
    assert len(modules) == MATRICES / 2
    for module in modules:
        assert torch.equal(after[f"{module}.weight_packed"], before[f"{module}.weight_packed{bits}"])
        assert torch.equal(after[f"{module}.weight_scale"], before[f"{module}.weight_scale{bits}"])
    rest = {name for name in after if name.rpartition(".")[0] not in modules}
    assert all(torch.equal(after[name], before[name]) for name in rest)
    report = json.loads((tmp_path / "rounded" / "compression_report.json").read_text(encoding="utf-8"))
    (row,) = [row for row in report["loads_in"] if row["runtime"] == "vllm"]
    assert "after `optimum-cli moe export --to compressed-tensors`" in row["says"]
    guards = {name for name in before if before[name].shape == (1,)}
    assert len(before) == len(rest) + 2 * len(modules) + len(guards)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["num_experts"], config["num_local_experts"]) == (4, 4)
    assert not {"auto_map", "fusion_config"} & set(config)
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"]) == (bits, {4: 64, 8: 128}[bits])


def test_narrower_experts_say_their_width(tmp_path: Path) -> None:
    saved(tmp_path / "rounded", [NeuronPruning(num_neurons=64, curvature=False), Rounding(fitted=False)])
    out = export(tmp_path / "rounded", "compressed-tensors", quantize="w4a16")
    assert out == tmp_path / "rounded-packed-w4a16"
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["moe_intermediate_size"] == 64
    shapes = {t.tolist()[0]: t.tolist()[1] for name, t in tensors_in(out).items() if name.endswith("weight_shape")}
    assert shapes == {64: 128, 128: 64}


@pytest.mark.parametrize(("name", "model"), [("w4a16", "qwen3_moe"), ("w8a16", "qwen3_moe"), ("w4a16", "mixtral")])
def test_plain_experts_are_rounded(name: str, model: str, tmp_path: Path) -> None:
    fields = SIZES if model == "qwen3_moe" else {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    bits = int(name[1])
    build(model, dtype=torch.bfloat16, **fields).save_pretrained(tmp_path / "plain")
    before = tensors_in(tmp_path / "plain")
    after = tensors_in(export(tmp_path / "plain", "compressed-tensors", quantize=name))
    modules = [name.removesuffix(".weight_packed") for name in after if name.endswith(".weight_packed")]
    assert len(modules) == MATRICES
    for module in modules:
        matrix_OX = before[f"{module}.weight"]
        found_OX = unpacked(after, module, bits)
        scale_OG = rounding.group_scales(matrix_OX.float(), bits, 128, torch.bfloat16)
        number_OX = rounding.nearest(matrix_OX, scale_OG, bits, 128)
        assert torch.equal(found_OX, number_OX.to(torch.bfloat16) * rounding.by_column(scale_OG, 128, 128))
        assert f"{module}.weight" not in after


def test_what_is_not_quantized_is_listed(tmp_path: Path) -> None:
    out = export(saved(tmp_path / "plain"), "compressed-tensors", quantize="w4a16")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    ignored = set(config["quantization_config"]["ignore"])
    tensors = read_headers(out).tensors
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith(".weight_packed")}
    with_matrix = {name.rpartition(".")[0] for name, (_, shape, _) in tensors.items() if len(shape) == 2}
    assert ignored == with_matrix - packed | {"lm_head"}
    assert {"model.layers.0.mlp.gate", "model.layers.1.self_attn.q_proj"} < ignored


def test_shards_keep_their_files(tmp_path: Path) -> None:
    build("qwen3_moe", dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path / "plain", max_shard_size="300KB")
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 2
    out = export(tmp_path / "plain", "compressed-tensors", quantize="w8a16")
    assert set(read_headers(out).tensors) == set(tensors_in(out))
    whole = export(saved(tmp_path / "whole"), "compressed-tensors", quantize="w8a16")
    one, many = tensors_in(whole), tensors_in(out)
    assert one.keys() == many.keys()
    assert all(torch.equal(tensor, many[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("stages", "fields", "quantize", "said"),
    [
        (None, {}, None, "has no bits yet. Pass quantize= .* w4a16 or w8a16"),
        (None, {}, "w4a4", "did you mean 'w4a16'"),
        (None, {"moe_intermediate_size": 80}, "w4a16", "whole groups of 128 or 64 or 32 weights.* 128 and 80 columns"),
        ([Rounding(bits=8)], {}, "w4a16", "would round again. Leave it out, or pass w8a16"),
        ([Rounding()], {"moe_intermediate_size": 96}, None, "whole groups of 64 weights.* 128 and 96 columns"),
        ([MSMoE(num_experts=4), Rounding()], {}, None, 'a map of the router.* Merge with routing="reduce"'),
        ([MSMoE(num_experts=4)], {}, "w4a16", 'a map of the router.* Merge with routing="reduce"'),
        ([Rounding(layers=[0])], {}, None, "experts of unlike sizes"),
    ],
)
def test_refused_before_a_tensor_is_read(stages, fields, quantize, said: str, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "checkpoint", stages, **fields)
    for file in checkpoint.glob("*.safetensors"):
        # The headers stay, and the values are gone.
        size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        file.write_bytes(file.read_bytes()[:size] + bytes(file.stat().st_size - size))
    with pytest.raises(ValueError, match=said):
        export(checkpoint, "compressed-tensors", quantize=quantize)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_architectures_that_are_read_in_another_way_are_refused(tmp_path: Path) -> None:
    build("gpt_oss", num_hidden_layers=1).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"which is known of mixtral, .*, not of gpt_oss"):
        export(tmp_path / "plain", "compressed-tensors", quantize="w4a16")
