"""Pictures of a look inside: one of all blocks, and one of each block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.cluster import hierarchy

from optimum_moe.reporting.block_look import CORRELATED, BlockLook
from optimum_moe.reporting.pictures import check_drawing, write_picture
from optimum_moe.statistics import MODALITIES

_NAMES = {
    "router_rows": "router rows",
    "router_logits": "router logits",
    "expert_weights": "weights",
    "outputs": "outputs",
}


def draw_look(blocks: Sequence[BlockLook], directory: Path) -> list[Path]:
    """Draw `overview` and `block-000`, `block-001`, ... in the order of the model.

    Args:
        blocks: All blocks.
        directory: Existing folder of the pictures.

    Returns:
        The files: a PNG and an SVG of each.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    check_drawing()
    files = write_picture(_overview(blocks), directory / "overview")
    for number, block in enumerate(blocks):
        files += write_picture(_block(block), directory / f"block-{number:03d}")
    return files


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _overview(blocks: Sequence[BlockLook]) -> Any:
    figure = _figure(12, 8)
    axes = figure.subplots(2, 2)
    summaries = [block.summary for block in blocks]

    def lines(axis: Any, title: str, **columns: Sequence[float]) -> None:
        for label, values in columns.items():
            axis.plot(range(len(values)), values, marker="o", markersize=3, linewidth=1, label=label.replace("_", " "))
        axis.set(title=title, xlabel="MoE block")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)

    def column(name: str) -> list[float]:
        return [summary[name] for summary in summaries]

    lines(
        axes[0, 0],
        "use of the experts",
        effective_experts_of_all=[
            s["effective_experts"] / b.num_experts for s, b in zip(summaries, blocks, strict=True)
        ],
        tokens_of_the_busiest_quarter=column("busiest_quarter"),
        router_entropy_of_its_maximum=column("relative_entropy"),
    )
    lines(
        axes[0, 1],
        "output norms and the router's choice",
        rank_correlation=column("norm_rank_correlation"),
        first_choice_is_the_largest=column("first_is_largest"),
    )
    lines(
        axes[1, 0],
        "correlation over the pairs of experts",
        **{f"{_NAMES[a]} and {_NAMES[b]}": column(f"{a}_and_{b}") for a, b in CORRELATED},
    )
    lines(
        axes[1, 1],
        "mean similarity of two experts",
        **{_NAMES[name]: [_mean_of_pairs(block, name) for block in blocks] for name in _NAMES},
        neurons_of_the_nearest=column("neurons_unaligned"),
        these_after_alignment=column("neurons_aligned"),
    )
    return figure


def _mean_of_pairs(block: BlockLook, name: str) -> float:
    similarity_EE = block.similarities.get(name)
    if similarity_EE is None or block.num_experts == 1:
        return torch.nan
    return float(similarity_EE[torch.ones_like(similarity_EE, dtype=torch.bool).triu(1)].mean())


def _block(block: BlockLook) -> Any:
    figure = _figure(16, 12)
    axes = figure.subplots(3, 3)
    figure.suptitle(f"{block.name}: {block.num_experts} experts, top-{block.top_k}")
    matrices = {_NAMES[name]: values_EE for name, values_EE in block.similarities.items()}
    matrices = {f"similarity of {name}": values_EE for name, values_EE in matrices.items()}
    matrices["tokens that two experts share"] = block.coactivation_EE
    places = list(axes.flat)
    for title, values_EE in matrices.items():
        axis = places.pop(0)
        # Every expert is like itself, which would take the colors from all others.
        others_EE = values_EE.clone().fill_diagonal_(torch.nan)
        shown = axis.imshow(others_EE, cmap="viridis", interpolation="nearest")
        axis.set(title=title, xlabel="expert", ylabel="expert")
        figure.colorbar(shown, ax=axis, shrink=0.8)
    _draw_frequencies(places.pop(0), block)
    _draw_norms(places.pop(0), block)
    _draw_choice(places.pop(0), block)
    _draw_tree(places.pop(0), block)
    for axis in places:
        axis.set_visible(False)
    return figure


def _draw_frequencies(axis: Any, block: BlockLook) -> None:
    """Share of the routed tokens of each expert, stacked by modality where it is known."""
    observed, experts = block.observed, range(block.num_experts)
    counts = {"tokens": observed.token_count_E}
    if observed.modality_count_VE is not None and observed.modality_count_VE.any():
        found = zip(MODALITIES, observed.modality_count_VE, strict=True)
        counts = {name: count_E for name, count_E in found if count_E.any()}
    total, below_E = observed.token_count_E.sum().clamp(min=1), torch.zeros(block.num_experts, dtype=torch.float64)
    for name, count_E in counts.items():
        axis.bar(experts, (count_E / total).tolist(), bottom=below_E.tolist(), label=name)
        below_E = below_E + count_E / total
    axis.axhline(1 / block.num_experts, color="black", linewidth=0.8, linestyle=":", label="even use")
    axis.set(title="share of the routed tokens", xlabel="expert")
    axis.legend(fontsize=7)


def _draw_norms(axis: Any, block: BlockLook) -> None:
    axis.scatter(block.routing_weight_E, block.output_norm_E, s=12)
    axis.set(title="experts on their own tokens", xlabel="mean routing weight", ylabel="mean output norm")
    axis.grid(alpha=0.3)


def _draw_choice(axis: Any, block: BlockLook) -> None:
    axis.set(title="norm rank of the first choice among all experts", xlabel="rank (0: largest output)")
    if block.choice is not None:
        axis.bar(range(block.num_experts), block.choice.norm_rank_E.tolist())
        axis.axhline(1 / block.num_experts, color="black", linewidth=0.8, linestyle=":", label="by chance")
        axis.legend(fontsize=7)


def _draw_tree(axis: Any, block: BlockLook) -> None:
    trees = block.dendrograms
    name = "outputs" if "outputs" in trees else "router_rows"
    axis.set(title=f"tree of {_NAMES[name]} (average linkage)", xlabel="expert", ylabel="distance")
    if block.num_experts > 1:
        hierarchy.dendrogram(trees[name].numpy(), ax=axis, leaf_font_size=6)
