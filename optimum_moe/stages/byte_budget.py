"""The byte budget: every expert of the model is stored in the format in which a byte saves the most loss."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from optimum_moe.algorithms.byte_budget import Candidate, Point, frontier, hull
from optimum_moe.algorithms.expert_tokens import SampledTokens, single_expert
from optimum_moe.algorithms.ranks import STEP
from optimum_moe.formats import StoredExperts, budget_formats, build_expert, candidates, choose, refit_block
from optimum_moe.formats.base import get_format
from optimum_moe.formats.budget import candidate_bytes, worth_trying
from optimum_moe.formats.budget_format import BudgetFormat
from optimum_moe.formats.rounded import ROUNDED
from optimum_moe.model_info import BlockInfo, ModelInfo
from optimum_moe.plan import BlockPlan, Routing
from optimum_moe.runtimes import RUNTIMES, Quantizer, Runtime, get_quantizer, get_runtime
from optimum_moe.settings import check_count, choose_one, exactly_one, product
from optimum_moe.stages.base import Stage, register_stage
from optimum_moe.stages.context import BlockContext
from optimum_moe.stages.cost import BlockCost
from optimum_moe.stages.counts import bytes_for_tensors, check_share, check_size, header_entry, selected_blocks
from optimum_moe.stages.formatting import FormattingStage
from optimum_moe.stages.plain_budget import (
    Pair,
    PlainShape,
    block_output,
    check_uniform,
    choose_shapes,
    expected_damage,
    pairs,
    plain_plan,
    possible_widths,
    stored_bytes,
)
from optimum_moe.statistics import Statistics

_REMOVED = Candidate("empty", 0)

# Experts of a block that tell which candidates of costly formats the others try.
_SCREENED = 8

# Points of a curve that reports draw.
_SHOWN = 100

# Smaller gains of another runtime are not worth a sentence: as a share of what is lost, and in nats a token.
_LEAST_REMARK = 0.05
_LEAST_LOSS = 1e-3


@dataclass(frozen=True)
class BlockProfile:
    """The candidates of one block's experts.

    Args:
        points: For each expert, see `optimum_moe.formats.candidates`.
        in_loss: Whether damages are changes of the loss; else squared output errors, not comparable between blocks.
    """

    points: tuple[tuple[Point, ...], ...]
    in_loss: bool


@register_stage
@dataclass(frozen=True)
class ByteBudget(FormattingStage):
    """Allocate a budget of bytes among the experts of the whole model, wherever a byte saves the most loss.

    What experts may become depends on what has to load the checkpoint. For whatever loads the original, all blocks
    keep the same number of experts, of the same width. For this package, every expert becomes empty, a constant or an
    affine map, keeps some of its neurons, gets low-rank gate and up projections, or is unchanged
    (`optimum_moe.formats`); the budget can then follow a stage that merges or prunes.

    Args:
        share: Share of the original experts' bytes that remains, in (0, 1] or as `"50%"`. Exactly one of this and
            `target_size`.
        target_size: Maximum size of the weight files, headers included: bytes, or for example `"16GB"`, or `"50%"` of
            their present size.
        runs_in: What has to load the checkpoint (`optimum_moe.runtimes`). `"any"` (default): everything that loads the
            original, since all blocks keep the same number of experts, of the same width, in the original's own
            tensors. `"vllm"`: vLLM from 0.33 on without any code; experts are whole or constants, different numbers of
            them in each block. `"vllm+optimum_moe"`: vLLM with this package as its plugin. `"transformers"`:
            transformers with this package. The later ones lose less at the same size.
        formats: Formats that an expert may get between empty and unchanged: `"narrow"` (fewer neurons), `"low_rank"`,
            `"constant"` (half of its mean output), `"affine"` (a low-rank map of its input, for transformers only) and
            other registered ones; default all that `runs_in` can take.
        curvature: Measure damage in the loss, with backward passes over the calibration data (default); False measures
            output errors, which are also used if no backward pass is possible.
        refit: Refit the down projections of each block together, to what the block gave before (default).
        layers: Positions of the MoE blocks to compress, None for all.
        protect: Patterns of block names to leave unchanged.
        tensor_parallel: Number of processes that the neurons of every expert have to be split over evenly.
        quantize: The quantizer that comes after it, such as `"q4_k_m"`, `"q8_0"`, `"awq"` or `"fp8"`
            (`optimum_moe.runtimes.QUANTIZERS`): widths are multiples of its blocks.
        bits: Store matrices in 8 or 4 bits as well, where a byte saves the most loss so, for example `[8, 4]`; default
            none. Such experts are unpacked whenever they run, and are not trained. Needs `runs_in="transformers"`.

    Raises:
        ValueError: If a setting is unknown or out of range.
    """

    name: ClassVar[str] = "byte-budget"
    size_fields: ClassVar[tuple[str, ...]] = ("share", "target_size")
    share_fields: ClassVar[tuple[str, ...]] = ("share",)

    share: float | None = None
    target_size: str | int | None = None
    runs_in: str = "any"
    formats: Sequence[str] | None = None
    curvature: bool = True
    refit: bool = True
    layers: Sequence[int] | None = None
    protect: Sequence[str] | None = None
    tensor_parallel: int = 1
    quantize: str | None = None
    bits: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        exactly_one(share=self.share, target_size=self.target_size)
        check_share("share", self.share)
        if self.target_size is not None:
            check_size(self.target_size)
        runtime, quantizer = self.runtime, self.quantizer
        if isinstance(self.formats, str):
            raise ValueError(f"formats={self.formats!r} must be a list, for example ['narrow'].")
        for name in self.formats or ():
            choose_one("formats", name, budget_formats())
            if name not in self._runtime_formats:
                raise ValueError(
                    f"runs_in={runtime.name!r} can take experts in the formats {list(self._runtime_formats)}, not in "
                    f'{name!r}. Leave it out, or pass runs_in="transformers".'
                )
        for bits in self.bits or ():
            if bits not in ROUNDED:
                raise ValueError(f"bits={list(self.bits or ())} can hold {sorted(ROUNDED)}, got {bits!r}.")
        if self.bits and runtime.formats is not None:
            raise ValueError(
                f"bits={list(self.bits)} needs formats that runs_in={runtime.name!r} does not take. Pass "
                'runs_in="transformers", or plan for the quantizer of another runtime with quantize.'
            )
        check_count("tensor_parallel", self.tensor_parallel, 1)
        if self.tensor_parallel > 1 and not runtime.can_split:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} has no meaning for runs_in={runtime.name!r}, which loads "
                'every expert as a whole. Leave it out, or pass runs_in="any".'
            )
        if quantizer is not None and not runtime.is_stock:
            raise ValueError(
                f"quantize={quantizer.name!r} reads experts in the original's own tensors, which runs_in="
                f'{runtime.name!r} does not write. Pass runs_in="any".'
            )

    @property
    def runtime(self) -> Runtime:
        """What has to load the checkpoint."""
        return get_runtime(self.runs_in)

    @property
    def quantizer(self) -> Quantizer | None:
        """What comes after the compression."""
        return None if self.quantize is None else get_quantizer(self.quantize)

    @property
    def _runtime_formats(self) -> tuple[str, ...]:
        found = self.runtime.formats
        return budget_formats() if found is None else found

    @property
    def tried_formats(self) -> tuple[str, ...]:
        """Formats that an expert may get between empty and unchanged."""
        found = self._runtime_formats if self.formats is None else tuple(self.formats)
        return (*found, *(ROUNDED[bits] for bits in self.bits or ()))

    @property
    def _left(self) -> Candidate:
        """What is left of a removed expert that tokens reached."""
        name = self.runtime.removed_as
        return _REMOVED if name == _REMOVED.format else Candidate(name, 0, size=1)

    @property
    def routing(self) -> Routing | None:
        """`"reduce"` where experts are removed, so that stock classes can load the checkpoint."""
        return "reduce" if self.runtime.is_stock else None

    @property
    def stores_stock_experts(self) -> bool:
        """Whether narrower experts are stored in the original's own tensors."""
        return self.runtime.is_stock

    @property
    def export_to(self) -> str:
        """See `Stage.export_to`; for vLLM as it is, whose names of replaced experts only the export writes."""
        return self.runtime.export_to

    def check_order(self, before: Stage | None) -> None:
        """See `Stage.check_order`; for stock classes the budget itself chooses the experts that stay."""
        if before is not None and self.runtime.is_stock and (before.chooses_experts or before.stores_stock_experts):
            raise ValueError(
                f"{self.name} with runs_in={self.runs_in!r} chooses the experts that remain itself, so it cannot "
                f'follow {before.name}. Use it alone, or pass runs_in="transformers".'
            )
        super().check_order(before)

    @property
    def needs_profile(self) -> bool:
        """Always True, since bytes are allocated over all blocks at once."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        """Frequencies, sampled tokens, and with `curvature` the gradients of the loss at them."""
        return frozenset({"frequency", "sample", *(("gradients",) if self.curvature else ())})

    @property
    def largest_sample(self) -> int:
        """Four times as many tokens, since the time that candidates take grows with them."""
        return 4 * self.sample_size

    def check(self, model: ModelInfo) -> None:
        """See `Stage.check`."""
        super().check(model)
        chosen = selected_blocks(model.original, self.layers, self.protect)
        self._check_architecture(model, chosen)
        self._check_split(chosen)
        if self.runtime.is_uniform:
            check_uniform(model.blocks, chosen, self.runtime)
            self._pairs(model)
            self._warn_of_fallback(model.blocks[0])
        else:
            self._budget(model.original, chosen)

    def _check_architecture(self, model: ModelInfo, chosen: Sequence[BlockInfo]) -> None:
        """Check that the runtime finds the replaced experts of this architecture."""
        objection = self.runtime.objection(model.original.model_type, [block.name for block in chosen])
        if objection is not None:
            others = [f'runs_in="{runtime.name}"' for runtime in RUNTIMES if self._is_possible_in(runtime, model)]
            raise ValueError(
                f'runs_in="{self.runs_in}" does not fit this model: {objection}. Pass {" or ".join(others)}.'
            )

    def _is_possible_in(self, runtime: Runtime, model: ModelInfo) -> bool:
        """Whether the same settings, but for the formats, pass all checks for a runtime that takes any architecture."""
        if runtime.model_types is not None:
            return False
        try:
            replace(self, runs_in=runtime.name, formats=None).check(model)
        except ValueError:
            return False
        return True

    def _check_split(self, chosen: Sequence[BlockInfo]) -> None:
        """Check that whole experts, and those of any width, can be split over the processes."""
        odd = next((block for block in chosen if block.intermediate_size % self.tensor_parallel), None)
        if odd is not None and not self.runtime.is_uniform:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} does not divide the {odd.intermediate_size} neurons of the "
                f"experts of {odd.name}. Use fewer processes."
            )
        if "narrow" in self.tried_formats and not self.runtime.is_uniform and STEP % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} does not divide {STEP}, of which all widths are multiples. "
                f"Use a divisor of {STEP}, or formats=[], which keeps the width of every expert."
            )

    def _warn_of_fallback(self, block: BlockInfo) -> None:
        """Say what the quantizer does to gate and up projections whose rows it cannot divide, whatever is planned."""
        quantizer = self.quantizer
        if quantizer is not None and block.hidden_size % quantizer.block:
            warnings.warn(
                f"The hidden size {block.hidden_size} is no multiple of {quantizer.block}: whatever reads the hidden "
                f"states, gate and up projections among it, {quantizer.otherwise} by quantize={self.quantize!r}. Only "
                "down projections gain from widths on its grid.",
                stacklevel=2,
            )

    def profile(self, context: BlockContext) -> BlockProfile | None:
        """The damage of each candidate of each expert; None for an unchanged block.

        Damages are summed over all tokens that the block saw. If neurons cannot be removed, no candidate is narrow. An
        expert without tokens has no damage when it is emptied, unless `unseen` keeps or prunes it.

        Raises:
            ValueError: If all gradients are zero.
        """
        if not self.applies(context):
            return None
        sample = context.sample()
        gradient_SJH = sample.gradient_SJH
        if gradient_SJH is not None and len(gradient_SJH) and not gradient_SJH.any():
            name = context.info.name
            raise ValueError(
                f"All gradients of the loss at {name} are zero, so all of its experts would be emptied. Check the "
                "weights of the layers after it; load the model in a wider dtype, leave the block out with "
                f'protect=["{name}"], or pass curvature=False.'
            )
        found: dict[int, list[Point]] = {}
        among = None
        # The experts with the most tokens, the fewest, and in between.
        counts = sample.counts(context.experts.num_experts)
        by_tokens = sorted(range(len(counts)), key=lambda e: -counts[e])
        first = by_tokens[:: max(1, len(by_tokens) // _SCREENED)]
        for index in [*first, *(index for index in by_tokens if index not in first)]:
            if len(found) == len(first):
                among = worth_trying([found[e] for e in first])
            found[index] = self._points(context, sample, index, among)
        points = (
            tuple(replace(point, damage=point.damage / sample.share) for point in found[e]) for e in sorted(found)
        )
        return BlockProfile(tuple(points), gradient_SJH is not None)

    def _points(
        self, context: BlockContext, sample: SampledTokens, index: int, among: Collection[Candidate] | None
    ) -> list[Point]:
        """What one expert could be stored as."""
        info, bias_EH = context.info, context.experts.down_bias
        expert, tokens = single_expert(context.experts, index), sample.of_expert(index)
        points = candidates(
            expert,
            tokens,
            formats=self.tried_formats,
            fixed_neurons=context.experts.fixed_neurons or (self.runtime.is_stock and bool(info.fixed_width)),
            itemsize=info.expert_itemsize,
            bias_itemsize=info.bias_itemsize,
            constant_bytes=0 if bias_EH is None else len(bias_EH[0]) * info.bias_itemsize,
            among=among,
        )
        if len(tokens) and self.runtime.removed_as != _REMOVED.format:
            # What is left of a removed expert has bytes of its own.
            left = candidate_bytes(self._left, expert, info.expert_itemsize, info.bias_itemsize)
            points = [replace(p, bytes=p.bytes + left) if p.candidate == _REMOVED else p for p in points]
        if len(tokens) == 0 and context.unseen in ("keep", "prune"):
            return points[-1:] if context.unseen == "keep" else points[:1]
        return points

    def allocate(
        self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, BlockProfile | None]
    ) -> Mapping[str, Any]:
        """By block the candidate of every expert, or a `PlainShape` for stock classes; None for unchanged blocks."""
        if self.runtime.is_uniform:
            points = comparable({name: profile for name, profile in profiles.items() if profile is not None})
            unreached = [block.name for block in model.blocks if block.name not in points]
            if unreached:
                raise ValueError(
                    f"No calibration token reached {unreached[0]}, which would keep all of its experts, but "
                    f"runs_in={self.runs_in!r} gives all blocks the same number. Add data that reaches it, or pass "
                    'runs_in="transformers".'
                )
            return choose_shapes(model.blocks, points, self._pairs(model))
        chosen = [block for block in model.original.blocks if profiles.get(block.name) is not None]
        found: dict[str, tuple[Candidate, ...]] = {}
        if chosen:
            found = spend_budget(chosen, profiles, self._budget(model.original, chosen), self.runtime.keeps_one)
        return {block.name: found.get(block.name) for block in model.blocks}

    def remarks(
        self, model: ModelInfo, statistics: Statistics | None, profiles: Mapping[str, BlockProfile | None]
    ) -> tuple[str, ...]:
        """How much of the calibration data was used, and for stock classes what another runtime would gain."""
        found = {name: profile for name, profile in profiles.items() if profile is not None}
        return (*_unused_tokens(statistics, found), *(self._gain_elsewhere(model, statistics, found) if found else ()))

    def evidence(
        self,
        model: ModelInfo,
        statistics: Statistics | None,
        profiles: Mapping[str, BlockProfile | None],
        allocation: Mapping[str, Any],
    ) -> Mapping[str, Any]:
        """Damage against bytes, from empty to unchanged experts, and what was chosen of each block."""
        found = {name: profile for name, profile in profiles.items() if profile is not None}
        if not found or statistics is None:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            points = comparable(found)
        own = {name: _chosen(name, points[name], allocation[name], model) for name in points}
        in_loss = all(profile.in_loss for profile in found.values())
        # The loss is a sum over the tokens that a block saw.
        unit = 1 / _tokens(statistics, points) if in_loss else 1 / len(points)
        return {
            "damage": {
                "in_loss": in_loss,
                "curve": [[round(size), _short(unit * lost)] for size, lost in _thinned_frontier(points)],
                "chosen": [
                    round(sum(size for size, _ in own.values())),
                    _short(unit * sum(d for _, d in own.values())),
                ],
                "blocks": {name: _short(unit * lost) for name, (_, lost) in own.items()},
            }
        }

    def _gain_elsewhere(
        self, model: ModelInfo, statistics: Statistics | None, found: Mapping[str, BlockProfile]
    ) -> tuple[str, ...]:
        """For stock classes, what experts of unlike widths and numbers would lose less at the same bytes."""
        if not self.runtime.is_uniform:
            return ()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            points = comparable(found)
        own = expected_damage(model.blocks, points, choose_shapes(model.blocks, points, self._pairs(model)))
        mixed = choose([each for block in points.values() for each in block], self._budget(model, model.blocks))
        saved = own - sum(point.damage for point in mixed)
        less = saved / own if own > 0 else 0.0
        if less < _LEAST_REMARK:
            return ()
        if all(profile.in_loss for profile in found.values()) and saved < _LEAST_LOSS * _tokens(statistics, found):
            return ()
        return (
            f'With runs_in="transformers" as many bytes are expected to lose at least {100 * less:.0f}% less, in a '
            "checkpoint that transformers loads with this package only.",
        )

    def choices(self, model: ModelInfo) -> tuple[tuple[int, int], ...]:
        """For stock classes, the pairs that fill the budget, the most experts first."""
        if not self.runtime.is_uniform:
            return ()
        return tuple(sorted(((pair.experts, pair.width) for pair in self._pairs(model)), reverse=True))

    def _pairs(self, model: ModelInfo) -> list[Pair]:
        """The numbers of experts and widths that fill the budget, for stock classes."""
        blocks = model.blocks
        router_bytes = 0.0 if self.target_size is None else blocks[0].router_parameters * blocks[0].router_itemsize
        widths = possible_widths(blocks[0], self.quantizer, self.tensor_parallel)
        if "narrow" not in self.tried_formats:
            widths = widths[-1:]
        return pairs(blocks[0], len(blocks), widths, self._budget(model, blocks), router_bytes)

    def remaining(self, model: ModelInfo, block: BlockInfo, allocated: Any) -> int:
        """Number of experts that remain; all of them, but for stock classes."""
        return len(allocated.kept) if self.runtime.is_uniform else block.num_experts

    def decide(self, context: BlockContext, allocated: Any) -> BlockPlan:
        """All experts in the chosen formats, or those that remain for stock classes."""
        if self.runtime.is_uniform:
            return plain_plan(context, allocated, self.refit)
        return super().decide(context, allocated)

    def _budget(self, model: ModelInfo, chosen: Sequence[BlockInfo]) -> int:
        """Budget in bytes for all experts of the chosen blocks, biases and indices included."""
        whole = _stored(chosen)
        if self.target_size is None:
            assert self.share is not None
            return int(product(self.share, whole))
        rest = model.bytes - whole
        # An expert has three tensors: gate and up dense or in two factors, and down dense. The guard has one element.
        headers = 0
        for block in () if self.runtime.is_stock else chosen:
            biases = 3 if block.expert_parameters > block.expert_multiply_adds else 0
            headers += (block.num_experts * (3 + biases) + 3) * header_entry(block)
        left = bytes_for_tensors(model, self.target_size, headers) - rest
        if left < 0:
            raise ValueError(
                f"target_size={self.target_size!r} cannot be reached: without any expert "
                f"{rest + model.header_bytes + headers:,} of {model.bytes:,} bytes remain, headers included. Use a "
                "larger size."
            )
        return min(left, whole)

    def factors(self, context: BlockContext, allocated: Sequence[Candidate] | None) -> StoredExperts | None:
        """All experts of a block as the chosen candidates, with down projections refitted to the block's outputs.

        An expert that no token selects any more is fitted to the tokens of the profile.
        """
        if allocated is None:
            return None
        sample, profiled = context.sample(), context.profiled_sample()
        experts = [single_expert(context.experts, index) for index in range(len(allocated))]
        tokens = [found if len(found := sample.of_expert(e)) else profiled.of_expert(e) for e in range(len(experts))]
        # What a constant saves is less certain than what it takes: which experts go does not depend on it.
        chosen = [
            self._left if candidate == _REMOVED and len(seen) else candidate
            for candidate, seen in zip(allocated, tokens, strict=True)
        ]
        stored = [build_expert(expert, seen, each) for expert, seen, each in zip(experts, tokens, chosen, strict=True)]
        if not self.refit or context.experts.finish is not None or context.experts.fixed_neurons:
            # Where expert outputs are not simply summed, one expert cannot make up for the error of another.
            return StoredExperts(tuple(stored))
        # Where experts are either whole or gone, the whole ones make up for the others.
        partial = any(c.neurons and get_format(c.format, BudgetFormat).needs_tokens for c in allocated)
        gone = any(not candidate.neurons for candidate in allocated)
        target_SH = None
        if gone and not partial:
            target_SH = block_output(context.experts, range(len(experts)), sample, biased=False)
        return StoredExperts(tuple(refit_block(experts, stored, sample, target_SH=target_SH)))

    def costs(self, model: ModelInfo, before: Mapping[str, BlockCost]) -> dict[str, BlockCost]:
        """Bounds of the costs: from no expert at all to the whole budget."""
        chosen = selected_blocks(model.original, self.layers, self.protect)
        # Earlier stages may have left less than the budget, or more in some blocks than in others.
        left = sum(
            _stored([block]) * before[block.name].parameters / (block.num_experts * block.expert_parameters)
            for block in chosen
        )
        share = min(1.0, self._budget(model.original, chosen) / left)
        costs = dict(before)
        for block in chosen:
            cost = before[block.name]
            costs[block.name] = replace(
                cost,
                parameters=share * cost.parameters,
                multiply_adds=(0.0, cost.active[1] * block.expert_multiply_adds),
                stock=self.runtime.is_stock,
            )
        return costs


def _unused_tokens(statistics: Statistics | None, found: Mapping[str, BlockProfile]) -> tuple[str, ...]:
    """A sentence if the sample has less tokens than were observed."""
    if statistics is None or not found:
        return ()
    sampled, observed = max(
        (len(b.reservoir.index_SK), b.num_tokens) for n, b in statistics.blocks.items() if n in found
    )
    if observed <= sampled:
        return ()
    return (
        f"Experts were fitted to a sample of {sampled:,} of {observed:,} calibration tokens; more of them lose less. "
        f"Calibrate with reservoir_tokens={observed} to use all, in as many times the memory and the time.",
    )


def _tokens(statistics: Statistics | None, blocks: Iterable[str]) -> int:
    """The most tokens that one of the blocks saw, at least 1."""
    return max((0 if statistics is None else statistics.blocks[name].num_tokens for name in blocks), default=0) or 1


def spend_budget(
    blocks: Sequence[BlockInfo],
    profiles: Mapping[str, BlockProfile | None],
    budget: float,
    keeps_one: bool = False,
) -> dict[str, tuple[Candidate, ...]]:
    """Choose a candidate for every expert, so that all of them store at most `budget` bytes.

    Args:
        blocks: The blocks.
        profiles: Profile of each block.
        budget: Budget in bytes.
        keeps_one: Whether the expert of a block that loses the most without its neurons stays as it is.

    Raises:
        ValueError: If experts that must be kept need more than the budget.
    """
    points = comparable({block.name: profile for block in blocks if (profile := profiles[block.name]) is not None})
    if keeps_one:
        for found in points.values():
            most = max(range(len(found)), key=lambda expert: found[expert][0].damage)
            found[most] = found[most][-1:]
    offered = [own for found in points.values() for own in found]
    owners = [name for name, found in points.items() for _ in found]
    allocated: dict[str, list[Candidate]] = {name: [] for name in points}
    for name, point in zip(owners, choose(offered, budget), strict=True):
        allocated[name].append(point.candidate)
    return {name: tuple(found) for name, found in allocated.items()}


def comparable(profiles: Mapping[str, BlockProfile]) -> dict[str, list[list[Point]]]:
    """The candidates of all blocks with their damages in one unit.

    That is the loss, or where it was not observed at some block the share of the error of emptying all of its experts.
    """
    without = [name for name, profile in profiles.items() if not profile.in_loss]
    if without:
        warnings.warn(
            f"No gradient of the loss was observed at {len(without)} of {len(profiles)} blocks ({without[0]}, ...): "
            "damage is measured by output errors, and all blocks have the same weight. A backward pass needs a model "
            "that returns logits, and no error propagation.",
            stacklevel=2,
        )
    found: dict[str, list[list[Point]]] = {}
    for name, profile in profiles.items():
        # Squared errors of different blocks are only comparable relative to the error of emptying all experts.
        total = sum(points[0].damage for points in profile.points) or 1.0
        unit = total if without else 1.0
        found[name] = [[replace(point, damage=point.damage / unit) for point in points] for points in profile.points]
    return found


def _chosen(name: str, points: Sequence[Sequence[Point]], allocated: Any, model: ModelInfo) -> tuple[float, float]:
    """Bytes and expected damage of what was allocated to a block."""
    if isinstance(allocated, PlainShape):
        blocks = [block for block in model.blocks if block.name == name]
        return stored_bytes(blocks, {name: allocated}), expected_damage(blocks, {name: points}, {name: allocated})
    taken = [
        next(point for point in own if point.candidate == candidate)
        for own, candidate in zip(points, allocated, strict=True)
    ]
    return sum(point.bytes for point in taken), sum(point.damage for point in taken)


def _thinned_frontier(points: Mapping[str, Sequence[Sequence[Point]]]) -> list[tuple[float, float]]:
    """At most so many points of damage against bytes, if every expert had the form of its own that loses the least."""
    whole = frontier([hull(own) for found in points.values() for own in found])
    step = -(-len(whole) // _SHOWN)
    return [*whole[:-1:step], whole[-1]]


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _stored(blocks: Sequence[BlockInfo]) -> int:
    """Bytes that the unchanged experts of some blocks store."""
    return round(sum(b.bytes_of_experts(b.num_experts, b.num_experts * b.expert_parameters) for b in blocks))
