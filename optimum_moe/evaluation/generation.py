"""Greedy continuations: their agreement with those of the original model, and how often they end in a loop.

Shape letters: B prompts, P prompt tokens, T new tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from optimum_moe.evaluation.heldout import HeldOut

PROMPT_TOKENS = 64
LOOP_NGRAM = 4
LOOP_TAIL = 8
LOOP_REPEATS = 3


def make_prompts(held_out: HeldOut, num_prompts: int, seed: int) -> Tensor:
    """Prompts of 64 tokens of held-out text after the tokenizer's prefix, int64 (B, P).

    Raises:
        ValueError: no held-out document has 64 tokens.
    """
    spans = held_out.spans(PROMPT_TOKENS, num_prompts, seed, "The generation task")
    rows = [[*held_out.prefix, *held_out.documents[index][start : start + PROMPT_TOKENS]] for index, start in spans]
    return torch.tensor(rows)


def continue_greedily(model: PreTrainedModel, prompts_BP: Tensor, new_tokens: int) -> Tensor:
    """Exactly `new_tokens` greedy tokens after each prompt, int64 (B, T) on the CPU, with the model's KV cache.

    The EOS token does not end a continuation, so that all have the same length. The model's generation config
    (sampling, penalties, EOS) is not used.

    Raises:
        ValueError: the model cannot generate.
    """
    if not model.can_generate():
        raise ValueError(f"{type(model).__name__} cannot generate. Pass tasks=... without 'generation'.")
    prompts_BP = prompts_BP.to(model.device)
    own = model.generation_config
    # generate() takes unset fields from the model's generation config, which would restore its penalties.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, use_cache=True, pad_token_id=0, eos_token_id=None
    )
    try:
        output = cast(Any, model).generate(input_ids=prompts_BP, attention_mask=torch.ones_like(prompts_BP))
    finally:
        model.generation_config = own
    tokens_BT: Tensor = output[:, prompts_BP.shape[1] :].cpu()
    return tokens_BT


def share_of_agreement(reference_BT: Tensor, tokens_BT: Tensor) -> Tensor:
    """Share of positions with the reference's token, (B,) float64."""
    return (reference_BT == tokens_BT).double().mean(-1)


def share_of_prefix(reference_BT: Tensor, tokens_BT: Tensor) -> Tensor:
    """Length of the prefix common with the reference, as a share of T, (B,) float64."""
    return (reference_BT == tokens_BT).long().cumprod(-1).double().mean(-1)


def is_loop(tokens_BT: Tensor) -> Tensor:
    """Whether each continuation ends in a loop, (B,) float64 of 0 and 1.

    It does if one of the 4-grams within its last 8 tokens occurs at least 3 times in the whole continuation
    (occurrences may overlap). With 32 new tokens this detects loops of up to 14 tokens.
    """
    grams_BNG = tokens_BT.unfold(1, LOOP_NGRAM, 1)
    tail_BMG = grams_BNG[:, -(LOOP_TAIL - LOOP_NGRAM + 1) :]
    same_BMN = (tail_BMG[:, :, None] == grams_BNG[:, None]).all(-1)
    return (same_BMN.sum(-1) >= LOOP_REPEATS).any(-1).double()
