"""Compressed experts lie in the files one by one, under the names of the stock checkpoint, and come back exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_moe import LowRankSparse, MSMoE
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.checkpoint.compatibility import mark_structure
from optimum_moe.checkpoint.source import open_source
from optimum_moe.formats import StoredExperts
from optimum_moe.surgeons import find_blocks, names_of
from tests.composites_table import build_composite, composite_named
from tests.expert_forms import joined, mixture
from tests.factor_methods import compressor_for
from tests.test_factors import factorized
from tests.tiny_models import Target, build, by_name, every_target

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

GATED = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
SHORT = {"gate": "w1", "up": "w3", "down": "w2"}
NAMES = {
    "mixtral": ("model.layers.2.block_sparse_moe", "", SHORT),
    "qwen3_moe": ("model.layers.2.mlp", "", GATED),
    "deepseek_v3": ("model.layers.2.mlp", "", GATED),
    "gpt_oss": ("model.layers.2.mlp", "", GATED),
    "switch_transformers": ("decoder.block.3.layer.2.mlp", "expert_", {"up": "wi", "down": "wo"}),
    "nemotron_h": ("backbone.layers.3.mixer", "", {"up": "up_proj", "down": "down_proj"}),
    "dbrx": ("transformer.blocks.2.ffn", "", GATED),
    "jetmoe": ("model.layers.2.self_attention.experts", "", GATED),
    "granitemoe": ("model.layers.2.block_sparse_moe", "", GATED),
    "mistral_large4": ("layers.2", "", SHORT),
}
COMPOSITES = {
    "minimax_m3_vl": ("language_model.model.layers.2.block_sparse_moe", SHORT),
    "kimi_k25": ("language_model.model.blocks.2.mlp", GATED),
    "dots3_note": ("vision_encoder.blocks.1.mlp", {"gate": "fc1", "up": "fc3", "down": "fc2"}),
    "ernie4_5_vl_moe": ("model.layers.2.mlp.vision_moe", GATED),
    "step3p7": ("model.layers.2.moe", GATED),
}


@pytest.mark.parametrize("name", NAMES)
def test_prefix_and_matrices_are_those_of_the_stock_checkpoint(name: str) -> None:
    model = build(name)
    names = names_of(model, find_blocks(model)[-1])
    block, number, stems = NAMES[name]
    assert (names.block, names.expert, dict(names.stems)) == (block, f"{block}.experts.{number}", stems)


@pytest.mark.parametrize("name", COMPOSITES)
def test_towers(name: str) -> None:
    model = build_composite(composite_named(name))
    names = names_of(model, find_blocks(model)[-1])
    block, stems = COMPOSITES[name]
    assert (names.block, names.expert, dict(names.stems)) == (block, f"{block}.experts.", stems)


@pytest.mark.parametrize("target", every_target())
def test_no_two_blocks_share_a_prefix(target: Target) -> None:
    model = build(target)
    found = [names_of(model, block) for block in find_blocks(model)]
    assert len({names.block for names in found}) == len({names.expert for names in found}) == len(found)


def save(family: str, folder: Path, make: Any) -> Path:
    """A checkpoint whose experts are all made by `make`."""
    model = build(family)
    source = open_source(model)
    mark_structure(model, source, factorized(model, make))
    model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def load(family: str, folder: Path) -> Any:
    return getattr(transformers, by_name(family).architecture).from_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Any], Path]:
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, make: Any) -> Path:
        key = family, make.__name__
        if key not in made:
            made[key] = save(family, tmp_path_factory.mktemp("-".join(key)), make)
        return made[key]

    return get


ODD = ("gpt_oss", "aria", "llama4", "dbrx", "jetmoe", "switch_transformers", "longcat_flash", "nemotron_h")


@pytest.mark.parametrize("family", ["mixtral", *ODD])
def test_loaded_and_saved_again_all_tensors_are_the_same(family: str, folders: Any, tmp_path: Path) -> None:
    load(family, folders(family, mixture)).save_pretrained(tmp_path)
    before, after = tensors(folders(family, mixture)), tensors(tmp_path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    # Nothing of the stacks in memory shows.
    assert not [name for name in before if ".factors." in name or "_stacks" in name]
    structure = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert structure["format_version"] == 2
    assert all(any(name.startswith(f"{block}.experts.") for name in before) for block in structure["blocks"])


def test_every_tensor_of_an_expert_has_the_canonical_orientation(folders: Any) -> None:
    """In gpt-oss the stock tensors are transposed, gate and up interleaved."""
    stored, original = tensors(folders("gpt_oss", mixture)), build("gpt_oss").model.layers[0].mlp.experts
    prefix = "model.layers.0.mlp.experts"
    gate_up = original.gate_up_proj[0].detach()
    assert torch.equal(stored[f"{prefix}.0.gate_proj.weight"], gate_up[:, ::2].T)
    assert torch.equal(stored[f"{prefix}.0.up_proj.weight"], gate_up[:, 1::2].T)
    assert torch.equal(stored[f"{prefix}.0.down_proj.weight"], original.down_proj[0].T)
    assert torch.equal(stored[f"{prefix}.0.up_proj.bias"], original.gate_up_proj_bias[0, 1::2])
    assert stored[f"{prefix}.4.down_proj.weight_rows"].shape == (4, gate_up.shape[1] // 2)
    assert stored[f"{prefix}.4.down_proj.weight_row_index"].dtype == torch.int32
    # Of the empty expert its down bias is left, of the others none lacks one.
    assert {name for name in stored if name.startswith(f"{prefix}.7.")} == {f"{prefix}.7.down_proj.bias"}
    assert torch.equal(stored[f"{prefix}.7.down_proj.bias"], original.down_proj_bias[7])


def all_joint(view: ExpertTensors) -> StoredExperts:
    return StoredExperts(tuple(joined(view, expert, 8) for expert in range(view.num_experts)))


def test_joint_matrices_and_a_guard_where_no_down_projection_is_free(folders: Any, tmp_path: Path) -> None:
    folder = folders("qwen3_moe", all_joint)
    stored, prefix = tensors(folder), "model.layers.0.mlp.experts"
    assert stored[f"{prefix}.0.gate_up_proj.weight_u"].shape == (8, 2 * stored[f"{prefix}.0.down_proj.weight"].shape[1])
    guards = [name for name, tensor in stored.items() if tensor.shape == (1,)]
    assert guards == [f"model.layers.{n}.mlp.experts.7.up_proj.weight" for n in range(3)]
    with pytest.raises(RuntimeError):
        transformers.Qwen3MoeForCausalLM.from_pretrained(folder, config=build("qwen3_moe").config)
    load("qwen3_moe", folder).save_pretrained(tmp_path)
    again = tensors(tmp_path)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("settings", "body"), [({"rank": 8, "density": None}, "weight_u"), ({"energy": 1.0}, "weight_dense")]
)
def test_what_a_group_shares_is_stored_once_and_never_as_the_whole_matrix(
    settings: Any, body: str, tmp_path: Path
) -> None:
    method = [MSMoE(num_experts=4), LowRankSparse(**settings, base="group")]
    compressor = compressor_for(build("qwen3_moe"), method, "qwen3_moe")
    model = compressor.apply()
    compressor.save_pretrained(tmp_path)
    stored, prefix = tensors(tmp_path), "model.layers.0.mlp.experts"
    shared = [name for name in stored if name.startswith(f"{prefix}.shared.")]
    assert sorted(shared) == sorted(
        f"{prefix}.shared.{g}.{stem}.weight_base" for g in range(4) for stem in GATED.values()
    )
    assert {stem for stem in GATED.values() for e in range(8) if f"{prefix}.{e}.{stem}.{body}" in stored} == {
        *GATED.values()
    }
    assert [name for name in stored if name.startswith(prefix) and name.endswith(".weight")] == [
        f"{prefix}.7.down_proj.weight"
    ]
    assert stored[f"{prefix}.7.down_proj.weight"].shape == (1,)
    loaded = load("qwen3_moe", tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], Any], str]] = {
    "gone": (lambda stored, name: stored.pop(name), r"lacks 1 tensors \({name}\)"),
    "smaller": (
        lambda stored, name: stored.update({name: stored[name][:-1].clone()}),
        r"1 tensors of compressed blocks \({name}, ...\) are not what config.json says of their number or size",
    ),
    "one too many": (
        lambda stored, name: stored.update({name.replace("experts.3.", "experts.9."): stored[name].clone()}),
        "1 tensors of compressed blocks .* are not what config.json says",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_has_the_name_of_the_file(kind: str, folders: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("mixtral", mixture), tmp_path / "out"))
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight_u"
    stored = tensors(folder)
    edit, message = WRONG[kind]
    edit(stored, name)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message.replace("{name}", name)):
        load("mixtral", folder)


def test_layers_beside_the_model_are_not_taken_for_its_own(folders: Any, tmp_path: Path) -> None:
    """The base model knows its blocks without the prefix that tells them from those for multi-token prediction."""
    folder = Path(shutil.copytree(folders("qwen3_moe", mixture), tmp_path / "out"))
    stored = tensors(folder)
    name = "layers.0.mlp.experts.0.gate_proj.weight"
    stored[f"mtp.{name}"] = stored[f"model.{name}"] + 1
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    base, whole = transformers.AutoModel.from_pretrained(folder), load("qwen3_moe", folder)
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[key]), key


def test_a_block_that_the_model_does_not_have(folders: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("mixtral", mixture), tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    blocks = config["quantization_config"]["blocks"]
    blocks["model.layers.0.mlp"] = blocks.pop("model.layers.0.block_sparse_moe")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"names the block model.layers.0.mlp, which MixtralForCausalLM does not have"):
        load("mixtral", folder)


def test_the_first_format_is_refused(folders: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("mixtral", mixture), tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["format_version"] = 1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"format_version=1, the installed package reads 2"):
        load("mixtral", folder)
