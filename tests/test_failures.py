"""Runs that fail or are interrupted: nothing half-written is left, and the model is what it was."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeForSequenceClassification

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE, verify
from optimum_moe import compressor as compressor_module
from optimum_moe.checkpoint import carried_files, destination
from optimum_moe.reporting import description
from optimum_moe.surgeons import find_blocks
from tests.tiny_checkpoints import save_checkpoint
from tests.tiny_models import build, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

WAYS_TO_FAIL: dict[str, tuple[Callable[[], Any], type[BaseException], str | None]] = {}


def failing(expected: type[BaseException], message: str | None) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        WAYS_TO_FAIL[function.__name__] = (function, expected, message)
        return function

    return add


@failing(KeyboardInterrupt, None)
def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@failing(ValueError, "is full; the incomplete result was removed. Free some space")
def full_disk() -> None:
    raise OSError(28, "No space left on device")


@failing(ValueError, "is full; the incomplete result was removed. Free some space")
def full_disk_by_safetensors() -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@failing(PermissionError, "denied")
def no_permission() -> None:
    raise PermissionError(13, "Permission denied")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("failures") / "qwen3_moe")


def pruning(original: Any, **settings: Any) -> MoECompressor:
    method = ExpertPruning(num_experts=4, saliency="random")
    return MoECompressor.from_pretrained(original, method, progress=False, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def earlier(tmp_path: Path) -> Iterator[Path]:
    """An earlier checkpoint at the destination, which the test must leave as it is."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}", encoding="utf-8")
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    yield out
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", ["model", "files", "plan", "card", "place"])
@pytest.mark.parametrize("way", WAYS_TO_FAIL)
def test_failed_write_leaves_the_destination_as_it_was(
    original: Path, earlier: Path, monkeypatch: pytest.MonkeyPatch, step: str, way: str
) -> None:
    fail, expected, message = WAYS_TO_FAIL[way]
    real_write, real_place = compressor_module.write_model, Path.rename
    renamed = []

    def write_then_fail(*arguments: Any) -> None:
        real_write(*arguments)
        fail()

    def rename_once_then_fail(self: Path, target: Path) -> Any:
        renamed.append(target)
        return real_place(self, target) if len(renamed) != 2 else fail()

    compressor = pruning(original, output_dir=earlier, overwrite=True)
    if step == "model":
        monkeypatch.setattr(compressor_module, "write_model", write_then_fail)
    elif step == "files":
        monkeypatch.setattr(carried_files, "_copy", lambda *_: fail())
    elif step == "plan":
        monkeypatch.setattr(compressor_module.CompressionPlan, "save_pretrained", lambda *_: fail())
    elif step == "card":
        monkeypatch.setattr(description, "model_card", lambda *_: fail())
    else:
        monkeypatch.setattr(Path, "rename", rename_once_then_fail)
    with pytest.raises(expected, match=message):
        compressor.apply()


def test_overwriting_replaces_everything(original: Path, tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "out", tmp_path / "link"
    real.mkdir(parents=True)
    (real / "old.txt").touch()
    link.symlink_to(real)
    assert pruning(original, output_dir=link, overwrite=True).apply() == real
    assert not (real / "old.txt").exists()
    assert link.is_symlink()
    assert [path.name for path in real.parent.iterdir()] == ["out"]
    assert AutoModelForCausalLM.from_pretrained(link).config.num_experts == 4


def test_a_disk_that_is_really_too_small(original: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = pruning(original, output_dir=small_disk / "out")
    with pytest.raises(ValueError, match=r"disk has [\d,]+ bytes left, the checkpoint needs [\d,]+. Free some space"):
        compressor.apply()
    assert compressor.model is None
    monkeypatch.setattr(compressor_module, "check_space", lambda *_: None)
    with pytest.raises(ValueError, match=r"The disk of .* is full; the incomplete result was removed"):
        compressor.apply()
    assert list(small_disk.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission(original: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="No permission to write in"):
        pruning(original, output_dir=tmp_path / "out")


def test_a_failed_save_can_be_repeated(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = pruning(original)
    compressor.apply()
    with monkeypatch.context() as patch:
        patch.setattr(compressor_module, "write_model", lambda *_: full_disk())
        with pytest.raises(ValueError, match="is full"):
            compressor.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    compressor.save_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def state_of(model: PreTrainedModel) -> list[Any]:
    """Everything that calibration touches."""
    modules = list(model.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in modules]
    return [
        [m.training for m in modules],
        hooks,
        [sorted(vars(m)) for m in modules],
        model.config._experts_implementation,
    ]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "switch_transformers"])
@pytest.mark.parametrize("failure", ["mask", "interrupt", "unseen"])
def test_failed_calibration_restores_the_model(
    name: str, failure: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = build(name), inputs_for(name)
    good = logits_of(model, inputs)
    config = CalibrationConfig([inputs])
    hook = None
    if failure == "mask":
        observer = importlib.import_module("optimum_moe.calibration.observe")
        monkeypatch.setattr(observer, "padding_mask", lambda *_: torch.ones(30, dtype=torch.bool))
        expected, message = ValueError, "saw 32 tokens, but the attention mask has 30[.] Give inputs whose"
    elif failure == "interrupt":
        hook = model.lm_head.register_forward_pre_hook(lambda *_: interrupt())
        expected, message = KeyboardInterrupt, None
    else:
        config = CalibrationConfig([{key: ids[:1, :1] for key, ids in inputs.items()}], unseen="error")
        expected, message = ValueError, "Calibration gave no token to"
    model.train(training)
    before = state_of(model)
    compressor = MoECompressor.from_pretrained(model, MSMoE(num_experts=4), config, progress=False)
    with pytest.raises(expected, match=message):
        compressor.calibrate()
    assert state_of(model) == before
    assert compressor.statistics is None
    if hook is not None:
        hook.remove()
    assert torch.equal(logits_of(model.eval(), inputs), good)


def test_unseen_error_names_block_and_experts() -> None:
    model = build("qwen3_moe")
    config = CalibrationConfig([{"input_ids": torch.tensor([[5]])}], unseen="error")
    compressor = MoECompressor.from_pretrained(model, MSMoE(num_experts=4), config, progress=False)
    with pytest.raises(ValueError, match=r"no token to 18 of 24 experts \(.*Add data, or set unseen=") as error:
        compressor.calibrate()
    for found in find_blocks(model):
        assert re.search(rf"{re.escape(found.info.name)}: \d, \d", str(error.value))
    warning = CalibrationConfig(config.source)
    with pytest.warns(UserWarning, match="no token to 18 of 24 experts"):
        MoECompressor.from_pretrained(model, MSMoE(num_experts=4), warning, progress=False).calibrate()


def fail_at_second_block(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = []
    real = ExpertPruning.decide

    def decide(self: ExpertPruning, context: Any, count: int) -> Any:
        cuts.append(context.info.name)
        if len(cuts) == 2:
            interrupt()
        return real(self, context, count)

    monkeypatch.setattr(ExpertPruning, "decide", decide)


def test_interrupted_cut_of_a_checkpoint_can_be_repeated(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pruning(original).apply()
    compressor = pruning(original)
    with monkeypatch.context() as patch:
        fail_at_second_block(patch)
        with pytest.raises(KeyboardInterrupt):
            compressor.apply()
    again = compressor.apply().state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.state_dict().items())
    with pytest.raises(ValueError, match=r"already cut\. .*from the original"):
        compressor.apply()


def test_interrupted_cut_of_a_model_in_memory_is_refused_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    compressor = pruning(build("qwen3_moe"))
    fail_at_second_block(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        compressor.apply()
    for call in (compressor.apply, compressor.calibrate):
        with pytest.raises(ValueError, match=r"partly cut|needs calibration data"):
            call()


def without(folder: Path, copy: Path, *names: str) -> Path:
    """A copy of a checkpoint that lacks tensors."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


LAYER = "model.layers.1"
LACKING = {
    "attention": [f"{LAYER}.self_attn.q_proj.weight"],
    "norm": ["model.norm.weight"],
    "head": ["lm_head.weight"],
    "router": [f"{LAYER}.mlp.gate.weight"],
    "one expert": [f"{LAYER}.mlp.experts.3.down_proj.weight"],
    "half of one": [f"{LAYER}.mlp.experts.7.up_proj.weight"],
    "experts": [f"{LAYER}.mlp.experts.{e}.down_proj.weight" for e in range(8)],
}


@pytest.mark.parametrize("kind", LACKING)
def test_what_a_checkpoint_lacks_is_never_random(original: Path, kind: str, tmp_path: Path) -> None:
    broken = without(original, tmp_path / "broken", *LACKING[kind])
    shown = ", ".join(LACKING[kind][:3]) + (", ..." if len(LACKING[kind]) > 3 else "")
    wanted = f"{broken} lacks {len(LACKING[kind])} tensors ({shown}). They would be random. Copy or download"
    for engine in ("memory", "streaming"):
        with pytest.raises(ValueError, match=re.escape(wanted)):
            pruning(broken, engine=engine, output_dir=tmp_path / engine)


def test_a_correction_that_some_layers_lack_is_refused(tmp_path: Path) -> None:
    build("deepseek_v3").save_pretrained(tmp_path / "original")
    name = f"{LAYER}.mlp.gate.e_score_correction_bias"
    broken = without(tmp_path / "original", tmp_path / "broken", name)
    with pytest.raises(ValueError, match=re.escape(f"lacks 1 tensors ({name})")):
        pruning(broken)


def test_tied_tensors_and_the_head_of_another_task_may_be_missing(tmp_path: Path) -> None:
    build("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    pruning(tmp_path / "tied")
    build("qwen3_moe").model.save_pretrained(tmp_path / "base")
    model = pruning(tmp_path / "base", auto_class=Qwen3MoeForSequenceClassification).apply()
    assert model.score.weight.shape == (2, 64)


@pytest.mark.parametrize("gone", ["model.layers.0.self_attn.k_norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("method", [ExpertPruning(num_experts=4), MSMoE(num_experts=4)], ids=["plain", "map"])
def test_verification_names_what_a_result_lacks(original: Path, method: Any, gone: str, tmp_path: Path) -> None:
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32)])
    MoECompressor.from_pretrained(original, method, data, progress=False, output_dir=tmp_path / "out").apply()
    report = verify(without(tmp_path / "out", tmp_path / "broken", gone), original)
    assert report["keys"].failures == (f"{gone} is missing",)
    if isinstance(method, MSMoE):
        with pytest.raises(ValueError, match=re.escape(f"The checkpoint lacks 1 tensors ({gone})")):
            AutoModelForCausalLM.from_pretrained(tmp_path / "broken")


def test_space_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bytes left, the checkpoint needs 1,000,000,000,000,000,000"):
        destination.check_space(tmp_path / "a" / "b", 10**18)
