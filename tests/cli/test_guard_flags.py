"""Domains and the guard on the command line."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from optimum_moe.checkpoint.source import ModelSource
from tests.cli.conftest import Run
from tests.tiny_checkpoints import write_text

SHORT = ("--num-prompts", 3, "--new-tokens", 8, "--max-tokens", 512, "--sequence-length", 64)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("domains")
    return {
        name: write_text(folder / f"{name}.jsonl", seed=seed, count=20)
        for seed, name in enumerate(("code", "chat", "maths"), start=50)
    }


def named(flag: str, texts: dict[str, Path]) -> list[str]:
    return [part for name, file in texts.items() for part in (flag, f"{name}={file}")]


def test_evaluate_shows_domains(run: Run, checkpoint: Path, texts: dict[str, Path]):
    given = (f"it={checkpoint}", "--reference", checkpoint, *named("--text", texts), *SHORT, "--quiet")
    status, printed, err = run("evaluate", *given, "--tasks", "perplexity", "agreement")
    assert status == 0, err
    firsts = [line.split()[0] for line in printed.splitlines() if line]
    assert [first for first in firsts if first in texts] == ["code", "chat", "maths", "code"]
    assert "code lost the most: 0.0000 nats a token, 1.00 times the mean of all domains (0.0000)." in printed
    record = json.loads(run("evaluate", *given, "--tasks", "perplexity", "agreement", "--json")[1])["it"]
    assert list(record["domains"]) == list(texts)
    assert record["domains"]["chat"]["perplexity_ratio"]["value"] == 1
    assert record["data"]["worst_domain"]["name"] == "code"


def test_compress_with_a_guard(compress: Run, tmp_path: Path, texts: dict[str, Path]):
    recipe = ("--recipe", "reap", "--keep-ratio", 0.5, "--output", tmp_path / "out")
    status, printed, err = compress(*recipe, "--guard", "worst=2.9x", *named("--guard-text", texts))
    assert status == 0, err
    assert "Guard: " in printed
    assert "lost the most" in printed
    report = json.loads((tmp_path / "out" / "compression_report.json").read_text(encoding="utf-8"))
    assert set(report["evaluation"]["domains"]) == set(texts)
    refused = (*recipe[:-1], tmp_path / "refused", "--guard", "worst=1.00001x", *named("--guard-text", texts))
    status, _, err = compress(*refused)
    assert status == 2
    assert "times the mean of all domains, and worst=1.00001 is allowed" in err
    assert "pass --guard-repair with text of all domains" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_statistics_are_saved_without_a_third_model_in_memory(
    compress: Run, tmp_path: Path, texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    load, loaded, alive = ModelSource.load, [], []

    def counted(source: ModelSource) -> PreTrainedModel:
        alive.append(sum(model() is not None for model in loaded))
        model = load(source)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ModelSource, "load", counted)
    recipe = ("--recipe", "reap", "--keep-ratio", 0.5, "--output", tmp_path / "out")
    guard = ("--guard", "worst=2.9x", *named("--guard-text", texts))
    status, _, err = compress(*recipe, *guard, "--save-statistics", tmp_path / "observed")
    assert status == 0, err
    # To observe it; the original that the guard compares with; the one that is cut.
    assert alive == [0, 0, 1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--guard", "worst=2x"), "--guard measures domains, and has no text"),
        (("--guard-repair", "code=FILE"), "--guard-repair belong to a guard. Give --guard worst=2x."),
        (("--guard", "best=2x", "--guard-text", "code=FILE"), "invalid guard_limit value: 'best=2x'"),
        (("--guard", "worst=2x", "--guard-text", "code=missing.txt"), "--guard-text missing.txt: there is no such"),
        (("--guard", "worst=2x", "--guard-text", "code=FILE"), "domains, and its text names only 'code'"),
        (
            ("--guard", "worst=2x", "--guard-text", "code=FILE", "--streaming"),
            "compressed model in memory, and --streaming holds none. Leave it out, or compress without",
        ),
        (
            ("--error-propagation", "--save-statistics", "observed"),
            "cutting those before it, and --save-statistics mean",
        ),
    ],
)
def test_wrong_guards(compress: Run, tmp_path: Path, texts: dict[str, Path], flags: tuple[str, ...], message: str):
    given = [flag.replace("FILE", str(texts["code"])) for flag in flags]
    status, _, err = compress("--recipe", "reap", "--keep-ratio", 0.5, "--output", tmp_path / "out", *given)
    assert status == 2
    assert message in err
