"""The scripts of `completion`, run by the shells that they are for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run

BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
$(complete -p optimum-cli | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
fpath=("$1" $fpath)
autoload -Uz compinit; compinit -u -d "$1/dump"
print ${_comps[optimum-cli]}
zsh -n "$1/_optimum-cli"
"""


def script(run: Run, shell: str, folder: Path) -> Path:
    pytest.importorskip("shtab", reason="completion scripts are made by shtab")
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    status, out, err = run("completion", shell)
    assert (status, err) == (0, "")
    file = folder / f"optimum-cli.{shell}"
    file.write_text(out, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("moe", "comp"), {"completion", "compress"}),
        (("moe", "compress", "model", "--push"), {"--push-to-hub"}),
        (("moe", "compress", "model", "--recipe", "mc-"), {"mc-smoe", "mc-smoe-fast"}),
        (("moe", "preview", "model", "--runs-in", "vllm"), {"vllm", "vllm+optimum_moe"}),
        (("moe", "verify", "tests/data/refer"), {"tests/data/reference", "tests/data/reference_deepseek"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bash(typed: tuple[str, ...], expected: set[str], run: Run, tmp_path: Path) -> None:
    file = script(run, "bash", tmp_path)
    done = subprocess.run(
        ["bash", "-c", BASH, "bash", str(file), "optimum-cli", *typed], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == expected


def test_zsh(run: Run, tmp_path: Path) -> None:
    script(run, "zsh", tmp_path).rename(tmp_path / "_optimum-cli")
    command = ["zsh", "-f", "-c", ZSH, "zsh", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "_optimum-cli"
    assert done.stderr == ""


def test_the_example_of_its_help(run: Run) -> None:
    assert run("completion", "--help")[1].endswith("\nexample:\n  optimum-cli moe completion bash\n")


def test_what_is_missing_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, _, err = run("completion", "bash")
    assert (status, err) == (
        2,
        "error: Completion needs shtab. Install it with: pip install 'optimum-moe[completion]'\n",
    )
