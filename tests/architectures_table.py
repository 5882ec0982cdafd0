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
    """One model to build: architecture class and config fields; a family runs in the default tests."""

    name: str
    architecture: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    family: bool = False
    refuses_pruning: str = ""
    inputs: str = "input_ids"

    @property
    def is_encoder_decoder(self) -> bool:
        return self.name == "switch_transformers"

    @property
    def router_groups(self) -> int:
        return self.fields.get("n_group", 1)


def family(name: str, architecture: str, config: str, fields: dict[str, Any] | None = None) -> Target:
    return Target(name, architecture, config, fields or {}, family=True)


def with_groups(target: Target, **fields: Any) -> Target:
    """The same architecture with its experts in two router groups, of which a token uses one."""
    grouped = target.fields | {"n_group": 2, "topk_group": 1} | fields
    return replace(target, name=f"{target.name}-groups", fields=grouped)


_MLA = {"num_key_value_heads": 4}

FAMILIES = (
    family("mixtral", "MixtralForCausalLM", "MixtralConfig"),
    family("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"norm_topk_prob": True}),
    family("qwen3_moe-unnormalised", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"norm_topk_prob": False}),
    family("olmoe", "OlmoeForCausalLM", "OlmoeConfig", {"norm_topk_prob": False}),
    family("olmoe-normalised", "OlmoeForCausalLM", "OlmoeConfig", {"norm_topk_prob": True}),
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
    ),
)

OTHERS: tuple[Target, ...] = ()
