"""A compressed model beside its original on the same text: the error of every block and layer, and continuations."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_moe.evaluation.generation import PROMPT_TOKENS, continue_greedily, make_prompts
from optimum_moe.evaluation.heldout import HeldOut, prepare
from optimum_moe.evaluation.models import ModelOrPath, find_tokenizer, load_models, logits_of, measuring
from optimum_moe.surgeons import find_blocks
from optimum_moe.surgeons.layers import layer_around

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any], Any]
"""Arguments of a module, and its output."""
WINDOW = 256


@dataclass(frozen=True)
class SideBySide:
    """What two models do with the same text.

    Args:
        block_errors: By MoE block of the compressed model ||new - old|| / ||old|| of its output, for what the original
            model gives to its own block.
        layer_errors: The same of the output of the layer around it, with all layers before it compressed too.
        samples: `prompt`, and the greedy continuations by the `original` and the compressed `model`.
        data: Record of the text.
    """

    block_errors: Mapping[str, float]
    layer_errors: Mapping[str, float]
    samples: Sequence[Mapping[str, str]]
    data: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)


def side_by_side(
    model: ModelOrPath,
    original: ModelOrPath,
    text: Any,
    *,
    blocks: Sequence[str],
    dropped: Collection[str] = (),
    max_tokens: int = 2048,
    num_prompts: int = 3,
    new_tokens: int = 32,
    seed: int = 0,
) -> SideBySide:
    """Compare a compressed model with its original; both are in memory at once.

    Args:
        model: The compressed model, or its path.
        original: The original, or its path or Hub id.
        text: Text that the model was not calibrated on, any `CalibrationConfig.source`.
        blocks: Paths of the MoE blocks of the compressed model, in order.
        dropped: Layers of the original that the compressed model lacks.
        max_tokens: Tokens of text on which errors are measured.
        num_prompts: Prompts that are continued.
        new_tokens: Tokens of a continuation.
        seed: Seed of the choice of text.

    Raises:
        ValueError: If there is too little text, or a model is not a decoder-only one.
    """
    tokenizer = find_tokenizer(None, [model, original])
    if tokenizer is None:
        raise ValueError("Continuations are shown as text, which needs a tokenizer. Give the models as paths.")
    held_out = prepare(text, tokenizer, max_tokens=max_tokens, sequence_length=WINDOW, batch_size=1, seed=seed)
    new, old = load_models([("model", model), ("original", original)])
    with measuring([new, old]):
        block_errors, layer_errors = _errors(new, old, held_out, blocks, dropped)
        prompts = make_prompts(held_out, num_prompts, seed)
        theirs, ours = (continue_greedily(each, prompts, new_tokens) for each in (old, new))
    samples = [
        {"prompt": _decoded(tokenizer, ids), "original": _decoded(tokenizer, was), "model": _decoded(tokenizer, now)}
        for ids, was, now in zip(prompts[:, -PROMPT_TOKENS:], theirs, ours, strict=True)
    ]
    return SideBySide(block_errors, layer_errors, samples, held_out.windows.description)


def _decoded(tokenizer: Any, ids: Tensor) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


@contextmanager
def _recorded(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, Call]]:
    """The last call of each module, by its path."""
    calls: dict[str, Call] = {}

    def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[name] = args, kwargs, output

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(partial(after, name), with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


def _errors(
    new: PreTrainedModel, old: PreTrainedModel, held_out: HeldOut, blocks: Sequence[str], dropped: Collection[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of blocks and of the layers around them, by the block's name in the compressed model."""
    kept = [found.info for found in find_blocks(old) if found.info.layer not in dropped]
    if len(kept) != len(blocks):
        raise ValueError(
            f"The original has {len(kept)} MoE blocks, and the compressed model {len(blocks)} of them. Give the model "
            "that it was made from."
        )
    around = {name: layer_around(new, name) for name in blocks}
    of_blocks, of_layers = _Sums(), _Sums()
    for batch in held_out.windows:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        with _recorded(old, {path for info in kept for path in (info.name, info.layer) if path}) as before:
            logits_of(old, ids, mask, last=1)
        with _recorded(new, {layer for layer in around.values() if layer}) as after:
            logits_of(new, ids, mask, last=1)
        for name, info in zip(blocks, kept, strict=True):
            # A block of two towers may see no text, and one may be no module that is called.
            if info.name in before:
                args, kwargs, output = before[info.name]
                of_blocks.add(name, output, new.get_submodule(name)(*args, **kwargs))
            if info.layer in before and around[name] in after:
                of_layers.add(name, before[info.layer][2], after[around[name]][2])
    return of_blocks.ratios(), of_layers.ratios()


class _Sums:
    """Sums of squares of the difference and of the original, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, old: Any, new: Any) -> None:
        was, now = (each[0] if isinstance(each, tuple) else each for each in (old, new))
        sums = self._sums.setdefault(name, [0.0, 0.0])
        sums[0] += float((now.double() - was.double()).square().sum())
        sums[1] += float(was.double().square().sum())

    def ratios(self) -> dict[str, float]:
        return {name: float(f"{(part / max(whole, 1e-300)) ** 0.5:.4g}") for name, (part, whole) in self._sums.items()}
