"""`recover`: what trains and what stays, resuming, teachers in memory and stored, and what is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_moe import CalibrationConfig, ExpertPruning, LowRankSparse, MoECompressor, MSMoE, Rounding, verify
from optimum_moe.checkpoint.training_record import TrainingRecord
from optimum_moe.recovery import Recovered, recover, store_teacher_logits
from optimum_moe.recovery.run import default_rate
from optimum_moe.recovery.trainer import step_share
from tests.composites_table import build_composite, composite_named, inputs_with_media
from tests.test_reload import assert_same_tensors, move_out_of_the_file
from tests.tiny_models import build, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:Training never lowered")

PRUNED = ExpertPruning(num_experts=4, saliency="reap")
SHARD = "model.safetensors"
SHORT = {"max_tokens": 1280, "progress": False}


def sharp() -> Any:
    """A random model whose predictions differ from token to token."""
    model = build("qwen3_moe", dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight *= 8
    return model


def rows(count: int = 64, seed: int = 5) -> CalibrationConfig:
    """Documents of 16 tokens, four in a batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 99, (count, 16), generator=generator).tolist()
    return CalibrationConfig(ids, sequence_length=16, batch_size=4)


def compress(teacher: Path, out: Path, recipe: Any) -> Path:
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32, seed=seed) for seed in range(3)])
    compressor = MoECompressor.from_pretrained(teacher, recipe, data, progress=False)
    compressor.apply()
    return compressor.save_pretrained(out)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original in bfloat16, a plain student, one with a routing map, and one with factors."""
    folder = tmp_path_factory.mktemp("recover")
    sharp().save_pretrained(folder / "teacher")
    compress(folder / "teacher", folder / "plain", PRUNED)
    compress(folder / "teacher", folder / "map", MSMoE(num_experts=4))
    compress(folder / "teacher", folder / "factors", [MSMoE(num_experts=4), LowRankSparse(rank=8, density=0.25)])
    return folder


def trained(folders: Path, student: str, out: Path | None = None, **settings: Any) -> Recovered:
    given = {"teacher": folders / "teacher", "data": rows(), **SHORT, **settings}
    return recover(folders / student, output_dir=out, **given)


def changed(before: Path, after: Path) -> set[str]:
    old, new = load_file(before / SHARD), load_file(after / SHARD)
    assert old.keys() == new.keys()
    assert {name: t.dtype for name, t in old.items()} == {name: t.dtype for name, t in new.items()}
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize(("student", "learning_rate"), [("plain", 3e-4), ("map", 2e-3), ("factors", 2e-3)])
def test_only_routers_and_norms_change_and_verify_knows_it(
    student: str, learning_rate: float, folders: Path, tmp_path: Path
) -> None:
    result = trained(folders, student, tmp_path / "out", learning_rate=learning_rate)
    record = TrainingRecord.load(tmp_path / "out")
    assert record == result.record
    assert record.kl_after < record.kl_before
    moved = changed(folders / student, tmp_path / "out")
    assert moved
    assert moved <= set(record.names)
    assert all("norm" in name or name.endswith("mlp.gate.weight") for name in record.names)
    assert {name for name in record.names if name.endswith("gate.weight")} <= moved
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8")) == json.loads(
        (folders / student / "config.json").read_text(encoding="utf-8")
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert_same_tensors(loaded, result.model)
    report = verify(tmp_path / "out", folders / "teacher")
    assert report.passed, str(report)
    assert report["routers"].trained
    assert not report["experts"].trained
    assert {text.partition(":")[0] for text in report.trained} == moved
    assert "then trained (router)" in report["plan"].note


def test_another_tensor_than_the_trained_ones_fails(folders: Path, tmp_path: Path) -> None:
    trained(folders, "plain", tmp_path / "out", learning_rate=3e-4)
    tensors = load_file(tmp_path / "out" / SHARD)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "out" / SHARD, metadata={"format": "pt"})
    report = verify(tmp_path / "out", folders / "teacher")
    assert [check.name for check in report.checks if not check.passed] == ["other tensors"]


@pytest.mark.parametrize(("student", "train"), [("factors", "experts"), ("plain", "full"), ("plain", "lora")])
def test_everything_of_a_kind_trains(student: str, train: str, folders: Path, tmp_path: Path) -> None:
    result = trained(folders, student, tmp_path / "out", train=train, learning_rate=3e-4)
    assert result.record.kl_after < result.record.kl_before
    assert result.record.best_step > 0
    moved = {text.partition(":")[0] for text in verify(tmp_path / "out", folders / "teacher").trained}
    if train == "experts":
        factors = [name for name in result.record.names if ".factors." in name]
        digests = {name.partition(" ")[0] for name in moved if "digest" in name}
        assert set(factors) == digests
        assert len(factors) > 10
    else:
        stacks = {n for n in result.record.names if n.endswith(("gate_up_proj", "down_proj")) and ".experts." in n}
        assert stacks
        assert moved >= stacks
    if train == "lora":
        assert not any("norm" in name or "embed" in name or "lm_head" in name for name in result.record.names)
    assert verify(tmp_path / "out", folders / "teacher").passed
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), result.model)


@pytest.mark.parametrize("name", ["mixtral", "glm4_moe", "kimi_linear", "gpt_oss"])
def test_a_trained_model_runs_as_its_checkpoint_does(name: str, tmp_path: Path) -> None:
    """In bfloat16, but for what its class keeps in float32."""
    build(name, dtype=torch.bfloat16).save_pretrained(tmp_path / "teacher")
    data = [inputs_for(name, rows=4, length=32, seed=seed) for seed in range(4)]
    compressor = MoECompressor.from_pretrained(tmp_path / "teacher", PRUNED, CalibrationConfig(data), progress=False)
    compressor.apply()
    compressor.save_pretrained(tmp_path / "student")
    given = {"teacher": tmp_path / "teacher", "data": data[:3], "held_out": data[3:], "train": "experts"}
    result = recover(tmp_path / "student", output_dir=tmp_path / "out", **given, max_tokens=300, progress=False)
    loaded, inputs = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), inputs_for(name)
    dtypes = [{n: t.dtype for n, t in model.state_dict().items()} for model in (result.model, loaded)]
    assert dtypes[0] == dtypes[1]
    move_out_of_the_file(loaded)
    assert torch.equal(logits_of(result.model, inputs), logits_of(loaded, inputs))


@pytest.mark.parametrize("name", ["nemotron_h", "jamba"])
def test_adapters_leave_state_space_mixers_alone(name: str) -> None:
    """Their convolutions, and the output projections that fused kernels read."""
    original, data = build(name), [inputs_for(name, rows=4, length=32, seed=seed) for seed in range(4)]
    student = MoECompressor.from_pretrained(build(name), ExpertPruning(num_experts=4, saliency="aimer")).apply()
    given = {"teacher": original, "data": data[:3], "held_out": data[3:], "train": "lora"}
    names = recover(student, **given, max_tokens=300, progress=False).record.names
    assert any("experts" in name for name in names)
    assert not any("conv1d" in name or "out_proj" in name or "A_log" in name for name in names)


def test_adapters_of_weights_that_others_read_are_refused() -> None:
    data = [inputs_for("dbrx", rows=4, length=32, seed=seed) for seed in range(2)]
    given = {"teacher": build("dbrx"), "data": data[:1], "held_out": data[1:], "train": "lora"}
    with pytest.raises(ValueError, match=r"PEFT cannot adapt DbrxForCausalLM.* Pass train='experts'"):
        recover(build("dbrx"), **given, max_tokens=128, progress=False)


def test_a_model_without_a_head_is_refused() -> None:
    data = [inputs_for("ernie4_5_vl_moe", rows=4, length=32, seed=seed) for seed in range(2)]
    given = {"teacher": build("ernie4_5_vl_moe"), "data": data[:1], "held_out": data[1:]}
    with pytest.raises(ValueError, match=r"Ernie4_5_VLMoeTextModel has no head, .* \(auto_class=\)"):
        recover(build("ernie4_5_vl_moe"), **given, max_tokens=128, progress=False)


def test_a_model_whose_part_runs_is_refused() -> None:
    composite = composite_named("qwen3_omni_moe")
    data = [inputs_with_media(composite, seed=seed) for seed in range(2)]
    given = {"teacher": build_composite(composite), "data": data[:1], "held_out": data[1:]}
    with pytest.raises(
        ValueError, match=r"Qwen3OmniMoeForConditionalGeneration has no forward pass .* `model\.thinker`"
    ):
        recover(build_composite(composite), **given, max_tokens=128, progress=False)


def test_disturbed_routers_find_back(folders: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(folders / "teacher", dtype=torch.float32)
    with torch.no_grad():
        for layer in student.model.layers:
            layer.mlp.gate.weight += 0.05 * torch.randn_like(layer.mlp.gate.weight)
    amount = {"max_tokens": 5000, "progress": False}
    result = recover(student, teacher=folders / "teacher", data=rows(200), learning_rate=3e-3, **amount)
    assert result.record.won_back > 0.3


class Interrupted(Exception):
    """What the kill of a run looks like from inside."""


def test_a_killed_run_goes_on_to_the_same_bytes(folders: Path, tmp_path: Path) -> None:
    whole = trained(folders, "plain", tmp_path / "whole", train="experts")
    teacher = AutoModelForCausalLM.from_pretrained(folders / "teacher", dtype=torch.float32)
    calls = [0]

    def stop(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 12:
            raise Interrupted

    handle = teacher.register_forward_pre_hook(stop)
    with pytest.raises(Interrupted):
        trained(folders, "plain", tmp_path / "out", train="experts", teacher=teacher)
    handle.remove()
    left = tmp_path / ".out.training"
    assert any(path.name.startswith("checkpoint-") for path in left.iterdir())
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unfinished training with another settings"):
        trained(folders, "plain", tmp_path / "out", train="experts", teacher=teacher, learning_rate=0.5)
    again = trained(folders, "plain", tmp_path / "out", train="experts", teacher=teacher)
    assert (tmp_path / "out" / SHARD).read_bytes() == (tmp_path / "whole" / SHARD).read_bytes()
    assert again.record.curve == whole.record.curve
    assert again.record.losses == whole.record.losses
    assert not left.exists()


def test_stored_logits_of_the_whole_vocabulary_are_the_teacher(folders: Path, tmp_path: Path) -> None:
    amount = {"max_tokens": SHORT["max_tokens"], "progress": False}
    # On a CPU a teacher in memory runs in float32.
    teacher = AutoModelForCausalLM.from_pretrained(folders / "teacher", dtype=torch.float32)
    stored = {k: store_teacher_logits(teacher, rows(), tmp_path / f"logits-{k}", k=k, **amount) for k in (8, 10_000)}
    direct = trained(folders, "plain")
    same = trained(folders, "plain", teacher=stored[10_000])
    curves = [[kl for _, kl in run.record.curve] for run in (direct, same)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    few = trained(folders, "plain", teacher=stored[8])
    # Less is seen of a divergence by fewer outcomes, and the training still lowers it.
    assert 0 < few.record.kl_before < direct.record.kl_before
    assert few.record.kl_after < few.record.kl_before
    with pytest.raises(ValueError, match=r"other tokens: the training data have sha256"):
        trained(folders, "plain", teacher=stored[8], seed=1)
    with pytest.raises(ValueError, match=r"temperature=2.0, but .* holds logits for 1.0"):
        trained(folders, "plain", teacher=stored[8], temperature=2.0)
    with pytest.raises(ValueError, match=r"hidden_weight=1.0 compares hidden states"):
        trained(folders, "plain", teacher=stored[8], hidden_weight=1.0)


def test_a_model_in_memory_trains_in_place_in_its_own_dtypes(folders: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(folders / "plain")
    before = copy.deepcopy(student)
    result = recover(student, teacher=folders / "teacher", data=rows(), learning_rate=3e-4, **SHORT)
    assert result.model is student
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in student.parameters())
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert moved
    assert moved <= set(result.record.names)


def test_a_compressor_saves_what_was_trained_in_between(folders: Path, tmp_path: Path) -> None:
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32, seed=seed) for seed in range(3)])
    compressor = MoECompressor.from_pretrained(folders / "teacher", PRUNED, data, progress=False)
    result = recover(compressor.apply(), teacher=folders / "teacher", data=rows(), learning_rate=3e-4, **SHORT)
    compressor.save_pretrained(tmp_path / "out")
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), result.model)
    assert not verify(tmp_path / "out", folders / "teacher").passed
    result.record.save(tmp_path / "out")
    report = verify(tmp_path / "out", folders / "teacher")
    assert report.passed, str(report)
    assert {text.partition(":")[0] for text in report.trained} <= set(result.record.names)


def test_a_student_like_its_teacher_has_nothing_to_learn(folders: Path) -> None:
    result = trained(folders, "teacher", learning_rate=1e-8)
    assert all(abs(kl) < 1e-6 for _, kl in result.record.curve)
    assert all(abs(loss) < 1e-6 for _, loss in result.record.losses)


def test_an_encoder_decoder_learns_from_a_teacher_of_its_class(tmp_path: Path) -> None:
    build("switch_transformers").save_pretrained(tmp_path / "teacher")
    student = build("switch_transformers")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("classifier.weight"):
                parameter += 0.05 * torch.randn_like(parameter)
    result = recover(student, teacher=tmp_path / "teacher", data=rows(), learning_rate=1e-3, **SHORT)
    assert any(name.endswith("decoder.block.1.layer.2.mlp.router.classifier.weight") for name in result.record.names)
    assert result.record.kl_after <= result.record.kl_before
    assert result.record.kl_before > 0


def test_the_losses_of_the_paper_can_be_chosen(folders: Path) -> None:
    given = {"alpha": 0.2, "temperature": 2.0, "task_weight": 1.0, "hidden_weight": 0.1}
    result = trained(folders, "plain", **given)
    assert {name: result.record.settings[name] for name in given} == given
    # The cross-entropy of random tokens is about the logarithm of their number.
    assert result.record.losses[0][1] > 4


def test_sparse_rows_are_pruned_while_they_train(folders: Path, tmp_path: Path) -> None:
    result = trained(folders, "factors", tmp_path / "out", train="experts", final_density=0.1)
    before = AutoModelForCausalLM.from_pretrained(folders / "factors")
    stored = [sum(p.numel() for n, p in m.named_parameters() if n.endswith(".rows")) for m in (before, result.model)]
    assert stored[1] == pytest.approx(0.4 * stored[0], rel=0.02)
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), result.model)
    assert verify(tmp_path / "out", folders / "teacher").passed


def test_projections_that_lose_all_their_rows_can_be_stored(folders: Path, tmp_path: Path) -> None:
    """The schedule compares rows of the whole model, so that some projections may keep none."""
    result = trained(folders, "factors", tmp_path / "out", train="experts", final_density=0.001)
    before, after = (
        {name for name, _ in model.named_parameters() if name.endswith(".rows")}
        for model in (AutoModelForCausalLM.from_pretrained(folders / "factors"), result.model)
    )
    assert after < before
    assert after <= set(result.record.names)
    assert not (before - after) & set(result.record.names)
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), result.model)


def test_a_training_that_diverges_keeps_the_student_as_it_was(folders: Path, tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(folders / "plain")
    before = copy.deepcopy(student)
    with pytest.raises(ValueError, match=r"diverged at step \d+ .* Lower learning_rate=1000"):
        recover(
            student,
            teacher=folders / "teacher",
            data=rows(),
            train="full",
            learning_rate=1000.0,
            output_dir=tmp_path / "out",
            **SHORT,
        )
    assert_same_tensors(student, before)
    assert list(tmp_path.iterdir()) == []


def test_scales_of_rounded_experts_train_and_their_numbers_stay(folders: Path, tmp_path: Path) -> None:
    small = compress(folders / "teacher", tmp_path / "small", Rounding(bits=4, fitted=False))
    student = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    with torch.no_grad():
        scales = {name: p for name, p in student.named_parameters() if name.endswith(".scale4")}
        for scale in scales.values():
            scale *= 1.5
    packed = {name: buffer.clone() for name, buffer in student.named_buffers() if "packed" in name}
    result = recover(student, teacher=folders / "teacher", data=rows(), train="experts", learning_rate=3e-3, **SHORT)
    assert set(scales) <= set(result.record.names)
    assert result.record.won_back > 0.3
    assert len(packed) == len(scales) == 9
    assert all(torch.equal(buffer, student.get_buffer(name)) for name, buffer in packed.items())


def test_steps_are_short_for_small_numbers() -> None:
    assert step_share(torch.full((4,), 0.002)) == pytest.approx(0.1)
    assert step_share(torch.ones(4)) == step_share(torch.zeros(4)) == step_share(torch.zeros(0)) == 1.0


def test_the_default_rate_follows_the_distance_and_is_recorded(folders: Path) -> None:
    assert default_rate("router", 0.35) == default_rate("router", 2.0) == 0.01
    assert default_rate("router", 0.035) == pytest.approx(0.001)
    record = trained(folders, "plain").record
    assert record.settings["learning_rate"] == pytest.approx(default_rate("router", record.kl_before))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "routers"}, r"train='routers' is unknown; did you mean 'router'\?"),
        ({"learning_rate": 0.0}, r"learning_rate=0.0 must be positive"),
        ({"alpha": -1.0}, r"alpha=-1.0: weights of a loss are at least 0"),
        ({"alpha": 0.0}, r"alpha=0.0, task_weight=0.0, hidden_weight=0.0: weights"),
        ({"temperature": 0.0}, r"temperature=0.0 must be positive"),
        ({"max_tokens": 0}, r"max_tokens=0 is out of range"),
        ({"held_out_share": 1.0}, r"held_out_share=1.0 must be between 0 and 1"),
        ({"data": []}, r"The calibration source is empty"),
        ({"data": rows(1)}, r"has 1 document\(s\): one is trained on and another one held out"),
        ({"held_out": rows(8)}, r"of the held-out text's sequences of 13 tokens are in the training text"),
        ({"data": CalibrationConfig([[5] * 16] * 9, sequence_length=16)}, r"Give every document once"),
        (
            {"data": [inputs_for("qwen3_moe")]},
            r"Model inputs, images, audio and video are not split .* Pass held_out=",
        ),
        ({"seed": -1}, r"seed=-1 is out of range"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str, folders: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trained(folders, "plain", **settings)


def test_wrong_models_and_folders(folders: Path, tmp_path: Path) -> None:
    build("qwen3_moe", vocab_size=120).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="wider has a vocabulary of 120 and the student 99"):
        trained(folders, "plain", teacher=tmp_path / "wider")
    for name, what in (("plain", "the student"), ("teacher", "the teacher")):
        with pytest.raises(ValueError, match=f"holds {what}, which would be replaced"):
            trained(folders, "plain", folders / name, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        trained(folders, "plain", tmp_path / "full")


def edit_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "recovery.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def test_a_changed_record_is_noticed(folders: Path, tmp_path: Path) -> None:
    trained(folders, "plain", tmp_path / "out")
    edit_record(tmp_path / "out", lambda record: record["names"].append("lm_head.weight"))
    report = verify(tmp_path / "out", folders / "teacher")
    assert [check.name for check in report.checks if not check.passed] == ["side files"]
    edit_record(tmp_path / "out", lambda record: record.pop("curve"))
    assert not verify(tmp_path / "out", folders / "teacher").passed
