"""Compress one model on a Ray cluster: each worker has the whole model, and a share of the text and of the blocks.

    python examples/on_ray.py org/model --calibration corpus.txt --output out --workers 8 --gpus

Workers need the same files at the same paths: a shared folder, where they are on several machines. Needs
pip install "ray[train]".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from optimum_moe import ByteBudget, MoECompressor


def compress(settings: dict[str, Any]) -> None:
    """What every worker does; the first one writes."""
    compressor = MoECompressor.from_pretrained(
        settings["model"],
        ByteBudget(share=settings["share"]),
        settings["calibration"],
        output_dir=settings["output"],
        device_map={"": str(get_device())},
    )
    compressor.apply()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--share", type=float, default=0.5, help="of the experts' bytes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", action="store_true", help="one for each worker")
    arguments = parser.parse_args()
    # Workers have working folders of their own.
    arguments.calibration, arguments.output = (
        str(Path(path).resolve()) for path in (arguments.calibration, arguments.output)
    )
    if Path(arguments.model).is_dir():
        arguments.model = str(Path(arguments.model).resolve())
    trainer = TorchTrainer(
        compress,
        train_loop_config=vars(arguments),
        scaling_config=ScalingConfig(num_workers=arguments.workers, use_gpu=arguments.gpus),
        torch_config=TorchConfig(backend=None if arguments.gpus else "gloo"),
        run_config=RunConfig(name="optimum-moe"),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
