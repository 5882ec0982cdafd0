"""Run a GGUF file with llama-cpp-python: greedy tokens, or the logits of given tokens; see `environment.run_script`."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

_FLOAT32 = 0


def main() -> None:
    """Continue the prompts of the request, or write the logits of its rows of tokens."""
    import llama_cpp

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    _use_plain_buffers(llama_cpp)
    longest = max(map(len, request["prompts"])) + request["num_tokens"]
    # Keys and values in float32: what is compared are the weights.
    model = llama_cpp.Llama(
        request["checkpoint"],
        n_ctx=longest + 8,
        n_batch=longest + 8,
        n_ubatch=longest + 8,
        type_k=_FLOAT32,
        type_v=_FLOAT32,
        flash_attn=False,
        logits_all=True,
        verbose=False,
    )
    answer: dict[str, Any] = {"version": llama_cpp.__version__}
    if request.get("logits"):
        rows = [_logits(model, prompt) for prompt in request["prompts"]]
        np.save(request["logits"], np.stack(rows).astype(np.float16 if request.get("half") else np.float32))
    else:
        answer["tokens"] = [_greedy(model, prompt, request["num_tokens"]) for prompt in request["prompts"]]
    if request.get("text"):
        answer["text_tokens"] = [
            model.tokenize(text.encode(), add_bos=False, special=False) for text in request["text"]
        ]
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


def _use_plain_buffers(llama_cpp: Any) -> None:
    """Do not repack weights for the processor's matrix units, which crashes on small matrices with some of them."""
    defaults = llama_cpp.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = plain


def _logits(model: Any, tokens: list[int]) -> Any:
    """(tokens, vocabulary) logits."""
    model.reset()
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


def _greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    model.reset()
    given, found = list(prompt), []
    for _ in range(num_tokens):
        model.eval(given)
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        given = found[-1:]
    return found


if __name__ == "__main__":
    main()
