"""Export to runtimes that read Hugging Face checkpoints: vLLM, and transformers 4."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_moe.exporting.approximate_experts import ReplacedExport, plan_replaced, replaced_experts
from optimum_moe.exporting.exported import Exported
from optimum_moe.exporting.staging import stage, write_json
from optimum_moe.runtimes import PER_EXPERT

_STACKED = ("gate_up_proj", "down_proj")
_OLD_TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes that transformers 5 writes, and what transformers 4 calls them."""


@dataclass(frozen=True)
class FolderExport:
    """A checked export as a folder of the same weights, with a config that the runtime reads.

    Args:
        checkpoint: The checkpoint.
        config: The new config.
        tokenizer_class: Function that renames the class of a tokenizer.
    """

    checkpoint: Exported
    config: Mapping[str, Any]
    tokenizer_class: Callable[[str], str]

    def write(self, output: Path) -> None:
        """Write the folder; weights are hard links where the file system has them."""
        output.mkdir()
        stage(self.checkpoint, output, self.config, link=False)
        file = output / "tokenizer_config.json"
        if file.is_file():
            values = json.loads(file.read_text(encoding="utf-8"))
            if "tokenizer_class" in values:
                write_json(file, values | {"tokenizer_class": self.tokenizer_class(values["tokenizer_class"])})


def plan_folder(checkpoint: Exported, runtime: str) -> FolderExport | ReplacedExport:
    """Check an export to vLLM or transformers 4 before any tensor is read.

    Raises:
        ValueError: If the model class or the names of the tensors are not those that the runtime reads.
    """
    replaced = replaced_experts(checkpoint) if runtime == "vLLM" else None
    if replaced is not None:
        return plan_replaced(checkpoint, replaced)
    config = checkpoint.spelled_config()
    stacked = [name for name in checkpoint.headers.tensors if name.endswith(tuple(f"experts.{s}" for s in _STACKED))]
    if stacked and not checkpoint.structure and checkpoint.config.get("model_type") in PER_EXPERT:
        raise ValueError(
            f"{checkpoint.directory} stores experts as stacked tensors ({stacked[0]}), which {runtime} does not read "
            "for this architecture. Save it again with model.save_pretrained(folder, save_original_format=True)."
        )
    return FolderExport(checkpoint, config, lambda name: _OLD_TOKENIZERS.get(name, name))
