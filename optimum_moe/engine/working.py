"""The working folder of a streaming run: finished shards, and what it takes to go on after an interruption."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum_moe.checkpoint.shards import is_whole, put_in_place, write_text
from optimum_moe.checkpoint.writer import PARTS, working_folder
from optimum_moe.plan import BlockPlan, CompressionPlan
from optimum_moe.statistics import BlockStatistics, Statistics

PROGRESS_FILE = "progress.json"


class WorkingFolder:
    """A folder beside the destination; a context manager that one process at a time can open.

    Args:
        destination: Where the checkpoint goes in the end.
        identity: What the result depends on, JSON-able, by a name that a user understands.
        anew: Forget an earlier run.
    """

    def __init__(self, destination: Path, identity: Mapping[str, Any], anew: bool = False) -> None:
        self.destination = destination
        self.path = working_folder(destination)
        self.checkpoint, self.state = self.path / PARTS, self.path / "state"
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.finished: dict[str, dict[str, Any]] = {}
        self._anew = anew
        self._lock: int | None = None

    def __enter__(self) -> WorkingFolder:
        if self._anew:
            shutil.rmtree(self.path, ignore_errors=True)
        for folder in (self.checkpoint, self.state):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._resume()
        except BlockingIOError as error:
            self._close()
            raise ValueError(f"Another run is writing to {self.destination}. Wait for it, or end it.") from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _resume(self) -> None:
        file = self.state / PROGRESS_FILE
        if not file.is_file():
            self._save()
            return
        try:
            record = json.loads(file.read_text())
            before, finished = dict(record["identity"]), dict(record["finished"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is broken. Pass overwrite=True (--overwrite) to begin anew.") from error
        if not finished:
            self._save()
            return
        for name in [*self.identity, *before]:
            if before.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{self.path} holds an unfinished run with another {name}: {_short(before.get(name))} there, "
                    f"{_short(self.identity.get(name))} now. Repeat that command, choose another folder, or pass "
                    "overwrite=True (--overwrite) to begin anew."
                )
        # A shard that was damaged since is made again.
        self.finished = {name: unit for name, unit in finished.items() if self._is_whole(unit)}

    def _is_whole(self, unit: Mapping[str, Any]) -> bool:
        if unit["record"] is not None and not (self.state / unit["record"]).is_dir():
            return False
        return unit["shard"] is None or is_whole(self.checkpoint / unit["shard"], unit["size"])

    def add(self, name: str, **unit: Any) -> None:
        """Remember that a unit is finished: `shard` and `size` of its file, the folder of its `record`, its tensors."""
        self.finished[name] = unit
        self._save()

    def _save(self) -> None:
        write_text(self.state / PROGRESS_FILE, json.dumps({"identity": self.identity, "finished": self.finished}))

    def write_record(
        self,
        folder: str,
        plans: Mapping[str, BlockPlan] | None,
        observed: Mapping[str, BlockStatistics] | None,
    ) -> str:
        """Keep the plans and statistics of a unit; returns the folder's name."""
        part, place = self.state / f".{folder}.part", self.state / folder
        for old in (part, place):
            shutil.rmtree(old, ignore_errors=True)
        part.mkdir()
        try:
            if plans is not None:
                CompressionPlan(plans).save_pretrained(part)
            if observed is not None:
                Statistics(observed).save_pretrained(part)
            for file in part.rglob("*"):
                descriptor = os.open(file, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            put_in_place(part, place)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return folder

    def plans(self, name: str) -> dict[str, BlockPlan]:
        """The plans of a finished unit."""
        return dict(CompressionPlan.from_pretrained(self.state / self.finished[name]["record"]).blocks)

    def observed(self, folder: str) -> dict[str, BlockStatistics]:
        """Statistics that were kept."""
        return dict(Statistics.from_pretrained(self.state / folder).blocks)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
