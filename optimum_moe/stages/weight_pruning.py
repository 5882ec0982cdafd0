"""Zeros among the weights of experts: expert slimming by Wanda, SparseGPT or magnitude.

"Demystifying the Compression of Mixture-of-Experts Through a Unified Framework" (arXiv:2406.02500, section 3.2). The
result is a dense checkpoint of the same size, which kernels for sparse matrices and compressed archives may use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from re import fullmatch
from typing import Any, ClassVar

from optimum_moe.algorithms.expert_tokens import single_expert
from optimum_moe.algorithms.weight_pruning import CRITERIA, Sparsity, pruned_expert
from optimum_moe.formats import StoredExperts
from optimum_moe.formats.stored import dense_expert
from optimum_moe.model_info import ModelInfo
from optimum_moe.plan import BlockPlan
from optimum_moe.settings import choose_one
from optimum_moe.stages.base import register_stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counts import selected_blocks
from optimum_moe.stages.formatting import FormattingStage
from optimum_moe.statistics import Statistics

_UNSTRUCTURED = "unstructured"
_DEFAULT = 0.5


@register_stage
@dataclass(frozen=True)
class WeightPruning(FormattingStage):
    """Set weights of the experts' matrices to zero; shapes, dtypes and bytes of the checkpoint stay as they are.

    The expert slimming of arXiv:2406.02500, section 3.2, without structure.

    An expert that no sampled token selects is pruned by magnitude, and so is a down projection whose inputs come from
    outside of the expert (attention experts).

    Args:
        method: `"wanda"` (arXiv:2306.11695): in each row the smallest |w| times the norm of the input channel over the
            expert's tokens. `"sparsegpt"` (arXiv:2301.00774): the weights that cost the expert's outputs the least,
            and the others take over what they can. `"magnitude"`: the smallest |w| of each matrix; needs no data. The
            down projection is pruned for the neurons that the pruned gate and up projections give.
        pattern: `"unstructured"`, or `"n:m"`, such as `"2:4"` or `"4:8"`: at most n of m weights beside each other in a
            row are not zero.
        sparsity: Share of the weights that become zero, in (0, 1) or as `"50%"`; by default half of them, or what the
            pattern `n:m` says.
        layers: Positions of the MoE blocks to prune, None for all.
        protect: Patterns of block names to leave unchanged.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "weight-pruning"
    size_fields: ClassVar[tuple[str, ...]] = ()
    share_fields: ClassVar[tuple[str, ...]] = ("sparsity",)

    method: str = "wanda"
    pattern: str = _UNSTRUCTURED
    sparsity: float | None = None
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choose_one("method", self.method, CRITERIA)
        group = self._group
        if group is not None and self.sparsity is not None:
            raise ValueError(
                f"sparsity={self.sparsity!r} cannot be chosen with pattern={self.pattern!r}, which leaves {group[0]} "
                f"of {group[1]} weights. Leave sparsity out, or pass pattern={_UNSTRUCTURED!r}."
            )
        share = self.sparsity
        if share is not None and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1):
            raise ValueError(f"sparsity={share!r} must lie in (0, 1): it is the share of weights that become zero.")

    @property
    def _group(self) -> tuple[int, int] | None:
        """The n and m of a pattern; None for unstructured zeros."""
        if self.pattern == _UNSTRUCTURED:
            return None
        found = fullmatch(r"(\d+):(\d+)", str(self.pattern))
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(
                f"pattern={self.pattern!r} must be {_UNSTRUCTURED!r}, or 'n:m' for n of m weights that stay, with n at "
                "least 1 and less than m, such as '2:4'."
            )
        return int(found[1]), int(found[2])

    @property
    def zeros(self) -> Sparsity:
        """How many weights become zero, and where."""
        if (group := self._group) is not None:
            return Sparsity(1 - group[0] / group[1], group[1])
        return Sparsity(_DEFAULT if self.sparsity is None else self.sparsity)

    @property
    def needs(self) -> frozenset[str]:
        """Sampled tokens, but for magnitudes."""
        return frozenset({"frequency", "sample"} if self.method != "magnitude" else ())

    @property
    def leaves_dense_experts(self) -> bool:
        """Always True: zeros are stored like other weights."""
        return True

    @property
    def only_changes_values(self) -> str:
        """See `Stage.only_changes_values`."""
        group = self._group
        what = f"{group[1] - group[0]} of {group[1]}" if group else f"{self.zeros.zeros:.4g} of the"
        return f"{self.name} sets {what} weights of experts to zero in dense tensors: this saves no bytes by itself."

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`; rows of all matrices have to consist of whole groups."""
        super().check(model)
        if (group := self._group) is None:
            return
        for block in selected_blocks(model, self.layers, self.protect):
            odd = [size for size in (block.hidden_size, block.intermediate_size) if size % group[1]]
            if odd:
                raise ValueError(
                    f"pattern={self.pattern!r} needs rows of whole groups of {group[1]}, but a matrix of {block.name} "
                    f"has {odd[0]} columns. Use pattern={_UNSTRUCTURED!r}, or leave the block out with "
                    f'protect=["{block.name}"].'
                )

    def remarks(self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, Any]) -> tuple[str, ...]:
        """How many experts were pruned by magnitude because no token selects them."""
        chosen = selected_blocks(model, self.layers, self.protect)
        if statistics is None or not self.needs:
            return ()
        count = sum(len(statistics.blocks[block.name].unseen) for block in chosen)
        if not count:
            return ()
        return (f"{self.name} pruned {count} experts without calibration tokens by magnitude, not by {self.method}.",)

    def factors(self, context: BlockContext, allocated: Any) -> StoredExperts | None:
        """See `FormattingStage.factors`."""
        if not self.applies(context):
            return None
        sample = context.sample() if self.needs else None
        knows_hidden = not context.experts.fixed_neurons
        stored = []
        for index in range(context.experts.num_experts):
            tokens = None if sample is None else sample.of_expert(index)
            single = single_expert(context.experts, index)
            stored.append(dense_expert(pruned_expert(single, tokens, self.method, self.zeros, knows_hidden)))
        return StoredExperts(tuple(stored))

    def decide(self, context: BlockContext, allocated: Any) -> BlockPlan:
        """Keep all experts in their own tensors, with zeros."""
        plan = super().decide(context, allocated)
        if plan.factors is None:
            return plan
        return replace(plan, is_stock=True, weights="fitted" if self.method == "sparsegpt" else "masked")

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """As before: zeros take as many bytes, and stock kernels multiply by them."""
        return dict(before)
