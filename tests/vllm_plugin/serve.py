"""Greedy tokens of checkpoints in vLLM; run by the interpreter of an environment that has it.

    python serve.py REQUESTS.json ANSWERS.json

Requests are `{"checkpoint": ..., "prompts": [[id, ...], ...], "tokens": n, "options": {...}}`; answers have `tokens`,
or `error` where vLLM refused.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    options = {"enforce_eager": True, "dtype": "float32"} | request["options"]
    model = None
    try:
        model = LLM(
            request["checkpoint"],
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_seqs=4,
            max_num_batched_tokens=64,
            disable_log_stats=True,
            **options,
        )
        sampling = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True, detokenize=False)
        outputs = model.generate([{"prompt_token_ids": p} for p in request["prompts"]], sampling, use_tqdm=False)
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        del model
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([answer(request) for request in requests]), encoding="utf-8")
