"""A look inside the MoE blocks of a model: how its experts are used, how alike they are, and how its router chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optimum_moe.algorithms.neuron_similarity import neuron_similarity
from optimum_moe.algorithms.output_comparison import compare_outputs
from optimum_moe.algorithms.router_choice import norm_choice, router_entropy
from optimum_moe.calibration import CalibrationBatches, CalibrationConfig, batches_for, observe
from optimum_moe.calibration.observe import check_observed
from optimum_moe.checkpoint.refusals import all_in_memory
from optimum_moe.checkpoint.source import ModelSource, open_source
from optimum_moe.checkpoint.streamed import align
from optimum_moe.engine import Store
from optimum_moe.engine.layers import Layer
from optimum_moe.engine.layerwise import LayerwiseRun
from optimum_moe.engine.progress import LayerReport, Progress
from optimum_moe.engine.store import Observed
from optimum_moe.engine.streaming import StreamingJob, choose_streaming
from optimum_moe.reporting.block_look import BlockLook, Neighbors, plain
from optimum_moe.reporting.look_pictures import draw_look
from optimum_moe.reporting.pictures import check_drawing
from optimum_moe.settings import choose_one
from optimum_moe.stages import BlockContext
from optimum_moe.stages.merge_choices import SIMILARITIES
from optimum_moe.statistics import MODALITIES, BlockStatistics, Statistics, Unseen, no_sample
from optimum_moe.surgeons import FoundBlock

LOOK_FILE = "look_inside.json"
COMPARED_TOKENS = 256
"""Sampled tokens of a block that all of its experts are run on."""

_SIMILARITIES = {
    "router_rows": "router_weights",
    "router_logits": "router_logits",
    "expert_weights": "expert_weights",
}
"""Registered similarity by the name that the result has."""
_NEEDS = frozenset({"frequency", "routing_weights", "outputs", "coactivation", "router_logits", "sample"})
_COLUMNS = {
    "effective_experts": "effective",
    "busiest_quarter": "busiest quarter",
    "imbalance": "busiest / mean",
    "relative_entropy": "entropy / log E",
    "norm_rank_correlation": "norm rank corr.",
    "first_is_largest": "first is largest",
    "router_rows_and_expert_weights": "rows ~ weights",
    "router_rows_and_outputs": "rows ~ outputs",
    "neurons_unaligned": "neurons",
    "neurons_aligned": "neurons aligned",
}


@dataclass(frozen=True)
class LookInside:
    """The result of `look_inside`; `str()` gives a table by block.

    Args:
        model: Hub id, path or class name of the model.
        calibration: Record of the calibration data.
        blocks: By module path.
    """

    model: str
    calibration: Mapping[str, Any]
    blocks: Mapping[str, BlockLook]

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON values, None for those that do not exist, such as norms of experts without tokens."""
        return {
            "model": self.model,
            "calibration": dict(self.calibration),
            "compared_tokens": COMPARED_TOKENS,
            "blocks": [block.to_dict() for block in self.blocks.values()],
        }

    def save(self, directory: str | Path) -> list[Path]:
        """Write `look_inside.json` and the pictures (PNG and SVG) to a folder, which is created.

        Returns:
            The files.

        Raises:
            ValueError: If matplotlib is not installed.
        """
        check_drawing()
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        numbers = directory / LOOK_FILE
        numbers.write_text(json.dumps(self.to_dict(), allow_nan=False) + "\n", encoding="utf-8")
        return [numbers, *draw_look(list(self.blocks.values()), directory)]

    def rows(self) -> list[list[str]]:
        """The table by block, its header first."""
        table = [["MoE block", "experts", "no tokens", *_COLUMNS.values()]]
        for name, block in self.blocks.items():
            summary = plain(block.summary)
            cells = ["" if summary[column] is None else f"{summary[column]:.3g}" for column in _COLUMNS]
            table.append([name, str(block.num_experts), str(len(block.observed.unseen)), *cells])
        return table

    def modality_rows(self) -> list[list[str]]:
        """By block and modality the tokens and the experts that serve half of them, header first; empty without media.

        Each expert has its share of the modality's routed tokens behind it, and its share of all routed tokens.
        """
        table = [["MoE block", "modality", "routed tokens", "experts that serve half of them (share, of all tokens)"]]
        for name, block in self.blocks.items():
            share_VE, count_VE = block.modality_share_VE, block.observed.modality_count_VE
            if share_VE is None or count_VE is None:
                continue
            for place, modality in enumerate(MODALITIES):
                if not count_VE[place].any():
                    continue
                order_E = share_VE[place].argsort(descending=True, stable=True)
                number = int((share_VE[place][order_E].cumsum(0) < 0.5).sum()) + 1
                shown = [
                    f"{e} ({float(share_VE[place, e]):.0%}, {float(block.observed.frequency_E[e]):.0%})"
                    for e in order_E[:number].tolist()
                ]
                table.append([name, modality, f"{int(count_VE[place].sum()):,}", ", ".join(shown)])
        return table if len(table) > 1 else []

    def __str__(self) -> str:
        return "\n\n".join(_markdown(rows) for rows in (self.rows(), self.modality_rows()) if rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def look_inside(
    model: Any,
    calibration: Any,
    *,
    tokenizer: Any = None,
    seed: int = 0,
    engine: str = "auto",
    auto_class: type | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    max_memory: Any = None,
    dequantize: bool = False,
    progress: bool = True,
    **kwargs: Any,
) -> LookInside:
    """Run a model once over calibration data, and tell what its MoE blocks do ("A Closer Look into Mixture-of-Experts
    in Large Language Models", arXiv:2406.18219).

    By block: frequency of each expert, effective number of experts (the exponential of the frequencies' entropy), share
    of the busiest quarter, co-activation, mean output norms and routing weights, entropy of the router; whether tokens
    select the experts with the largest outputs; similarity of the experts' router rows, router logits, weights and
    outputs with trees over them, and how they correlate over the pairs of experts; neurons of each expert beside those
    of the most similar one, before and after alignment; all frequencies by modality where the data have media. Nothing
    is changed or written.

    Args:
        model: Hub id, folder of a checkpoint, or a `PreTrainedModel` in memory; not one with experts in forms of this
            package.
        calibration: As in `MoECompressor.from_pretrained`.
        tokenizer: Tokenizer or processor, or the folder or Hub id of one; by default the checkpoint's.
        seed: Seed of the calibration sample, unless `calibration` has its own.
        engine: `"memory"`, `"streaming"` for checkpoints larger than memory, layer by layer, or `"auto"` (default):
            streaming if the model exceeds the free memory.
        auto_class: As in `MoECompressor.from_pretrained`, as are `dtype`, `device_map` and `dequantize`.
        dtype: See there.
        device_map: See there.
        max_memory: Maximum bytes for tensors with streaming, or a size such as `"20GB"`.
        dequantize: See there.
        progress: Show progress bars.
        kwargs: Further arguments for `from_pretrained` of the model class.

    Raises:
        ValueError: If the model or the calibration data are invalid, or the model was compressed by this package.
    """
    choose_one("engine", engine, ("auto", "memory", "streaming"))
    config = CalibrationConfig.coerce(calibration)
    config = config if config.seed is not None else replace(config, seed=seed)
    if config.reservoir_tokens == 0:
        raise ValueError("reservoir_tokens=0 samples no tokens, on which experts are compared. Leave it out.")
    if device_map is not None:
        kwargs["device_map"] = device_map
    source = open_source(model, auto_class, dtype, dequantize, **kwargs)
    streaming = choose_streaming(engine, source, None, device_map, max_memory, writes=False)
    if isinstance(tokenizer, str | Path):
        tokenizer = source.load_tokenizer(tokenizer)
    if tokenizer is None and source.directory is not None:
        tokenizer = source.load_tokenizer(source.directory)
    batches = batches_for(source.skeleton, config, tokenizer)
    if streaming is None:
        blocks = _in_memory(source, batches, config, progress)
    else:
        with StreamingJob(source, None, {}, streaming) as job:
            handler = _Looker(job.store, config.unseen)
            pending = {layer.name for layer in job.store.layers if layer.blocks}
            run = LayerwiseRun(job.store, batches, config, handler, pending, keep=job.keep, needs=_NEEDS)
            layers = [layer for layer in job.store.layers if not layer.tensors]
            with Progress(len(layers), "look inside", progress, lines=True) as shown:
                run.run(shown)
            blocks = {found.info.name: handler.looks[found.info.name] for found in source.blocks}
            check_observed(Statistics({name: look.observed for name, look in blocks.items()}, unseen=config.unseen))
    return LookInside(source.name, batches.description, blocks)


def _in_memory(
    source: ModelSource, batches: CalibrationBatches, config: CalibrationConfig, progress: bool
) -> dict[str, BlockLook]:
    model = all_in_memory(align(source.load()))
    statistics = observe(model, source.blocks, batches, config, progress=progress, needs=_NEEDS)
    return {
        found.info.name: look_at(_context(found, found.module(model), statistics.blocks[found.info.name]))
        for found in source.blocks
    }


class _Looker:
    """Looks at each layer while a streaming run has it in memory."""

    def __init__(self, store: Store, unseen: Unseen) -> None:
        self._store, self._unseen = store, unseen
        self.looks: dict[str, BlockLook] = {}

    def observed(self, layer: Layer, statistics: Observed, report: LayerReport) -> None:
        Statistics(statistics, unseen=self._unseen).check_finite()
        for found in layer.blocks:
            context = _context(found, found.module(self._store.model), statistics[found.info.name])
            self.looks[found.info.name] = look_at(context)

    def passed(self, layer: Layer) -> None:
        """Do nothing, since a layer without blocks has nothing to look at."""

    def unreached(self, statistics: Observed) -> None:
        """Do nothing, since `observed` follows for these layers too."""


def _context(found: FoundBlock, block: nn.Module, observed: BlockStatistics) -> BlockContext:
    return BlockContext(
        info=found.info,
        experts=found.surgeon.experts(block),
        router=found.surgeon.router(block),
        generator=torch.Generator(),
        statistics=observed,
    )


@torch.no_grad()
def look_at(context: BlockContext) -> BlockLook:
    """What statistics and weights of one block say.

    Args:
        context: The block, with statistics that have all that `look_inside` lists.
    """
    experts, observed = context.experts, context.observed()
    sample, reservoir = context.sample(), observed.reservoir
    similarities = {name: SIMILARITIES[registered](context) for name, registered in _SIMILARITIES.items()}
    scores_SE = _scores(context)
    choice = None
    if experts.activate is not None and not experts.fixed_neurons:
        step = max(1, -(-len(sample.input_SH) // COMPARED_TOKENS))
        found = compare_outputs(experts, sample.input_SH[::step])
        similarities["outputs"] = found.similarity_EE
        choice = norm_choice(scores_SE[::step], found.norm_SE, reservoir.index_SK[::step], reservoir.weights_SK[::step])
    return BlockLook(
        name=context.info.name,
        top_k=context.info.top_k,
        # The sample is only for what follows from it.
        observed=replace(observed, reservoir=no_sample()),
        router_entropy=float(router_entropy(scores_SE).nanmean()),
        similarities=similarities,
        choice=choice,
        neighbors=_neighbors(context, similarities),
    )


def _scores(context: BlockContext) -> torch.Tensor:
    """(S, E) float64 scores of the routed experts for the sampled tokens; NaN where no router reads the tokens."""
    input_SX, num_experts = context.observed().reservoir.router_input_SH, context.info.num_experts
    if input_SX.shape[-1] != context.router.rows_NX.shape[-1]:
        return torch.full((len(input_SX), num_experts), torch.nan, dtype=torch.float64)
    return context.router.scores(context.router.logits(input_SX)).double().cpu()[:, :num_experts]


def _neighbors(context: BlockContext, similarities: Mapping[str, torch.Tensor]) -> Neighbors | None:
    """Neurons of each expert beside those of its most similar one."""
    experts = context.experts
    if experts.num_experts == 1:
        return None
    alike_EE = similarities.get("outputs", similarities["router_rows"]).clone()
    if not alike_EE.isfinite().all():
        alike_EE = similarities["router_rows"].clone()
    # torch.argmax does not promise which of equal values it returns, NumPy's promises the first.
    nearest_E = torch.from_numpy(alike_EE.fill_diagonal_(-torch.inf).numpy().argmax(axis=1))
    pairs = [neuron_similarity(experts, expert, other) for expert, other in enumerate(nearest_E.tolist())]
    unaligned_E, aligned_E = torch.tensor(pairs, dtype=torch.float64).T
    return Neighbors(nearest_E, unaligned_E, aligned_E)
