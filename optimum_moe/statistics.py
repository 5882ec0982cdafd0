"""`Statistics`: observations on calibration data, reusable with other sizes and recipes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from optimum_moe.records import digest, read_record, write_record

STATISTICS_NAME = "statistics"

Unseen = Literal["warn", "error", "keep", "prune"]

OBSERVATIONS: Mapping[str, tuple[str, ...]] = {
    "frequency": ("token_count_E",),
    "routing_weights": ("gate_sum_E",),
    "outputs": ("output_norm_sum_E", "output_sq_sum_E", "gated_norm_sum_E", "gated_sq_sum_E"),
    "inputs": ("input_sq_EH",),
    "neurons": ("hidden_sq_EI",),
    "coactivation": ("coactivation_EE",),
    "router_logits": ("router_gram_EE", "router_sum_E"),
    "sample": ("reservoir",),
    "residual": (),
    "gradients": (),
    "experts_similarity": ("experts_cosine_sum", "layer_tokens"),
    "layer_similarity": ("layer_cosine_sum", "layer_tokens"),
    "residual_stream": ("residual_before_SH", "residual_after_SH"),
    "modalities": ("modality_count_VE", "modality_gated_norm_VE"),
}
"""Fields of `BlockStatistics` by observation; residual stream and gradients are part of the sample."""
ON_REQUEST = frozenset({"gradients", "layer_similarity", "residual_stream", "experts_similarity", "modalities"})
"""Observations that are only collected for a recipe that reads them: they take more time or memory, or, like those by
modality, are only there for some data (and are then always collected)."""
MODALITIES = ("text", "image", "video", "audio")
"""Modalities of tokens, in the order of `modality_count_VE`."""
STANDARD = tuple(name for name in OBSERVATIONS if name not in ON_REQUEST)
"""Observations that `calibrate()` collects for any recipe."""
# Of two observations that have a field the later one is taken.
OBSERVATION_OF: Mapping[str, str] = {
    field: name for name, fields_ in OBSERVATIONS.items() for field in fields_ if field != "reservoir"
}
"""Observation by field of `BlockStatistics`."""


@dataclass(frozen=True, eq=False)
class Reservoir:
    """A seeded sample of S tokens of one block, in the order in which they were seen.

    Args:
        router_input_SH: (S, H) input of the router.
        experts_input_SH: (S, H) input of the experts; the same tensor if the two are equal.
        index_SK: (S, K) selected experts; an id >= E is not a routed expert.
        weights_SK: (S, K) routing weights.
        gradient_SJH: (S, J, H) gradient of the loss, summed over tokens, with respect to the weighted sum of the
            selected experts, for each of J draws of labels from the model's predictions; None without backward passes.
        residual_SH: (S, H) residual stream before the block; None where no stage asked for it, or it cannot be seen.
    """

    router_input_SH: torch.Tensor
    experts_input_SH: torch.Tensor
    index_SK: torch.Tensor
    weights_SK: torch.Tensor
    gradient_SJH: torch.Tensor | None = None
    residual_SH: torch.Tensor | None = None


def no_sample() -> Reservoir:
    """A sample of no tokens."""
    empty = torch.empty(0, 0)
    return Reservoir(empty, empty, torch.empty(0, 0, dtype=torch.int64), empty)


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
        layer_cosine_sum: Sum over tokens of the cosine of the residual stream before and after the layer around the
            block.
        layer_tokens: Tokens that this layer saw: more than the block did where it has one for each modality.
        residual_before_SH: (S, H) residual stream before that layer for sampled tokens, the same ones in all layers.
        residual_after_SH: (S, H) residual stream after it.
        experts_cosine_sum: Sum over tokens of the cosine of the residual stream after that layer with the routed
            experts of the block and without them.
        modality_count_VE: Tokens of each of `MODALITIES` (V of them) that were routed to each expert; zeros for a block
            that sees no token ids, such as one of a vision tower. Observed where calibration data have media.
        modality_gated_norm_VE: Sum of g ||f(x)|| over them.

    What no stage asked for is None.
    """

    num_tokens: int
    reservoir: Reservoir
    token_count_E: torch.Tensor
    output_norm_sum_E: torch.Tensor
    output_sq_sum_E: torch.Tensor
    gated_norm_sum_E: torch.Tensor
    gated_sq_sum_E: torch.Tensor
    gate_sum_E: torch.Tensor | None = None
    input_sq_EH: torch.Tensor | None = None
    hidden_sq_EI: torch.Tensor | None = None
    coactivation_EE: torch.Tensor | None = None
    router_gram_EE: torch.Tensor | None = None
    router_sum_E: torch.Tensor | None = None
    layer_cosine_sum: torch.Tensor | None = None
    layer_tokens: torch.Tensor | None = None
    residual_before_SH: torch.Tensor | None = None
    residual_after_SH: torch.Tensor | None = None
    experts_cosine_sum: torch.Tensor | None = None
    modality_count_VE: torch.Tensor | None = None
    modality_gated_norm_VE: torch.Tensor | None = None

    @property
    def sums(self) -> list[str]:
        """Names of the observed fields, without the sample."""
        return [name for name in _SUMS if getattr(self, name) is not None]

    @property
    def num_experts(self) -> int:
        """Number of routed experts (E)."""
        return len(self.token_count_E)

    @property
    def frequency_E(self) -> torch.Tensor:
        """(E,) share of the routed (token, expert) pairs; zeros if there were none."""
        return self.token_count_E / self.token_count_E.sum().clamp(min=1)

    @property
    def unseen(self) -> tuple[int, ...]:
        """Experts that no calibration token reached."""
        return tuple((self.token_count_E == 0).nonzero()[:, 0].tolist())

    def broken(self, gradients: bool) -> str | None:
        """Description of the first gradients or sums in the block that are NaN or infinite; None if all are finite."""
        sums: dict[str, torch.Tensor | None]
        if gradients:
            sums = {"gradients of the loss": self._gradient_sum_E}
        else:
            sums = {
                "inputs": None if self.input_sq_EH is None else self.input_sq_EH.sum(-1),
                "router logits": self.router_sum_E,
                "hidden neurons": None if self.hidden_sq_EI is None else self.hidden_sq_EI.sum(-1),
                "outputs": self.output_sq_sum_E,
                "routing weights": self.gated_sq_sum_E,
            }
        for what, sum_E in sums.items():
            if sum_E is None:
                continue
            experts = (~sum_E.isfinite()).nonzero()[:, 0].tolist()
            if experts:
                more = ", ..." if len(experts) > 5 else ""
                return f"{what} of expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts[:5]))}{more}"
        return None

    @property
    def _gradient_sum_E(self) -> torch.Tensor:
        """(E,) sum of the sampled gradients over the tokens of each expert."""
        sample, sum_E = self.reservoir, torch.zeros(self.num_experts + 1, dtype=torch.float64)
        if sample.gradient_SJH is not None:
            sum_S = sample.gradient_SJH.double().sum((1, 2))
            index_SK = sample.index_SK.long().clamp(max=self.num_experts)
            sum_E.index_add_(0, index_SK.flatten(), sum_S.repeat_interleave(index_SK.shape[1]))
        return sum_E[:-1]

    @property
    def silent(self) -> tuple[int, ...]:
        """Experts whose outputs are zero for all their tokens."""
        return tuple(((self.token_count_E > 0) & (self.output_sq_sum_E == 0)).nonzero()[:, 0].tolist())

    def mean_distinct(self, labels_E: tuple[int, ...]) -> float:
        """Mean number of distinct groups per sampled token, if experts map to `labels_E`."""
        return self.mean_of_distinct(labels_E, [1] * (max(labels_E, default=-1) + 1))

    def mean_of_distinct(self, labels_E: tuple[int, ...], values_G: Sequence[float]) -> float:
        """Mean over the sampled tokens of the sum of `values_G` over the distinct groups of a token."""
        padded = torch.tensor([*labels_E, -1])
        groups_SK = padded[self.reservoir.index_SK.clamp(max=len(labels_E))].sort(dim=-1).values
        new_SK = groups_SK >= 0
        new_SK[:, 1:] &= groups_SK[:, 1:] != groups_SK[:, :-1]
        values = torch.tensor([*values_G, 0], dtype=torch.float64)
        return float((values[groups_SK] * new_SK).sum(-1).mean())


NO_SAMPLE = (
    "The recipe needs sampled tokens of each block, but reservoir_tokens=0 keeps none. Calibrate with "
    "reservoir_tokens=None for the number that it needs."
)

_SUMS = tuple(f.name for f in fields(BlockStatistics) if f.name not in ("num_tokens", "reservoir"))
_RESERVOIR = tuple(f.name for f in fields(Reservoir))


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of all MoE blocks of one model on one set of calibration data.

    Args:
        blocks: Statistics of each block by module path.
        calibration: Record of the data: sources, token count, hash, seed.
        source: Identity of the observed model; statistics of another model are refused.
        unseen: Policy for experts without tokens.
        memo: Cached profiles of stages, so that another size does not compute them again; not saved.
    """

    blocks: Mapping[str, BlockStatistics]
    calibration: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    unseen: Unseen = "warn"
    memo: dict[str, Any] = field(default_factory=dict, repr=False)

    def check_finite(self) -> None:
        """Raise a `ValueError` with block and experts if any observation is NaN or infinite."""
        # If activations overflow in one block, gradients are NaN in the blocks before it.
        for gradients in (False, True):
            found = ((name, block.broken(gradients)) for name, block in self.blocks.items())
            broken = {name: what for name, what in found if what is not None}
            if not broken:
                continue
            (name, what), behind = next(iter(broken.items())), len(broken) - 1
            more = f", and in {behind} other blocks" if behind else ""
            raise ValueError(
                f"Observation gave NaN or infinity in the {what} of {name}{more}, so its statistics cannot be used. "
                "Check the calibration data; if the model runs in float16, load it with a dtype of larger range: "
                'dtype="bfloat16" or dtype="float32".'
            )

    def unseen_report(self) -> str | None:
        """One sentence that names blocks and experts without tokens, None if every expert was reached."""
        missing = {name: block.unseen for name, block in self.blocks.items() if block.unseen}
        if not missing:
            return None
        return (
            f'Calibration gave no token to {self._counted(missing)}. Add data, or set unseen="keep" or unseen="prune".'
        )

    def silent_report(self) -> str | None:
        """One sentence that names blocks and experts whose outputs are all zero, None if there are none."""
        silent = {name: block.silent for name, block in self.blocks.items() if block.silent}
        if not silent:
            return None
        return f"All outputs are zero for {self._counted(silent)}. Check their weights if this is not intended."

    def _counted(self, experts: Mapping[str, Sequence[int]]) -> str:
        total = sum(block.num_experts for block in self.blocks.values())
        count = sum(len(found) for found in experts.values())
        shown = [
            f"{name}: {', '.join(map(str, found[:5]))}{', ...' if len(found) > 5 else ''}"
            for name, found in list(experts.items())[:4]
        ]
        more = "; ..." if len(experts) > 4 else ""
        return f"{count} of {total} experts ({'; '.join(shown)}{more})"

    def check_complete(self, num_experts: Mapping[str, int], needs: Collection[str]) -> None:
        """Raise a `ValueError` unless the statistics have all that a recipe reads.

        Args:
            num_experts: Number of experts of each block of the model.
            needs: Names of the observations that the recipe reads, see `OBSERVATIONS`.
        """
        for name, experts in num_experts.items():
            if name not in self.blocks:
                raise ValueError(
                    f"The statistics lack {name}: they hold {len(self.blocks)} blocks, but the model has "
                    f"{len(num_experts)}. Observe the model again with calibrate()."
                )
            block = self.blocks[name]
            wanted = [field for need in sorted(needs) for field in OBSERVATIONS[need]]
            lacking = [field for field in wanted if getattr(block, field) is None]
            if lacking or block.num_experts != experts:
                found = f"no {', '.join(lacking)}" if lacking else f"{block.num_experts} experts"
                raise ValueError(
                    f"The statistics of {name} have {found}, but the recipe reads {', '.join(wanted)} of its {experts} "
                    "experts. Observe the model again with calibrate()."
                )
            if "sample" in needs and block.num_tokens and not len(block.reservoir.index_SK):
                raise ValueError(NO_SAMPLE)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `statistics.json` and `statistics/tensors.safetensors`; the folder is created."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        record = {
            "calibration": dict(self.calibration),
            "source": dict(self.source),
            "unseen": self.unseen,
            "blocks": [
                {"name": name, "num_tokens": block.num_tokens, "sums": block.sums}
                for name, block in self.blocks.items()
            ],
        }
        write_record(directory, STATISTICS_NAME, record, self._tensors())

    def digest(self) -> str:
        """SHA-256 of all data that a recipe reads."""
        record = {"calibration": dict(self.calibration), "unseen": self.unseen, "blocks": list(self.blocks)}
        return digest(record, self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for index, block in enumerate(self.blocks.values()):
            tensors |= {f"{index}.{name}": getattr(block, name) for name in block.sums}
            # safetensors refuses shared storage, and the two inputs are one tensor in most architectures.
            shared = block.reservoir.router_input_SH is block.reservoir.experts_input_SH
            names = [name for name in _RESERVOIR if not (shared and name == "experts_input_SH")]
            names = [name for name in names if getattr(block.reservoir, name) is not None]
            tensors |= {f"{index}.reservoir.{name}": getattr(block.reservoir, name).contiguous() for name in names}
        return tensors

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Statistics:
        """Read statistics from a folder.

        Raises:
            ValueError: If the folder has no statistics, broken ones, or ones of another format version.
        """
        record, tensors = read_record(Path(directory), STATISTICS_NAME)
        blocks = {}
        try:
            for index, entry in enumerate(record["blocks"]):
                prefix = f"{index}.reservoir."
                sample = {name: tensors[prefix + name] for name in _RESERVOIR if prefix + name in tensors}
                sample.setdefault("experts_input_SH", tensors[f"{prefix}router_input_SH"])
                blocks[entry["name"]] = BlockStatistics(
                    num_tokens=entry["num_tokens"],
                    reservoir=Reservoir(**sample),
                    **{name: tensors[f"{index}.{name}"] for name in entry["sums"]},
                )
            return cls(blocks, record["calibration"], record["source"], record["unseen"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"The statistics in {directory} lack a field that this version of optimum_moe needs ({error}). Observe "
                "the model again with calibrate(), or install the version that wrote them."
            ) from error
