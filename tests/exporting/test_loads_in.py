"""Where a checkpoint loads: the rows of each kind, what a run changes, and the comparison of greedy tokens."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE, export
from optimum_moe.exporting import runs_in
from optimum_moe.exporting.environment import RuntimeFailed
from optimum_moe.exporting.runs_in import Reference, Run, run_in
from optimum_moe.reporting.loads_in import LoadsIn, kind_of, known_rows, markdown, record_run, with_section
from optimum_moe.verification import verify
from tests.exporting.test_export import ROWS
from tests.tiny_models import build

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    build("qwen3_moe").save_pretrained(folder / "original")
    for name, stage in (("plain", ExpertPruning(num_experts=4)), ("structured", MSMoE(num_experts=4))):
        compressor = MoECompressor.from_pretrained(
            str(folder / "original"), stage, CalibrationConfig(ROWS, sequence_length=16), progress=False
        )
        compressor.apply()
        compressor.save_pretrained(str(folder / name))
    return {name: folder / name for name in ("original", "plain", "structured")}


@pytest.fixture
def plain(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(checkpoints["plain"], tmp_path / "plain")
    return tmp_path / "plain"


def test_what_is_known_of_each_kind(checkpoints: dict[str, Path]) -> None:
    assert {name: kind_of(folder) for name, folder in checkpoints.items()} == {
        "original": "plain",
        "plain": "plain",
        "structured": "structured",
    }
    for name in ("plain", "structured"):
        report = json.loads((checkpoints[name] / "compression_report.json").read_text(encoding="utf-8"))
        assert {row["runtime"] for row in report["loads_in"]} >= {"transformers", "llama.cpp", "mlx"}
        assert {row["known"] for row in report["loads_in"]} == {"table"}
        card = (checkpoints[name] / "README.md").read_text(encoding="utf-8")
        assert markdown(known_rows(checkpoints[name])) in card
    assert "cannot express it. Compress with `--runs-in any`" in card
    assert "| vLLM | loads with this package installed beside it |" in card


def test_what_the_plugin_does_not_run_is_said(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["structured"], tmp_path / "reduced")
    config = json.loads((tmp_path / "reduced" / "config.json").read_text(encoding="utf-8"))
    for entry in config["quantization_config"]["blocks"].values():
        entry["routing"] = "reduce"
    (tmp_path / "reduced" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "reduced" / "compression_report.json").unlink()
    said = next(row.says for row in known_rows(tmp_path / "reduced") if row.runtime == "vllm")
    assert said.startswith("cannot run it: ")
    with pytest.raises(ValueError, match="routing 'reduce'"):
        export(tmp_path / "reduced", "vllm")


def test_a_run_takes_the_place_of_what_was_expected(plain: Path) -> None:
    record_run(plain, LoadsIn("vllm", "same greedy tokens: 64 of 64", "run", "0.32.0"))
    rows = known_rows(plain)
    assert [row.runtime for row in rows] == ["transformers", "llama.cpp", "mlx", "vllm"]
    assert (rows[-1].known, rows[-1].version) == ("run", "0.32.0")
    record_run(plain, LoadsIn("vllm", "refused: no", "run", "0.33.0"))
    assert [row.says for row in known_rows(plain) if row.runtime == "vllm"] == ["refused: no"]
    card = (plain / "README.md").read_text(encoding="utf-8")
    assert "| vLLM 0.33.0 | refused: no | run |" in card
    assert card.count("## Loads in") == 1
    assert card.index("## Size") < card.index("## Loads in") < card.index("## How it was made")
    # The digests of the side files know of the change.
    assert verify(plain).passed


def test_cards_of_users_keep_their_text() -> None:
    rows = [LoadsIn("vllm", "loads")]
    assert with_section("# Mine\n\nText.\n", rows).startswith("# Mine\n\nText.\n\n## Loads in\n")
    again = with_section(with_section("# Mine\n\n## Loads in\n\nold\n\n## After\n\nkept\n", rows), rows)
    assert "old" not in again
    assert again.endswith("## After\n\nkept\n")
    assert again.count("## Loads in") == 1


def test_only_runs_are_recorded_and_only_in_reports(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known='table'"):
        record_run(plain, LoadsIn("vllm", "loads"))
    with pytest.raises(ValueError, match=r"has no compression_report\.json"):
        record_run(tmp_path, LoadsIn("vllm", "loads", "run"))


def test_ties_are_no_difference() -> None:
    logits = torch.zeros(1, 3, 5)
    logits[0, :, 0], logits[0, :, 1], logits[0, 1, 2] = 10.0, 5.0, 9.99
    reference = Reference([[1, 2]], [[0, 0, 0]], logits)
    assert reference.compare([[0, 0, 0]]) == (True, "3 of 3 greedy tokens")
    assert reference.compare([[0, 2, 4]]) == (True, "1 of 3 greedy tokens before 1 near tie")
    assert reference.compare([[0, 1, 0]]) == (False, "1 of 3 greedy tokens")


def test_what_a_runtime_does_is_an_outcome(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Reference([[1, 2]], [[0, 0]], torch.eye(5)[:1].expand(2, 5)[None])
    answers = {"version": "1.0", "tokens": [[0, 0]]}
    monkeypatch.setattr(runs_in, "has_module", lambda python, module: True)
    monkeypatch.setattr(runs_in, "run_script", lambda *args: answers)
    assert run_in("vllm", plain, reference=reference) == Run("vllm", "1.0", "same", "2 of 2 greedy tokens")
    answers["tokens"] = [[0, 3]]
    assert run_in("vllm", plain, reference=reference).outcome == "differs"

    monkeypatch.setattr(runs_in, "export", lambda *args, **kwargs: plain)
    rounded = {"q8_0": answers, "f32": {"version": "1.0", "tokens": [[0, 0]]}}
    monkeypatch.setattr(runs_in, "run_script", lambda *args: rounded.pop("q8_0", rounded["f32"]))
    found = run_in("llama.cpp", plain, reference=reference, quantize="q8_0")
    # Without rounding the tokens are the same, so rounding is what changes them.
    assert (found.outcome, found.passed) == ("rounded", True)
    assert found.says == "runs: 1 of 2 greedy tokens, rounded to q8_0; 2 of 2 greedy tokens without rounding"
    monkeypatch.setattr(runs_in, "run_script", lambda *args: answers)
    found = run_in("llama.cpp", plain, reference=reference, quantize="q8_0")
    assert (found.outcome, found.passed) == ("differs", False)

    def fail(*args: object) -> None:
        raise RuntimeFailed("python could not run the checkpoint: ...", "KeyError: 'experts'")

    monkeypatch.setattr(runs_in, "run_script", fail)
    found = run_in("vllm", plain, reference=reference)
    assert (found.outcome, found.says) == ("refused", "refused: KeyError: 'experts'")


def test_a_runtime_that_is_not_there(plain: Path) -> None:
    with pytest.raises(ValueError, match=r"has no vllm\. Install it.*--python"):
        run_in("vllm", plain, python=sys.executable)
    with pytest.raises(ValueError, match="did you mean 'vllm'"):
        run_in("vlm", plain)
