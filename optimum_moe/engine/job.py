"""A streaming run from its working folder to the finished checkpoint."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from optimum_moe.calibration.data import CalibrationBatches, CalibrationConfig
from optimum_moe.checkpoint.destination import check_space, disk_is_full, remove, take_place
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.checkpoint.streamed import StreamedModel
from optimum_moe.checkpoint.system import readable_path
from optimum_moe.engine.activations import Activations
from optimum_moe.engine.disk_store import DiskStore
from optimum_moe.engine.soundness import Named, check_tensors
from optimum_moe.engine.working_folder import WorkingFolder
from optimum_moe.plan import PLAN_NAME, CompressionPlan
from optimum_moe.records import read_digest
from optimum_moe.reporting.versions import versions
from optimum_moe.stages.counts import parse_size
from optimum_moe.statistics import Statistics

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class StreamingSettings:
    """How a checkpoint is streamed.

    Args:
        device: Where layers are computed.
        max_memory: Bytes for tensors; None for as many as are free.
    """

    device: torch.device
    max_memory: int | None = None


def choose_streaming(
    engine: str, source: ModelSource, destination: Path | None, device_map: Any, max_memory: Any
) -> StreamingSettings | None:
    """How to stream, None where the model is to be loaded as a whole.

    Raises:
        ValueError: If streaming is asked for and impossible.
    """
    if engine == "auto":
        too_large = source.live is None and source.info.bytes > psutil.virtual_memory().available
        spread = device_map in ("auto", "balanced", "balanced_low_0", "sequential")
        spread = spread or (isinstance(device_map, Mapping) and len(device_map) > 1)
        engine = "streaming" if too_large and destination is not None and not spread else "memory"
    if engine == "memory":
        if max_memory is not None and not isinstance(max_memory, Mapping):
            raise ValueError(f'max_memory={max_memory!r} is for engine="streaming"; in memory it is a dict by device.')
        return None
    if source.live is not None:
        raise ValueError('engine="streaming" is for a checkpoint, and this model is in memory. Give its path instead.')
    if destination is None:
        raise ValueError('engine="streaming" writes as it goes and needs output_dir. Pass output_dir=.')
    if isinstance(device_map, Mapping) and len(device_map) == 1:
        device_map = next(iter(device_map.values()))
    try:
        device = torch.device("cpu" if device_map is None else device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'engine="streaming" computes on one device, device_map={device_map!r} is none. Pass "cpu" or "cuda:0".'
        ) from error
    return StreamingSettings(device, None if max_memory is None else parse_size(max_memory, "max_memory"))


class StreamingJob:
    """A context manager around a streaming run; what is finished stays when it is left by an error.

    Args:
        source: The checkpoint.
        destination: Where the result goes; None for a run that only observes.
        identity: What the result depends on.
        settings: How it is streamed.
        overwrite: Forget an earlier run, and replace what is at the destination.
    """

    def __init__(
        self,
        source: ModelSource,
        destination: Path | None,
        identity: Mapping[str, Any],
        settings: StreamingSettings,
        overwrite: bool = False,
    ) -> None:
        self._checkpoint, self._device, self._max_memory = source, settings.device, settings.max_memory
        self._before = file_states(source)
        self.folder = None
        if destination is not None:
            self.folder = WorkingFolder(destination, {**identity, "versions": versions()}, overwrite)
        self._stack = ExitStack()

    def __enter__(self) -> StreamingJob:
        try:
            if self.folder is not None:
                self._stack.enter_context(self.folder)
            streamed = StreamedModel(self._checkpoint, self._device)
            self._stack.callback(streamed.close)
            self.store = DiskStore(streamed, self._checkpoint.blocks, self.folder)
            self.keep = Activations(self._place_for_activations(), self._room()).keep
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stack.close()
        kept = "nothing was to be kept"
        if self.folder is not None:
            kept = "no part is finished"
            if self.folder.finished:
                kept = f"{len(self.folder.finished)} parts are finished and stay in {self.folder.path}"
        if isinstance(error, Exception) and disk_is_full(error):
            raise ValueError(f"The disk is full; {kept}. Free some space, and repeat the same command.") from error
        if isinstance(error, OSError) and error.errno in _REFUSED:
            raise ValueError(
                f"The system refused to write or read ({error}); {kept}. Change the permissions, and repeat the same "
                "command."
            ) from error

    def check(self, size: int, beside: Iterable[Named]) -> None:
        """Raise a `ValueError` unless there is room for what is not written yet, and what is read is sound.

        Args:
            size: Bytes of the whole result.
            beside: Tensors that are copied beside the model.
        """
        assert self.folder is not None
        check_tensors(chain(self.store.tensors(), beside), self.store.model, self.store.blocks)
        check_space(self.folder.destination, size - sum(layer["size"] for layer in self.folder.finished.values()))

    def finished_model(self) -> PreTrainedModel:
        """The compressed model, without numbers."""
        self.store.rebuild()
        return self.store.model

    def complete(self, describe: Callable[[Path, str], None]) -> None:
        """Add to the shards what else a checkpoint has, and put it in its place.

        Args:
            describe: Writes everything but the shards and their index into a folder, for a checkpoint of that name.

        Raises:
            ValueError: If the original checkpoint or a shard was changed in the meantime, or something appeared at the
                destination that must not be replaced.
        """
        assert self.folder is not None
        if file_states(self._checkpoint) != self._before:
            raise ValueError(
                f"{self._checkpoint.name} was changed while it was compressed. Pass overwrite=True (--overwrite) to "
                "begin anew."
            )
        self.folder.check()
        side = self.folder.path / "description"
        remove(side)
        side.mkdir()
        self.store.write_index(side)
        describe(side, readable_path(self.folder.destination.name))
        checkpoint = self.folder.checkpoint
        shards = {layer["shard"] for layer in self.folder.finished.values()}
        for old in checkpoint.iterdir():
            if old.name not in shards:
                remove(old)
        for path in side.iterdir():
            path.rename(checkpoint / path.name)
        take_place(checkpoint, self.folder.destination, self.folder.overwrite)
        remove(self.folder.path)

    def _place_for_activations(self) -> Path:
        return Path(tempfile.gettempdir()) if self.folder is None else self.folder.path

    def _room(self) -> int:
        """Bytes for activations.

        Raises:
            ValueError: If not one layer fits.
        """
        needed = self.store.needed
        if self._max_memory is None:
            return max(0, psutil.virtual_memory().available - needed) // 2
        if self._max_memory < needed:
            raise ValueError(
                f"max_memory={self._max_memory:,} bytes is less than the {needed:,} that the largest layer takes while "
                "it is read, cut and written. Allow at least that much."
            )
        return self._max_memory - needed


def calibration_identity(
    batches: CalibrationBatches | None,
    config: CalibrationConfig | None,
    statistics: Statistics | None,
    plan: CompressionPlan | None,
) -> dict[str, Any]:
    """What a run is made from beside the checkpoint and the recipe."""
    found: dict[str, Any] = {}
    if batches is not None and config is not None:
        found["data"] = batches.description
        found["calibration settings"] = [config.random_seed, config.unseen, config.reservoir_tokens]
    if statistics is not None:
        found["statistics"] = statistics.digest()
    if plan is not None:
        with tempfile.TemporaryDirectory() as folder:
            plan.save_pretrained(folder)
            found["plan"] = read_digest(Path(folder), PLAN_NAME)
    return found


def file_states(source: ModelSource) -> dict[str, Any]:
    """What changes when somebody writes to a checkpoint while it is read: sizes and times of its files."""
    assert source.headers is not None
    files = {}
    for file in (*source.headers.files, Path(source.directory or "") / "config.json"):
        if file.is_file():
            status = file.stat()
            files[file.name] = status.st_size, status.st_mtime_ns
    return files
