"""Convert a checkpoint with mlx-lm; see `environment.run_script`."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Convert the checkpoint that the request names."""
    import mlx_lm

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    quantized = {} if request["bits"] is None else {"q_bits": request["bits"], "q_group_size": request["group"]}
    mlx_lm.convert(request["checkpoint"], request["output"], quantize=bool(quantized), **quantized)
    Path(sys.argv[2]).write_text(json.dumps({"version": mlx_lm.__version__}), encoding="utf-8")


if __name__ == "__main__":
    main()
