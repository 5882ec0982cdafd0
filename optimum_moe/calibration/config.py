"""`CalibrationConfig`: the source and amount of calibration data, and its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from optimum_moe.calibration.documents import did_you_mean
from optimum_moe.settings import check_count, check_seed, plain, token_count
from optimum_moe.statistics import Unseen

_LIMITS = (("num_samples", 1), ("max_tokens", 1), ("reservoir_tokens", 0))

DEFAULT_SAMPLE = 4096
"""Default size of a block's sample in tokens, if neither the user nor a stage sets one."""


@dataclass(frozen=True)
class CalibrationConfig:
    """The calibration data of a model, and how it is sampled.

    Args:
        source: one of
            a path to a .txt (documents separated by blank lines), .jsonl or .parquet file;
            a list of strings, or of chats (lists of {"role", "content"} or {"from", "value"} messages, rendered with
            the tokenizer's chat template), or of rows with a text or messages column; a stream keeps its order;
            a `datasets.Dataset`, streaming or not;
            tokenized rows, as lists of token ids or with an input_ids column (masked tokens are dropped): each remains
            one row (`packing` does not apply), and longer ones are split; no tokenizer is needed;
            examples with images, audio or video, which the model's processor turns into inputs one by one
            (`sequence_length`, `batch_size` and `packing` do not apply): chats with such content, or rows of {"text":
            with the processor's placeholders, "images", "audio" or "videos": objects or paths}; paths in a .jsonl
            are relative to its folder;
            an iterable of batches of model inputs, such as a DataLoader, used unchanged except for labels; only
            `num_samples` limits them;
            a mixture of text sources, {source: weight} or [(source, weight), ...]: token counts follow the weights,
            and the mixture ends when its first source is exhausted;
            files of several domains, {domain: path}, mixed with equal weights. Rows with a "domain" column name
            theirs, which changes nothing about how they are sampled.
        num_samples: maximum number of rows (dicts for model inputs); None (default) for no limit.
        max_tokens: maximum number of tokens, padding not counted, as a number or a text such as "64k". Default 65,536;
            None for no limit.
        sequence_length: tokens per row, default 512.
        batch_size: rows per batch, default 8.
        packing: True (default) joins documents with the EOS token and cuts rows without padding; a tail shorter than
            a row is dropped. False makes each document a padded row, and splits longer documents into several rows.
        text_column: column of the text or of the chats in .jsonl, .parquet and datasets, default "text". Without it a
            "messages" column is read as chats, or an "input_ids" column as token ids.
        seed: seed of the choice and order of documents and of the sampled tokens. None (default) for the seed of the
            run, or 0.
        unseen: policy for an expert that no calibration token reached: "warn" (default), "error", "keep", "prune".
        reservoir_tokens: tokens sampled at each block with their inputs and routing. None (default) for the number
            that the recipe needs (4,096, or 32,768 if it factorizes); for the byte budget twice or four times 32,768
            where as many tokens are observed and their samples take at most a quarter of the free memory (streaming:
            of the free disk). The number is recorded with the statistics. 0 samples none.

    Raises:
        ValueError: a value is outside of its range.
    """

    source: Any
    num_samples: int | None = None
    max_tokens: int | None = 65536
    sequence_length: int = 512
    batch_size: int = 8
    packing: bool = True
    text_column: str = "text"
    seed: int | None = None
    unseen: Unseen = "warn"
    reservoir_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.source is None:
            raise ValueError("source is None. Pass a path, texts, chats, a dataset or model inputs.")
        for name in (*(limit for limit, _ in _LIMITS), "sequence_length", "batch_size", "seed"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("max_tokens", "reservoir_tokens"):
            object.__setattr__(self, name, token_count(getattr(self, name)))
        for name, least in _LIMITS:
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least, ", or None")
        # A row of one token has no next token to predict.
        for name, least in (("sequence_length", 2), ("batch_size", 1)):
            check_count(name, getattr(self, name), least)
        if self.seed is not None:
            check_seed(self.seed)
        if self.max_tokens is not None and self.max_tokens < self.sequence_length:
            raise ValueError(
                f"max_tokens={self.max_tokens} is smaller than sequence_length={self.sequence_length}, so no row fits. "
                "Raise max_tokens or lower sequence_length."
            )
        if self.unseen not in get_args(Unseen):
            raise ValueError(
                f"unseen={self.unseen!r} is not one of {get_args(Unseen)}"
                f"{did_you_mean(self.unseen, get_args(Unseen)) or '.'}"
            )

    @property
    def sampled_tokens(self) -> int:
        """Number of tokens sampled at each block."""
        return DEFAULT_SAMPLE if self.reservoir_tokens is None else self.reservoir_tokens

    @property
    def random_seed(self) -> int:
        """The seed, 0 if neither the user nor the run sets one."""
        return 0 if self.seed is None else self.seed

    @classmethod
    def coerce(cls, value: Any) -> CalibrationConfig:
        """A config from whatever `calibration=` accepts.

        Args:
            value: a config (returned unchanged), a dict of its fields including "source" (as in a recipe), or any
                source.

        Raises:
            ValueError: the value is None, or a field is unknown or outside of its range.
        """
        if isinstance(value, cls):
            return value
        if cls.is_fields(value):
            fields = [field.name for field in dataclasses.fields(cls)]
            for key in value:
                if key not in fields:
                    raise ValueError(
                        f"Unknown field {key!r}{did_you_mean(key, fields) or f', the fields are {fields}.'}"
                    )
            return cls(**value)
        return cls(source=value)

    @staticmethod
    def is_fields(value: Any) -> bool:
        """Whether a value is a dict of fields, and not a mixture of sources."""
        return isinstance(value, Mapping) and "source" in value and not isinstance(value["source"], int | float)
