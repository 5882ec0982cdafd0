"""Architectures as rows of data: what the generic surgeon has to know about a family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One architecture that follows the contract `router(h) -> (logits, weights, index)`, `experts(h, index, weights)`.

    No axis is ever guessed from a shape (a shared expert's width can equal the number of experts): each row names
    the tensors that have an expert axis, which is always the first.

    Args:
        name: Name of the family, that of the transformers module.
        block: Class name of the MoE block.
        count_fields: Every config field that holds the number of routed experts, the class's own first, then the
            spellings that other versions and runtimes read.
        router: Attribute of the block that holds the router.
        experts: Attribute of the block that holds the experts.
        router_tensors: Tensors of the router (parameters and buffers) with an expert axis.
        top_k: Attribute of the router with the number of selected experts.
        router_groups: Attribute of the router with the number of router groups, None where there are none.
        eager_takes_sentinel: Whether the stock eager loop accepts the id `num_experts`.
    """

    name: str
    block: str
    count_fields: tuple[str, ...]
    router: str = "gate"
    experts: str = "experts"
    router_tensors: tuple[str, ...] = ("weight",)
    top_k: str = "top_k"
    router_groups: str | None = None
    eager_takes_sentinel: bool = True


ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("mixtral", "MixtralSparseMoeBlock", ("num_local_experts", "num_experts")),
    Architecture("qwen3_moe", "Qwen3MoeSparseMoeBlock", ("num_local_experts", "num_experts")),
    Architecture("olmoe", "OlmoeSparseMoeBlock", ("num_experts", "num_local_experts")),
    Architecture(
        "deepseek_v3",
        "DeepseekV3MoE",
        ("n_routed_experts", "num_local_experts"),
        router_tensors=("weight", "e_score_correction_bias"),
        router_groups="num_group",
    ),
    Architecture(
        "gpt_oss",
        "GptOssMLP",
        ("num_local_experts", "num_experts"),
        router="router",
        router_tensors=("weight", "bias"),
        eager_takes_sentinel=False,
    ),
)
