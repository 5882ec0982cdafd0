"""Quantize a GGUF file with llama.cpp through llama-cpp-python; see `environment.run_script`."""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Quantize the file that the request names."""
    import llama_cpp

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = request["type"]
    params.nthread = request["threads"]
    held = _importance(llama_cpp, params, request["importance"])
    status = llama_cpp.llama_model_quantize(request["input"].encode(), request["output"].encode(), ctypes.byref(params))
    del held
    if status:
        raise RuntimeError(f"llama_model_quantize ended with status {status}")
    Path(sys.argv[2]).write_text(json.dumps({"version": llama_cpp.__version__}), encoding="utf-8")


def _importance(llama_cpp: Any, params: Any, file: str | None) -> Any:
    """Set the importance matrix, mean squares by tensor; returns what has to stay in memory."""
    if file is None:
        return None
    with np.load(file) as stored:
        arrays = {name: np.ascontiguousarray(stored[name], np.float32) for name in stored.files}
    # A null name ends the list.
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, (name, array) in zip(entries, arrays.items(), strict=False):
        entry.name = name.encode()
        entry.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = array.size
    params.imatrix = ctypes.cast(entries, type(params.imatrix))
    return arrays, entries


if __name__ == "__main__":
    main()
