"""Export to GGUF files for llama.cpp and what is built on it (Ollama, LM Studio), with llama.cpp's own tools."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optimum_moe.exporting.exported import Exported
from optimum_moe.exporting.gguf_file import GGUFHeader, read_gguf
from optimum_moe.exporting.gguf_types import TENSOR_TYPES, FileType, file_type, stored_as
from optimum_moe.exporting.importance import ImportanceMatrix, collect_importance
from optimum_moe.exporting.llama_cpp_tools import Quantizer, check_converter, convert, converter, find_quantizer
from optimum_moe.exporting.pre_tokenizers import known_pre_tokenizer
from optimum_moe.exporting.staging import stage

_SHOWN = 3
_SMALL_BLOCK = 32
_AS_STORED = {"BF16": "bf16", "F16": "f16", "F32": "f32"}


@dataclass(frozen=True)
class GGUFExport:
    """A checked export to a GGUF file.

    Args:
        checkpoint: The checkpoint.
        kind: Type of the file.
        llama_cpp: Where llama.cpp's converter is.
        quantizer: llama.cpp's quantizer; None if it is not needed.
        calibration: Text for the importance matrix; None for none.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer; None to recognize it.
    """

    checkpoint: Exported
    kind: FileType
    llama_cpp: str | os.PathLike[str] | None
    quantizer: Quantizer | None
    calibration: Any = None
    pre_tokenizer: str | None = None

    def write(self, output: Path) -> None:
        """Write the file."""
        values = self.kind.name if self.kind.is_converted else stored_type(self.checkpoint)
        with (
            TemporaryDirectory(prefix="optimum_moe_", dir=output.parent) as folder,
            converter(self.llama_cpp) as script,
        ):
            staged = Path(folder) / "checkpoint"
            staged.mkdir()
            stage(self.checkpoint, staged, self.checkpoint.spelled_config(), link=True)
            named = self.pre_tokenizer or known_pre_tokenizer(self.checkpoint.directory)
            converted = output if self.kind.is_converted else Path(folder) / "converted.gguf"
            convert(
                script=script,
                checkpoint=staged,
                output=converted,
                kind=values,
                name=self.checkpoint.directory.resolve().name,
                pre_tokenizer=named,
            )
            if self.quantizer is None:
                return
            matrix = None
            importance = None
            if self.calibration is not None:
                matrix = collect_importance(self.checkpoint.directory, self.calibration)
                warn_incomplete(matrix, read_gguf(converted), self.kind)
                importance = Path(folder) / "imatrix.gguf"
                matrix.save(importance)
            means = None if matrix is None else matrix.means()
            self.quantizer.run(converted, output, self.kind, importance, means)
            warn_fallbacks(read_gguf(output), self.kind)


def plan_gguf(
    checkpoint: Exported,
    quantize: str | None,
    calibration: Any,
    llama_cpp: str | os.PathLike[str] | None,
    python: str,
    pre_tokenizer: str | None,
) -> GGUFExport:
    """Check an export to a GGUF file before any tensor is read.

    Raises:
        ValueError: If llama.cpp's tools are missing, or the type needs an importance matrix and there is no text.
    """
    kind = file_type(quantize or stored_type(checkpoint))
    check_converter(llama_cpp)
    if kind.needs_importance and calibration is None:
        raise ValueError(
            f"llama.cpp writes {kind.name} only with an importance matrix. Pass calibration= (--calibration) text, "
            "from which it is measured."
        )
    if kind.is_converted and calibration is not None:
        raise ValueError(
            f"{kind.name} stores the values as they are, so the importance matrix of calibration= has no effect. Leave "
            "it out, or pass quantize= (--quantize)."
        )
    quantizer = None if kind.is_converted else find_quantizer(llama_cpp, python)
    return GGUFExport(checkpoint, kind, llama_cpp, quantizer, calibration, pre_tokenizer)


def stored_type(checkpoint: Exported) -> str:
    """The file type with the checkpoint's own values, so that nothing is rounded."""
    counts: dict[str, int] = {}
    for dtype, _, size in checkpoint.headers.tensors.values():
        counts[dtype] = counts.get(dtype, 0) + size
    return _AS_STORED.get(max(counts, key=lambda dtype: counts[dtype]), "f32")


def warn_fallbacks(header: GGUFHeader, kind: FileType) -> None:
    """Warn of matrices that llama.cpp stored in a larger type because their rows do not fit the blocks of the type."""
    block = TENSOR_TYPES[kind.main].block
    fell = {
        name: tensor
        for name, tensor in header.tensors.items()
        if len(tensor.shape) > 1
        and tensor.shape[-1] % block
        and tensor.type == stored_as(kind.main, tensor.shape[-1])
        and name.endswith(".weight")
    }
    if not fell:
        return
    names = sorted(fell, key=lambda name: -(fell[name].bytes or 0))
    shown = ", ".join(f"{name} (rows of {fell[name].shape[-1]}) as {fell[name].type}" for name in names[:_SHOWN])
    hidden = header.metadata.get(f"{header.metadata.get('general.architecture')}.embedding_length", 0)
    experts = any("_exps." in name and tensor.shape[-1] != hidden for name, tensor in fell.items())
    remedy = f"The hidden size of {hidden} is none either: choose a type with smaller blocks"
    if hidden % block == 0:
        remedy = "They are no widths of experts, so another compression would not change that"
        if experts:
            remedy = f'For a smaller file compress again with quantize="{kind.name}", which chooses fitting widths'
        remedy += ", or choose a type with smaller blocks" * (block > _SMALL_BLOCK)
    warnings.warn(
        f"{kind.name} stores rows in blocks of {block}. llama.cpp stored {len(fell)} matrices whose rows are no "
        f"multiple of it in larger types: {shown}{', ...' if len(fell) > _SHOWN else ''}. {remedy}.",
        stacklevel=2,
    )


def warn_incomplete(matrix: ImportanceMatrix, header: GGUFHeader, kind: FileType) -> None:
    """Warn of matrices that would be quantized without their part of the importance matrix.

    Raises:
        ValueError: If an entry does not fit its matrix.
    """
    lacking = []
    for name, tensor in header.tensors.items():
        if (
            not name.startswith("blk.")
            or len(tensor.shape) < 2
            or tensor.shape[-1] % 32
            or not name.endswith(".weight")
        ):
            continue
        entry = matrix.sums.get(name)
        if entry is None:
            lacking.append(name)
            continue
        rows = tensor.shape[0] if len(tensor.shape) == 3 else 1
        if entry.shape != (rows, tensor.shape[-1]):
            raise ValueError(
                f"The importance matrix has {entry.shape} for {name}, whose inputs are {(rows, tensor.shape[-1])}. "
                "Leave out calibration=, and report this architecture."
            )
    if lacking:
        warnings.warn(
            f"{len(lacking)} matrices are quantized to {kind.name} without importances, because this package does not "
            f"know llama.cpp's names of them: {', '.join(lacking[:_SHOWN])}{', ...' * (len(lacking) > _SHOWN)}.",
            stacklevel=2,
        )
