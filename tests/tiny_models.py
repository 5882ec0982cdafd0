"""Tiny random models of every supported architecture, built in process, with routers that are really exercised."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

# Set where the config class has the field; a target's own fields win.
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
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_mtp_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 16,
}


@dataclass(frozen=True)
class Target:
    """One model to build: architecture class and config fields."""

    name: str
    architecture: str
    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    family: bool = True

    @property
    def is_encoder_decoder(self) -> bool:
        return "Conditional" in self.architecture


TARGETS = (
    Target("mixtral", "MixtralForCausalLM", "MixtralConfig"),
    Target("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"norm_topk_prob": True}),
    Target("qwen3_moe-unnormalised", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"norm_topk_prob": False}),
    Target("olmoe", "OlmoeForCausalLM", "OlmoeConfig", {"norm_topk_prob": False}),
    Target("olmoe-normalised", "OlmoeForCausalLM", "OlmoeConfig", {"norm_topk_prob": True}),
    Target("deepseek_v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", {"num_key_value_heads": 4}),
    Target(
        "deepseek_v3-groups",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    ),
    Target("gpt_oss", "GptOssForCausalLM", "GptOssConfig"),
    Target(
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


def by_name(name: str) -> Target:
    return next(target for target in TARGETS if target.name == name)


def build(target: Target | str, seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
    """A random model in eval mode; matrices from N(0, 0.08), correction biases from N(0, 0.1)."""
    if isinstance(target, str):
        target = by_name(target)
    config_class = getattr(transformers, target.config)
    known = {f.name for f in dataclasses.fields(config_class)}
    chosen = {k: v for k, v in DEFAULTS.items() if k in known} | target.fields | fields
    torch.manual_seed(seed)
    model = getattr(transformers, target.architecture)(config_class(**chosen))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.08)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name or name.endswith(("router.bias", "_proj_bias")):
                tensor.normal_(0, 0.1)
    return model.to(dtype).eval()


def inputs_for(target: Target | str, rows: int = 2, length: int = 16, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random token ids (without the padding id), and decoder ids where there is a decoder."""
    if isinstance(target, str):
        target = by_name(target)
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(3, 99, (rows, length), generator=generator)}
    if target.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 99, (rows, length), generator=generator)
    return inputs


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits
