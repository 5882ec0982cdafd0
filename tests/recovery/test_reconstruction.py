"""Layer-wise reconstruction before a training: what it minimizes, what it changes, and runs that go on after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor
from optimum_moe.recovery import recover, store_teacher_logits
from optimum_moe.recovery.reconstruction import reconstruct, relative_error
from optimum_moe.recovery.trainable import blocks_of, trained_names
from tests.tiny_models import build

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:Training never lowered")

SHORT: dict[str, Any] = {"max_tokens": 1280, "progress": False, "train": "experts", "reconstruct": 0.5}


def rows(count: int = 64) -> CalibrationConfig:
    ids = torch.randint(3, 99, (count, 16), generator=torch.Generator().manual_seed(5)).tolist()
    return CalibrationConfig(ids, sequence_length=16, batch_size=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original and a pruned student."""
    folder = tmp_path_factory.mktemp("reconstruct")
    model = build("qwen3_moe")
    with torch.no_grad():
        model.lm_head.weight *= 8
        for layer in model.model.layers:
            layer.mlp.experts.down_proj *= 4
    model.save_pretrained(folder / "teacher")
    compressor = MoECompressor.from_pretrained(
        folder / "teacher", ExpertPruning(num_experts=4, saliency="reap"), rows(), progress=False
    )
    compressor.apply()
    compressor.save_pretrained(folder / "student")
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def block_errors(student: Any, teacher: Any, ids: torch.Tensor) -> list[float]:
    """Relative error of each block on the teacher's inputs, computed apart."""
    seen: list[tuple[Any, Any]] = []
    hooks = [
        found.module(teacher).register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
        for found in blocks_of(teacher)
    ]
    with torch.no_grad():
        teacher(ids)
        for hook in hooks:
            hook.remove()
        errors = []
        for found, (given, output) in zip(blocks_of(student), seen, strict=True):
            own = found.module(student)(given)
            own, target = (part[0] if isinstance(part, tuple) else part for part in (own, output))
            errors.append(float(((own - target) ** 2).sum() / (target**2).sum()))
    return errors


def test_the_error_is_relative():
    target = torch.tensor([[3.0, 4.0]])
    assert float(relative_error(target, target)) == 0
    assert float(relative_error(torch.zeros(1, 2), target)) == 1
    assert float(relative_error(torch.tensor([[3.0, -4.0]]), target)) == pytest.approx(64 / 25)


def test_every_block_comes_closer_to_the_originals(folders: Path):
    student, teacher = load(folders / "student"), load(folders / "teacher")
    ids = torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(9))
    batches = [{"input_ids": torch.randint(3, 99, (8, 16))} for _ in range(60)]
    before = block_errors(student, teacher, ids)
    names = trained_names(student, "experts")
    frozen = {name: p.clone() for name, p in student.named_parameters() if name not in names}
    student.requires_grad_(False)
    for name in names:
        student.get_parameter(name).requires_grad_(True)
    groups = [{"params": [p for p in student.parameters() if p.requires_grad], "lr": 5e-3}]
    reconstruct(student, teacher, batches, groups, progress=False)
    after = block_errors(student, teacher, ids)
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True)), (before, after)
    assert all(torch.equal(student.get_parameter(name), value) for name, value in frozen.items())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(found.module(teacher)._forward_hooks for found in blocks_of(teacher))


def test_it_is_a_part_of_the_tokens_and_counts_from_before(folders: Path, tmp_path: Path):
    given = {"teacher": folders / "teacher", "data": rows()}
    plain = recover(folders / "student", **given, **{**SHORT, "reconstruct": 0}).record
    done = recover(folders / "student", **given, **SHORT, output_dir=tmp_path / "out").record
    # 20 steps, of which half reconstruct.
    assert done.tokens == pytest.approx(1280, abs=64)
    assert done.kl_before == plain.kl_before
    assert done.steps == 10
    # The curve begins after the reconstruction.
    assert done.curve[0][1] < done.kl_before
    assert done.kl_after < done.kl_before
    assert done.settings["reconstruct"] == 0.5
    assert "reconstruct" not in plain.settings


def test_a_run_that_was_killed_after_it_goes_on_to_the_same_bytes(folders: Path, tmp_path: Path):
    given: dict[str, Any] = {"data": rows(), **SHORT}
    whole = recover(folders / "student", teacher=folders / "teacher", output_dir=tmp_path / "whole", **given)
    for at in (14, 30):
        teacher, calls = load(folders / "teacher"), [0]

        def stop(*_: Any, calls: list[int] = calls, at: int = at) -> None:
            calls[0] += 1
            if calls[0] == at:
                raise InterruptedError

        handle = teacher.register_forward_pre_hook(stop)
        with pytest.raises(InterruptedError):
            recover(folders / "student", teacher=teacher, output_dir=tmp_path / f"{at}", **given)
        handle.remove()
        again = recover(folders / "student", teacher=teacher, output_dir=tmp_path / f"{at}", **given)
        assert again.record.curve == whole.record.curve
        assert again.record.kl_before == whole.record.kl_before
        shards = [(tmp_path / name / "model.safetensors").read_bytes() for name in (f"{at}", "whole")]
        assert shards[0] == shards[1]


def test_what_can_not_be_reconstructed(folders: Path, tmp_path: Path):
    given: dict[str, Any] = {"data": rows(), **SHORT}
    for share in (1, -0.1):
        with pytest.raises(ValueError, match=r"reconstruct=.* is a share of max_tokens: at least 0 and less than 1"):
            recover(folders / "student", teacher=folders / "teacher", **{**given, "reconstruct": share})
    store_teacher_logits(folders / "teacher", rows(), tmp_path / "logits", max_tokens=1280, k=8, progress=False)
    with pytest.raises(ValueError, match=r"reconstruct=0\.5 compares MoE blocks, and .*logits holds logits only"):
        recover(folders / "student", teacher=tmp_path / "logits", **given)
    student = load(folders / "student")
    student.model.layers = student.model.layers[:1]
    student.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"The teacher has 3 MoE blocks and the student 1, so that blocks cannot"):
        recover(student, teacher=folders / "teacher", **given)
