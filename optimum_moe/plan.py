"""The plan: the decisions for every MoE block, as frozen data.

A plan contains all that a surgeon needs to cut a block, and all that loading, verification and reports need to know
about the cut. On disk it is `plan.json` (structure, labels, dominant experts, stages) and `plan/tensors.safetensors`
(merge weights, permutations, neurons of merged experts, router weights, kept neurons). The factors of matrices are only
in the checkpoint.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from optimum_moe.algorithms.expert_skipping import Skipping
from optimum_moe.algorithms.router_fit import RouterFit
from optimum_moe.formats import ExpertsSpec, StoredExperts
from optimum_moe.records import read_record, write_record

PLAN_NAME = "plan"

Routing = Literal["map", "reduce"]
Weights = Literal["original", "masked", "fitted"]

_FITTED = tuple(f.name for f in fields(RouterFit))


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The decision for one MoE block of E routed experts, of which G remain.

    Groups are numbered by ascending index of their reference expert, so that a plan that keeps all experts is the
    identity, and the experts of one router group remain together.

    Args:
        name: Module path of the block.
        labels_E: Group of each expert, -1 for a pruned expert.
        dominants_G: The dominant expert of each group: the most frequent one, to which its members are aligned. None if
            groups have no dominant expert; the first expert of a group is then its reference.
        routing: `"map"` keeps the router and maps its E ids to the groups; `"reduce"` gives the router G rows.
        merge_weights_E: (E,) float64, sums to 1 in every group, 0 for pruned experts.
        permutations_EI: (E, I) int64; expert e enters the merge with its neurons in the order `permutations_EI[e]`.
            None for no permutation.
        sources_GI: (G, I) int64, the neurons that the expert of each group is made of: neuron i of expert e is
            e * I + i. They are taken as they are, with their biases; `merge_weights_E` then only weighs the biases of
            down. None for weighted sums of matrices.
        router_weights_E: (E,) float64, weight of each expert's router row in its group's row; `"reduce"` only.
        router_fit: Fitted router entries, which replace the weighted ones; `"reduce"` only.
        factors: The G experts in their stored formats; None for dense experts, and for a plan that was read from disk.
        sizes: Specification of the stored formats, which is also on disk.
        neurons: Indices of the neurons that each expert keeps (None for all), which are also on disk.
        digest: SHA-256 by name of each tensor that the original does not have (factors, sparse rows, shared bases),
            also on disk.
        stable_rank: Mean stable rank of the experts' matrices before and after merging, if both are known.
        skipping: Which selected experts a token skips at run time; None for none.
        refits_down: Whether the down projections of merged experts were refitted to what their members gave.
        is_stock: Whether the experts of `sizes` are dense and of one width, and stored in the original's own tensors;
            their digests are then those of these tensors.
        weights: What dense matrices of `sizes` hold: the `"original"` weights (of merged experts: those of the merge),
            these or zeros (`"masked"`), or other values (`"fitted"`). Refitted down projections are others in any case.
    """

    name: str
    labels_E: tuple[int, ...]
    dominants_G: tuple[int, ...] | None
    routing: Routing
    merge_weights_E: torch.Tensor
    permutations_EI: torch.Tensor | None = None
    sources_GI: torch.Tensor | None = None
    router_weights_E: torch.Tensor | None = None
    router_fit: RouterFit | None = None
    factors: StoredExperts | None = None
    sizes: ExpertsSpec | None = None
    neurons: tuple[torch.Tensor | None, ...] | None = None
    digest: Mapping[str, str] | None = None
    stable_rank: tuple[float, float] | None = None
    refits_down: bool = False
    is_stock: bool = False
    weights: Weights = "original"
    skipping: Skipping | None = None

    def __post_init__(self) -> None:
        if self.factors is not None and self.sizes is None:
            object.__setattr__(self, "sizes", self.factors.spec)
            object.__setattr__(self, "neurons", tuple(expert.neurons for expert in self.factors.experts))
        if self.sizes is not None and len(self.sizes.widths) != self.num_groups:
            raise ValueError(
                f"Plan for {self.name}: {len(self.sizes.widths)} experts have sizes, but {self.num_groups} remain."
            )
        if self.is_stock and (self.sizes is None or self.width is None):
            raise ValueError(f"Plan for {self.name}: stock experts must be dense and of one width, got {self.sizes}.")
        if self.weights not in get_args(Weights):
            raise ValueError(f"Plan for {self.name}: weights must be one of {get_args(Weights)}, got {self.weights!r}.")
        if self.routing not in ("map", "reduce"):
            raise ValueError(f"Plan for {self.name}: routing must be 'map' or 'reduce', got {self.routing!r}.")
        self._check_groups()
        self._check_tensors()

    def _check_groups(self) -> None:
        groups = sorted({label for label in self.labels_E if label >= 0})
        if groups != list(range(self.num_groups)) or not groups:
            raise ValueError(
                f"Plan for {self.name}: labels must use each of 0..{max(self.num_groups, 1) - 1} at least once, "
                f"got {groups}."
            )
        references = self.references_G
        if any(self.labels_E[expert] != group for group, expert in enumerate(references)):
            raise ValueError(f"Plan for {self.name}: a dominant expert must be a member of its own group.")
        if list(references) != sorted(references):
            raise ValueError(f"Plan for {self.name}: groups must be numbered by ascending reference expert.")

    def _check_tensors(self) -> None:
        experts, weights_E = self.num_experts, self.merge_weights_E
        if weights_E.shape != (experts,) or not bool(((weights_E >= 0) & weights_E.isfinite()).all()):
            raise ValueError(f"Plan for {self.name}: merge_weights_E must hold {experts} nonnegative values.")
        slots_E = torch.tensor(self.labels_E).where(torch.tensor(self.labels_E) >= 0, self.num_groups)
        sums_G = torch.zeros(self.num_groups + 1, dtype=torch.float64).index_add_(0, slots_E, weights_E.double())
        wanted_G = torch.ones_like(sums_G).index_fill_(0, torch.tensor([self.num_groups]), 0.0)
        if not torch.allclose(sums_G, wanted_G, rtol=0, atol=1e-6):
            raise ValueError(
                f"Plan for {self.name}: merge_weights_E must sum to 1 in every group and be 0 for pruned experts, "
                f"got {[round(total, 4) for total in sums_G.tolist()]}."
            )
        order_EI = self.permutations_EI
        if order_EI is not None:
            every_EI = torch.arange(order_EI.shape[-1]).expand(experts, -1)
            if order_EI.shape != every_EI.shape or not torch.equal(order_EI.long().sort(-1).values, every_EI):
                raise ValueError(
                    f"Plan for {self.name}: each of the {experts} rows of permutations_EI must be a permutation, got a "
                    f"tensor of shape {tuple(order_EI.shape)}."
                )
        self._check_sources()
        if self.routing == "reduce" and self.router_weights_E is None and not self.keeps_all:
            raise ValueError(f'Plan for {self.name}: routing="reduce" needs router_weights_E.')
        if self.router_weights_E is not None and self.router_weights_E.shape != (experts,):
            raise ValueError(f"Plan for {self.name}: router_weights_E must hold {experts} values.")
        ranks = self.stable_rank
        if ranks is not None and (len(ranks) != 2 or any(not 0 <= float(rank) < float("inf") for rank in ranks)):
            raise ValueError(f"Plan for {self.name}: stable_rank must hold two nonnegative values, got {ranks!r:.80}.")

    def _check_sources(self) -> None:
        sources_GI = self.sources_GI
        if sources_GI is None:
            return
        inner = sources_GI.shape[-1]
        fits = sources_GI.shape == (self.num_groups, inner) and int(sources_GI.min()) >= 0
        if not fits or int(sources_GI.max()) >= self.num_experts * inner or self.permutations_EI is not None:
            raise ValueError(
                f"Plan for {self.name}: sources_GI must hold neurons of {self.num_experts} experts for each of "
                f"{self.num_groups} groups, and no permutations beside them, got a tensor of shape "
                f"{tuple(sources_GI.shape)}."
            )
        owner_GI = torch.tensor(self.labels_E)[sources_GI.long() // inner]
        if not torch.equal(owner_GI, torch.arange(self.num_groups)[:, None].expand_as(owner_GI)):
            raise ValueError(f"Plan for {self.name}: a merged expert takes neurons from the members of its group only.")

    @property
    def num_experts(self) -> int:
        """Number of routed experts before the cut (E)."""
        return len(self.labels_E)

    @property
    def num_groups(self) -> int:
        """Number of routed experts after the cut (G)."""
        return max(self.labels_E, default=-1) + 1 if self.dominants_G is None else len(self.dominants_G)

    @property
    def references_G(self) -> tuple[int, ...]:
        """The expert to which the members of each group are aligned: the dominant one, else the first."""
        if self.dominants_G is not None:
            return self.dominants_G
        return tuple(self.labels_E.index(group) for group in range(self.num_groups))

    @property
    def removed_experts(self) -> tuple[int, ...]:
        """The pruned experts, and those that keep no neuron."""
        empty = set() if self.sizes is None else {g for g, width in enumerate(self.sizes.widths) if width == 0}
        return tuple(e for e, label in enumerate(self.labels_E) if label < 0 or label in empty)

    @property
    def keeps_all(self) -> bool:
        """True if no expert is merged or removed."""
        return self.num_groups == self.num_experts

    @property
    def merges(self) -> bool:
        """True if some experts become one."""
        return sum(label >= 0 for label in self.labels_E) > self.num_groups

    @property
    def is_identity(self) -> bool:
        """True if the block is not changed at all."""
        return self.keeps_all and self.sizes is None and self.skipping is None

    @property
    def width(self) -> int | None:
        """Neurons of every expert in stock tensors that were resized; None if they were not."""
        if not self.is_stock or self.sizes is None or self.sizes.parts or len(set(self.sizes.widths)) != 1:
            return None
        return self.sizes.widths[0]

    @property
    def needs_guard(self) -> bool:
        """True if a stock model could load the stored block without an error and initialize the rest randomly."""
        return (self.sizes is not None and not self.is_stock) or (self.routing == "map" and not self.keeps_all)

    @property
    def keeps_experts(self) -> bool:
        """True if every remaining expert is an original one, neither merged nor permuted."""
        if self.sizes is not None or self.sources_GI is not None:
            return False
        alone_E = torch.zeros(self.num_experts, dtype=torch.float64)
        alone_E[list(self.references_G)] = 1.0
        if not torch.equal(self.merge_weights_E.double(), alone_E):
            return False
        if self.permutations_EI is None:
            return True
        kept_GI = self.permutations_EI[list(self.references_G)].long()
        return torch.equal(kept_GI, torch.arange(kept_GI.shape[-1]).expand_as(kept_GI))

    def sources(self, group: int) -> torch.Tensor | None:
        """(2, I) expert of each neuron of a merged expert above its number there; None for weighted sums."""
        if self.sources_GI is None:
            return None
        row_I = self.sources_GI[group].long()
        return torch.stack([row_I // len(row_I), row_I % len(row_I)])

    def members(self, group: int) -> list[int]:
        """The experts of a group, with its reference first."""
        reference = self.references_G[group]
        return [reference] + [e for e, label in enumerate(self.labels_E) if label == group and e != reference]

    def with_forms_of(self, following: BlockPlan) -> BlockPlan:
        """This plan, followed by one that keeps all remaining experts in other formats.

        Raises:
            ValueError: If the other plan merges or removes experts.
        """
        if not following.keeps_all or following.num_experts != self.num_groups:
            raise ValueError(
                f"Plan for {self.name}: experts that were merged or pruned already cannot be merged or pruned again, "
                f"got a second plan from {following.num_experts} to {following.num_groups} of {self.num_groups}."
            )
        if following.sizes is None:
            return replace(self, stable_rank=following.stable_rank)
        factors, neurons = following.factors, following.neurons
        if factors is not None and self.neurons is not None:
            factors = factors.within(self.neurons)
            neurons = tuple(expert.neurons for expert in factors.experts)
        return replace(
            self,
            factors=factors,
            sizes=following.sizes,
            neurons=neurons,
            digest=following.digest,
            is_stock=following.is_stock,
            weights=max(self.weights, following.weights, key=get_args(Weights).index),
            stable_rank=following.stable_rank,
        )


def is_expressible(counts: Mapping[str, int], unchanged: Collection[str], towers: Mapping[str, str | None]) -> bool:
    """Whether configs can express the number of experts of each block.

    Args:
        counts: Number of remaining experts by block.
        unchanged: Blocks that keep all experts.
        towers: Path of the config with the expert count of each block, None for none; `{}` if all have the same.
    """
    by_tower: dict[str | None, set[int]] = {}
    for name, count in counts.items():
        tower = towers.get(name, "")
        if tower is None and name not in unchanged:
            return False
        by_tower.setdefault(tower, set()).add(count)
    return all(len(found) == 1 for tower, found in by_tower.items() if tower is not None)


def keep_all(name: str, num_experts: int, routing: Routing = "reduce") -> BlockPlan:
    """The plan of an unchanged block."""
    every = tuple(range(num_experts))
    ones_E = torch.ones(num_experts, dtype=torch.float64)
    return BlockPlan(name, every, every, routing, ones_E, router_weights_E=ones_E if routing == "reduce" else None)


def keep_some(name: str, num_experts: int, kept: Sequence[int]) -> BlockPlan:
    """The plan of a block that loses all experts but some, with their rows of the router.

    Args:
        name: Module path of the block.
        num_experts: Its experts.
        kept: Ids of those that remain.
    """
    kept = tuple(sorted(kept))
    labels = [-1] * num_experts
    for slot, expert in enumerate(kept):
        labels[expert] = slot
    weights_E = torch.tensor([float(label >= 0) for label in labels], dtype=torch.float64)
    return BlockPlan(
        name=name,
        labels_E=tuple(labels),
        dominants_G=kept,
        routing="reduce",
        merge_weights_E=weights_E,
        router_weights_E=weights_E,
    )


@dataclass(frozen=True, eq=False)
class CompressionPlan:
    """The plans of all MoE blocks of one checkpoint, and the record of how they were decided.

    Args:
        blocks: One `BlockPlan` for each MoE block, by module path.
        stages: Name and settings of each stage of the recipe, in order.
        source: Identity of the checkpoint: architecture, name, number of experts of each block.
        calibration: Record of the calibration data (None for data-free recipes).
        seed: Seed of all random choices.
        settings: Config settings of the result that differ from the original's, by dotted path, where stock classes
            have experts of another width or fewer layers.
        dropped: Paths in the original of the layers that were dropped before the first block was decided; `blocks` are
            those of the remaining layers, under their new numbers.
        remarks: Sentences for the user about what was decided.
        evidence: Numbers behind the decisions that reports draw, as JSON values by name.
    """

    blocks: Mapping[str, BlockPlan]
    stages: Sequence[Mapping[str, Any]] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """True if stock transformers classes can load the result: no map, no factors, one count per config."""
        if any(plan.sizes is not None and not plan.is_stock for plan in self.blocks.values()):
            return False
        if any(plan.skipping is not None for plan in self.blocks.values()):
            return False
        mapped = any(plan.routing == "map" and not plan.keeps_all for plan in self.blocks.values())
        counts = {name: plan.num_groups for name, plan in self.blocks.items()}
        unchanged = {name for name, plan in self.blocks.items() if plan.keeps_all}
        return not mapped and is_expressible(counts, unchanged, self.source.get("towers", {}))

    def structure(self) -> dict[str, dict[str, Any]]:
        """Sizes and routing of every changed block, from which the model is rebuilt without its weights."""
        return {
            name: {"num_experts": plan.num_experts, "num_groups": plan.num_groups, "routing": plan.routing}
            | ({} if plan.sizes is None or plan.is_stock else {"factors": plan.sizes.to_dict()})
            | ({} if plan.skipping is None else {"skipping": plan.skipping.to_dict()})
            for name, plan in self.blocks.items()
            if not plan.is_identity
        }

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `plan.json` and `plan/tensors.safetensors` into an existing folder."""
        tensors: dict[str, torch.Tensor] = {}
        blocks: list[dict[str, Any]] = []
        for index, plan in enumerate(self.blocks.values()):
            blocks.append(
                {
                    "name": plan.name,
                    "routing": plan.routing,
                    "labels": list(plan.labels_E),
                    "dominants": None if plan.dominants_G is None else list(plan.dominants_G),
                }
            )
            if plan.sizes is not None:
                blocks[-1] |= {"factors": plan.sizes.to_dict(), "factors_digest": plan.digest}
                kept = plan.neurons or ()
                tensors |= {f"{index}.neurons.{e}": n.to(torch.int32) for e, n in enumerate(kept) if n is not None}
            if plan.is_stock:
                blocks[-1]["stock"] = True
            if plan.weights != "original":
                blocks[-1]["weights"] = plan.weights
            if plan.skipping is not None:
                blocks[-1]["skipping"] = plan.skipping.to_dict()
            if plan.refits_down:
                blocks[-1]["refits_down"] = True
            if plan.stable_rank is not None:
                blocks[-1]["stable_rank"] = list(plan.stable_rank)
            tensors[f"{index}.merge_weights_E"] = plan.merge_weights_E
            if plan.permutations_EI is not None:
                tensors[f"{index}.permutations_EI"] = plan.permutations_EI.to(torch.int32)
            if plan.sources_GI is not None:
                tensors[f"{index}.sources_GI"] = plan.sources_GI.to(torch.int32)
            if plan.router_weights_E is not None:
                # safetensors refuses shared storage, and pruning has one tensor for both weights.
                tensors[f"{index}.router_weights_E"] = plan.router_weights_E.clone()
            if plan.router_fit is not None:
                fitted = {name: getattr(plan.router_fit, name) for name in _FITTED}
                tensors |= {f"{index}.fitted.{name}": t for name, t in fitted.items() if t is not None}
        record: dict[str, Any] = {
            "stages": [dict(stage) for stage in self.stages],
            "source": dict(self.source),
            "calibration": self.calibration,
            "seed": self.seed,
            "blocks": blocks,
        }
        if self.settings:
            record["settings"] = dict(self.settings)
        if self.dropped:
            record["dropped"] = list(self.dropped)
        if self.remarks:
            record |= {"remarks": list(self.remarks)}
        if self.evidence:
            record |= {"evidence": dict(self.evidence)}
        write_record(Path(directory), PLAN_NAME, record, tensors)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> CompressionPlan:
        """Read a plan from a folder.

        Raises:
            ValueError: If the folder has no plan, a broken one, or one of another format version.
        """
        record, tensors = read_record(Path(directory), PLAN_NAME)
        try:
            blocks = {block["name"]: _read_block(block, index, tensors) for index, block in enumerate(record["blocks"])}
            settings = {str(path): value for path, value in record.get("settings", {}).items()}
            return cls(
                blocks=blocks,
                stages=record["stages"],
                source=record["source"],
                calibration=record["calibration"],
                seed=record["seed"],
                settings=settings,
                dropped=tuple(str(layer) for layer in record.get("dropped", ())),
                remarks=tuple(str(remark) for remark in record.get("remarks", ())),
                evidence=dict(record.get("evidence", {})),
            )
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(f"The plan in {directory} is broken ({error}). Copy or create it again.") from error


def _read_block(block: Mapping[str, Any], index: int, tensors: Mapping[str, torch.Tensor]) -> BlockPlan:
    permutations, sources = tensors.get(f"{index}.permutations_EI"), tensors.get(f"{index}.sources_GI")
    sizes = ExpertsSpec.from_dict(block["factors"]) if "factors" in block else None
    dominants = block["dominants"]
    groups = 0 if sizes is None else len(sizes.widths)
    kept = [tensors.get(f"{index}.neurons.{e}") for e in range(groups)]
    return BlockPlan(
        name=block["name"],
        labels_E=tuple(operator.index(label) for label in block["labels"]),
        dominants_G=None if dominants is None else tuple(operator.index(expert) for expert in dominants),
        routing=block["routing"],
        merge_weights_E=tensors[f"{index}.merge_weights_E"],
        permutations_EI=None if permutations is None else permutations.long(),
        sources_GI=None if sources is None else sources.long(),
        router_weights_E=tensors.get(f"{index}.router_weights_E"),
        router_fit=_router_fit(index, tensors),
        sizes=sizes,
        neurons=None if sizes is None else tuple(None if n is None else n.long() for n in kept),
        digest=block.get("factors_digest"),
        stable_rank=tuple(block["stable_rank"]) if "stable_rank" in block else None,
        refits_down=block.get("refits_down", False) is True,
        is_stock=block.get("stock", False) is True,
        weights=block.get("weights", "original"),
        skipping=Skipping.from_dict(block["skipping"]) if "skipping" in block else None,
    )


def _router_fit(index: int, tensors: Mapping[str, torch.Tensor]) -> RouterFit | None:
    prefix = f"{index}.fitted."
    fitted = {name: tensors[prefix + name] for name in _FITTED if prefix + name in tensors}
    return RouterFit(**fitted) if fitted else None
