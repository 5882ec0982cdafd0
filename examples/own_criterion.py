"""Prune experts by a criterion of your own: one function of what was observed.

python examples/own_criterion.py org/model --num-experts 64 --calibration corpus.txt --output out
"""

from __future__ import annotations

import argparse

import torch

from optimum_moe import ExpertPruning, MoECompressor, register_saliency


@register_saliency("mean_gate")
def mean_gate(gate_sum_E: torch.Tensor, token_count_E: torch.Tensor) -> torch.Tensor:
    """(E,) mean routing weight of an expert over its tokens: how sure the router is when it picks it."""
    return gate_sum_E / token_count_E.clamp(min=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("--num-experts", type=int, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    method = ExpertPruning(num_experts=arguments.num_experts, saliency="mean_gate")
    compressor = MoECompressor.from_pretrained(arguments.model, method, arguments.calibration)
    compressor.apply()
    print(compressor.save_pretrained(arguments.output))


if __name__ == "__main__":
    main()
