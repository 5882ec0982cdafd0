"""`Recovery`: the settings of a training after the cut, as `recover` takes them and a recipe writes them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from optimum_moe.settings import check_count, check_fields, choose_one, percent, plain, token_count

LEARNING_RATES = {"router": 1e-2, "experts": 2e-3, "lora": 2e-3, "full": 1e-3}
"""Default learning rates by what trains, of a student that is far from its teacher."""
_SHARES = ("held_out_share", "final_density", "reconstruct")
_NUMBERS = ("learning_rate", "alpha", "temperature", "task_weight", "hidden_weight")
_COUNTS = ("max_tokens", "lora_rank")
_TRAINS = {
    "router": "routers and norms",
    "experts": "experts, routers and norms",
    "lora": "adapters of linear layers, routers and stacks of experts",
    "full": "all parameters",
}


@dataclass(frozen=True)
class Recovery:
    """A training of the compressed model on the predictions of the original (knowledge distillation).

    A recipe that has one compresses, then trains: the original is loaded again as the teacher, so that both are in
    memory.

    Args:
        train: `"router"` (routers and norms; default), `"experts"` (also everything that is stored of the experts),
            `"lora"` (adapters of linear layers, routers and stacks of experts, merged at the end; needs PEFT), or
            `"full"`.
        max_tokens: Tokens to train on, such as 300_000 (the default) or "300k"; a shorter text is read several times.
        data: Text to train on: whatever `calibration=` of `MoECompressor.from_pretrained` takes. None (default) for
            the text of the calibration. Rows have 512 tokens and steps 4 rows, unless the data say otherwise.
        held_out: Other text to measure on; by default documents of `data`.
        held_out_share: Share of the documents of `data` that are held out, default 0.1, at least one.
        learning_rate: Of AdamW; by default one that depends on what trains and on how much was lost.
        alpha: Weight of the divergence, default 1; 0.2 in MC-SMoE.
        temperature: At which the distributions are compared, default 1; 2 in MC-SMoE.
        task_weight: Weight of the cross-entropy of the text, default 0; 1 in MC-SMoE.
        hidden_weight: Weight of the mean squared difference of hidden states, default 0.
        final_density: Prune sparse rows meanwhile down to this density.
        lora_rank: Rank of the adapters, default 8.
        reconstruct: Share of `max_tokens` on which each MoE block is first fitted to the original's, default 0.

    Raises:
        ValueError: If a setting is out of range.
    """

    train: str = "router"
    max_tokens: int = 300_000
    data: Any = None
    held_out: Any = None
    held_out_share: float = 0.1
    learning_rate: float | None = None
    alpha: float = 1.0
    temperature: float = 1.0
    task_weight: float = 0.0
    hidden_weight: float = 0.0
    final_density: float | None = None
    lora_rank: int = 8
    reconstruct: float = 0.0

    def __post_init__(self) -> None:
        for name in (*_SHARES, *_NUMBERS, *_COUNTS):
            object.__setattr__(self, name, percent(plain(getattr(self, name))))
        object.__setattr__(self, "max_tokens", token_count(self.max_tokens))
        check_train(self.train)
        for name in (*_SHARES, *_NUMBERS):
            check_number(name, getattr(self, name))
        check_amount(self.max_tokens, self.held_out_share)
        check_loss(self.alpha, self.temperature, self.task_weight, self.hidden_weight)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate={self.learning_rate} must be positive. Leave it out for a default by train= and by "
                f"how far the student is, at most {LEARNING_RATES[self.train]:g}."
            )
        if self.final_density is not None and not 0 < self.final_density <= 1:
            raise ValueError(
                f"final_density={self.final_density} must be in (0, 1]: the share of the sparse part's elements that "
                "remains. Use 0.1, or leave it out."
            )
        check_count("lora_rank", self.lora_rank, 1)
        if not 0 <= self.reconstruct < 1:
            raise ValueError(
                f"reconstruct={self.reconstruct} is a share of max_tokens: at least 0 and less than 1. Use 0.5, or 0 "
                "for none."
            )
        if self.train == "lora" and find_spec("peft") is None:
            raise ValueError(
                "train='lora' needs the package peft. Install it with: pip install 'optimum-moe[recover]'."
            )

    @classmethod
    def coerce(cls, given: Any) -> Recovery:
        """A recovery from one, or from a mapping of its settings, as a recipe has it.

        Raises:
            ValueError: If it is neither, or a setting is unknown or out of range.
        """
        if isinstance(given, Recovery):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(
                f"recover={given!r} must be a mapping of settings, such as {{train: router, max_tokens: 300000}}. "
                "Leave it empty ({}) for the defaults."
            )
        try:
            check_fields(given, [field.name for field in dataclasses.fields(cls)])
            return cls(**given)
        except ValueError as error:
            error.add_note("It is a setting of the training, recover in a recipe (--set recover.FIELD=VALUE).")
            raise

    def described(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        given = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {
            name: value
            for name, (value, default) in given.items()
            if (value is not None if default is None else value != default)
        }

    def told(self) -> dict[str, Any]:
        """The settings that a record of a training tells."""
        names = ["alpha", "temperature", "task_weight", "hidden_weight", "learning_rate", "max_tokens"]
        names += [] if self.final_density is None else ["final_density"]
        names += ["reconstruct"] if self.reconstruct else []
        names += ["lora_rank"] if self.train == "lora" else []
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        return f"then trained: {_TRAINS[self.train]}, on {self.max_tokens:,} tokens"


def check_train(train: str) -> None:
    """Raise a `ValueError` unless the name of what trains is known."""
    choose_one("train", train, _TRAINS, f": {'; '.join(f'{name} for {what}' for name, what in _TRAINS.items())}")


def check_number(name: str, value: Any) -> None:
    """Raise a `ValueError` unless a setting is a number, or left out."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise ValueError(f"{name}={value!r} is not a number. Pass one, such as 0.1.")


def check_amount(max_tokens: Any, held_out_share: Any) -> None:
    """Raise a `ValueError` unless an amount of text and the share of it that is held out are possible."""
    check_count("max_tokens", max_tokens, 2)
    if not 0 < held_out_share < 1:
        raise ValueError(
            f"held_out_share={held_out_share} must be between 0 and 1: the share of the documents that are not "
            "trained on. Use 0.1, or pass held_out=."
        )


def check_loss(alpha: float, temperature: float, task_weight: float, hidden_weight: float) -> None:
    """Raise a `ValueError` if a weight is negative, all are 0, or the temperature is not positive."""
    weights = {"alpha": alpha, "task_weight": task_weight, "hidden_weight": hidden_weight}
    wrong = {name: value for name, value in weights.items() if not 0 <= value < math.inf}
    if wrong or not any(weights.values()):
        said = ", ".join(f"{name}={value}" for name, value in (wrong or weights).items())
        raise ValueError(f"{said}: weights of a loss are at least 0, and one of them is more. Use alpha=1.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive. Use 1, or 2 as MC-SMoE does.")
