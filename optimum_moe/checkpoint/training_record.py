"""`recovery.json`: what was trained of a checkpoint after it was compressed, on which text, and how it went."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RECOVERY_FILE = "recovery.json"
"""Name of the record, beside the weights."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class TrainingRecord:
    """The record of one recovery.

    Args:
        train: What was chosen to train: `"router"`, `"experts"`, `"lora"` or `"full"`.
        names: Parameters of the model that may differ from what compression gave.
        teacher: Name of the original, without its path.
        settings: Loss, learning rate and amount.
        data: Description of the training text, with its hash and tokens.
        held_out: Description of the text that the divergence was measured on.
        kl_before: KL(teacher || student) in nats a token on held-out text, before.
        kl_after: The same of what was written.
        best_step: Step whose weights were written, 0 for those from before.
        steps: Steps that were made.
        tokens: Tokens that were trained on, repeated ones counted each time.
        curve: (step, KL) of the held-out text.
        losses: (step, mean loss since the last one) of the training text.
        seed: Seed of all random choices.
        stopped: Why it ended.
    """

    train: str
    names: tuple[str, ...]
    teacher: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    held_out: Mapping[str, Any]
    kl_before: float
    kl_after: float
    best_step: int
    steps: int
    tokens: int
    curve: tuple[tuple[int, float], ...] = ()
    losses: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stopped: str = "at its last step"
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def won_back(self) -> float:
        """Share of the KL that was lost before and is not after."""
        return 1 - self.kl_after / self.kl_before if self.kl_before > 0 else 0.0

    def save(self, directory: str | Path) -> None:
        """Write `recovery.json` into the folder of a checkpoint, by which `verify` knows what was trained."""
        (Path(directory) / RECOVERY_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> TrainingRecord | None:
        """Read it from a folder; None if there is none.

        Raises:
            ValueError: If it is broken, or of another format version.
        """
        path = Path(directory) / RECOVERY_FILE
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            version = found["format_version"]
            pairs = {name: tuple((int(a), float(b)) for a, b in found.pop(name)) for name in ("curve", "losses")}
            record = cls(**{**found, **pairs, "names": tuple(map(str, found["names"]))})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is broken ({error}). Copy it again, or repeat the recovery.") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format_version={version}, this version of optimum_moe reads {FORMAT_VERSION}. Install the "
                "version that wrote it."
            )
        return record
