"""The small MoEs that `tasks.py` trains from scratch on every task, Switch-style and decoder-only, and dense twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from train_reference import balancing_loss
from transformers import (
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

BALANCE_WEIGHT = 0.01
VOCABULARY = 2048
NUM_EXPERTS = 8
SPREAD = 0.05


@dataclass(frozen=True)
class Architecture:
    """A model to train.

    Args:
        description: What tables say of it.
        make: The model with random weights, from its number of experts; with one it is a dense model.
        top_k: Experts of a token.
    """

    description: str
    make: Callable[[int], PreTrainedModel]
    top_k: int

    def balance(self, output: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Balancing loss of every block, without padding.

        Switch Transformers in transformers has none where every layer is sparse, and other models pool all blocks.
        """
        if hasattr(output, "encoder_router_logits"):
            read, written = inputs["attention_mask"].bool(), inputs["labels"] != -100
            masks = [*[read] * len(output.encoder_router_logits), *[written] * len(output.decoder_router_logits)]
            logits = [*output.encoder_router_logits, *output.decoder_router_logits]
        else:
            masks, logits = [inputs["attention_mask"].bool()] * len(output.router_logits), [*output.router_logits]
        kept = tuple(
            logits_E.flatten(0, -2)[mask_BS.flatten()] for logits_E, mask_BS in zip(logits, masks, strict=True)
        )
        return BALANCE_WEIGHT * balancing_loss(kept, min(self.top_k, kept[0].shape[1]))


def switch(num_experts: int) -> PreTrainedModel:
    model = SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=256,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=2,
            num_sparse_decoder_layers=2,
            num_experts=num_experts,
            # No token is dropped: an expert may serve all tokens of a text.
            expert_capacity=256,
            # Dropout moves tokens to other experts, which a short training does not get over.
            dropout_rate=0.0,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    # Drawn with a variance of 1 for a long pretraining; a few thousand texts would hardly move them.
    for name, parameter in model.named_parameters():
        if name.endswith(("router.classifier.weight", "embed_tokens.weight", "lm_head.weight")):
            torch.nn.init.normal_(parameter, std=SPREAD)
    return model


def qwen3_moe(num_experts: int) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            # A token's two experts in one.
            moe_intermediate_size=128 if num_experts > 1 else 256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            num_experts=num_experts,
            num_experts_per_tok=min(2, num_experts),
            norm_topk_prob=True,
            # `Architecture.balance` is used instead.
            router_aux_loss_coef=0.0,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


ARCHITECTURES = {
    "switch": Architecture(
        "Switch-style encoder-decoder, 2 + 2 layers, width 64, 8 experts of 256 neurons in every layer, top-1",
        switch,
        1,
    ),
    "qwen3_moe": Architecture(
        "decoder-only Qwen3-MoE, 3 layers, width 64, 8 experts of 128 neurons in every layer, top-2",
        qwen3_moe,
        2,
    ),
}
"""By name."""
