"""Many recipes at many sizes: one calibration, results that are kept, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optimum_moe import CalibrationConfig, verify
from optimum_moe.evaluation import EvaluationResult
from optimum_moe.evaluation.scores import Score
from optimum_moe.sweep import Outcome, Sweep, Trial, split_recipe, sweep, write_best

REFERENCE = Path(__file__).parent / "data" / "reference"
RECIPES = ("reap", "m-smoe {routing: reduce}", "byte-budget {runs_in: transformers, curvature: false}")
pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")


def run(folder: Path, **given: Any) -> Sweep:
    settings: dict[str, Any] = {"recipes": RECIPES, "sizes": ["50%", 0.05]}
    settings |= {"evaluation": {"max_tokens": 1024, "tasks": ["perplexity", "agreement"]}, "progress": False} | given
    calibration = CalibrationConfig(str(REFERENCE / "calibration.jsonl"), max_tokens=2048, sequence_length=128)
    held_out = str(REFERENCE / "held_out.jsonl")
    return sweep(REFERENCE / "model", calibration=calibration, text=held_out, output_dir=folder, **settings)


def test_a_sweep_is_measured_kept_and_continued(tmp_path: Path) -> None:
    found = run(tmp_path / "sweep")
    assert [(o.trial.recipe, o.trial.size) for o in found.outcomes] == [(r, s) for s in ("50%", "5%") for r in RECIPES]
    # A router that selects 4 of 32 experts cannot keep 2, but a budget can store a twentieth.
    reasons = [outcome.refused for outcome in found.outcomes]
    assert reasons[:3] == ["", "", ""]
    assert all("experts" in reason for reason in reasons[3:5]), reasons
    assert reasons[5] == ""
    original = found.original.bytes
    assert all(0.3 * original < o.bytes < 0.6 * original for o in found.outcomes[:3])
    assert [o.plain for o in found.outcomes[:3]] == [True, True, False]
    best = found.best("50%")
    assert best is found.outcomes[2]
    assert best.score("kl") < min(o.score("kl") for o in found.outcomes[:2])
    assert {file.name for file in (tmp_path / "sweep").iterdir()} >= {"pareto.png", "pareto.svg", "sweep.md"}
    assert str(found) == (tmp_path / "sweep" / "sweep.md").read_text(encoding="utf-8").strip()

    trials = sorted((tmp_path / "sweep" / "trials").glob("reap*.json"))
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "sweep").rglob("*.json")}
    removed = next(file for file in trials if "50" in file.name and "scores" not in file.name)
    removed.unlink()
    again = run(tmp_path / "sweep")
    changed = {file for file, time in times.items() if file.stat().st_mtime_ns != time}
    assert changed == {removed, removed.with_name(f"{removed.stem}.scores.json")}
    assert [o.bytes for o in again.outcomes] == [o.bytes for o in found.outcomes]
    assert again.outcomes[0].result == found.outcomes[0].result

    path = write_best(again, "50%", REFERENCE / "model", tmp_path / "sweep", tmp_path / "best", progress=False)
    written = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert written == pytest.approx(best.bytes, rel=0.02)
    assert verify(path, against=REFERENCE / "model").passed
    with pytest.raises(ValueError, match=r"holds a sweep with another evaluation, seed"):
        run(tmp_path / "sweep", seed=1, evaluation={"max_tokens": 2048, "tasks": ["perplexity", "agreement"]})


def test_sizes_of_checkpoints(tmp_path: Path) -> None:
    found = run(tmp_path / "sweep", recipes=["reap"], sizes=["5MB", "3MB"])
    assert [outcome.bytes <= limit for outcome, limit in zip(found.outcomes, (5e6, 3e6), strict=True)] == [True, True]
    assert found.pareto() == list(found.outcomes[::-1])


def test_a_recipe_that_trains_is_measured_after_it(tmp_path: Path) -> None:
    recipe = "reap {recover: {max_tokens: 4096}}"
    cut, trained = run(tmp_path / "sweep", recipes=["reap", recipe], sizes=["50%"]).outcomes
    assert trained.bytes == cut.bytes
    assert trained.score("kl") < cut.score("kl")


def test_the_front_is_what_nothing_beats() -> None:
    def outcome(recipe: str, size: int, kl: float) -> Outcome:
        result = EvaluationResult(scores={"kl": Score(kl, kl, kl, 1)}, units={}, data={})
        return Outcome(Trial(recipe, "50%"), size, True, 1.0, result)

    a, b, c, d = outcome("a", 10, 0.5), outcome("b", 20, 0.6), outcome("c", 20, 0.2), outcome("d", 30, 0.1)
    refused = Outcome(Trial("e", "50%"), 0, False, 0.0, None, "too small")
    found = Sweep(outcome("original", 40, 0.0), (d, b, refused, c, a))
    assert found.pareto() == [a, c, d]
    assert found.best("50%") is d
    with pytest.raises(ValueError, match="No recipe could be tried at 10%"):
        found.best("10%")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipes": []}, "needs at least one recipe and one size"),
        ({"recipes": ["reap", "reap"]}, "given twice"),
        ({"recipes": ["raep"]}, "did you mean 'reap'"),
        ({"recipes": ["reap {saliency"]}, "no YAML mapping behind its name"),
        ({"recipes": ["low-rank-sparse"], "sizes": ["5MB"]}, r"takes energy, rank, rank_ratio, not a size such as 5MB"),
        ({"sizes": [1.5]}, r"sizes=1.5"),
        ({"sizes": ["5 elephants"]}, r"sizes="),
        ({"at_once": 0}, r"at_once=0 is out of range"),
        ({"evaluation": {"tasks": ["perplexity", "choice"]}}, r"lack agreement. Add it to the tasks"),
        ({"recipes": ["reap"], "sizes": [0.01]}, "No trial is possible for this model. reap at 1%"),
    ],
)
def test_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "sweep", **given)
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="poetry"):
        run(tmp_path / "sweep", recipes=["reap"], sizes=[0.5], evaluation={"tasks": ["perplexity", "poetry"]})
    assert not (tmp_path / "sweep").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no sweep, but is not empty"):
        run(tmp_path, recipes=["reap"], sizes=[0.5])
    assert json.dumps(sorted(file.name for file in tmp_path.iterdir())) == '["file"]'


def test_settings_behind_a_name() -> None:
    assert split_recipe("byte-budget {runs_in: transformers, bits: [8, 4]}") == (
        "byte-budget",
        {"runs_in": "transformers", "bits": [8, 4]},
    )
    assert split_recipe(" reap ") == ("reap", {})


def test_recipes_that_drop_layers_are_observed_too(tmp_path: Path) -> None:
    drop, both = tmp_path / "drop.yaml", tmp_path / "both.yaml"
    drop.write_text("stage: block-drop\nkeep_ratio: 0.5\n", encoding="utf-8")
    both.write_text(
        "stages:\n- {stage: block-drop, keep_ratio: 0.75}\n- {stage: expert-pruning, num_experts: 16}\n",
        encoding="utf-8",
    )
    found = run(tmp_path / "sweep", recipes=["reap", str(drop), str(both)], sizes=["75%"])
    assert [outcome.refused for outcome in found.outcomes] == ["", "", ""]
    reap, dropped, pruned = (outcome.bytes for outcome in found.outcomes)
    # A layer of four goes, with its attention; and half of the experts of the others.
    assert pruned < dropped < reap
