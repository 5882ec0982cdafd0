"""Several processes that compress one model together, as `torchrun` or `accelerate launch` start them.

Every process has the whole model and all settings. Each observes its share of the batches and decides its share of the
blocks; what they find is exchanged, so that all of them end with the same model. The first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What launchers tell every process."""
_PATIENCE = timedelta(days=7)
"""Processes wait for each other as long as blocks take; one that died closes its connection at once."""


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

    def gathered(self, value: Item) -> list[Item]:
        """The values of all processes, in their order; every process calls this."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sent(self, value: Item | None, owner: int) -> Item:
        """The value that one process has, for all of them; every process calls this."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=dist.get_global_rank(self.group, owner), group=self.group)
        sent = values[0]
        assert sent is not None
        return sent

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
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=_PATIENCE))


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
