"""Time GGUF files side by side in llama.cpp; run by the interpreter of an environment that has llama-cpp-python.

    python llama_cpp_timing.py REQUEST.json ANSWER.json

The request is `{"files": [...], "prompt": tokens, "steps": tokens, "rounds": n, "threads": n}`. All files are loaded
before the first is timed, and every round times each of them once. The answer has, for each file and round, the seconds
of the prompt in one batch (`prefill`) and of all steps after it, one token at a time (`decode`).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

_FIRST_ID = 100


def main() -> None:
    """Answer the request."""
    import llama_cpp

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    prompt, steps = request["prompt"], request["steps"]
    models = [
        llama_cpp.Llama(
            file,
            n_ctx=prompt + steps + 8,
            n_batch=prompt,
            n_ubatch=prompt,
            n_threads=request["threads"],
            n_threads_batch=request["threads"],
            verbose=False,
        )
        for file in request["files"]
    ]
    answer: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in models]
    for _ in range(request["rounds"] + 1):
        for model, times in zip(models, answer, strict=True):
            for name, seconds in _run(model, prompt, steps).items():
                times[name].append(seconds)
    # The first round reads the files.
    kept = [{name: seconds[1:] for name, seconds in times.items()} for times in answer]
    Path(sys.argv[2]).write_text(json.dumps(kept), encoding="utf-8")


def _run(model: Any, prompt: int, steps: int) -> dict[str, float]:
    model.reset()
    start = time.perf_counter()
    model.eval([_FIRST_ID + token % 997 for token in range(prompt)])
    middle = time.perf_counter()
    for step in range(steps):
        model.eval([_FIRST_ID + step])
    return {"prefill": middle - start, "decode": time.perf_counter() - middle}


if __name__ == "__main__":
    main()
