"""`optimum-cli moe report`, and what `compress` writes for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_a_report_of_a_run(run: Run, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    sample = ("--calibration", corpus, "--max-tokens", 1024, "--sequence-length", 64)
    kept = ("--save-statistics", tmp_path / "statistics")
    recipe = ("--recipe", "m-smoe", "--num-experts", 4, "--quiet")
    assert run("compress", checkpoint, *recipe, *sample, *kept, "--output", tmp_path / "out")[0] == 0
    assert "is not recorded with the checkpoint" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    file = tmp_path / "page.html"
    status, out, err = run("report", tmp_path / "out", "--output", file, "--statistics", tmp_path / "statistics")
    assert (status, out, err) == (0, f"{file}\n", "")
    assert "how alike its experts are" in file.read_text(encoding="utf-8")
    status, out, _ = run("report", tmp_path / "out", "--output", file, "--json")
    assert (status, json.loads(out)) == (0, {"report": str(file), "bytes": file.stat().st_size})


def test_results_for_machines(run: Run, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    def printed(*arguments: object) -> dict:
        status, out, err = run(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)

    folder, sample = tmp_path / "out", ("--calibration", corpus, "--max-tokens", 1024, "--sequence-length", 64)
    made = printed("compress", checkpoint, "--recipe", "reap", "--num-experts", 4, *sample, "--output", folder)
    report = json.loads((folder / "compression_report.json").read_text(encoding="utf-8"))
    assert made["output"] == str(folder)
    assert (made["before"], made["after"], made["loads_in"]) == (report["before"], report["after"], report["loads_in"])
    verified = printed("verify", folder)
    assert verified["passed"]
    assert all(check["failures"] == [] for check in verified["checks"])
    text = ("--text", corpus, "--max-tokens", 512, "--sequence-length", 64, "--tasks", "perplexity", "--quiet")
    scored = printed("evaluate", f"small={folder}", *text)
    assert scored["small"]["scores"]["perplexity"]["value"] > 1
    exported = printed("export", folder, "--to", "vllm", "--output", tmp_path / "vllm")
    assert exported["output"] == str(tmp_path / "vllm")
    assert exported["bytes"] > report["after"]["bytes"]


def test_no_report(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    recipe = ("--recipe", "reap", "--num-experts", 4, "--set", "saliency=aimer", "--quiet")
    assert run("compress", checkpoint, *recipe, "--output", tmp_path / "out", "--no-report")[0] == 0
    assert not (tmp_path / "out" / "report.html").exists()
    status, out, _ = run("report", tmp_path / "out")
    assert (status, out) == (0, f"{tmp_path / 'out' / 'report.html'}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gone",), "gone is not a folder"),
        (("{checkpoint}",), "holds a checkpoint that was not compressed"),
        (("{checkpoint}", "--evaluation", "gone.json"), "--evaluation gone.json is no file. Check the path."),
        (("{checkpoint}", "--statistics", "gone"), "--statistics gone is no folder. Check the path."),
    ],
)
def test_wrong_input_ends_in_one_line(arguments: tuple[str, ...], message: str, run: Run, checkpoint: Path) -> None:
    status, _, err = run("report", *(word.format(checkpoint=checkpoint) for word in arguments))
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
