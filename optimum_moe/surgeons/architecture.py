"""Architectures as rows of data: what the generic surgeon has to know about a family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterTensor:
    """A parameter or buffer with an expert axis, where it is more than a path and a first axis.

    Args:
        path: Dotted path from the router, or from the block with `on_block`.
        axis: The axis of the experts.
        on_block: Whether it belongs to the block instead of its router.
        optional: Whether some blocks of the architecture lack it.
        trailing: Whether entries that belong to no routed expert (shared or skipped ones) follow those of the
            experts; they stay as they are.
        holds_ids: Whether it has no expert axis at all, but holds expert ids (a hash table).
    """

    path: str
    axis: int = 0
    on_block: bool = False
    optional: bool = False
    trailing: bool = False
    holds_ids: bool = False


@dataclass(frozen=True)
class Architecture:
    """One architecture that follows the contract `router(h) -> (logits, weights, index)`, `experts(h, index, weights)`.

    No axis is ever guessed from a shape (a shared expert's width can equal the number of experts): each row names
    the tensors that have an expert axis.

    Args:
        name: Name of the family, that of the transformers module.
        block: Class name of the MoE block.
        count_fields: Every config field that holds the number of routed experts, the class's own first, then the
            spellings that other versions and runtimes read.
        router: Attribute of the block that holds the router.
        experts: Attribute of the block that holds the experts.
        router_tensors: Tensors of the router (parameters and buffers) with an expert axis, the rows of its last
            linear layer first; a path where the axis is the first one.
        top_k: Attribute of the router (dotted) with the number of selected experts.
        router_groups: Attribute of the router with the number of router groups, None where there are none.
        router_groups_used: Attribute of the router with the number of router groups that one token may use; all where
            the router has no such attribute.
        router_counts: Attributes of the router (dotted) that count its experts, trailing ones included or not.
        block_counts: Attributes of the block itself that do.
        logits: Path from the router to the layer whose output are the logits before any scoring; None where the
            router itself returns them, and computes them from its own input.
        least_experts: Fewest experts with which transformers builds this block and not a dense one.
    """

    name: str
    block: str
    count_fields: tuple[str, ...]
    router: str = "gate"
    experts: str = "experts"
    router_tensors: tuple[str | RouterTensor, ...] = ("weight",)
    top_k: str = "top_k"
    router_groups: str | None = None
    router_groups_used: str = "topk_group"
    router_counts: tuple[str, ...] = ("num_experts",)
    block_counts: tuple[str, ...] = ()
    logits: str | None = None
    least_experts: int = 1

    @property
    def tensors(self) -> tuple[RouterTensor, ...]:
        """`router_tensors` in their long form."""
        return tuple(RouterTensor(t) if isinstance(t, str) else t for t in self.router_tensors)


_PLAIN = ("num_experts",)
_LOCAL = ("num_local_experts",)
_EITHER = ("num_experts", "num_local_experts")
_LOCAL_FIRST = ("num_local_experts", "num_experts")
_ROUTED = ("n_routed_experts", "num_local_experts")
_BIASED = ("weight", "e_score_correction_bias")
_STATICS = ("weight", RouterTensor("moe_statics.e_score_correction_bias", axis=1))
_GEMMA = ("proj.weight", "per_expert_scale")

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("mixtral", "MixtralSparseMoeBlock", _LOCAL_FIRST),
    Architecture("qwen3_moe", "Qwen3MoeSparseMoeBlock", _LOCAL_FIRST),
    Architecture("olmoe", "OlmoeSparseMoeBlock", _EITHER),
    Architecture("deepseek_v3", "DeepseekV3MoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("gpt_oss", "GptOssMLP", _LOCAL_FIRST, router="router", router_tensors=("weight", "bias")),
)
