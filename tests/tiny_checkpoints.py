"""Tiny checkpoint folders: a random model with a tokenizer trained here, and text for both."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import build

VOCABULARY = 300


def documents(count: int = 20, words: int = 120, seed: int = 0) -> list[str]:
    """Texts of random words; other seeds give other words."""
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(200)]
    return [" ".join(rng.choices(lexicon, k=words)) for _ in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end-of-text token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet)
    raw.train_from_iterator(documents(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")


def write_text(path: Path, seed: int = 0, **sizes: int) -> Path:
    """A .jsonl file of `documents`."""
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents(seed=seed, **sizes)), encoding="utf-8"
    )
    return path


def save_checkpoint(directory: Path, target: str = "qwen3_moe", **fields: Any) -> Path:
    """A tiny model of 8 experts in 3 blocks with its tokenizer."""
    build(target, vocab_size=VOCABULARY, **fields).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by name."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
