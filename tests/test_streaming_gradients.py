"""Backward passes layer by layer: the streaming engine observes the gradients of the one in memory, bit for bit."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from optimum_moe import ByteBudget, CalibrationConfig, ExpertMerging, ExpertPruning, MoECompressor
from optimum_moe.calibration.boundaries import run_layer_call
from optimum_moe.calibration.gradients import differentiable
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.engine import activations as activations_module
from optimum_moe.engine import streaming as streaming_module
from optimum_moe.engine.activations import SavedActivations
from optimum_moe.engine.lockstep import Backward, Lockstep
from optimum_moe.engine.run import KeptStatistics
from tests.composites_table import build_composite, composite_named, inputs_with_media
from tests.test_resume import contents
from tests.test_streaming import FAMILIES, assert_same, calibration, compressed
from tests.tiny_models import Target, build, every_target, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")

BUDGET = ByteBudget(share=0.5, runs_in="transformers")
METHODS: dict[str, Any] = {
    "plain": ByteBudget(share=0.5),
    "fisher": ExpertPruning(num_experts=4, saliency="fisher"),
    "refit": ExpertMerging(num_experts=4, refit="block"),
}
WITHOUT_FACTORS = ("vitpose_backbone", "vitpose")
"""Their experts have no format but the dense one, and no logits."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def saved(name: str) -> Path:
        if not (folder / name).is_dir():
            build(name).save_pretrained(folder / name)
        return folder / name

    return saved


def observed(checkpoint: Path, data: CalibrationConfig, engine: str, folder: Path, **settings: Any) -> dict[str, Any]:
    where = {"output_dir": folder / "never"} if engine == "streaming" else {}
    compressor = MoECompressor.from_pretrained(
        checkpoint, BUDGET, data, engine=engine, progress=False, **where, **settings
    )
    compressor.calibrate().save_pretrained(folder / engine)
    return load_file(folder / engine / "statistics" / "tensors.safetensors")


def assert_equal_statistics(checkpoint: Path, data: CalibrationConfig, folder: Path, **settings: Any) -> int:
    """Both engines observe the same bits; returns the number of blocks with gradients."""
    whole, streamed = (observed(checkpoint, data, engine, folder, **settings) for engine in ("memory", "streaming"))
    assert whole.keys() == streamed.keys()
    different = [name for name, tensor in whole.items() if not torch.equal(tensor, streamed[name])]
    assert not different
    return sum(name.endswith("gradient_SJH") for name in whole)


@pytest.mark.parametrize("target", every_target())
def test_statistics_equal_those_in_memory(target: Target, tmp_path: Path) -> None:
    if target.name in WITHOUT_FACTORS or not target.curvature:
        pytest.skip("refused")
    model = build(target)
    inputs = inputs_for(target)
    with torch.no_grad():
        has_loss = "logits" in model(**inputs) and target.inputs == "input_ids"
    model.save_pretrained(tmp_path / "model")
    with_gradients = assert_equal_statistics(tmp_path / "model", calibration(target.name), tmp_path)
    assert (with_gradients > 0) == has_loss


@pytest.mark.parametrize("name", ["qwen3_vl_moe", pytest.param("qwen3_omni_moe", marks=pytest.mark.full)])
def test_statistics_with_images_equal_those_in_memory(name: str, tmp_path: Path) -> None:
    composite = composite_named(name)
    build_composite(composite).save_pretrained(tmp_path / "model")
    data = CalibrationConfig([inputs_with_media(composite, seed=seed) for seed in range(2)], unseen="keep")
    assert assert_equal_statistics(tmp_path / "model", data, tmp_path) > 0


def test_keys_and_values_that_layers_share_take_gradients(tmp_path: Path) -> None:
    """The last two layers of four read those that the first two write to a mapping."""
    kinds = ["sliding_attention", "full_attention"] * 2
    model = build("gemma4", num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2)
    model.save_pretrained(tmp_path / "model")
    assert assert_equal_statistics(tmp_path / "model", calibration("gemma4"), tmp_path) == 4


def test_half_precision_and_error_propagation(tmp_path: Path) -> None:
    """What `calibrate()` observes is the original, with gradients, also if layers are to be cut on the way."""
    build("deepseek_v3").save_pretrained(tmp_path / "model")
    settings = {"dtype": "bfloat16", "error_propagation": True}
    assert assert_equal_statistics(tmp_path / "model", calibration("deepseek_v3"), tmp_path, **settings) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_byte_budget_writes_the_same(name: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    written = [
        compressed(checkpoints(name), BUDGET, calibration(name), tmp_path / engine / "out", engine)
        for engine in ("memory", "streaming")
    ]
    assert_same(*written)


@pytest.mark.parametrize("how", METHODS)
def test_other_stages_write_the_same(how: str, checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    data = calibration("qwen3_moe")
    written = [
        compressed(checkpoints("qwen3_moe"), METHODS[how], data, tmp_path / engine / "out", engine)
        for engine in ("memory", "streaming")
    ]
    assert_same(*written)


def test_free_memory_does_not_change_the_result(
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = calibration("mixtral", reservoir_tokens=64)
    plenty = compressed(checkpoints("mixtral"), BUDGET, data, tmp_path / "a" / "out", "auto")
    nothing = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=0))
    monkeypatch.setattr(streaming_module, "psutil", nothing)
    loads: list[ModelSource] = []
    monkeypatch.setattr(ModelSource, "load", loads.append)
    none_left = compressed(checkpoints("mixtral"), BUDGET, data, tmp_path / "b" / "out", "auto")
    assert not loads
    assert_same(plenty, none_left)


def test_a_run_that_was_stopped_on_the_way_back_goes_on(
    checkpoints: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = calibration("qwen3_moe")

    def run(name: str) -> dict[str, bytes]:
        return contents(compressed(checkpoints("qwen3_moe"), BUDGET, data, tmp_path / name / "out", "streaming"))

    expected, put, observed_layers = run("undisturbed"), KeptStatistics.put, []

    def put_two(self: KeptStatistics, layer: Any, statistics: Any) -> None:
        put(self, layer, statistics)
        observed_layers.append(layer.name)
        if len(observed_layers) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(KeptStatistics, "put", put_two)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    # Nothing that entered the layers is left behind.
    files = [path.name for path in (tmp_path / "stopped" / ".out.streaming").rglob("*") if path.is_file()]
    assert not [name for name in files if not name.endswith((".json", ".safetensors"))]
    assert run("stopped") == expected
    # Layers that were observed before are not observed again.
    assert observed_layers == ["model.layers.2", "model.layers.1", "model.layers.0"]


def test_parameters_require_gradients_again(tmp_path: Path) -> None:
    """Also those that were loaded and freed in the meantime."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].bias.requires_grad_(False)
    with differentiable(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model[0].weight = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["1.bias"]


class Layer(nn.Linear):
    """A layer that notes the threads that it ran in."""

    threads: ClassVar[set[threading.Thread]] = set()

    def forward(self, input_TH: torch.Tensor) -> torch.Tensor:
        self.threads.add(threading.current_thread())
        return super().forward(input_TH)


class Stack(nn.Module):
    """Layers that share a state, which the first of them gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(4, 4) for _ in range(3))

    def forward(self, input_TH: torch.Tensor) -> torch.Tensor:
        first = hidden = self.layers[0](input_TH)
        for layer in list(self.layers)[1:]:
            hidden = layer(hidden).tanh() * first
        return hidden.square().sum()


def test_all_batches_go_back_through_a_layer_before_the_one_below(tmp_path: Path) -> None:
    model = Stack().requires_grad_(False)
    inputs = [torch.randn(3, 4, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(2)]
    expected = [torch.autograd.grad(model(batch), batch)[0] for batch in inputs]
    turns: list[tuple[str, bool, int]] = []

    def call(batch: torch.Tensor) -> None:
        with torch.enable_grad():
            model(batch).backward()

    names = [f"layers.{number}" for number in range(3)]
    calls = [lambda batch=batch: call(batch) for batch in inputs]
    backward = Backward(starts=(), save=SavedActivations(tmp_path).save)
    with Lockstep(model, names, calls, lambda output: output, backward) as lockstep:
        for turn, runners in lockstep.turns():
            turns.append((turn.layer, turn.back, len(runners)))
            for runner in runners:
                runner.advance()
    assert turns == [(name, False, 2) for name in names] + [(name, True, 2) for name in reversed(names)]
    # Libraries keep memory for each thread that they ran in.
    assert Layer.threads == {threading.main_thread()}
    for batch, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(batch.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_activations_come_back_with_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    store = SavedActivations(tmp_path)
    tensors = [torch.randn(2, 3).to(dtype), torch.randn(5, 4).to(dtype).T, torch.empty(0, 4, dtype=dtype)]
    loads = [store.save("layer", tensor) for tensor in tensors]
    for tensor, load in zip(tensors, loads, strict=True):
        assert torch.equal(load(), tensor)
    assert list(tmp_path.iterdir()) == []
    assert len(store) == 1
    del loads, load
    assert len(store) == 0


def test_a_full_disk_is_said(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> None:
        compressed(checkpoints("qwen3_moe"), BUDGET, calibration("qwen3_moe"), tmp_path / "out", "streaming")

    monkeypatch.setattr(streaming_module, "free_space", lambda place: 3 * 96 * 64 * 4 - 1)
    with pytest.raises(ValueError, match=r"3 layers takes 73,728 bytes of disk for 96 tokens; .* has 73,727 left"):
        run()
    monkeypatch.setattr(streaming_module, "free_space", lambda place: 3 * 96 * 64 * 4)

    def fail(descriptor: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(activations_module, "write_all", fail)
    with pytest.raises(ValueError, match=r"The disk is full; no part is finished"):
        run()


@pytest.mark.parametrize("engine", ["memory", "streaming"])
def test_batches_with_and_without_a_loss_are_refused(
    engine: str, checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    data = CalibrationConfig([inputs_for("qwen3_moe"), {"inputs_embeds": torch.randn(2, 16, 64)}])
    with pytest.raises(ValueError, match=r"no logits for its input ids|for 1 of the 2 batches that run through it"):
        compressed(checkpoints("qwen3_moe"), BUDGET, data, tmp_path / "out", engine)


@pytest.mark.parametrize("engine", ["memory", "streaming"])
def test_layers_that_fill_a_cache_are_refused_by_name(engine: str, tmp_path: Path) -> None:
    build("diffusion_gemma").save_pretrained(tmp_path / "model")
    data = calibration("diffusion_gemma")
    with pytest.raises(ValueError, match=r"layers.0 passes tensors to other layers in cache, .*curvature=False"):
        compressed(tmp_path / "model", BUDGET, data, tmp_path / "out", engine)
    method = ByteBudget(share=0.5, runs_in="transformers", curvature=False)
    assert compressed(tmp_path / "model", method, data, tmp_path / "out", engine) == tmp_path / "out"


def test_layers_that_pass_gradients_in_other_ways_are_refused() -> None:
    tensor = torch.ones(2, requires_grad=True)

    def appends(hidden: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        states.append(hidden * 2)
        return hidden

    class Pair(tuple):
        """A container of a type that is not known."""

    def gives_a_pair(hidden: torch.Tensor, states: list[torch.Tensor]) -> Any:
        return Pair((hidden, hidden * 2))

    with pytest.raises(ValueError, match=r"layers.1 passes tensors to other layers in states"):
        run_layer_call("layers.1", appends, {0: tensor, "states": []})
    with pytest.raises(ValueError, match=r"layers.1 passes tensors to other layers in its output"):
        run_layer_call("layers.1", gives_a_pair, {0: tensor, "states": []})
