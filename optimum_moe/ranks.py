"""Several processes that compress one model together, as `torchrun` or `accelerate launch` start them.

Every process has the whole model and all settings. Each observes its share of the batches and decides its share of the
blocks; what they find is exchanged, so that all of them end with the same model. The first one writes.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What launchers tell every process."""
_PATIENCE = timedelta(days=7)
"""Processes wait for each other as long as blocks take; one that died closes its connection at once."""


@dataclass(frozen=True)
class Parcel:
    """A value between processes of one run, whose accelerators have different names: their tensors travel on the CPU.

    Args:
        content: The pickled value without these tensors.
        tensors: The tensors.
    """

    content: bytes
    tensors: list[torch.Tensor]

    @classmethod
    def of(cls, value: Any) -> Parcel:
        """Pack a value."""
        buffer, tensors = io.BytesIO(), list[torch.Tensor]()

        class Pickler(pickle.Pickler):
            def persistent_id(self, part: Any) -> int | None:
                if not isinstance(part, torch.Tensor) or part.device.type == "cpu":
                    return None
                tensors.append(part.cpu())
                return len(tensors) - 1

        Pickler(buffer).dump(value)
        return cls(buffer.getvalue(), tensors)

    def opened(self, device: torch.device | None) -> Any:
        """The value; tensors that come from an accelerator are on the given device, others on the CPU."""
        tensors = self.tensors

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, number: int) -> torch.Tensor:
                return tensors[number].to(device)

        return Unpickler(io.BytesIO(self.content)).load()


@dataclass(frozen=True)
class Ranks:
    """This process among those that work together.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.
        group: Group of the processes in which the CPU communicates; None for a single process.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def writes(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """The items of this process: every `size`-th one."""
        return list(items[self.rank :: self.size])

    def owner(self, number: int) -> int:
        """The process whose `share` has the item of this number."""
        return number % self.size

    def gathered(self, value: Item, device: torch.device | None = None) -> list[Item]:
        """The values of all processes, in their order; every process calls this.

        Args:
            value: The value of this process.
            device: Where tensors go that come from an accelerator; needed if there are some.
        """
        if self.size == 1:
            return [value]
        parcels: list[Any] = [None] * self.size
        dist.all_gather_object(parcels, Parcel.of(value), group=self.group)
        return [parcel.opened(device) for parcel in parcels]

    def sent(self, value: Item | None, owner: int, device: torch.device | None = None) -> Item:
        """The value that one process has, for all of them; every process calls this.

        Args:
            value: The value, in the process that has it.
            owner: Number of this process.
            device: Where tensors go that come from an accelerator; needed if there are some.
        """
        if self.size == 1:
            assert value is not None
            return value
        parcels = [Parcel.of(value)]
        dist.broadcast_object_list(parcels, src=dist.get_global_rank(self.group, owner), group=self.group)
        opened: Item = parcels[0].opened(device)
        return opened

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Check that all processes were started alike.

        Args:
            facts: What has to be equal, by a name that a message can use.

        Raises:
            ValueError: If a process differs, in every process.
        """
        everywhere = self.gathered(dict(facts))
        for rank, others in enumerate(everywhere):
            for name, value in everywhere[0].items():
                if others[name] != value:
                    raise ValueError(
                        f"Processes that work together need equal {name}: process 0 has {value}, process {rank} has "
                        f"{others[name]}. Start all of them with the same command, files and versions."
                    )

    def check_engine(self, streams: bool, propagates: bool) -> None:
        """Raise a `ValueError` if a run goes layer by layer, which several processes cannot share."""
        if self.size > 1 and (streams or propagates):
            what = "error_propagation=True cuts each layer" if propagates else 'engine="streaming" loads each layer'
            raise ValueError(
                f"{what} before the next one is observed, which {self.size} processes cannot share. Start one process, "
                'or give each of them memory for the whole model and pass engine="memory" without error propagation.'
            )

    def check_single(self, what: str) -> None:
        """Raise a `ValueError` if several processes were started for what one does alone."""
        if self.size > 1:
            raise ValueError(f"{what} runs in one process, and {self.size} were started. Start it without a launcher.")

    def check_work(self, number: int, of_what: str, remedy: str) -> None:
        """Raise a `ValueError` if some processes would have nothing to do."""
        if number < self.size:
            raise ValueError(f"{self.size} processes share the work, but there are {number} {of_what}. {remedy}.")


SINGLE = Ranks()
"""A process that works alone."""


def current_ranks() -> Ranks:
    """The processes that a launcher started, which are joined if they are not yet.

    Raises:
        ValueError: If a launcher's environment variables are set in part.
    """
    if not dist.is_available():
        return SINGLE
    if not dist.is_initialized():
        known = [name for name in _LAUNCHED if os.environ.get(name)]
        # MASTER_ADDR and MASTER_PORT alone are often exported on clusters, and start nothing.
        if not {"RANK", "WORLD_SIZE"} & set(known) or os.environ.get("WORLD_SIZE") == "1":
            return SINGLE
        missing = [name for name in _LAUNCHED if name not in known]
        if missing:
            raise ValueError(
                f"{', '.join(known)} {'are' if len(known) > 1 else 'is'} set, but {', '.join(missing)} "
                f"{'are' if len(missing) > 1 else 'is'} not, so that processes cannot find each other. Start them with "
                "torchrun or accelerate launch, or unset the variables."
            )
        dist.init_process_group("gloo", timeout=_PATIENCE)
    if dist.get_world_size() == 1:
        return SINGLE
    return Ranks(dist.get_rank(), dist.get_world_size(), _group_beside(dist.group.WORLD))


@cache
def _group_beside(world: Any) -> Any:
    """The group in which the CPU communicates, one for all runs of these processes."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def local_device() -> dict[str, str]:
    """The device map of this process: the accelerator with its number among the processes of this machine, or the CPU.

    Raises:
        ValueError: If the machine has fewer accelerators than processes.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return {"": "cpu"}
    number, available = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
    if number >= available:
        raise ValueError(
            f'device_map="local" gives each process its own accelerator. This machine has {available}, and there is a '
            f"process {number}. Start {available} processes on it."
        )
    return {"": f"{accelerator.type}:{number}"}
