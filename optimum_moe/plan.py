"""The plan: what was decided for every MoE block, as frozen data.

A plan is all that a surgeon needs to cut a block, and all that reload, verification and reports need to know about
a cut. On disk it is `plan.json` (structure, labels, dominant experts, the method) and `plan.safetensors` (merge
weights, permutations, router weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from optimum_moe.records import read_record, write_record

PLAN_NAME = "plan"

Routing = Literal["map", "reduce"]


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The decision for one MoE block of E routed experts, of which G remain.

    Groups are numbered by ascending index of their dominant expert, so that a plan that keeps everything is the
    identity and the experts of one router group stay together.

    Args:
        name: Module path of the block.
        labels_E: Group of each expert, -1 for a pruned expert.
        dominants_G: The dominant expert of each group: the one its members are aligned to.
        routing: `"map"` keeps the router and maps its E ids to the groups; `"reduce"` gives the router G rows.
        merge_weights_E: (E,) float64, sums to 1 in every group, 0 for pruned experts.
        permutations_EI: (E, I) int64; expert e enters the merge with its neurons in the order `permutations_EI[e]`.
            None leaves every expert as it is.
        router_weights_E: (E,) float64, weight of each expert's router row in its group's row; `"reduce"` only.
    """

    name: str
    labels_E: tuple[int, ...]
    dominants_G: tuple[int, ...]
    routing: Routing
    merge_weights_E: torch.Tensor
    permutations_EI: torch.Tensor | None = None
    router_weights_E: torch.Tensor | None = None

    def __post_init__(self) -> None:
        groups = [label for label in self.labels_E if label >= 0]
        if sorted(set(groups)) != list(range(self.num_groups)):
            raise ValueError(
                f"Plan for {self.name}: labels must use each of 0..{self.num_groups - 1} at least once, "
                f"got {sorted(set(groups))}."
            )
        if any(self.labels_E[expert] != group for group, expert in enumerate(self.dominants_G)):
            raise ValueError(f"Plan for {self.name}: a dominant expert must be a member of its own group.")
        if list(self.dominants_G) != sorted(self.dominants_G):
            raise ValueError(f"Plan for {self.name}: groups must be numbered by ascending dominant expert.")

    @property
    def num_experts(self) -> int:
        """Routed experts before the cut (E)."""
        return len(self.labels_E)

    @property
    def num_groups(self) -> int:
        """Routed experts after the cut (G)."""
        return len(self.dominants_G)

    @property
    def is_identity(self) -> bool:
        """True if every expert stays as it is."""
        return self.num_groups == self.num_experts

    def members(self, group: int) -> list[int]:
        """The experts of a group, its dominant expert first."""
        dominant = self.dominants_G[group]
        return [dominant] + [e for e, label in enumerate(self.labels_E) if label == group and e != dominant]


def keep_all(name: str, num_experts: int, routing: Routing = "reduce") -> BlockPlan:
    """The plan that leaves a block as it is."""
    every = tuple(range(num_experts))
    ones_E = torch.ones(num_experts, dtype=torch.float64)
    return BlockPlan(name, every, every, routing, ones_E, router_weights_E=ones_E if routing == "reduce" else None)


@dataclass(frozen=True, eq=False)
class CompressionPlan:
    """The decisions for all MoE blocks of one checkpoint, with what they were made from.

    Args:
        blocks: One `BlockPlan` for each MoE block, by module path.
        method: Name and settings of the method that decided.
        source: Identity of the checkpoint: architecture, name, number of experts of each block.
        calibration: Record of the calibration data (None for data-free methods).
        seed: Seed of everything random in the decision.
    """

    blocks: Mapping[str, BlockPlan]
    method: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    seed: int = 0

    @property
    def is_uniform(self) -> bool:
        """True if every block keeps the same number of experts."""
        return len({plan.num_groups for plan in self.blocks.values()}) == 1

    @property
    def is_plain(self) -> bool:
        """True if stock transformers classes can hold the result: one count for all blocks, no map."""
        mapped = any(plan.routing == "map" and not plan.is_identity for plan in self.blocks.values())
        return self.is_uniform and not mapped

    def structure(self) -> dict[str, dict[str, Any]]:
        """Sizes and routing of every changed block: what rebuilds the model without its weights."""
        return {
            name: {"num_experts": plan.num_experts, "num_groups": plan.num_groups, "routing": plan.routing}
            for name, plan in self.blocks.items()
            if not plan.is_identity
        }

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `plan.json` and `plan.safetensors` into an existing folder."""
        tensors, blocks = {}, []
        for index, plan in enumerate(self.blocks.values()):
            blocks.append(
                {
                    "name": plan.name,
                    "routing": plan.routing,
                    "labels": list(plan.labels_E),
                    "dominants": list(plan.dominants_G),
                }
            )
            tensors[f"{index}.merge_weights_E"] = plan.merge_weights_E
            if plan.permutations_EI is not None:
                tensors[f"{index}.permutations_EI"] = plan.permutations_EI.to(torch.int32)
            if plan.router_weights_E is not None:
                # safetensors refuses shared storage, and pruning has one tensor for both weights.
                tensors[f"{index}.router_weights_E"] = plan.router_weights_E.clone()
        record = {
            "method": dict(self.method),
            "source": dict(self.source),
            "calibration": self.calibration,
            "seed": self.seed,
            "blocks": blocks,
        }
        write_record(Path(directory), PLAN_NAME, record, tensors)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> CompressionPlan:
        """Read a plan back.

        Raises:
            ValueError: If the folder has no plan, or a broken one, or one of another format version.
        """
        record, tensors = read_record(Path(directory), PLAN_NAME)
        blocks = {}
        for index, block in enumerate(record["blocks"]):
            permutations = tensors.get(f"{index}.permutations_EI")
            blocks[block["name"]] = BlockPlan(
                name=block["name"],
                labels_E=tuple(block["labels"]),
                dominants_G=tuple(block["dominants"]),
                routing=block["routing"],
                merge_weights_E=tensors[f"{index}.merge_weights_E"],
                permutations_EI=None if permutations is None else permutations.long(),
                router_weights_E=tensors.get(f"{index}.router_weights_E"),
            )
        return cls(blocks, record["method"], record["source"], record["calibration"], record["seed"])
