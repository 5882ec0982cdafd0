"""Finds llama.cpp's converter and its quantizer, and runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from optimum_moe.exporting.environment import RuntimeFailed, has_module, reason_of, run_script
from optimum_moe.exporting.gguf_types import FileType
from optimum_moe.exporting.targets import CONVERTER, QUANTIZER

SCRIPT = "convert_hf_to_gguf.py"
_IN_ARCHIVE = (SCRIPT, "conversion", "gguf-py")
_NO_MODULE = re.compile(r"No module named '(\w+)")
_BINARIES = ("llama-quantize", "build/bin/llama-quantize", "bin/llama-quantize")


@contextmanager
def converter(llama_cpp: str | os.PathLike[str] | None) -> Iterator[Path]:
    """llama.cpp's converter.

    Args:
        llama_cpp: A checkout of llama.cpp, a folder that has one as `vendor/llama.cpp`, or the source distribution of
            llama-cpp-python, which is unpacked during the context.

    Raises:
        ValueError: If there is none.
    """
    if llama_cpp is None:
        raise ValueError(f"GGUF files are written by llama.cpp's own converter. {CONVERTER}.")
    path = Path(llama_cpp).expanduser()
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz")):
        with TemporaryDirectory(prefix="optimum_moe_") as folder:
            yield _unpacked(path, Path(folder))
        return
    for place in (path / SCRIPT, path / "vendor" / "llama.cpp" / SCRIPT):
        if place.is_file():
            # A relative path would not be found from the folder in which the converter runs.
            yield place.resolve()
            return
    raise ValueError(f"{path} has no {SCRIPT}. {CONVERTER}.")


def check_converter(llama_cpp: str | os.PathLike[str] | None) -> None:
    """Raise a `ValueError` if there is no converter, without unpacking it."""
    if llama_cpp is not None and Path(llama_cpp).expanduser().is_file():
        if not str(llama_cpp).endswith((".tar.gz", ".tgz")):
            raise ValueError(f"{llama_cpp} is no source distribution (.tar.gz). {CONVERTER}.")
        return
    with converter(llama_cpp):
        pass


def _unpacked(archive: Path, folder: Path) -> Path:
    """The converter of a source distribution, unpacked with what it imports."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = Path(member.name).parts
                if "llama.cpp" not in parts:
                    continue
                inside = parts[parts.index("llama.cpp") + 1 :]
                if inside and inside[0] in _IN_ARCHIVE:
                    member.name = "/".join(inside)
                    tar.extract(member, folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} cannot be unpacked ({error}). {CONVERTER}.") from error
    if not (folder / SCRIPT).is_file():
        raise ValueError(f"{archive} has no {SCRIPT}. {CONVERTER}.")
    return folder / SCRIPT


def convert(script: Path, checkpoint: Path, output: Path, kind: str, name: str, pre_tokenizer: str | None) -> str:
    """Convert a checkpoint into a GGUF file, in this interpreter's environment.

    Args:
        script: llama.cpp's converter.
        checkpoint: The folder, without code.
        output: The file.
        kind: "f32", "f16" or "bf16".
        name: Name of the model, stored in the file.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, for a tokenizer that the converter does not recognize.

    Returns:
        The pre-tokenizer that was used, or "recognized".

    Raises:
        RuntimeFailed: If the converter refuses the checkpoint.
    """
    request: dict[str, Any] = {
        "converter": str(script),
        "checkpoint": str(checkpoint),
        "output": str(output),
        "type": kind,
        "name": name,
        "pre_tokenizer": pre_tokenizer,
    }
    try:
        answer = run_script(sys.executable, "convert_to_gguf", request, "convert the checkpoint with llama.cpp")
    except RuntimeFailed as error:
        lacking = _NO_MODULE.search(str(error))
        if lacking is not None:
            raise RuntimeFailed(
                f"llama.cpp's converter needs {lacking[1]}, which {sys.executable} lacks. Install it: pip install "
                f"{lacking[1]}.",
                error.reason,
            ) from error
        if "pre-tokenizer was not recognized" not in str(error):
            raise
        raise RuntimeFailed(
            "llama.cpp recognizes tokenizers by a hash of what they give, and does not know this one, nor is its "
            "pre-tokenizer one that is known to be the same. If the tokenizer splits text as one of llama.cpp's does, "
            "name that one: pre_tokenizer='llama-bpe' (--pre-tokenizer); the names are in get_vocab_base_pre of "
            "llama.cpp's conversion/base.py. A wrong one gives wrong tokens.",
            error.reason,
        ) from error
    return str(answer["pre_tokenizer"])


@dataclass(frozen=True)
class Quantizer:
    """llama.cpp's quantizer: a binary, or llama-cpp-python in some environment.

    Args:
        binary: `llama-quantize`; None for llama-cpp-python.
        python: Interpreter that has llama-cpp-python.
    """

    binary: str | None
    python: str

    def run(
        self,
        source: Path,
        output: Path,
        kind: FileType,
        importance: Path | None,
        means: Mapping[str, np.ndarray[Any, Any]] | None,
    ) -> None:
        """Quantize a GGUF file.

        Args:
            source: The file to quantize.
            output: The new file.
            kind: Its type.
            importance: The importance matrix as a GGUF file; None for none.
            means: The same as mean squares by tensor.

        Raises:
            RuntimeFailed: If llama.cpp refuses.
        """
        threads = os.cpu_count() or 1
        if self.binary is not None:
            options = [] if importance is None else ["--imatrix", str(importance)]
            command = [self.binary, *options, str(source), str(output), kind.name.upper(), str(threads)]
            run = subprocess.run(command, capture_output=True, check=False)
            if run.returncode:
                said = (run.stdout + run.stderr).decode("utf-8", errors="replace")
                reason = reason_of([line.strip() for line in said.splitlines() if line.strip()])
                raise RuntimeFailed(f"{self.binary} could not quantize to {kind.name}: {reason}", reason)
            return
        with TemporaryDirectory(prefix="optimum_moe_") as folder:
            file = None
            if means is not None:
                file = str(Path(folder) / "importance.npz")
                # Names have dots, which np.savez takes as keywords all the same.
                np.savez(file, **dict(means))  # type: ignore[arg-type]
            request = {
                "input": str(source),
                "output": str(output),
                "type": kind.number,
                "threads": threads,
                "importance": file,
            }
            run_script(self.python, "quantize_gguf", request, f"quantize to {kind.name}")


def find_quantizer(llama_cpp: str | os.PathLike[str] | None, python: str) -> Quantizer:
    """llama.cpp's quantizer: of a checkout that is built, else of `python`'s llama-cpp-python, else on PATH.

    Raises:
        ValueError: If there is none.
    """
    if llama_cpp is not None:
        for name in _BINARIES:
            binary = Path(llama_cpp).expanduser() / name
            if binary.is_file() and os.access(binary, os.X_OK):
                return Quantizer(str(binary), python)
    if has_module(python, "llama_cpp"):
        return Quantizer(None, python)
    on_path = shutil.which("llama-quantize")
    if on_path is not None:
        return Quantizer(on_path, python)
    raise ValueError(
        f"Quantized GGUF files are written by llama.cpp's own quantizer, and {python} has none. {QUANTIZER}."
    )
