"""Runs a script of this package in the Python environment of a runtime, which has the runtime but not this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_SCRIPTS = Path(__file__).parent / "runners"
_LONGEST = 300
_LINES = 4
"""Last lines of a failed script's output that an error quotes."""


class RuntimeFailed(ValueError):
    """A script failed in the environment of a runtime.

    Args:
        message: What failed, and the last lines of the output.
        reason: The last line of the output that says something.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_python(python: str | os.PathLike[str] | None) -> str:
    """The interpreter to run; the current one for None.

    Raises:
        ValueError: If it is not an executable file.
    """
    if python is None:
        return sys.executable
    path = Path(python).expanduser()
    # Not resolved: the link is what tells Python its environment.
    if not path.is_file() or not os.access(path, os.X_OK):
        raise ValueError(f"python={str(python)!r} is not an executable file. Give ENVIRONMENT/bin/python.")
    return str(path.absolute())


def has_module(python: str, module: str) -> bool:
    """Whether an interpreter finds a module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], capture_output=True, cwd=_SCRIPTS, check=False).returncode == 0


def run_script(python: str, script: str, request: Mapping[str, Any], what: str) -> Any:
    """The JSON answer of a script in `runners`.

    Args:
        python: The interpreter.
        script: Name of the script, without ".py".
        request: JSON values, which the script reads from the file that its first argument names.
        what: What it does, for errors: "convert the checkpoint".

    Raises:
        RuntimeFailed: If it ends with an error.
    """
    with TemporaryDirectory(prefix="optimum_moe_") as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(dict(request)), encoding="utf-8")
        command = [python, str(_SCRIPTS / f"{script}.py"), str(asked), str(answer)]
        run = subprocess.run(command, capture_output=True, cwd=folder, env=_environment(), check=False)
        if run.returncode or not answer.is_file():
            lines = [line.strip() for line in _text(run.stderr).splitlines() if line.strip()]
            lines = lines or [line.strip() for line in _text(run.stdout).splitlines() if line.strip()]
            lines = lines or [f"it ended with status {run.returncode}"]
            said = " / ".join(line[:_LONGEST] for line in lines[-_LINES:])
            raise RuntimeFailed(f"{python} could not {what}: {said}", reason_of(lines))
        return json.loads(answer.read_text(encoding="utf-8"))


def reason_of(lines: list[str]) -> str:
    """The line of a traceback that names the error, with the next one if that says more; else the last line."""
    named = [
        i for i, line in enumerate(lines) if line.partition(":")[0].endswith(("Error", "Exception")) and ":" in line
    ]
    if not named:
        return lines[-1][:_LONGEST]
    last = named[-1]
    goes_on = lines[last].endswith(":") or "validation error" in lines[last]
    return " ".join(lines[last : last + 1 + goes_on])[:_LONGEST]


def _text(output: bytes) -> str:
    return output.decode("utf-8", errors="replace")


def _environment() -> dict[str, str]:
    # Nothing is fetched: an export works on what is on the disk.
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
