"""Run a checkpoint with vLLM; see `environment.run_script`."""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Continue the prompts of the request greedily."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if request["tensor_parallel"] == 1:
        # An error is then raised here, with its message, and not in another process.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if not request["plugins"]:
        os.environ |= {"VLLM_PLUGINS": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    import vllm
    from vllm.platforms import current_platform

    longest = max(map(len, request["prompts"])) + request["num_tokens"] + 1
    config = json.loads((Path(request["checkpoint"]) / "config.json").read_text(encoding="utf-8"))
    # On a CPU, float32 and latent attention go together only in this one.
    latent = "kv_lora_rank" in config and current_platform.is_cpu()
    model = vllm.LLM(
        request["checkpoint"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_batched_tokens=longest * len(request["prompts"]),
        max_num_seqs=len(request["prompts"]),
        tensor_parallel_size=request["tensor_parallel"],
        **({"attention_config": {"backend": "CPU_MLA"}} if latent else {}),
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=request["num_tokens"], ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], sampling)
    answer = {"version": vllm.__version__, "tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
