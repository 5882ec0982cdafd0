"""Runs a benchmark in a process of its own, with the package of this or of another checkout of the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def measured(checkout: Path, script: str, arguments: Sequence[str], threads: int = 1) -> Any:
    """What a script prints as JSON in its last line.

    Args:
        checkout: The repository whose package it imports.
        script: Its file, of this repository.
        arguments: What it is called with.
        threads: Threads of torch.

    Raises:
        SystemExit: If it fails; with what it printed.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
