"""Compress a checkpoint that does not fit into memory, layer by layer; run it again after an interruption.

python examples/larger_than_memory.py org/model --keep-ratio 0.5 --calibration corpus.txt --output out
"""

from __future__ import annotations

import argparse

from optimum_moe import ExpertPruning, MoECompressor, verify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--max-memory", help='for tensors, such as "20GB"')
    arguments = parser.parse_args()
    compressor = MoECompressor.from_pretrained(
        arguments.model,
        ExpertPruning(keep_ratio=arguments.keep_ratio),
        arguments.calibration,
        engine="streaming",
        max_memory=arguments.max_memory,
        output_dir=arguments.output,
    )
    compressor.apply()
    print(verify(arguments.output))


if __name__ == "__main__":
    main()
