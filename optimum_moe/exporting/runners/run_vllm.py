"""Run a checkpoint with vLLM; see `environment.run_script`."""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Continue the prompts of the request greedily."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model = vllm.LLM(
        request["checkpoint"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=max(map(len, request["prompts"])) + request["num_tokens"] + 1,
        max_num_seqs=len(request["prompts"]),
        tensor_parallel_size=request.get("tensor_parallel", 1),
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=request["num_tokens"], ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], sampling)
    answer = {"version": vllm.__version__, "tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
