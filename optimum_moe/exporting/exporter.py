"""`export`: write a checkpoint for another runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from optimum_moe.checkpoint.destination import remove
from optimum_moe.exporting.environment import check_python
from optimum_moe.exporting.exported import open_exported
from optimum_moe.exporting.targets import Target, check_quantize, get_target, refuse_inexpressible


def export(
    checkpoint: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str] | None = None,
    *,
    quantize: str | None = None,
    calibration: Any = None,
    llama_cpp: str | os.PathLike[str] | None = None,
    python: str | os.PathLike[str] | None = None,
    pre_tokenizer: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint for another runtime, with that runtime's own converter.

    Nothing is written at `output` unless the export succeeds, no code of the checkpoint is run, and no pickled file is
    read.

    Args:
        checkpoint: Folder of a checkpoint: compressed, or the original.
        to: "gguf" (llama.cpp, Ollama, LM Studio), "mlx", "vllm", "compressed-tensors" (vLLM, with the experts in 4 or 8
            bits) or "transformers4".
        output: The new file or folder; by default beside the checkpoint, under its name and the type.
        quantize: Type of the values, such as "q4_k_m" or "q8_0" for GGUF, "4bit" for MLX, "w4a16" or "w8a16" for
            compressed-tensors; by default the checkpoint's own values.
        calibration: Text for the importance matrix of a quantized GGUF file, as `calibration` of `MoECompressor`; None
            for none.
        llama_cpp: A checkout of llama.cpp, or the source distribution of llama-cpp-python, for GGUF.
        python: Interpreter of an environment that has llama-cpp-python or mlx-lm; by default this one.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, for a tokenizer that it does not recognize.
        overwrite: Whether an existing `output` is replaced.

    Returns:
        Path of the new file or folder.

    Raises:
        ValueError: If the runtime cannot express the checkpoint, its converter is missing or refuses, or `output`
            exists. All but the converter's own refusals are raised before any tensor is read.
    """
    target = get_target(to)
    check_quantize(target, quantize)
    _check_arguments(target, calibration=calibration, llama_cpp=llama_cpp, pre_tokenizer=pre_tokenizer)
    interpreter = check_python(python)
    opened = open_exported(checkpoint)
    refuse_inexpressible(opened, target)
    place = _destination(opened.directory, target, output, quantize, overwrite)
    if target.name == "gguf":
        from optimum_moe.exporting.to_gguf import plan_gguf

        planned: Any = plan_gguf(opened, quantize, calibration, llama_cpp, interpreter, pre_tokenizer)
    elif target.name == "mlx":
        from optimum_moe.exporting.to_mlx import plan_mlx

        planned = plan_mlx(opened, quantize, interpreter)
    elif target.name == "compressed-tensors":
        from optimum_moe.exporting.to_compressed_tensors import plan_packed

        planned = plan_packed(opened, quantize)
    else:
        from optimum_moe.exporting.to_folder import plan_folder

        planned = plan_folder(opened, target.runtime)
    beside = place.parent / f".{place.name}.writing"
    place.parent.mkdir(parents=True, exist_ok=True)
    remove(beside)
    try:
        planned.write(beside)
        if overwrite:
            remove(place)
        beside.rename(place)
    finally:
        remove(beside)
    return place


def _check_arguments(target: Target, **given: Any) -> None:
    """Raise a `ValueError` for an argument that has no effect on this export."""
    if target.name == "gguf":
        return
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}= is for to='gguf', and to={target.name!r} was given. Leave it out.")


def _destination(
    directory: Path, target: Target, output: str | os.PathLike[str] | None, quantize: str | None, overwrite: bool
) -> Path:
    """Where the export is written.

    Raises:
        ValueError: If something is there already, or it would replace the checkpoint.
    """
    if output is None:
        name = directory.resolve().name
        middle = "" if quantize is None else f"-{quantize.lower()}"
        ending = f"{middle}.gguf" if target.name == "gguf" else f"-{target.suffix}{middle}"
        place = directory.resolve().parent / f"{name}{ending}"
    else:
        place = Path(output).expanduser().absolute()
    if place.resolve() == directory.resolve() or place.resolve() in directory.resolve().parents:
        raise ValueError(f"{place} holds the checkpoint that is exported. Choose another place.")
    if target.name == "gguf" and (place.is_dir() or not place.name.endswith(".gguf")):
        raise ValueError(f"{place} is not the name of a GGUF file. Give a name that ends in .gguf.")
    if os.path.lexists(place) and not overwrite:
        raise ValueError(f"{place} exists. Choose another place, or pass overwrite=True (--overwrite).")
    return place
