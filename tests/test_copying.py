"""Streaming copies stored tensors that a cut leaves alone: which ones, how much it reads, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from optimum_moe import ExpertPruning, MoECompressor, MSMoE, register_saliency
from optimum_moe.checkpoint.buffers import Buffers
from optimum_moe.checkpoint.byte_ranges import ByteRange
from optimum_moe.checkpoint.headers import read_headers
from optimum_moe.checkpoint.source import open_source
from optimum_moe.checkpoint.streamed import StreamedModel
from optimum_moe.engine.disk_store import DiskStore
from optimum_moe.plan import BlockPlan, CompressionPlan, keep_all
from tests.composites_table import COMPOSITES, build_composite
from tests.test_released_sources import EVEN
from tests.test_released_sources import written as written_quantized
from tests.test_streaming import assert_same, calibration, compressed
from tests.tiny_models import build, every_target

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

HALF = ExpertPruning(keep_ratio=0.5, saliency="random")


@register_saliency("later_experts")
def later_experts(info: Any) -> torch.Tensor:
    return torch.arange(info.num_experts, dtype=torch.float64)


@register_saliency("routed_later_experts")
def routed_later_experts(token_count_E: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(token_count_E), dtype=torch.float64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copying") / "qwen3_moe"
    build("qwen3_moe").save_pretrained(folder)
    return folder


def streaming_source(checkpoint: Path, **settings: Any) -> DiskStore:
    opened = open_source(checkpoint, **settings)
    return DiskStore(StreamedModel(opened, torch.device("cpu")), opened.blocks, None)


def bytes_by_kind(checkpoint: Path) -> dict[str, int]:
    """Bytes of one expert, of all routers, and of everything else."""
    sizes = {name: size for name, (_, _, size) in read_headers(checkpoint).tensors.items()}
    one = sum(size for name, size in sizes.items() if ".layers.0.mlp.experts.0." in name)
    router = sum(size for name, size in sizes.items() if name.endswith("mlp.gate.weight"))
    other = sum(size for name, size in sizes.items() if ".experts." not in name) - router
    return {"expert": one, "router": router, "other": other}


def checks(sizes: dict[str, int], times: int) -> int:
    """Bytes that are read to know the model again and to find broken weights; of large tensors the former samples."""
    return times * (24 * sizes["expert"] + sizes["router"] + sizes["other"])


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of bytes that are read, while the test runs."""
    counts: list[int] = []
    real = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], start: int) -> int:
        counts.append(real(descriptor, buffers, start))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return counts


@pytest.mark.parametrize(
    ("method", "experts_read"),
    [
        # Three layers of 8 experts: the 4 that remain are copied, nothing else of the experts is read.
        (ExpertPruning(num_experts=4, saliency="random"), 3 * 4),
        (ExpertPruning(num_experts=4, saliency="later_experts"), 3 * 4),
        # All are looked at, and those that remain are copied.
        (ExpertPruning(num_experts=4, saliency="aimer"), 3 * (8 + 4)),
        # A layer that is left alone is copied.
        (ExpertPruning(num_experts=4, saliency="random", layers=[1]), 2 * 8 + 4),
    ],
)
def test_each_tensor_is_read_once_for_what_it_is_needed(
    method: Any, experts_read: int, checkpoint: Path, tmp_path: Path, read: list[int]
) -> None:
    sizes = bytes_by_kind(checkpoint)
    streamed = compressed(checkpoint, method, None, tmp_path / "streaming" / "out", "streaming")
    assert sum(read) == experts_read * sizes["expert"] + sizes["router"] + sizes["other"] + checks(sizes, 2)
    assert_same(compressed(checkpoint, method, None, tmp_path / "memory" / "out", "memory"), streamed)


@pytest.mark.parametrize(
    ("method", "experts_read"),
    [
        (ExpertPruning(num_experts=4, saliency="routed_later_experts"), 3 * 4),
        (MSMoE(num_experts=4), 3 * 8),
        (MSMoE(num_experts=4, routing="reduce"), 3 * 8),
    ],
)
def test_given_statistics_read_each_tensor_once(
    method: Any, experts_read: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressors = {}
    for engine in ("memory", "streaming"):
        compressors[engine] = MoECompressor.from_pretrained(
            checkpoint,
            method,
            calibration("qwen3_moe"),
            engine=engine,
            output_dir=tmp_path / engine / "out",
            progress=False,
        )
    statistics = compressors["memory"].calibrate()
    counts: list[int] = []
    real = ByteRange.read_into

    def counted(place: ByteRange, buffer: memoryview) -> None:
        counts.append(place.size)
        real(place, buffer)

    monkeypatch.setattr(ByteRange, "read_into", counted)
    paths = {engine: compressor.apply(statistics) for engine, compressor in compressors.items()}
    sizes = bytes_by_kind(checkpoint)
    assert sum(counts) == experts_read * sizes["expert"] + sizes["router"] + sizes["other"] + checks(sizes, 3)
    assert_same(paths["memory"], paths["streaming"])


@pytest.mark.parametrize(
    ("name", "settings", "stacked"),
    [
        ("qwen3_moe", {}, {"gate_up_proj", "down_proj"}),
        ("mixtral", {}, {"gate_up_proj", "down_proj"}),
        ("olmoe", {}, {"gate_up_proj", "down_proj"}),
        ("nemotron_h", {}, {"up_proj", "down_proj"}),
        # Another dtype than is stored.
        ("qwen3_moe", {"dtype": "bfloat16"}, set()),
        # Stored as one tensor for all experts.
        ("gpt_oss", {}, set()),
        ("dbrx", {}, set()),
        ("aria", {}, set()),
    ],
)
def test_what_is_copied_expert_by_expert(name: str, settings: Any, stacked: set[str], tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    found = streaming_source(tmp_path, **settings)
    assert {tensor.rpartition(".")[2] for tensor in found._stacked} == stacked
    assert len(found._stacked) == len(stacked) * len(found.blocks)
    assert not settings or not found._saved_as


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_what_is_dequantized_is_not_copied(name: str, tmp_path: Path) -> None:
    original = written_quantized(name, tmp_path / "original", **EVEN)
    found = streaming_source(original, dequantize=True)
    assert (found._stacked, found._saved_as) == (set(), {})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pruning_to_another_dtype(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    method = ExpertPruning(num_experts=4, saliency="later_experts")
    written = {}
    for engine in ("memory", "streaming"):
        written[engine] = compressed(checkpoint, method, None, tmp_path / engine / "out", engine, dtype=dtype)
    assert_same(written["memory"], written["streaming"])


def test_a_plan_that_only_keeps_experts(checkpoint: Path, tmp_path: Path, read: list[int]) -> None:
    method = ExpertPruning(num_experts=4, saliency="later_experts")
    whole = compressed(checkpoint, method, None, tmp_path / "whole" / "out", "memory")
    del read[:]
    compressor = MoECompressor.from_pretrained(
        checkpoint, method, engine="streaming", output_dir=tmp_path / "out", progress=False
    )
    streamed = compressor.apply(plan=CompressionPlan.from_pretrained(whole))
    sizes = bytes_by_kind(checkpoint)
    assert sum(read) == 3 * 4 * sizes["expert"] + sizes["router"] + sizes["other"] + checks(sizes, 2)
    assert (whole / "config.json").read_bytes() == (streamed / "config.json").read_bytes()


def test_which_plans_keep_experts() -> None:
    weights_E = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    pruned: dict[str, Any] = {
        "name": "block",
        "labels_E": (0, -1, 1, -1),
        "dominants_G": (0, 2),
        "routing": "reduce",
        "merge_weights_E": weights_E,
        "router_weights_E": weights_E,
    }
    straight_EI = torch.arange(3).expand(4, 3).clone()
    turned_EI, removed_EI = straight_EI.clone(), straight_EI.clone()
    turned_EI[2], removed_EI[1] = torch.tensor([1, 0, 2]), torch.tensor([2, 1, 0])
    mixed_E = torch.tensor([0.5, 0.5, 1.0, 0.0], dtype=torch.float64)
    assert BlockPlan(**pruned).keeps_experts
    assert BlockPlan(**pruned, permutations_EI=straight_EI).keeps_experts
    assert BlockPlan(**pruned, permutations_EI=removed_EI).keeps_experts
    assert not BlockPlan(**pruned, permutations_EI=turned_EI).keeps_experts
    assert not BlockPlan(**{**pruned, "labels_E": (0, 0, 1, -1), "merge_weights_E": mixed_E}).keeps_experts
    # Merged, but the other member has no weight.
    assert BlockPlan(**{**pruned, "labels_E": (0, 0, 1, 1)}).keeps_experts
    # A dominant expert without weight: what remains is the other one.
    other_E = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert not BlockPlan(**{**pruned, "labels_E": (0, 0, 1, 1), "merge_weights_E": other_E}).keeps_experts
    assert keep_all("block", 4).keeps_experts


def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    buffers, shape = Buffers(), torch.Size((4, 1024))
    first = buffers.empty(shape, torch.bfloat16)
    assert (first.shape, first.dtype, first.data_ptr() % 4096) == (shape, torch.bfloat16, 0)
    address, view = first.data_ptr(), first[1:3]
    del first
    other = buffers.empty(shape, torch.bfloat16).data_ptr()
    assert other != address
    del view
    again = buffers.empty(torch.Size((2, 1024)), torch.float32)
    assert again.data_ptr() in (address, other)
    assert len(buffers._idle) == 1
    # What is idle goes before more is taken.
    larger = buffers.empty(torch.Size((8, 1024)), torch.float32)
    assert buffers._idle == []
    assert buffers.empty(torch.Size((0, 3)), torch.float32).shape == (0, 3)
    del again, larger


@pytest.mark.parametrize("saliency", ["random", "aimer"])
def test_a_shard_that_loses_its_end_during_the_run(
    saliency: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    build("qwen3_moe").save_pretrained(source)
    file = source / "model.safetensors"
    size, real = file.stat().st_size, DiskStore.opened

    def opened(self: DiskStore, unit: Any) -> Any:
        if unit.name == "model.layers.1":
            os.truncate(file, size // 4)
        return real(self, unit)

    monkeypatch.setattr(DiskStore, "opened", opened)
    method = ExpertPruning(num_experts=4, saliency=saliency)
    with pytest.raises(ValueError, match=r"model.safetensors ends at byte [\d,]+, its header promises [\d,]+. Copy or"):
        compressed(source, method, None, tmp_path / "result" / "out", "streaming")
    assert not (tmp_path / "result" / "out").exists()


def assert_pruned_alike(checkpoint: Path, tmp_path: Path) -> None:
    try:
        whole = compressed(checkpoint, HALF, None, tmp_path / "memory" / "out", "memory")
    except ValueError as error:
        # Tables of token ids, for example: no expert can go.
        pytest.skip(str(error))
    assert_same(whole, compressed(checkpoint, HALF, None, tmp_path / "streaming" / "out", "streaming"))


@pytest.mark.parametrize("target", every_target())
def test_pruning_every_architecture(target: Any, tmp_path: Path) -> None:
    build(target).save_pretrained(tmp_path / "original")
    assert_pruned_alike(tmp_path / "original", tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("composite", COMPOSITES, ids=lambda composite: composite.name)
def test_pruning_every_composite(composite: Any, tmp_path: Path) -> None:
    build_composite(composite).save_pretrained(tmp_path / "original")
    assert_pruned_alike(tmp_path / "original", tmp_path)


def test_parts_are_named_in_the_order_of_their_bytes(checkpoint: Path) -> None:
    found = streaming_source(checkpoint)
    parts = found.streamed.entries("model.layers.1.mlp.experts.gate_up_proj")
    assert parts is not None
    assert parts[5] == tuple(f"model.layers.1.mlp.experts.5.{name}.weight" for name in ("gate_proj", "up_proj"))
    assert found.streamed.entries("model.norm.weight") == (("model.norm.weight",),)
    assert found._saved_as["model.norm.weight"] == "model.norm.weight"
