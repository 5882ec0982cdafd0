"""Run a checkpoint with mlx-lm; see `environment.run_script`."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Continue the prompts of the request greedily."""
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.utils import load_model

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model, _ = load_model(Path(request["checkpoint"]))
    # Scales of quantized matrices stay what they are.
    model.set_dtype(mx.float32)
    answers = []
    for prompt in request["prompts"]:
        ids = list(prompt)
        for _ in range(request["num_tokens"]):
            logits = model(mx.array([ids]))[0, -1]
            ids.append(int(mx.argmax(logits).item()))
        answers.append(ids[len(prompt) :])
    answer = {"version": mlx_lm.__version__, "tokens": answers}
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
