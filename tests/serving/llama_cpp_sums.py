"""Sums of squared inputs of every matrix, as llama.cpp's own graph sees them through its callback for tensors.

Run in the environment of llama-cpp-python: request and answer as files, as the scripts of `optimum_moe.exporting`.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np

MUL_MAT, MUL_MAT_ID = b"MUL_MAT", b"MUL_MAT_ID"


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]
sums: dict[str, np.ndarray] = {}
counts: dict[str, np.ndarray] = {}


def array(tensor: Tensor, dtype: type) -> np.ndarray:
    """The values of a tensor, with the row length last; it may be strided."""
    size = np.dtype(dtype).itemsize
    extent = sum((n - 1) * s for n, s in zip(tensor.ne, tensor.nb, strict=True)) + size
    raw = np.frombuffer((ctypes.c_char * extent).from_address(tensor.data), np.uint8)
    return np.lib.stride_tricks.as_strided(
        raw[: extent // size * size].view(dtype), tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    )


def evaluated(pointer: int, ask: bool, user_data: object) -> bool:
    """Called before (ask) and after each tensor of the graph is computed."""
    tensor = ctypes.cast(pointer, ctypes.POINTER(Tensor)).contents
    name = OPS(tensor.op)
    if name not in (MUL_MAT, MUL_MAT_ID):
        return not ask
    weight = tensor.src[0].contents
    key = weight.name.decode()
    if not key.startswith("blk."):
        return not ask
    if ask:
        return True
    inputs = array(tensor.src[1].contents, np.float32).astype(np.float64)
    if name == MUL_MAT_ID:
        chosen = array(tensor.src[2].contents, np.int32)[0, 0]
        experts, width = weight.ne[2], inputs.shape[-1]
        own = sums.setdefault(key, np.zeros((experts, width)))
        number = counts.setdefault(key, np.zeros(experts))
        for token, ids in enumerate(chosen):
            for slot, expert in enumerate(ids):
                own[expert] += inputs[0, token, slot % inputs.shape[2]] ** 2
                number[expert] += 1
        return True
    matrices = weight.ne[2]
    own = sums.setdefault(key, np.zeros((matrices, inputs.shape[-1])))
    for index in range(inputs.shape[1]):
        own[index % matrices] += (inputs[0, index] ** 2).sum(0)
    number = counts.setdefault(key, np.zeros(1))
    number += inputs.shape[1] * inputs.shape[2] // matrices
    return True


library = llama_cpp.llama_cpp._lib
library.ggml_op_name.restype = ctypes.c_char_p
OPS = library.ggml_op_name


def main() -> None:
    """Decode the rows of the request one after the other."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    callback = llama_cpp.ggml_backend_sched_eval_callback(evaluated)
    model_params, context_params = llama_cpp.llama_model_default_params(), llama_cpp.llama_context_default_params()
    model_params.use_extra_bufts = False
    context_params.n_ctx = context_params.n_batch = context_params.n_ubatch = 256
    context_params.type_k = context_params.type_v = 0
    context_params.flash_attn_type = 0
    context_params.cb_eval = callback
    model = llama_cpp.llama_model_load_from_file(request["checkpoint"].encode(), model_params)
    for row in request["prompts"]:
        context = llama_cpp.llama_init_from_model(model, context_params)
        batch = llama_cpp.llama_batch_init(len(row), 0, 1)
        batch.n_tokens = len(row)
        for place, token in enumerate(row):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            # Else the last layer computes the last token alone.
            batch.seq_id[place][0], batch.logits[place] = 0, True
        assert llama_cpp.llama_decode(context, batch) == 0
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    answer = {name: {"sums": sums[name].tolist(), "counts": counts[name].tolist()} for name in sums}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
