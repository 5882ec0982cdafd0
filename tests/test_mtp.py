"""Multi-token-prediction layers are copied, cut or dropped when it is said so, and never lost in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_moe import BlockDrop, CalibrationConfig, ExpertPruning, MoECompressor, MSMoE
from optimum_moe.algorithms.alignment import align_experts
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.checkpoint.headers import read_headers
from optimum_moe.checkpoint.source import open_source
from tests.mtp_checkpoints import PREFIXES, save_with_mtp
from tests.quantized_checkpoints import dequantize_fp8, to_fp8
from tests.tiny_checkpoints import tensors_in
from tests.tiny_models import by_name, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

METHODS = {
    "map": MSMoE(num_experts=4),
    "reduce": MSMoE(num_experts=4, routing="reduce"),
    "prune": ExpertPruning(num_experts=4, saliency="aimer"),
}
NAMES = list(PREFIXES)


def opened(checkpoint: Path, method: Any = METHODS["prune"], **settings: Any) -> MoECompressor:
    name = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model_type"]
    data = [inputs_for(name, rows=4, length=32, seed=seed) for seed in range(3)]
    return MoECompressor.from_pretrained(checkpoint, method, CalibrationConfig(data), progress=False, **settings)


def compressed(checkpoint: Path, out: Path, method: str, **settings: Any) -> MoECompressor:
    compressor = opened(checkpoint, METHODS[method], **settings)
    compressor.apply()
    compressor.save_pretrained(out)
    return compressor


@pytest.mark.parametrize(("name", "kinds"), [("deepseek_v3", r"model\.layers\.3\.\*"), ("qwen3_next", r"mtp\.\*")])
def test_a_checkpoint_with_mtp_layers_asks_for_an_option(name: str, kinds: str, tmp_path: Path) -> None:
    extra = save_with_mtp(tmp_path / "in", name)
    message = rf"has {len(extra)} tensors of multi-token-prediction layers .* \({kinds}\)\. Pass mtp=.*drop"
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "in")
    with pytest.raises(ValueError, match=r"mtp='keep' is unknown"):
        opened(tmp_path / "in", mtp="keep")
    assert open_source(tmp_path / "in").info.parameters == read_headers(tmp_path / "in").parameters


@pytest.mark.parametrize("name", NAMES)
def test_copied_unchanged_into_a_shard_of_the_index(name: str, tmp_path: Path) -> None:
    extra = save_with_mtp(tmp_path / "in", name)
    compressor = compressed(tmp_path / "in", tmp_path / "out", "map", mtp="copy")
    before, after = tensors_in(tmp_path / "in"), tensors_in(tmp_path / "out")
    assert [key for key in extra if not torch.equal(before[key], after[key])] == []
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert {key for key, file in index["weight_map"].items() if file == "model-mtp.safetensors"} == set(extra)
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in after.values())
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["num_nextn_predict_layers"] == 1
    # Buffers are stored, and are no parameters.
    buffers = sum(t.numel() for key, t in after.items() if key.endswith(("expert_map", "correction_bias")))
    buffers += sum(tensor.shape == (1,) for tensor in after.values())
    buffers -= sum(after[key].numel() for key in extra if key.endswith("correction_bias"))
    assert compressor.measured().after.parameters == read_headers(tmp_path / "out").parameters - buffers
    loaded = getattr(transformers, by_name(name).architecture).from_pretrained(tmp_path / "out")
    state = compressor.model.state_dict()
    assert [key for key, tensor in loaded.state_dict().items() if not torch.equal(tensor, state[key])] == []


def test_several_shards_stay_in_the_index(tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "in", "deepseek_v3")
    compressor = opened(tmp_path / "in", METHODS["map"], mtp="copy")
    compressor.apply()
    compressor.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 3
    headers = read_headers(tmp_path / "out")
    assert set(headers.tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == headers.bytes


@pytest.mark.parametrize("method", ["reduce", "prune"])
def test_a_copy_that_contradicts_the_config_is_refused(method: str, tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "in", "deepseek_v3")
    with pytest.raises(ValueError, match=r'keep 8 experts .* config would have 4 .* mtp="cut" .*\s*mtp="drop"'):
        opened(tmp_path / "in", METHODS[method], mtp="copy")


def test_layers_without_experts_are_copied_beside_any_count(tmp_path: Path) -> None:
    extra = save_with_mtp(tmp_path / "in", "deepseek_v3")
    tensors = {k: t for k, t in load_file(tmp_path / "in" / "model.safetensors").items() if k not in extra}
    dense = {key: torch.randn(4, 4) for key in ("model.layers.3.eh_proj.weight", "model.layers.3.mlp.up_proj.weight")}
    save_file(tensors | dense, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    compressed(tmp_path / "in", tmp_path / "out", "prune", mtp="copy")
    after = tensors_in(tmp_path / "out")
    assert [key for key in dense if not torch.equal(dense[key], after[key])] == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_dropped(name: str, method: str, tmp_path: Path) -> None:
    extra = save_with_mtp(tmp_path / "in", name)
    compressor = opened(tmp_path / "in", METHODS[method], mtp="drop")
    preview = compressor.preview()
    compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    assert not set(extra) & set(read_headers(tmp_path / "out").tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["num_nextn_predict_layers"] == 0
    measured = compressor.measured()
    assert preview.before.parameters == read_headers(tmp_path / "in").parameters
    buffers = 8 * 2 if name == "deepseek_v3" else 0
    kept_buffers = buffers if method == "map" else buffers // 2
    assert preview.after.parameters - measured.after.parameters == kept_buffers
    assert measured.after.parameters == sum(p.numel() for p in compressor.model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_follow_on_a_dropped_one_are_counted_once(name: str, tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "in", name)
    compressor = opened(tmp_path / "in", BlockDrop(num_blocks=1), mtp="drop")
    preview = compressor.preview()
    compressor.apply()
    buffers = 8 if name == "deepseek_v3" else 0
    assert preview.after.parameters - compressor.measured().after.parameters == buffers


def merged_by_hand(before: dict[str, torch.Tensor], prefix: str, plan: Any) -> dict[str, torch.Tensor]:
    """The experts of a group as the weighted sum of their aligned matrices, in float64."""
    parts = ("gate", "up", "down")
    matrices = {
        part: torch.stack([before[f"{prefix}mlp.experts.{e}.{part}_proj.weight"] for e in range(8)]) for part in parts
    }
    labels_E = torch.tensor(plan.labels_E)
    aligned_EI = torch.arange(matrices["up"].shape[1]).repeat(8, 1)
    if plan.permutations_EI is not None:
        aligned_EI = align_experts(ExpertTensors(**matrices), labels_E, plan.dominants_G)
        assert not torch.equal(aligned_EI, plan.permutations_EI)
    merged = {}
    for group in range(plan.num_groups):
        for part in parts:
            axis = 1 if part == "down" else 0
            terms = [
                float(plan.merge_weights_E[e]) * matrices[part][e].double().index_select(axis, aligned_EI[e])
                for e in plan.members(group)
            ]
            merged[f"{prefix}mlp.experts.{group}.{part}_proj.weight"] = sum(terms)
    return merged


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_cut_like_the_last_block(name: str, method: str, tmp_path: Path) -> None:
    extra, prefix = save_with_mtp(tmp_path / "in", name), PREFIXES[name]
    preview = opened(tmp_path / "in", METHODS[method], mtp="cut").preview()
    compressor = compressed(tmp_path / "in", tmp_path / "out", method, mtp="cut")
    before, after = tensors_in(tmp_path / "in"), tensors_in(tmp_path / "out")
    plan = list(compressor.plan.blocks.values())[-1]
    expected = merged_by_hand(before, prefix, plan)
    experts = {key for key in after if key.startswith(prefix) and ".experts." in key}
    assert experts == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(after[key].double(), value, rtol=1e-6, atol=1e-7)
    router = f"{prefix}mlp.gate.weight"
    if method == "map":
        assert torch.equal(after[router], before[router])
        assert after[f"{prefix}mlp.gate.expert_map"].tolist() == list(plan.labels_E)
    else:
        assert torch.equal(after[router], before[router][list(plan.dominants_G)])
    rest = [key for key in extra if ".experts." not in key and "mlp.gate." not in key]
    assert len(rest) >= 8
    assert [key for key in rest if not torch.equal(after[key], before[key])] == []
    below = "model.layers.2." if name == "deepseek_v3" else "model.layers.3."
    # Of the layers that transformers loads each has a guard too.
    guards = [key for key, tensor in after.items() if tensor.shape == (1,)]
    assert len(guards) == (len(compressor.plan.blocks) if method == "map" else 0)
    stored = {key: tensor for key, tensor in after.items() if key not in guards}
    shapes = {key.removeprefix(below): t.shape for key, t in stored.items() if key.startswith(f"{below}mlp.")}
    assert {key.removeprefix(prefix): t.shape for key, t in after.items() if key.startswith(f"{prefix}mlp.")} == shapes
    ids = sum(t.numel() for key, t in after.items() if key.endswith("expert_map"))
    assert preview.after.parameters == read_headers(tmp_path / "out").parameters - ids - len(guards)


def test_mtp_layers_that_are_not_like_the_last_block_cannot_be_cut(tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "in", "deepseek_v3")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.3.mlp.experts.7.up_proj.weight"
    save_file({k: t for k, t in tensors.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"like those of model.layers.2.mlp, but model.layers.3.mlp.experts.* is not"):
        opened(tmp_path / "in", mtp="cut")
    save_file(tensors | {name.replace(".7.", ".8."): tensors[name].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.3.mlp.experts.8.up_proj.weight is not"):
        opened(tmp_path / "in", mtp="cut")


@pytest.mark.parametrize("option", ["copy", "cut"])
def test_quantized_mtp_layers_are_dequantized(option: str, tmp_path: Path) -> None:
    names = save_with_mtp(tmp_path / "plain", "deepseek_v3", torch.bfloat16)
    checkpoint = to_fp8(tmp_path / "plain", tmp_path / "in", skip=["eh_proj"])
    method = "map" if option == "copy" else "prune"
    compressor = compressed(checkpoint, tmp_path / "out", method, mtp=option, dequantize=True)
    before, after = tensors_in(checkpoint), tensors_in(tmp_path / "out")
    kept = list(compressor.plan.blocks.values())[-1].dominants_G if option == "cut" else range(8)

    def expected(name: str) -> torch.Tensor:
        scale = before.get(f"{name}_scale_inv")
        return before[name] if scale is None else dequantize_fp8(before[name], scale, (16, 16)).bfloat16()

    moved = {f".experts.{old}.": f".experts.{new}." for new, old in enumerate(kept)}
    compared = 0
    for name in names:
        if ".experts." in name:
            old = next((part for part in moved if part in name), None)
            if old is None:
                continue
            assert torch.equal(after[name.replace(old, moved[old])], expected(name)), name
            compared += 1
        elif "mlp.gate." not in name:
            assert torch.equal(after[name], expected(name)), name
    assert compared == 3 * len(kept)
    assert not [name for name in after if "scale" in name]


def test_other_tensors_that_the_model_does_not_load_are_an_error(tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "in", "deepseek_v3")
    file = tmp_path / "in" / "model.safetensors"
    tensors = load_file(file)
    benign = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    save_file(tensors | benign, file, metadata={"format": "pt"})
    assert opened(tmp_path / "in", mtp="drop").mtp.names
    save_file(tensors | {"value_head.weight": torch.ones(4)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has 1 tensors that DeepseekV3ForCausalLM does not load \(value_head.weight"):
        opened(tmp_path / "in", mtp="drop")


def test_a_model_in_memory_has_no_mtp_layers(tmp_path: Path) -> None:
    from tests.tiny_models import build

    with pytest.raises(ValueError, match=r"mtp='drop' needs a checkpoint, but this model is in memory"):
        MoECompressor.from_pretrained(build("deepseek_v3"), METHODS["prune"], mtp="drop")
