"""Run a checkpoint with the transformers of this environment; see `environment.run_script`."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Continue the prompts of the request greedily."""
    import torch
    import transformers

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(request["checkpoint"], torch_dtype=torch.float32).eval()
    answers = []
    with torch.no_grad():
        for prompt in request["prompts"]:
            ids = torch.tensor([prompt])
            for _ in range(request["num_tokens"]):
                # Without a cache, whose interface differs between versions.
                logits = model(ids, use_cache=False).logits[:, -1]
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            answers.append(ids[0, len(prompt) :].tolist())
    answer = {"version": transformers.__version__, "tokens": answers}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
