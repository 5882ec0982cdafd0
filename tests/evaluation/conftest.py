"""A tokenizer trained here, held-out text, and tiny causal MoE models with known behavior."""

import random
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM


def tiny_model(vocab_size: int = 300, hidden_size: int = 32, seed: int = 0) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=16,
        intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.3,
        max_position_embeddings=256,
    )
    return Qwen3MoeForCausalLM(config).eval()


def successor_model(vocab_size: int = 64) -> Qwen3MoeForCausalLM:
    """A model that is sure that token v is followed by v + 1: every layer's output is zero, the rest a lookup."""
    model = tiny_model(vocab_size, hidden_size=vocab_size)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size))
        model.lm_head.weight.copy_(torch.eye(vocab_size).roll(1, dims=0))
    return model


def constant_model(vocab_size: int = 300) -> Qwen3MoeForCausalLM:
    """Uniform over the vocabulary; greedily always token 0."""
    model = tiny_model(vocab_size)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return model


@pytest.fixture(scope="session")
def text() -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=120)) for _ in range(20)]


@pytest.fixture(scope="session")
def tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


@pytest.fixture(scope="session")
def model() -> Qwen3MoeForCausalLM:
    return tiny_model()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Qwen3MoeForCausalLM]:
    return tiny_model


@pytest.fixture(scope="session")
def make_successor_model() -> Callable[..., Qwen3MoeForCausalLM]:
    return successor_model


@pytest.fixture(scope="session")
def make_constant_model() -> Callable[..., Qwen3MoeForCausalLM]:
    return constant_model
