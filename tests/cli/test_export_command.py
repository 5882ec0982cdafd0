"""`optimum-cli moe export`, and `verify --runs-in`: flags in messages, and statuses."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run


def test_export_and_its_refusals(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    status, printed, _ = run("export", checkpoint, "--to", "transformers4", "--output", tmp_path / "out")
    assert status == 0
    assert str(tmp_path / "out") in printed
    assert (tmp_path / "out" / "config.json").is_file()
    status, _, error = run("export", checkpoint, "--to", "transformers4", "--output", tmp_path / "out")
    assert status == 2
    assert "--overwrite" in error
    status, _, error = run("export", checkpoint, "--to", "gguf", "--output", tmp_path / "a.gguf")
    assert status == 2
    assert "--llama-cpp" in error
    status, _, error = run("export", checkpoint, "--to", "gguf", "--calibration", tmp_path / "none.txt")
    assert status == 2
    assert "there is no such file" in error


def test_arguments_of_a_runtime_without_one(run: Run, checkpoint: Path) -> None:
    status, _, error = run("verify", checkpoint, "--quantize", "q8_0")
    assert status == 2
    assert "--quantize is for --runs-in" in error
    status, _, error = run("verify", checkpoint, "--runs-in", "vllm", "--runs-in", "mlx", "--exported", "x")
    assert status == 2
    assert "--exported is for one --runs-in" in error
