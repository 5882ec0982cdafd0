"""The checkpoint to export: what it stores its experts in, and what its config and headers say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_moe.checkpoint.checkpoint_tensors import built
from optimum_moe.checkpoint.headers import Headers, read_headers
from optimum_moe.checkpoint.location import raw_config
from optimum_moe.checkpoint.writer import spell_out
from optimum_moe.hf.structure import METHOD, REPLACEMENTS

CONSTANTS_FIELD = "approximate_experts"
"""Field of `config.json` that lists, by layer, experts that are replaced by a constant output."""


@dataclass(frozen=True)
class Exported:
    """A checkpoint with checked headers.

    Args:
        directory: Its folder.
        config: The content of `config.json`.
        headers: Names, dtypes and shapes of its tensors.
    """

    directory: Path
    config: Mapping[str, Any]
    headers: Headers

    @property
    def is_structured(self) -> bool:
        """Whether it has a map or experts in compressed formats, which this package runs."""
        return (self.config.get("quantization_config") or {}).get("quant_method") == METHOD

    @property
    def record(self) -> Mapping[str, Any]:
        """What its config says of the structure of its experts; empty for a plain checkpoint."""
        quantization = self.config.get("quantization_config") or {}
        replacements = self.config.get(REPLACEMENTS) or {}
        return quantization if quantization.get("quant_method") == METHOD else replacements.get(METHOD) or {}

    @property
    def structure(self) -> tuple[str, ...]:
        """What its experts have that stock model classes cannot load, in words; empty for a plain checkpoint."""
        said = []
        if self.record:
            blocks = [dict(entry) for entry in self.record.get("blocks", {}).values()]
            if any(entry.get("routing") == "map" and entry["num_groups"] < entry["num_experts"] for entry in blocks):
                said.append("a map of the router's experts to merged ones")
            if any("factors" in entry for entry in blocks):
                said.append("experts in compressed formats")
            if not said:
                said.append("another number of experts in each layer")
        if CONSTANTS_FIELD in self.config:
            said.append("experts that are replaced by a constant output, in other numbers by layer")
        return tuple(said)

    def spelled_config(self) -> dict[str, Any]:
        """The config with all settings that other runtimes read, see `spell_out`."""
        _, blocks = built(self.directory, self.headers)
        return spell_out(self.config, {found.surgeon.count_fields for found in blocks})

    @property
    def quantization(self) -> str | None:
        """The method that its values are quantized with; None if they are not."""
        method = (self.config.get("quantization_config") or {}).get("quant_method")
        return None if method in (None, METHOD) else str(method)

    @property
    def architecture(self) -> str:
        """The model class that `config.json` names."""
        return str((self.config.get("architectures") or ["a model without an architecture"])[0])


def open_exported(checkpoint: str | os.PathLike[str]) -> Exported:
    """Open a checkpoint, without reading a tensor.

    Raises:
        ValueError: If it is not a folder with a config and complete safetensors files.
    """
    directory = Path(checkpoint).expanduser()
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a folder. Give the folder of a compressed checkpoint; a Hub model is exported after "
            "`hf download ORG/MODEL --local-dir FOLDER`."
        )
    return Exported(directory, raw_config(directory), read_headers(directory))
