"""A streaming run, from its working folder to the finished checkpoint."""

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
from optimum_moe.checkpoint.destination import check_space, disk_is_full, free_space, remove, take_place
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.checkpoint.streamed import StreamedModel
from optimum_moe.checkpoint.system import readable_path
from optimum_moe.engine.activations import Activations, SavedActivations
from optimum_moe.engine.disk_store import DiskStore
from optimum_moe.engine.sample_size import SAMPLE_SETTING
from optimum_moe.engine.weight_checks import Named, check_tensors
from optimum_moe.engine.working_folder import WorkingFolder
from optimum_moe.plan import PLAN_NAME, CompressionPlan
from optimum_moe.records import read_digest
from optimum_moe.reporting.versions import versions
from optimum_moe.stages.counts import parse_size
from optimum_moe.statistics import Statistics

_IDS = ("input_ids", "decoder_input_ids")
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class StreamingSettings:
    """How a checkpoint is streamed.

    Args:
        device: Device that computes the layers.
        max_memory: Maximum bytes for tensors; None for the free memory.
    """

    device: torch.device
    max_memory: int | None = None


def choose_streaming(
    engine: str, source: ModelSource, destination: Path | None, device_map: Any, max_memory: Any, writes: bool = True
) -> StreamingSettings | None:
    """The settings of a streaming run; None if the whole model is to be loaded.

    Args:
        engine: `"auto"`, `"memory"` or `"streaming"`.
        source: The model.
        destination: Folder that the run writes to.
        device_map: As in `from_pretrained`.
        max_memory: Maximum bytes for tensors, or a size such as `"20GB"`.
        writes: Whether the run writes, and so cannot stream without a destination.

    Raises:
        ValueError: If streaming is requested and impossible.
    """
    if engine == "auto":
        too_large = source.live is None and source.info.bytes > psutil.virtual_memory().available
        spread = device_map in ("auto", "balanced", "balanced_low_0", "sequential")
        spread = spread or (isinstance(device_map, Mapping) and len(device_map) > 1)
        engine = "streaming" if too_large and (destination is not None or not writes) and not spread else "memory"
    if engine == "memory":
        if max_memory is not None and not isinstance(max_memory, Mapping):
            raise ValueError(f'max_memory={max_memory!r} is for engine="streaming"; in memory it is a dict by device.')
        return None
    if source.live is not None:
        raise ValueError('engine="streaming" needs a checkpoint, but this model is in memory. Pass its path instead.')
    if destination is None and writes:
        raise ValueError('engine="streaming" writes during the run and needs output_dir. Pass output_dir=.')
    if isinstance(device_map, Mapping) and len(device_map) == 1:
        device_map = next(iter(device_map.values()))
    try:
        device = torch.device("cpu" if device_map is None else device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'engine="streaming" computes on one device, not device_map={device_map!r}. Pass "cpu" or "cuda:0".'
        ) from error
    return StreamingSettings(device, None if max_memory is None else parse_size(max_memory, "max_memory"))


class StreamingJob:
    """A context manager around a streaming run; finished layers are kept after an error, so the run can resume.

    Args:
        source: The checkpoint.
        destination: Folder of the result; None for a run that only observes.
        identity: Everything that the result depends on.
        settings: How to stream.
        overwrite: Discard an earlier run, and replace the destination.
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
            self.save = SavedActivations(self._place_for_activations()).save
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stack.close()
        kept = "this run keeps no parts"
        if self.folder is not None:
            kept = "no part is finished"
            if self.folder.finished:
                kept = f"{len(self.folder.finished)} parts are finished and kept in {self.folder.path}"
        if isinstance(error, Exception) and disk_is_full(error):
            raise ValueError(f"The disk is full; {kept}. Free some space, and repeat the same command.") from error
        if isinstance(error, OSError) and error.errno in _REFUSED:
            raise ValueError(
                f"The system refused to write or read ({error}); {kept}. Change the permissions, and repeat the same "
                "command."
            ) from error

    def check(self, size: int, beside: Iterable[Named]) -> None:
        """Raise a `ValueError` unless the remaining output fits on the disk and all weights are finite.

        Args:
            size: Bytes of the whole result.
            beside: Tensors outside of the model that are copied to the result.
        """
        assert self.folder is not None
        check_tensors(chain(self.store.tensors(), beside), self.store.model, self.store.blocks)
        check_space(self.folder.destination, size - sum(layer["size"] for layer in self.folder.finished.values()))

    def check_backward(self, batches: CalibrationBatches) -> None:
        """Raise a `ValueError` unless the disk has room for what enters the layers, until the backward pass."""
        store, place = self.store, self._place_for_activations()
        # Padding included; a decoder and its encoder have layers of their own.
        tokens = sum(max((ids.numel() for name, ids in batch.items() if name in _IDS), default=0) for batch in batches)
        layers = [layer for layer in store.layers if not layer.tensors]
        needed = len(layers) * tokens * store.blocks[0].info.hidden_size * store.model.dtype.itemsize
        free = free_space(place)
        if free < needed:
            raise ValueError(
                f"A backward pass through {len(layers)} layers takes {needed:,} bytes of disk for {tokens:,} tokens; "
                f"{place} has {free:,} left. Free some space, observe fewer tokens (max_tokens=), or choose a recipe "
                "that reads no gradients, such as ByteBudget(curvature=False) (--set curvature=false)."
            )

    def finished_model(self) -> PreTrainedModel:
        """The compressed model on the meta device, without values."""
        self.store.rebuild()
        return self.store.model

    def complete(self, describe: Callable[[Path, str], None]) -> None:
        """Write the other files of the checkpoint, and move it to the destination.

        Args:
            describe: Called with a folder and the checkpoint's name; writes all files but shards and index.

        Raises:
            ValueError: If the original checkpoint or a shard changed in the meantime, or if something appeared at the
                destination that must not be replaced.
        """
        assert self.folder is not None
        if file_states(self._checkpoint) != self._before:
            raise ValueError(
                f"{self._checkpoint.name} was changed while it was compressed. Pass overwrite=True (--overwrite) to "
                "start again."
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
        """Bytes of memory that are left for activations.

        Raises:
            ValueError: If the largest layer does not fit into `max_memory`.
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
    """The calibration part of a run's identity, beside the checkpoint and the recipe."""
    found: dict[str, Any] = {}
    if batches is not None and config is not None:
        found["data"] = batches.description
        found["calibration settings"] = [config.random_seed, config.unseen]
        found[SAMPLE_SETTING] = config.sampled_tokens
    if statistics is not None:
        found["statistics"] = statistics.digest()
    if plan is not None:
        with tempfile.TemporaryDirectory() as folder:
            plan.save_pretrained(folder)
            found["plan"] = read_digest(Path(folder), PLAN_NAME)
    return found


def file_states(source: ModelSource) -> dict[str, Any]:
    """Sizes and modification times of a checkpoint's files, to detect changes while it is read."""
    assert source.headers is not None
    files = {}
    for file in (*source.headers.files, Path(source.directory or "") / "config.json"):
        if file.is_file():
            status = file.stat()
            files[file.name] = status.st_size, status.st_mtime_ns
    return files
