"""`recover` on labels: what is minimized and measured, of encoder-decoder and of decoder-only models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor
from optimum_moe.recovery import recover, store_teacher_logits
from optimum_moe.recovery.data import DataSettings, read_data
from optimum_moe.recovery.objective import Objective, Prediction, model_inputs
from optimum_moe.recovery.trainable import norms
from tests.tiny_models import build

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:Training never lowered")

ENCODER_DECODER, DECODER = "switch_transformers", "qwen3_moe"
IGNORED = -100


def batches(kind: str, count: int = 6, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of two rows with labels, the second shorter; a decoder-only model is asked for the last three tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 99, (2, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        labels = torch.randint(3, 99, (2, 3), generator=generator) if kind == ENCODER_DECODER else ids.clone()
        if kind == ENCODER_DECODER:
            labels[1, 2] = IGNORED
        else:
            labels[:, :6], labels[1, 7:] = IGNORED, IGNORED
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def read(kind: str, training: Any, held_out: Any) -> Any:
    return read_data(build(kind), None, CalibrationConfig(training), DataSettings(1000, held_out))


@pytest.mark.parametrize(("kind", "counted"), [(ENCODER_DECODER, 5), (DECODER, 4)])
def test_the_loss_on_labels_is_the_one_of_transformers(kind: str, counted: int) -> None:
    model = build(kind).eval()
    read_batch = read(kind, batches(kind), batches(kind, seed=1)).training[0]
    with torch.no_grad():
        output = model(**model_inputs(read_batch), use_cache=False)
        expected = model(**batches(kind)[0]).loss
    told = Prediction(output.logits + torch.linspace(0, 2, output.logits.shape[-1]))
    assert Objective(alpha=0.0, task_weight=1.0).loss(output, told, read_batch).item() == pytest.approx(expected.item())
    # The divergence counts the same positions: those of the labels, and none of the input.
    apart = torch.nn.functional.kl_div(
        output.logits.log_softmax(-1), told.logits.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    labels = read_batch["labels"]
    chosen = apart[labels != IGNORED] if kind == ENCODER_DECODER else apart[:, :-1][labels[:, 1:] != IGNORED]
    assert len(chosen) == counted
    assert Objective().loss(output, told, read_batch).item() == pytest.approx(chosen.mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", [ENCODER_DECODER, DECODER])
def test_a_student_learns_what_the_teacher_answers(kind: str) -> None:
    teacher = build(kind)
    with torch.no_grad():
        teacher.get_output_embeddings().weight *= 3
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norms(student):
            parameter *= 1 + 0.5 * torch.randn(parameter.shape, generator=generator)
    result = recover(
        student,
        teacher=teacher,
        data=batches(kind, 24),
        held_out=batches(kind, 8, seed=1),
        train="router",
        max_tokens=2000,
        learning_rate=1e-2,
        progress=False,
    )
    assert result.record.kl_after < 0.7 * result.record.kl_before


def test_stored_logits_belong_to_their_labels(tmp_path: Any) -> None:
    teacher, data, held_out = build(DECODER), batches(DECODER), batches(DECODER, seed=1)
    store_teacher_logits(teacher, data, tmp_path / "logits", held_out=held_out, max_tokens=100, k=99, progress=False)
    settings: Any = {"held_out": held_out, "max_tokens": 100, "train": "router", "progress": False}
    student = MoECompressor.from_pretrained(
        copy.deepcopy(teacher), ExpertPruning(keep_ratio=0.5), data, progress=False
    ).apply()
    assert read(DECODER, iter(data), iter(held_out)).training.hash == read(DECODER, data, held_out).training.hash
    stored = recover(copy.deepcopy(student), teacher=tmp_path / "logits", data=data, **settings)
    direct = recover(copy.deepcopy(student), teacher=teacher, data=data, **settings)
    assert stored.record.kl_before == pytest.approx(direct.record.kl_before, rel=1e-5)
    for batch in data:
        batch["labels"][:, 5] = 3
    with pytest.raises(ValueError, match="other tokens: the training data"):
        recover(student, teacher=tmp_path / "logits", data=data, **settings)


def test_labels_that_cannot_be_used_are_refused() -> None:
    good, held_out = batches(DECODER), batches(DECODER, seed=1)
    narrow = [{**batch, "labels": batch["labels"][:, :4]} for batch in good]
    with pytest.raises(ValueError, match=r"labels of item 0 are \(2, 4\), and its input_ids have the shape \(2, 9\)"):
        read(DECODER, narrow, held_out)
    one_lacks = [good[0], {name: good[1][name] for name in ("input_ids", "attention_mask")}]
    with pytest.raises(ValueError, match="labels of item 1 are NoneType"):
        read(DECODER, one_lacks, held_out)
    first_only = torch.full((2, 9), IGNORED)
    first_only[:, 0] = 5
    with pytest.raises(ValueError, match="No label of item 0 counts"):
        read(DECODER, [{**good[0], "labels": first_only}], held_out)
    without = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in held_out]
    with pytest.raises(ValueError, match="only one has here"):
        read(DECODER, good, without)
    with pytest.raises(ValueError, match="2 of the 4 held-out inputs are trained on"):
        read(DECODER, good, [held_out[0], good[3]])
