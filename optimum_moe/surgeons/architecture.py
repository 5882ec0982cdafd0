"""Architectures as rows of data, which the generic surgeon reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from optimum_moe.surgeons.scoring import (
    Scoring,
    activation,
    multiplied_sigmoid,
    sigmoid,
    softcapped_sigmoid,
    softmax,
    softmax_or_sigmoid,
)

Role: TypeAlias = Literal["rows", "bias", "correction", "scale"]


@dataclass(frozen=True)
class RouterTensor:
    """A parameter or buffer of the router with an expert axis; a path alone stands for one whose first axis it is.

    Args:
        path: Dotted path from the router, or from the block with `on_block`.
        axis: The axis of the experts.
        on_block: Whether it belongs to the block instead of its router.
        optional: Whether some blocks of the architecture lack it.
        trailing: Whether entries of other experts (shared or skipped ones) follow those of the routed experts; they
            are not changed.
        holds_ids: Whether it has no expert axis, but holds expert ids (a hash table).
        role: Rows of the last linear layer, its bias, the correction that is added only for the selection, or a factor
            on the routing weights; by default derived from the name.
    """

    path: str
    axis: int = 0
    on_block: bool = False
    optional: bool = False
    trailing: bool = False
    holds_ids: bool = False
    role: Role = ""  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not self.role:
            object.__setattr__(self, "role", _role_of(self.path.rpartition(".")[2]))


def _role_of(name: str) -> Role:
    if name == "bias":
        return "bias"
    return "correction" if "bias" in name else "scale" if "scale" in name else "rows"


@dataclass(frozen=True)
class Architecture:
    """One architecture that follows the contract `router(h) -> (logits, weights, index)`, `experts(h, index, weights)`.

    Axes are never guessed from shapes (a shared expert's width can equal the number of experts): each row names the
    tensors that have an expert axis.

    Args:
        name: Name of the family, which is the name of the transformers module.
        block: Class name of the MoE block.
        count_fields: All config fields with the number of routed experts: first that of the config class, then names
            that other versions and runtimes read.
        router: Attribute of the block that holds the router.
        experts: Attribute of the block that holds the experts.
        router_tensors: Parameters and buffers of the router with an expert axis, the rows of its last linear layer
            first; a path if the expert axis is the first one.
        top_k: Attribute of the router (dotted) with the number of selected experts.
        router_groups: Attribute of the router with the number of router groups, None if there are none.
        router_groups_used: Attribute of the router with the number of router groups that one token may use; all if the
            router has no such attribute.
        router_counts: Attributes of the router (dotted) with its number of experts, with or without trailing ones.
        block_counts: Attributes of the block with its number of experts.
        logits: Path from the router to the layer whose output are the logits before any scoring; None if the router
            itself computes them from its input and returns them.
        least_experts: Minimum number of experts with which transformers builds this block and not a dense one.
        scoring: How logits become scores; by default a sigmoid if the router has a correction, else a softmax.
        selects_by: Whether the correction is added to scores or logits for the selection.
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
    scoring: Scoring | None = None
    selects_by: Literal["scores", "logits"] = "scores"

    @property
    def tensors(self) -> tuple[RouterTensor, ...]:
        """`router_tensors` with every path as a `RouterTensor`."""
        return tuple(RouterTensor(t) if isinstance(t, str) else t for t in self.router_tensors)

    @property
    def remark(self) -> str:
        """Limitations of the architecture, for users."""
        remarks = {
            "within router groups, where a checkpoint has several": self.router_groups is not None,
            "blocks routed by a table of token ids cannot be pruned": any(t.holds_ids for t in self.tensors),
            "router entries of shared or skipped experts are kept": any(t.trailing for t in self.tensors),
            f"at least {self.least_experts} experts": self.least_experts > 1,
        }
        return "; ".join(remark for remark, applies in remarks.items() if applies)

    @property
    def scores(self) -> Scoring:
        """The scoring, or its default if `scoring` is None."""
        default = sigmoid if any(tensor.role == "correction" for tensor in self.tensors) else softmax
        return self.scoring or default


_PLAIN = ("num_experts",)
_LOCAL = ("num_local_experts",)
_EITHER = ("num_experts", "num_local_experts")
_LOCAL_FIRST = ("num_local_experts", "num_experts")
_ROUTED = ("n_routed_experts", "num_local_experts")
_BIASED = ("weight", "e_score_correction_bias")
_WITH_BIAS = ("weight", "bias")
_STATICS = ("weight", RouterTensor("moe_statics.e_score_correction_bias", axis=1))
_GEMMA = ("proj.weight", "per_expert_scale")

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("mixtral", "MixtralSparseMoeBlock", _LOCAL_FIRST),
    Architecture("qwen3_moe", "Qwen3MoeSparseMoeBlock", _LOCAL_FIRST),
    Architecture("olmoe", "OlmoeSparseMoeBlock", _EITHER),
    Architecture("deepseek_v3", "DeepseekV3MoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("gpt_oss", "GptOssMLP", _LOCAL_FIRST, router="router", router_tensors=_WITH_BIAS),
    Architecture("aria", "AriaTextMoELayer", ("moe_num_experts",), router="router"),
    Architecture("nemotron_h", "NemotronHMoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture(
        "gemma4",
        "Gemma4TextDecoderLayer",
        _PLAIN,
        router="router",
        router_tensors=_GEMMA,
        top_k="config.top_k_experts",
        router_counts=("proj.out_features",),
        logits="proj",
    ),
    Architecture("qwen3_vl_moe", "Qwen3VLMoeTextSparseMoeBlock", _LOCAL_FIRST),
    Architecture("qwen2_moe", "Qwen2MoeSparseMoeBlock", _PLAIN),
    Architecture("qwen3_next", "Qwen3NextSparseMoeBlock", _PLAIN),
    Architecture("qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock", _PLAIN),
    Architecture("qwen3_omni_moe_thinker", "Qwen3OmniMoeThinkerTextSparseMoeBlock", _PLAIN),
    Architecture("qwen3_omni_moe_talker", "Qwen3OmniMoeTalkerTextSparseMoeBlock", _LOCAL_FIRST),
    Architecture("qwen4_exp", "Qwen4ExpTextSparseMoeBlock", _PLAIN),
    Architecture("deepseek_v2", "DeepseekV2Moe", ("n_routed_experts", "num_experts"), router_groups="num_group"),
    Architecture("deepseek_v32", "DeepseekV32MoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture(
        "deepseek_v4",
        "DeepseekV4SparseMoeBlock",
        _ROUTED,
        router_tensors=(
            "weight",
            RouterTensor("e_score_correction_bias", optional=True),
            RouterTensor("tid2eid", optional=True, holds_ids=True),
        ),
        scoring=activation,
    ),
    Architecture(
        "deepseek_ocr2", "DeepseekOcr2TextMoe", ("n_routed_experts", "num_experts"), router_groups="num_group"
    ),
    Architecture(
        "unlimited_ocr", "UnlimitedOcrTextMoe", ("n_routed_experts", "num_experts"), router_groups="num_group"
    ),
    Architecture("glm4_moe", "Glm4MoeMoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("glm4_moe_lite", "Glm4MoeLiteMoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("glm4v_moe", "Glm4vMoeTextMoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("glm5_next", "Glm5NextTextMoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("glm_moe_dsa", "GlmMoeDsaMoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("granitemoe", "GraniteMoeMoE", _LOCAL, router="router"),
    Architecture("granitemoe_swa", "GraniteMoeSWAMoE", _LOCAL, router="router"),
    Architecture("granitemoehybrid", "GraniteMoeHybridMoE", _LOCAL, router="router"),
    Architecture("granitemoeshared", "GraniteMoeSharedMoE", _LOCAL, router="router"),
    Architecture(
        "hunyuan_v1_moe",
        "HunYuanMoEV1Moe",
        _EITHER,
        router_tensors=("wg.weight",),
        router_counts=("num_experts", "wg.out_features"),
    ),
    Architecture(
        "hy_v3",
        "HYV3MoE",
        _EITHER,
        router_tensors=("weight", RouterTensor("e_score_correction_bias", on_block=True)),
    ),
    Architecture("hy_v4", "HYV4MoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture(
        "ernie4_5_moe",
        "Ernie4_5_MoeSparseMoeBlock",
        ("moe_num_experts", "num_experts"),
        router_tensors=_STATICS,
        scoring=softmax,
        block_counts=("num_experts",),
    ),
    Architecture(
        "phimoe",
        "PhimoeSparseMoeBlock",
        _LOCAL,
        router="router",
        router_counts=("num_experts", "out_features"),
        block_counts=("num_experts",),
    ),
    Architecture(
        "jamba",
        "JambaSparseMoeBlock",
        _EITHER,
        router="router",
        block_counts=("num_experts",),
        least_experts=2,
    ),
    Architecture("minimax", "MiniMaxSparseMoeBlock", _LOCAL_FIRST),
    Architecture(
        "minimax_m2",
        "MiniMaxM2SparseMoeBlock",
        _LOCAL_FIRST,
        router_tensors=("weight", RouterTensor("e_score_correction_bias", on_block=True)),
    ),
    Architecture("minimax_m3_vl", "MiniMaxM3VLSparseMoeBlock", _LOCAL_FIRST, router_tensors=_BIASED),
    Architecture("dots1", "Dots1MoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("dots3_note", "Dots3NoteTextMoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture(
        "dots3_note_vision",
        "Dots3NoteVisionMoE",
        _LOCAL,
        router_tensors=("weight", RouterTensor("e_score_correction_bias", on_block=True)),
    ),
    Architecture(
        "lfm2_moe",
        "Lfm2MoeSparseMoeBlock",
        _PLAIN,
        router_tensors=("weight", RouterTensor("expert_bias", on_block=True, optional=True)),
    ),
    Architecture(
        "afmoe",
        "AfmoeSparseMoeBlock",
        _PLAIN,
        router="router",
        router_tensors=("gate.weight", RouterTensor("expert_bias", on_block=True)),
        router_counts=("num_experts", "gate.out_features"),
    ),
    Architecture("axk1", "AXK1MoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("axk2", "AXK2MoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("bailing_hybrid", "BailingHybridMoE", _EITHER, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("beam", "BeamMoE", _PLAIN, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("cohere2_moe", "Cohere2MoeSparseMoeBlock", _PLAIN, scoring=softmax_or_sigmoid),
    Architecture("exaone_moe", "ExaoneMoeSparseMoEBlock", _PLAIN, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("flex_olmo", "FlexOlmoSparseMoeBlock", _EITHER),
    Architecture("flint", "FlintSparseMoeBlock", _PLAIN, scoring=sigmoid),
    Architecture(
        "inkling",
        "InklingMoE",
        _ROUTED,
        router_tensors=(RouterTensor("weight", trailing=True), "e_score_correction_bias"),
        router_counts=("num_experts", "n_total_experts"),
    ),
    Architecture("inkling2", "Inkling2SparseMoeBlock", _ROUTED, router_tensors=_BIASED, scoring=activation),
    Architecture("kimi_linear", "KimiLinearMoE", _EITHER, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("kolibri1", "Kolibri1SparseMoeBlock", _LOCAL_FIRST, router_tensors=_BIASED, selects_by="logits"),
    Architecture("laguna", "LagunaSparseMoeBlock", _PLAIN, router_tensors=_BIASED, scoring=softcapped_sigmoid),
    Architecture("mellum", "MellumSparseMoeBlock", _LOCAL_FIRST),
    Architecture("mimo_v2_flash", "MiMoV2FlashMoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture("mistral4", "Mistral4MoE", _ROUTED, router_groups="num_group"),
    Architecture("mistral_large4", "MistralLarge4TextMoE", _ROUTED, router_groups="num_group"),
    Architecture("muse_spark", "MuseSparkMoE", _LOCAL, router_tensors=_BIASED, scoring=multiplied_sigmoid),
    Architecture(
        "openai_privacy_filter",
        "OpenAIPrivacyFilterMLP",
        _LOCAL_FIRST,
        router="router",
        router_tensors=_WITH_BIAS,
    ),
    Architecture(
        "diffusion_gemma",
        "DiffusionGemmaEncoderTextLayer",
        _PLAIN,
        router="router",
        router_tensors=_GEMMA,
        top_k="config.top_k_experts",
        router_counts=("proj.out_features",),
        logits="proj",
    ),
    Architecture("solar_open", "SolarOpenMoE", _ROUTED, router_tensors=_BIASED, router_groups="num_group"),
    Architecture(
        "zaya",
        "ZayaSparseMoeBlock",
        _PLAIN,
        router_tensors=(
            RouterTensor("router_mlp.out_proj.weight", trailing=True),
            RouterTensor("balancing_biases", trailing=True),
        ),
        # The router detects ids beyond its experts, which skip them, by the count in its config.
        router_counts=("num_experts", "num_router_classes", "router_mlp.out_proj.out_features", "config.num_experts"),
        logits="router_mlp.out_proj",
        scoring=softmax,
    ),
)
