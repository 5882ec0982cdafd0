"""`Statistics`: what was observed on calibration data, reusable over ratios and methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from optimum_moe.records import digest, read_record, write_record

STATISTICS_NAME = "statistics"

Unseen = Literal["warn", "error", "keep", "prune"]


@dataclass(frozen=True, eq=False)
class Reservoir:
    """A seeded sample of S tokens of one block, in the order in which they were seen.

    Args:
        router_input_SH: (S, H) input of the router.
        experts_input_SH: (S, H) input of the experts; the same tensor where the two are equal.
        index_SK: (S, K) selected experts; an id >= E is no routed expert.
        weights_SK: (S, K) routing weights.
        gradient_SJH: (S, J, H) gradient of the loss, summed over tokens, at the weighted sum of the selected experts,
            for each of J draws of the labels from the model's own predictions; None where no backward pass ran.
    """

    router_input_SH: torch.Tensor
    experts_input_SH: torch.Tensor
    index_SK: torch.Tensor
    weights_SK: torch.Tensor
    gradient_SJH: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class BlockStatistics:
    """Sums over the routed tokens of one block, float64 on the CPU; padding never counts.

    Args:
        num_tokens: Tokens that reached the block.
        token_count_E: Tokens routed to each expert.
        gate_sum_E: Sum of routing weights g.
        output_norm_sum_E: Sum of ||f(x)||.
        output_sq_sum_E: Sum of ||f(x)||^2.
        gated_norm_sum_E: Sum of g ||f(x)||.
        gated_sq_sum_E: Sum of (g ||f(x)||)^2.
        input_sq_EH: Sum of squares of each input channel over the expert's tokens.
        hidden_sq_EI: Sum of squares of each hidden neuron.
        coactivation_EE: Tokens for which both experts were selected; the diagonal is the token count.
        router_gram_EE: Sum over tokens of l l^T, l the router logits before any scoring.
        router_sum_E: Sum of the logits.
        reservoir: Sample of tokens.
    """

    num_tokens: int
    token_count_E: torch.Tensor
    gate_sum_E: torch.Tensor
    output_norm_sum_E: torch.Tensor
    output_sq_sum_E: torch.Tensor
    gated_norm_sum_E: torch.Tensor
    gated_sq_sum_E: torch.Tensor
    input_sq_EH: torch.Tensor
    hidden_sq_EI: torch.Tensor
    coactivation_EE: torch.Tensor
    router_gram_EE: torch.Tensor
    router_sum_E: torch.Tensor
    reservoir: Reservoir

    @property
    def num_experts(self) -> int:
        """Routed experts (E)."""
        return len(self.token_count_E)

    @property
    def frequency_E(self) -> torch.Tensor:
        """(E,) share of the routed (token, expert) pairs; zeros if there were none."""
        return self.token_count_E / self.token_count_E.sum().clamp(min=1)

    @property
    def unseen(self) -> tuple[int, ...]:
        """Experts that no calibration token reached."""
        return tuple((self.token_count_E == 0).nonzero()[:, 0].tolist())

    def mean_distinct(self, labels_E: tuple[int, ...]) -> float:
        """Mean number of distinct groups a token runs when experts map to `labels_E`, from the reservoir's tokens."""
        return self.mean_of_distinct(labels_E, [1] * (max(labels_E, default=-1) + 1))

    def mean_of_distinct(self, labels_E: tuple[int, ...], values_G: Sequence[float]) -> float:
        """Mean over the reservoir's tokens of the sum of a value over the distinct groups that a token runs."""
        padded = torch.tensor([*labels_E, -1])
        groups_SK = padded[self.reservoir.index_SK.clamp(max=len(labels_E))].sort(dim=-1).values
        new_SK = groups_SK >= 0
        new_SK[:, 1:] &= groups_SK[:, 1:] != groups_SK[:, :-1]
        values = torch.tensor([*values_G, 0], dtype=torch.float64)
        return float((values[groups_SK] * new_SK).sum(-1).mean())


_SUMS = tuple(f.name for f in fields(BlockStatistics) if f.name not in ("num_tokens", "reservoir"))
_RESERVOIR = tuple(f.name for f in fields(Reservoir))


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of all MoE blocks of one model on one set of calibration data.

    Args:
        blocks: By module path.
        calibration: Record of the data: sources, token count, hash, seed.
        source: Identity of the observed model; methods refuse statistics of another one.
        unseen: What to do about experts without tokens.
        memo: What methods computed from them and the model, so that another size does not compute it again; not saved.
    """

    blocks: Mapping[str, BlockStatistics]
    calibration: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    unseen: Unseen = "warn"
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    def unseen_report(self) -> str | None:
        """One sentence that names blocks and experts without tokens, None if every expert was reached."""
        missing = {name: block.unseen for name, block in self.blocks.items() if block.unseen}
        if not missing:
            return None
        total = sum(block.num_experts for block in self.blocks.values())
        count = sum(len(experts) for experts in missing.values())
        shown = [
            f"{name}: {', '.join(map(str, experts[:5]))}{', ...' if len(experts) > 5 else ''}"
            for name, experts in list(missing.items())[:4]
        ]
        more = "; ..." if len(missing) > 4 else ""
        return (
            f"Calibration gave no token to {count} of {total} experts ({'; '.join(shown)}{more}). "
            'Add data, or set unseen="keep" or "prune".'
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `statistics.json` and `statistics/tensors.safetensors`; the folder is created."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        record = {
            "calibration": dict(self.calibration),
            "source": dict(self.source),
            "unseen": self.unseen,
            "blocks": [{"name": name, "num_tokens": block.num_tokens} for name, block in self.blocks.items()],
        }
        write_record(directory, STATISTICS_NAME, record, self._tensors())

    def digest(self) -> str:
        """SHA-256 of all that a method sees of them."""
        record = {"calibration": dict(self.calibration), "unseen": self.unseen, "blocks": list(self.blocks)}
        return digest(record, self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for index, block in enumerate(self.blocks.values()):
            tensors |= {f"{index}.{name}": getattr(block, name) for name in _SUMS}
            # safetensors refuses shared storage, and the two inputs are one tensor in most architectures.
            shared = block.reservoir.router_input_SH is block.reservoir.experts_input_SH
            names = [name for name in _RESERVOIR if not (shared and name == "experts_input_SH")]
            names = [name for name in names if getattr(block.reservoir, name) is not None]
            tensors |= {f"{index}.reservoir.{name}": getattr(block.reservoir, name).contiguous() for name in names}
        return tensors

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Statistics:
        """Read statistics back.

        Raises:
            ValueError: If the folder has none, or broken ones, or of another format version.
        """
        record, tensors = read_record(Path(directory), STATISTICS_NAME)
        blocks = {}
        for index, entry in enumerate(record["blocks"]):
            prefix = f"{index}.reservoir."
            sample = {name: tensors[prefix + name] for name in _RESERVOIR if prefix + name in tensors}
            sample.setdefault("experts_input_SH", sample["router_input_SH"])
            blocks[entry["name"]] = BlockStatistics(
                num_tokens=entry["num_tokens"],
                reservoir=Reservoir(**sample),
                **{name: tensors[f"{index}.{name}"] for name in _SUMS},
            )
        return cls(blocks, record["calibration"], record["source"], record["unseen"])
