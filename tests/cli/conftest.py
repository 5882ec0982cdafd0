from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from optimum.commands import optimum_cli

from tests.tiny_checkpoints import save_checkpoint, write_text

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "corpus.jsonl")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command of `optimum-cli moe`: its exit status, output and errors."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "moe", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            optimum_cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        return status, *capsys.readouterr()

    return run_command


@pytest.fixture
def compress(run: Run, checkpoint: Path, corpus: Path) -> Run:
    def run_compress(*arguments: object) -> tuple[int, str, str]:
        short = ("--max-tokens", 1024, "--sequence-length", 64, "--calibration", corpus)
        return run("compress", checkpoint, *short, *arguments)

    return run_compress
