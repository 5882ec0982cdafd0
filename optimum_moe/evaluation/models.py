"""Loads the models to evaluate, and runs them in the same way: eval mode, no gradients, only the needed logits."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from optimum_moe.calibration.observe import running_part
from optimum_moe.checkpoint.source import model_class
from optimum_moe.checkpoint.system import utf8_path

ModelOrPath: TypeAlias = PreTrainedModel | str | os.PathLike[str]


def load_models(models: Iterable[tuple[str, ModelOrPath]]) -> list[PreTrainedModel]:
    """Models from (name for errors, model or path); a path or Hub id is loaded once, in its stored dtype.

    A checkpoint is loaded with the class that its config names. Of an omni model it is the thinker that predicts text.

    Raises:
        ValueError: an encoder-decoder model, or something that is neither a model nor a path.
    """
    loaded: list[PreTrainedModel] = []
    by_path: dict[str, Any] = {}
    for name, model in models:
        if isinstance(model, str | os.PathLike):
            path = os.fspath(model)
            if path not in by_path:
                by_path[path] = model_class(AutoConfig.from_pretrained(path)).from_pretrained(path)
            model = by_path[path]
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"{name} is a {type(model).__name__}. Pass a PreTrainedModel, or a path to one.")
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{name} ({type(model).__name__}) is an encoder-decoder model, which no choice of tasks=... supports: "
                "plain text has no separate decoder input, and with the same text as input the decoder only copies. "
                "Measure it on pairs of input and target with `score_examples`, or pass a decoder-only model."
            )
        loaded.append(running_part(model))
    return loaded


def find_tokenizer(tokenizer: Any, candidates: Sequence[ModelOrPath | None]) -> Any:
    """The tokenizer given, else the one saved with the first path among `candidates`, else None."""
    if tokenizer is not None:
        return _saved_tokenizer(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer
    for candidate in candidates:
        if isinstance(candidate, str | os.PathLike):
            return _saved_tokenizer(candidate)
    return None


def _saved_tokenizer(path: str | os.PathLike[str]) -> Any:
    with utf8_path(Path(path)) as folder:
        return AutoTokenizer.from_pretrained(os.fspath(folder))


@contextmanager
def measuring(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Context with eval mode and inference mode; every module's training flag is restored on exit."""
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def logits_of(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, last: int = 0) -> Tensor:
    """Logits of the last `last` positions, (B, last, V), in the model's dtype; of all positions for 0.

    If a model supports it, only these positions are computed, since the logits are the largest tensor of a forward.
    """
    extra: dict[str, Any] = {"logits_to_keep": last} if last and _keeps_logits(model) else {}
    if attention_mask is not None:
        extra["attention_mask"] = attention_mask.to(model.device)
    output = model(input_ids=input_ids.to(model.device), use_cache=False, **extra)
    if "logits" not in output:
        raise ValueError(
            f"{type(model).__name__} has no head, so there are no predictions to measure. Pass the model with its "
            "head, such as AutoModelForCausalLM loads."
        )
    logits: Tensor = output.logits
    return logits[:, -last:]


def _keeps_logits(model: PreTrainedModel) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
