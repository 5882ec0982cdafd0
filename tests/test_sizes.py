"""What a unknown's checkpoint says of its sizes is checked against its files before anything is made of it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_moe import CalibrationConfig, ExpertPruning, LowRankSparse, MoECompressor, MSMoE, verify
from optimum_moe.checkpoint.headers import read_headers
from optimum_moe.formats import specification
from tests.tiny_models import build, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

HUGE = 10**12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    build("qwen3_moe").save_pretrained(folder / "original")
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32)])
    for name, method in {"map": MSMoE(num_experts=4), "factors": LowRankSparse(rank=8)}.items():
        output = {"output_dir": folder / name}
        MoECompressor.from_pretrained(folder / "original", method, data, progress=False, **output).apply()
    return folder


def edited(folder: Path, copy: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint with another config."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    edit(config)
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def blocks_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    return list(config["quantization_config"]["blocks"].values())


def with_factors(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Change the sizes of all experts, and forge their checksum."""

    def edit(config: dict[str, Any]) -> None:
        for block in blocks_of(config):
            block["factors"].pop("checksum")
            change(block["factors"])
            block["factors"]["checksum"] = specification._checksum(block["factors"])

    return edit


def with_blocks(**fields: Any) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        if "num_experts" in fields:
            config.update(dict.fromkeys(("num_experts", "num_local_experts"), fields["num_experts"]))
        for block in blocks_of(config):
            block.update(fields)

    return edit


def of_all(number: object) -> str:
    """The table of eight experts."""
    return " ".join([str(number)] * 8)


STRUCTURES = {
    "bases": (
        "factors",
        with_factors(lambda f: f.update(shared_base={"up": of_all(10**9)})),
        "no more bases than experts",
    ),
    "rows": (
        "factors",
        with_factors(lambda f: f["sparse_rows"].update(down=of_all(HUGE))),
        "with 1000000000000 sparse rows",
    ),
    "float": ("factors", with_factors(lambda f: f["sparse_rows"].update(down=of_all(1e12))), "no whole number"),
    "numbers": ("factors", with_factors(lambda f: f["sparse_rows"].update(down=[HUGE] * 8)), "cannot be read"),
    "ranks": (
        "factors",
        with_factors(lambda f: f["low_rank"].update(up=of_all(HUGE))),
        "there is one of rank 1000000000000",
    ),
    "widths": ("factors", with_factors(lambda f: f.update(widths=of_all(HUGE))), "has 24 neurons by config.json"),
    "no widths": ("factors", with_factors(lambda f: f.update(widths="")), "no whole number"),
    "list": ("factors", with_blocks(factors=[1]), "Sizes of experts cannot be read"),
    "experts": ("map", with_blocks(num_experts=10**9), "1,000,000,000"),
    "groups": ("map", with_blocks(num_groups=HUGE), "num_groups=1000000000000"),
    "flag": ("map", with_blocks(num_groups=True), "num_groups=True"),
    "routing": ("map", with_blocks(routing=["map"]), r"routing=\['map'\]"),
    "hidden": ("map", lambda config: config.update(hidden_size=10**7), "10,?000,?000|numbers"),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_sizes_of_a_structure(folders: Path, case: str, tmp_path: Path) -> None:
    kind, edit, message = STRUCTURES[case]
    broken = edited(folders / kind, tmp_path / "broken", edit)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(broken)
    report = verify(broken)
    assert not report["config"].passed
    assert not report["reload"].ran


CONFIGS = {
    "num_hidden_layers": 10**9,
    "vocab_size": 10**13,
    "hidden_size": 10**15,
    "num_attention_heads": HUGE,
    "num_experts": 10**9,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_larger_than_its_weights(folders: Path, name: str, tmp_path: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config[name] = CONFIGS[name]
        if name == "num_experts":
            del config["num_local_experts"]

    broken = edited(folders / "original", tmp_path / "broken", edit)
    shown = "num_(local_)?experts" if name == "num_experts" else name
    with pytest.raises(ValueError, match=f"config.json says {shown}={CONFIGS[name]:,}, and the checkpoint has"):
        MoECompressor.from_pretrained(broken, ExpertPruning(num_experts=4, saliency="random"))


def test_a_config_that_belongs_to_other_weights(folders: Path, tmp_path: Path) -> None:
    broken = edited(folders / "original", tmp_path / "broken", lambda config: config.update(moe_intermediate_size=32))
    with pytest.raises(
        ValueError, match=r"down_proj of shape \(8, 64, 24\), but Qwen3MoeForCausalLM needs \(8, 64, 32\)"
    ):
        MoECompressor.from_pretrained(broken, ExpertPruning(num_experts=4, saliency="random"))


def entry(**fields: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}}


HEADERS: dict[str, Any] = {
    "nested": b"[" * 10**6,
    "list": [],
    "null": None,
    "huge": entry(shape=[HUGE, 64]),
    "negative": entry(shape=[-1]),
    "text": entry(shape=["1"]),
    "float": entry(shape=[1.0]),
    "dtype": entry(dtype=["F32"]),
    "hole": entry(data_offsets=[4, 8]),
    "overlap": entry() | {"b": entry()["a"]},
    "backward": entry(data_offsets=[4, 0]),
}


def write_header(file: Path, header: Any, size: int = 4) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * size)


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_none(case: str, tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", HEADERS[case])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        read_headers(tmp_path)


def test_a_header_without_tensors(tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", {}, size=0)
    with pytest.raises(ValueError, match="hold no tensor"):
        read_headers(tmp_path)
    write_header(tmp_path / "model.safetensors", entry())
    assert read_headers(tmp_path).tensors == {"a": ("F32", (1,), 4)}


INDICES: dict[str, tuple[Any, str]] = {
    "number": ({"a": 5}, "not a readable index"),
    "list": (["a"], "not a readable index"),
    "null": (None, "not a readable index"),
    "nested": ({"a": {"b": 1}}, "not a readable index"),
    "above": ({"a": "../model.safetensors"}, "outside of"),
    "absolute": ({"a": "/model.safetensors"}, "outside of"),
    "empty": ({}, "hold no tensor"),
}


@pytest.mark.parametrize("case", INDICES)
def test_indices_that_are_none(case: str, tmp_path: Path) -> None:
    weight_map, message = INDICES[case]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_headers(tmp_path)


def test_sizes_that_are_right_load(folders: Path, tmp_path: Path) -> None:
    for kind in ("map", "factors"):
        same = edited(folders / kind, tmp_path / kind, lambda config: None)
        ours, theirs = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (same, folders / kind))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
