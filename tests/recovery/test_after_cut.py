"""A recipe that trains after the cut: the same as both steps by hand, what is refused, resuming, and who honors it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_moe import (
    BlockDrop,
    CalibrationConfig,
    ExpertPruning,
    LowRankSparse,
    MoECompressor,
    MSMoE,
    Recovery,
    verify,
)
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.checkpoint.training_record import TrainingRecord
from optimum_moe.ranks import Ranks
from optimum_moe.recipe import load_recipe, parse_recipe, recovery_on, share_field, size_fields
from optimum_moe.recovery import recover
from optimum_moe.recovery.teacher import ModelTeacher
from optimum_moe.reporting.page.run_record import read_report
from tests.fake_hub import FakeHub, fake_hub
from tests.recovery.test_recover import SHARD, Interrupted, rows, sharp
from tests.test_reload import assert_same_tensors

__all__ = ["fake_hub"]
pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:Training never lowered")

PRUNED = ExpertPruning(num_experts=4, saliency="reap")
SPARSE = [MSMoE(num_experts=4), LowRankSparse(rank=8, density=1.0, whiten=False)]
ROUTERS = {"max_tokens": 640, "learning_rate": 3e-4}
ROWS = {"max_tokens": 640, "train": "experts", "final_density": 0.25, "task_weight": 1.0, "alpha": 0.2}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16 that stores its routers in float32."""
    folder = tmp_path_factory.mktemp("after_cut") / "original"
    sharp().save_pretrained(folder)
    tensors = load_file(folder / SHARD)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("mlp.gate.weight")]:
        wide = tensors[name].float()
        tensors[name] = wide * (1 + 1e-3 * torch.rand(wide.shape, generator=generator))
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    return folder


def text() -> dict[str, Any]:
    data = rows(40)
    return {"source": data.source, "sequence_length": data.sequence_length, "batch_size": data.batch_size}


def opened(original: Any, stages: Any, settings: dict[str, Any] | None, **given: Any) -> MoECompressor:
    given = {"calibration": rows(16), "progress": False, **given}
    recover = None if settings is None else {"data": text(), **settings}
    return MoECompressor.from_pretrained(original, stages, recover=recover, **given)


@pytest.mark.parametrize(("stages", "settings"), [(PRUNED, ROUTERS), (SPARSE, ROWS)], ids=["routers", "rows"])
def test_one_apply_is_both_steps_by_hand(stages: Any, settings: dict[str, Any], original: Path, tmp_path: Path) -> None:
    one = opened(original, stages, settings, output_dir=tmp_path / "one")
    assert one.apply() == tmp_path / "one"
    opened(original, stages, None, output_dir=tmp_path / "cut").apply()
    by_hand = recover(
        tmp_path / "cut", teacher=original, data=text(), output_dir=tmp_path / "two", progress=False, **settings
    )
    record = one.training
    assert record is not None
    assert record == by_hand.record == TrainingRecord.load(tmp_path / "one")
    if stages is PRUNED:
        assert record.kl_after < record.kl_before
    together, apart = (load_file(tmp_path / name / SHARD) for name in ("one", "two"))
    assert together.keys() == apart.keys()
    assert all(tensor.dtype == apart[name].dtype for name, tensor in together.items())
    assert all(torch.equal(tensor, apart[name]) for name, tensor in together.items())
    assert {tensor.dtype for name, tensor in together.items() if name.endswith("mlp.gate.weight")} == {torch.float32}
    files = [sorted(path.name for path in (tmp_path / name).rglob("*")) for name in ("one", "two")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / name / "config.json").read_text(encoding="utf-8")) for name in ("one", "two")]
    assert configs[0] == configs[1]
    report = verify(tmp_path / "one", original)
    assert report.passed, str(report)
    assert "then trained" in report["plan"].note
    assert read_report(tmp_path / "one")["recovery"]["kl_after"] == record.kl_after
    assert "## Trained afterwards" in (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert_same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "one"), one.model)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "cut", "two"}


def test_a_model_in_memory_is_copied_before_it_is_cut(tmp_path: Path, fake_hub: FakeHub) -> None:
    models = [sharp() for _ in range(2)]
    compressor = opened(models[0], PRUNED, ROUTERS)
    assert compressor.apply() is models[0]
    teacher = copy.deepcopy(models[1])
    by_hand = opened(models[1], PRUNED, None).apply()
    record = recover(by_hand, teacher=teacher, data=text(), progress=False, **ROUTERS).record
    assert compressor.training == record
    assert_same_tensors(models[0], by_hand)
    assert models[0].config.use_cache
    compressor.save_pretrained(tmp_path / "out")
    assert TrainingRecord.load(tmp_path / "out") == record
    teacher.save_pretrained(tmp_path / "original")
    report = verify(tmp_path / "out", tmp_path / "original")
    assert report.passed, str(report)
    assert report["routers"].trained
    compressor.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/small")
    card = fake_hub.files["me/small"]["README.md"].decode()
    assert "# me/small\n" in card
    assert card.count("## Trained afterwards") == 1
    assert "Nothing was trained after the cut" not in card


def test_a_killed_training_goes_on_to_the_same_bytes(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**ROUTERS, "train": "experts"}
    opened(original, PRUNED, settings, output_dir=tmp_path / "whole").apply()
    calls, predict = [0], ModelTeacher.predict

    def stop(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 12:
            raise Interrupted
        return predict(*given)

    killed = opened(original, PRUNED, settings, output_dir=tmp_path / "out")
    monkeypatch.setattr(ModelTeacher, "predict", stop)
    with pytest.raises(Interrupted):
        killed.apply()
    monkeypatch.undo()
    assert any(path.name.startswith("checkpoint-") for path in (tmp_path / ".out.training").iterdir())
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="Nothing to save yet"):
        killed.save_pretrained(tmp_path / "partly-trained")
    with pytest.raises(ValueError, match="unfinished training with another settings"):
        opened(original, PRUNED, {**settings, "learning_rate": 0.5}, output_dir=tmp_path / "out").apply()
    opened(original, PRUNED, settings, output_dir=tmp_path / "out").apply()
    assert (tmp_path / "out" / SHARD).read_bytes() == (tmp_path / "whole" / SHARD).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_a_model_in_memory_whose_training_stopped_is_not_cut_again() -> None:
    compressor = opened(sharp(), PRUNED, {**ROUTERS, "learning_rate": 1000.0})
    with pytest.raises(ValueError, match="Lower learning_rate=1000"):
        compressor.apply()
    with pytest.raises(ValueError, match=r"left the model partly cut\. Load it again"):
        compressor.apply()


def test_a_recipe_is_written_with_its_training(original: Path, tmp_path: Path) -> None:
    given = {"stage": "reap", "num_experts": 4, "calibration": {"max_tokens": 64}, "recover": {"max_tokens": 640}}
    given["stage"] = "expert-pruning"
    recipe = parse_recipe(given)
    assert recipe.recover == Recovery(max_tokens=640)
    text = recipe.to_yaml()
    assert text.endswith("recover:\n  max_tokens: 640\n")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert parse_recipe({**given, "recover": {}}).recover == Recovery()
    assert "recover: {}" in parse_recipe({**given, "recover": {}}).to_yaml()
    assert parse_recipe(given, {"recover.train": "full"}).recover == Recovery("full", 640)
    assert parse_recipe(given, {"recover": None}).recover is None
    assert parse_recipe({"stage": "expert-pruning", "num_experts": 4}, {"recover.train": "full"}).recover == Recovery(
        "full"
    )
    stages = {"stages": [{"stage": "expert-pruning", "num_experts": 4}], "calibration": {}, "recover": {}, "seed": 1}
    (tmp_path / "stages.yaml").write_text(json.dumps(stages), encoding="utf-8")
    assert "num_experts" in size_fields(tmp_path / "stages.yaml")
    assert share_field(tmp_path / "stages.yaml") == "keep_ratio"

    opened(original, PRUNED, ROUTERS, output_dir=tmp_path / "out").apply()
    written = load_recipe(tmp_path / "out" / "recipe.yaml")
    # Ids have no name by which a recipe could find them again.
    assert written.recover == Recovery(max_tokens=640, learning_rate=3e-4)


@pytest.mark.parametrize(
    ("data", "written"),
    [
        ("folder/corpus.txt", "corpus.txt"),
        (Path("folder/corpus.jsonl"), "corpus.jsonl"),
        ({"source": "folder/corpus.txt", "batch_size": 2}, {"source": "corpus.txt", "batch_size": 2}),
        (CalibrationConfig("folder/corpus.txt", batch_size=2), {"source": "corpus.txt", "batch_size": 2}),
        ([("a/x.txt", 2), ("org/data:train", 1)], [["x.txt", 2], ["org/data:train", 1]]),
        ({"a/x.txt": 2, "b/y.txt": 1}, {"x.txt": 2, "y.txt": 1}),
        (["A text itself.", "And another one."], None),
    ],
)
def test_text_is_written_by_name_without_folders(data: Any, written: Any) -> None:
    recipe = parse_recipe({"stage": "expert-pruning", "num_experts": 4, "recover": {"data": data}})
    plan = type("Plan", (), {"calibration": None, "seed": 0})()
    used = recipe.as_used(plan)
    assert used.recover is not None
    assert used.recover.data == written
    assert parse_recipe(json.loads(json.dumps({"stage": "expert-pruning", "num_experts": 4}))).recover is None
    assert ("data:" in used.to_yaml()) == (written is not None)


def test_its_text_is_that_of_the_calibration_by_default() -> None:
    used = recovery_on(Recovery(), CalibrationConfig("corpus.jsonl", sequence_length=64, text_column="body"))
    assert used.data == {"source": "corpus.jsonl", "text_column": "body"}
    assert recovery_on(Recovery(data="other.txt"), CalibrationConfig("corpus.jsonl")).data == "other.txt"


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"max_token": 5}, {}, r"Unknown field 'max_token'; did you mean 'max_tokens'\?"),
        ({"train": "routers"}, {}, r"train='routers' is unknown; did you mean 'router'\?"),
        ({"max_tokens": "300 kg"}, {}, r"max_tokens='300 kg' is out of range"),
        ({"alpha": "high"}, {}, r"alpha='high' is not a number"),
        ({"final_density": 0.0}, {}, r"final_density=0\.0 must be in \(0, 1\]"),
        ({"lora_rank": 0}, {}, r"lora_rank=0 is out of range"),
        ({"held_out_share": 2}, {}, r"held_out_share=2 must be between 0 and 1"),
        ({"final_density": 0.1}, {}, r"the experts of expert-pruning stay whole matrices\. Leave it out"),
        ({}, {"engine": "streaming"}, r"Training holds the original .* and this run streams them\. Choose engine="),
    ],
)
def test_wrong_settings_before_any_weight_is_read(
    settings: dict[str, Any], given: dict[str, Any], message: str, original: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        opened(original, PRUNED, settings, output_dir=tmp_path / "out", **given)


def test_what_compares_layers_needs_all_of_them(original: Path) -> None:
    for setting in ("hidden_weight", "reconstruct"):
        with pytest.raises(ValueError, match=rf"{setting}=0\.5 compares .* layer by layer, and block-drop drops some"):
            opened(original, BlockDrop(num_blocks=1), {setting: 0.5})
    assert opened(original, BlockDrop(num_blocks=1), {}).preview().layers == (3, 2)


@pytest.mark.parametrize(
    ("settings", "calibration", "message"),
    [
        ({}, None, r"trains the compressed model, and there is no text to train on\. Pass calibration="),
        ({}, CalibrationConfig(iter([[5] * 16] * 9)), r"a stream can be read once\. Pass a list of it"),
        ({"data": rows(1)}, None, r"has 1 document\(s\): one is trained on and another one held out"),
    ],
)
def test_wrong_text_before_any_weight_is_read(
    settings: dict[str, Any], calibration: Any, message: str, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ExpertPruning(num_experts=4, saliency="aimer")
    compressor = MoECompressor.from_pretrained(original, stage, calibration, recover=settings, progress=False)

    def read(_: ModelSource) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ModelSource, "load", read)
    with pytest.raises(ValueError, match=message):
        compressor.apply()


def test_several_processes_are_refused(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_moe.compressor.current_ranks", lambda: Ranks(0, 2))
    with pytest.raises(ValueError, match="Training runs in one process, and 2 were started"):
        opened(original, PRUNED, ROUTERS)


def test_the_preview_says_what_trains(original: Path) -> None:
    preview = opened(original, PRUNED, {"train": "experts"}).preview()
    assert str(preview).endswith("then trained: experts, routers and norms, on 300,000 tokens")
    assert preview.to_dict()["training"] == "then trained: experts, routers and norms, on 300,000 tokens"
    assert opened(original, PRUNED, None).preview().training == ""
