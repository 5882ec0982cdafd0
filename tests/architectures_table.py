"""What the tests build of every supported architecture: its classes and tiny config fields."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

# Set where a config class, or one of the sub configs that a target names, has the field; a target's own fields win.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "d_model": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "shared_expert_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40,
    "shared_experts_intermediate_size": 40,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "first_k_dense": 1,
    "decoder_sparse_step": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "mamba_d_state": 16,
    "mamba_n_heads": 16,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
    "mamba_dt_rank": 4,
    "mamba_num_heads": 16,
    "mamba_head_dim": 8,
    "mamba_chunk_size": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "chunk_size": 16,
    "use_mamba_kernels": False,
    "num_mtp_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 16,
}


@dataclass(frozen=True)
class Target:
    """One model to build: architecture class and config fields; a family runs in the default tests.

    `refuses_pruning`, `fixed_router` and `fixed_neurons` say why experts cannot be removed, the router cannot shrink
    and neurons cannot be permuted; `implementations` whether transformers has several for these experts; `curvature`
    whether gradients of a loss can be observed.
    """

    name: str
    architecture: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    family: bool = False
    refuses_pruning: str = ""
    fixed_router: str = ""
    fixed_neurons: str = ""
    implementations: bool = True
    curvature: bool = True
    inputs: str = "input_ids"

    def refuses(self, method: str) -> str:
        """Why a method of that name cannot be used, empty where it can."""
        return self.fixed_router if method in ("reduce", "protected") else self.refuses_pruning * (method == "prune")

    @property
    def is_encoder_decoder(self) -> bool:
        return self.name == "switch_transformers"

    @property
    def router_groups(self) -> int:
        return self.fields.get("n_group", 1)


def family(name: str, architecture: str, config: str, fields: dict[str, Any] | None = None, **more: Any) -> Target:
    return Target(name, architecture, config, fields or {}, family=True, **more)


def with_groups(target: Target, **fields: Any) -> Target:
    """The same architecture with its experts in two router groups, of which a token uses one."""
    grouped = target.fields | {"n_group": 2, "topk_group": 1} | fields
    return replace(target, name=f"{target.name}-groups", fields=grouped, family=False)


_MLA = {"num_key_value_heads": 4}
_FOUR_LAYERS = {"num_hidden_layers": 4}


_LONGCAT = _MLA | {
    "num_layers": 2,
    "head_dim": 8,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 24,
    "zero_expert_num": 4,
    "moe_topk": 3,
}
_LLAMA4 = {"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48}


def _layers(*types: str) -> dict[str, Any]:
    """Four layers, of the two types in turn."""
    return {"num_hidden_layers": 4, "layer_types": [*types, *types]}


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary embeddings with sections for time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*sections], **more}}


FAMILIES = (
    family("mixtral", "MixtralForCausalLM", "MixtralConfig"),
    family("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"norm_topk_prob": True}),
    family("olmoe", "OlmoeForCausalLM", "OlmoeConfig", {"norm_topk_prob": False}),
    family("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", _MLA),
    family(
        "deepseek_v3-groups",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _MLA | {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    ),
    family("gpt_oss", "GptOssForCausalLM", "GptOssConfig"),
    family(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            "d_kv": 16,
            "d_ff": 48,
            "num_heads": 4,
            "num_decoder_layers": 4,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "expert_capacity": 64,
            "decoder_start_token_id": 0,
        },
        implementations=False,
    ),
    family("aria", "AriaTextForCausalLM", "AriaTextConfig"),
    family(
        "nemotron_h",
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "num_hidden_layers": 4},
    ),
    family(
        "gemma4",
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {"enable_moe_block": True, "vocab_size_per_layer_input": 99, "hidden_size_per_layer_input": 8},
    ),
    family(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": _mrope(2, 3, 3),
            "vision_config": {"depth": 1, "num_heads": 4, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
        },
    ),
    family("longcat_flash", "LongcatFlashForCausalLM", "LongcatFlashConfig", _LONGCAT, implementations=False),
    family(
        "dbrx",
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "n_layers": 3,
            "n_heads": 4,
            "max_seq_len": 512,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
        },
        implementations=False,
    ),
    family("llama4", "Llama4ForCausalLM", "Llama4TextConfig", _LLAMA4, implementations=False),
    family(
        "llama4-top1",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _LLAMA4 | {"num_experts_per_tok": 1},
        implementations=False,
    ),
    family("jetmoe", "JetMoeForCausalLM", "JetMoeConfig", {"kv_channels": 16}, implementations=False),
)

_WITHOUT_GROUPS = (
    Target("qwen3_moe-unnormalized", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"norm_topk_prob": False}),
    Target("olmoe-normalized", "OlmoeForCausalLM", "OlmoeConfig", {"norm_topk_prob": True}),
    Target("qwen2_moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig"),
    Target("qwen3_next", "Qwen3NextForCausalLM", "Qwen3NextConfig", _FOUR_LAYERS),
    Target("qwen3_5_moe", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", _FOUR_LAYERS),
    Target("qwen3_omni_moe_thinker", "Qwen3OmniMoeThinkerTextModel", "Qwen3OmniMoeTextConfig"),
    Target(
        "qwen3_omni_moe_talker",
        "Qwen3OmniMoeTalkerModel",
        "Qwen3OmniMoeTalkerTextConfig",
        {"shared_expert_intermediate_size": 40} | _mrope(2, 3, 3),
        inputs="inputs_embeds",
    ),
    Target(
        "qwen4_exp",
        "Qwen4ExpForCausalLM",
        "Qwen4ExpTextConfig",
        _layers("linear_attention", "indexed_attention")
        | {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "hc_lowrank": 8,
        },
    ),
    Target("deepseek_v2", "DeepseekV2ForCausalLM", "DeepseekV2Config", _MLA),
    Target("deepseek_v32", "DeepseekV32ForCausalLM", "DeepseekV32Config", _MLA),
    Target("deepseek_v4", "DeepseekV4ForCausalLM", "DeepseekV4Config", {"mlp_layer_types": ["moe", "moe", "moe"]}),
    Target(
        "deepseek_v4-hash",
        "DeepseekV4ForCausalLM",
        "DeepseekV4Config",
        {"mlp_layer_types": ["hash_moe", "hash_moe", "moe"]},
        refuses_pruning="experts are chosen by a table of token ids",
    ),
    Target(
        "deepseek_ocr2",
        "DeepseekOcr2TextModel",
        "DeepseekOcr2TextConfig",
        _MLA | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    ),
    Target("unlimited_ocr", "UnlimitedOcrTextModel", "UnlimitedOcrTextConfig", _MLA),
    Target("glm4_moe", "Glm4MoeForCausalLM", "Glm4MoeConfig"),
    Target("glm4_moe_lite", "Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", _MLA),
    Target("glm4v_moe", "Glm4vMoeTextModel", "Glm4vMoeTextConfig", _mrope(2, 3, 3, partial_rotary_factor=1.0)),
    Target(
        "glm5_next",
        "Glm5NextTextModel",
        "Glm5NextTextConfig",
        _MLA
        | {
            "num_hidden_layers": 4,
            "index_topk": 16,
            "qk_rope_head_dim": 0,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "linear_num_heads": 4,
            "linear_head_dim": 16,
        },
    ),
    Target("glm_moe_dsa", "GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", _MLA),
    Target("granitemoe", "GraniteMoeForCausalLM", "GraniteMoeConfig"),
    Target("granitemoe_swa", "GraniteMoeSWAForCausalLM", "GraniteMoeSWAConfig"),
    Target(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        _layers("linear_attention", "full_attention"),
    ),
    Target("granitemoeshared", "GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig"),
    Target("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config"),
    Target("hy_v3", "HYV3ForCausalLM", "HYV3Config"),
    Target("hy_v4", "HYV4ForCausalLM", "HYV4Config"),
    Target("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig"),
    Target(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextModel",
        "Ernie4_5_VLMoeTextConfig",
        {"moe_intermediate_size": [24, 16]} | _mrope(3, 3, 2),
    ),
    Target("phimoe", "PhimoeForCausalLM", "PhimoeConfig"),
    Target(
        "jamba",
        "JambaForCausalLM",
        "JambaConfig",
        {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    Target("minimax", "MiniMaxForCausalLM", "MiniMaxConfig"),
    Target("minimax_m2", "MiniMaxM2ForCausalLM", "MiniMaxM2Config"),
    Target("minimax_m3_vl", "MiniMaxM3VLForCausalLM", "MiniMaxM3VLTextConfig"),
    Target("dots1", "Dots1ForCausalLM", "Dots1Config"),
    Target(
        "dots3_note",
        "Dots3NoteForCausalLM",
        "Dots3NoteTextConfig",
        _MLA
        | _layers("indexed_attention", "sliding_attention")
        | {"qk_head_dim": 16, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    ),
    Target("lfm2_moe", "Lfm2MoeForCausalLM", "Lfm2MoeConfig", _layers("conv", "full_attention")),
    Target(
        "lfm2_moe-unbiased",
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        _layers("conv", "full_attention") | {"use_expert_bias": False},
    ),
    Target("afmoe", "AfmoeForCausalLM", "AfmoeConfig"),
    Target("axk1", "AXK1ForCausalLM", "AXK1Config", _MLA),
    Target("axk2", "AXK2ForCausalLM", "AXK2Config", _MLA),
    Target(
        "bailing_hybrid",
        "BailingHybridForCausalLM",
        "BailingHybridConfig",
        _MLA | {"num_hidden_layers": 4, "layer_group_size": 2},
    ),
    Target("beam", "BeamForCausalLM", "BeamConfig", {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    Target("cohere2_moe", "Cohere2MoeForCausalLM", "Cohere2MoeConfig"),
    Target("exaone_moe", "ExaoneMoeForCausalLM", "ExaoneMoeConfig"),
    Target("flex_olmo", "FlexOlmoForCausalLM", "FlexOlmoConfig"),
    Target("flint", "FlintForCausalLM", "FlintConfig", {"mlp_only_layers": [0]}),
    Target("inkling", "InklingForCausalLM", "InklingTextConfig"),
    Target("inkling2", "Inkling2ForCausalLM", "Inkling2TextConfig", {"unpadded_vocab_size": 99}),
    Target(
        "kimi_linear",
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        _MLA | _layers("linear_attention", "full_attention") | {"linear_num_heads": 4, "linear_head_dim": 16},
    ),
    Target("kolibri1", "Kolibri1ForCausalLM", "Kolibri1Config"),
    Target("laguna", "LagunaForCausalLM", "LagunaConfig"),
    Target("mellum", "MellumForCausalLM", "MellumConfig"),
    Target("mimo_v2_flash", "MiMoV2FlashForCausalLM", "MiMoV2FlashConfig"),
    Target("mistral4", "Mistral4ForCausalLM", "Mistral4Config", _MLA),
    Target("mistral_large4", "MistralLarge4TextModel", "MistralLarge4TextConfig", _MLA),
    Target("muse_spark", "MuseSparkTextModel", "MuseSparkTextConfig", {"moe_hidden_size": 32}),
    Target("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification", "OpenAIPrivacyFilterConfig"),
    Target("solar_open", "SolarOpenForCausalLM", "SolarOpenConfig"),
    # Its layers fill a cache for another model.
    Target("diffusion_gemma", "DiffusionGemmaEncoderTextModel", "DiffusionGemmaTextConfig", curvature=False),
    Target(
        "step3p7",
        "Step3p7TextModel",
        "Step3p7TextConfig",
        {"mlp_layer_types": ["dense", "sparse", "sparse"], "swiglu_limits": [0.0, 0.1, 0.0]},
        implementations=False,
    ),
    Target(
        "vitpose_backbone",
        "VitPoseBackbone",
        "VitPoseBackboneConfig",
        {"part_features": 16, "image_size": [32, 32], "patch_size": [8, 8], "mlp_ratio": 1},
        refuses_pruning="the index of a data set selects the expert",
        fixed_router="the index of a data set selects the expert",
        fixed_neurons="its experts share one hidden layer",
        implementations=False,
        inputs="pixel_values",
    ),
    Target("zaya", "ZayaForCausalLM", "ZayaConfig", {"num_experts_per_tok": 1, "router_hidden_size": 32}),
)

_VITPOSE = next(target for target in _WITHOUT_GROUPS if target.name == "vitpose_backbone")
_VITPOSE_BACKBONE = {
    "model_type": "vitpose_backbone",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 8,
    "out_features": ["stage3"],
}
_WITHOUT_GROUPS += (
    replace(
        _VITPOSE,
        name="vitpose",
        architecture="VitPoseForPoseEstimation",
        config="VitPoseConfig",
        fields={"backbone_config": _VITPOSE.fields | _VITPOSE_BACKBONE},
    ),
)

_GROUP_LIMITED = {"topk_method": "group_limited_greedy"}

_GROUPED: dict[str, dict[str, Any]] = {
    "nemotron_h": {},
    "deepseek_v2": _GROUP_LIMITED,
    "deepseek_v32": {},
    "deepseek_ocr2": _GROUP_LIMITED,
    "unlimited_ocr": _GROUP_LIMITED,
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm4v_moe": {},
    "glm5_next": {},
    "glm_moe_dsa": {},
    "hy_v4": {},
    "dots1": {},
    "dots3_note": {},
    "axk1": {},
    "axk2": {},
    "bailing_hybrid": {},
    "beam": {},
    "exaone_moe": {},
    "kimi_linear": {},
    "mimo_v2_flash": {},
    "mistral4": {},
    "mistral_large4": {},
    "solar_open": {},
}

OTHERS = (
    *_WITHOUT_GROUPS,
    *(with_groups(t, **_GROUPED[t.name]) for t in (*FAMILIES, *_WITHOUT_GROUPS) if t.name in _GROUPED),
)

REFUSED_TARGETS = {
    "nllb_moe": Target(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        {
            "encoder_layers": 4,
            "decoder_layers": 4,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "expert_capacity": 64,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "decoder_start_token_id": 2,
        },
    ),
    "doge": Target("doge", "DogeForCausalLM", "DogeConfig", {"is_moe": True, "num_experts": 16}),
    "diffusion_gemma-decoder": Target(
        "diffusion_gemma-decoder",
        "DiffusionGemmaDecoderModel",
        "DiffusionGemmaConfig",
        {"text_config": {}},
    ),
}
"""Models with blocks that are refused."""
