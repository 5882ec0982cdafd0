"""The working folder of a streaming run: finished shards, and records to resume after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from optimum_moe.checkpoint.destination import PARTS, owned, remove, working_folder
from optimum_moe.checkpoint.shards import put_in_place, write_text
from optimum_moe.checkpoint.system import sync_to_disk
from optimum_moe.plan import BlockPlan, CompressionPlan
from optimum_moe.statistics import BlockStatistics, Statistics

PROGRESS_FILE = "progress.json"
STATE = "state"


def recorded_identity(destination: Path) -> dict[str, Any]:
    """What an interrupted run to `destination` depends on; empty if there is none that could be resumed."""
    try:
        record = json.loads((working_folder(destination) / STATE / PROGRESS_FILE).read_text(encoding="utf-8"))
        return dict(record["identity"]) if record["finished"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        # A broken record is refused when the run is resumed.
        return {}


class WorkingFolder:
    """A folder beside the destination; a context manager that locks the destination.

    Args:
        destination: Folder of the finished checkpoint.
        identity: Everything that the result depends on, as JSON values by names that a user understands.
        overwrite: Discard an earlier run, and replace the destination.
    """

    def __init__(self, destination: Path, identity: Mapping[str, Any], overwrite: bool = False) -> None:
        self.destination = destination
        self.path = working_folder(destination)
        self.checkpoint, self.state = self.path / PARTS, self.path / STATE
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.finished: dict[str, dict[str, Any]] = {}
        self.overwrite = overwrite
        self._owning = ExitStack()

    def __enter__(self) -> WorkingFolder:
        with ExitStack() as stack:
            stack.enter_context(owned(self.destination, self.overwrite))
            if self.overwrite:
                remove(self.path)
            for folder in (self.checkpoint, self.state):
                folder.mkdir(parents=True, exist_ok=True)
            self._resume()
            self._owning = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        if not self.finished:
            # There is nothing to resume.
            remove(self.path)
        self._owning.close()

    def _resume(self) -> None:
        file = self.state / PROGRESS_FILE
        if not file.is_file():
            self._save()
            return
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            before, finished = dict(record["identity"]), dict(record["finished"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is broken. Pass overwrite=True (--overwrite) to start again.") from error
        if not finished:
            self._save()
            return
        for name in [*self.identity, *before]:
            if before.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{self.path} holds an unfinished run with another {name}: {_short(before.get(name))} there, "
                    f"{_short(self.identity.get(name))} now. Repeat that command, choose another folder, or pass "
                    "overwrite=True (--overwrite) to start again."
                )
        # Layers whose files were damaged since are written again.
        self.finished = {name: layer for name, layer in finished.items() if self._is_whole(layer)}

    def _is_whole(self, layer: Mapping[str, Any], only: str = "") -> bool:
        """Whether the files of a finished layer, or those below the folder `only`, are unchanged since written."""
        # A record without digests counts as damaged.
        digests = layer.get("digests")
        return digests is not None and all(
            _digest(self.path / name) == digest for name, digest in digests.items() if name.startswith(only)
        )

    def check(self) -> None:
        """Check that every shard exists and is unchanged.

        Raises:
            ValueError: If a shard is missing or was changed.
        """
        broken = [layer["shard"] for layer in self.finished.values() if not self._is_whole(layer, f"{PARTS}/")]
        if broken:
            raise ValueError(
                f"{self.checkpoint} does not contain what was written there: {', '.join(broken)}. Nothing was put in "
                f"{self.destination}. Repeat the same command, which writes them again."
            )

    def add(self, name: str, **layer: Any) -> None:
        """Record a finished layer: `shard` and `size` of its file, the folder of its `record`, its tensors."""
        files = [] if layer["shard"] is None else [self.checkpoint / layer["shard"]]
        if layer["record"] is not None:
            files += [file for file in (self.state / layer["record"]).rglob("*") if file.is_file()]
        layer["digests"] = {file.relative_to(self.path).as_posix(): _digest(file) for file in sorted(files)}
        self.finished[name] = layer
        self._save()

    def _save(self) -> None:
        write_text(self.state / PROGRESS_FILE, json.dumps({"identity": self.identity, "finished": self.finished}))

    def write_record(
        self,
        folder: str,
        plans: Mapping[str, BlockPlan] | None,
        observed: Mapping[str, BlockStatistics] | None,
    ) -> str:
        """Write the plans and statistics of a layer; returns the folder's name."""
        part, place = self.state / f".{folder}.part", self.state / folder
        for old in (part, place):
            remove(old)
        part.mkdir()
        try:
            if plans is not None:
                CompressionPlan(plans).save_pretrained(part)
            if observed is not None:
                Statistics(observed).save_pretrained(part)
            for file in part.rglob("*"):
                sync_to_disk(file)
            put_in_place(part, place)
        finally:
            remove(part)
        return folder

    def plans(self, name: str) -> dict[str, BlockPlan]:
        """Read the plans of a finished layer."""
        return dict(CompressionPlan.from_pretrained(self.state / self.finished[name]["record"]).blocks)

    def observed(self, folder: str) -> dict[str, BlockStatistics]:
        """Read the statistics that `write_record` wrote."""
        return dict(Statistics.from_pretrained(self.state / folder).blocks)


def _digest(file: Path) -> str | None:
    """SHA-256 of a file, None if it does not exist."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
