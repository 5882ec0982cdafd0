"""Graphs of compressed models (exported, compiled as a whole) give what the models give, at every length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimum_moe import ByteBudget, CalibrationConfig, LowRankSparse, MoECompressor, MSMoE
from tests.tiny_models import build, in_full, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")
METHODS: dict[str, Any] = {
    "rank": LowRankSparse(rank=8),
    "budget": ByteBudget(runs_in="transformers", share=0.5),
    "merged and budget": [MSMoE(num_experts=4), ByteBudget(runs_in="transformers", share=0.5)],
    "shared bases": [MSMoE(num_experts=4), LowRankSparse(rank=8, base="group")],
}


class Logits(nn.Module):
    """A model from ids to logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def compressed(target: str, method: str) -> Logits:
    config = CalibrationConfig([inputs_for(target, rows=4, length=32)])
    return Logits(MoECompressor.from_pretrained(build(target), METHODS[method], config, progress=False).apply())


@torch.no_grad()
def assert_equal_at_two_lengths(graph: Any, model: Logits, target: str) -> None:
    for length in (16, 23):
        ids = inputs_for(target, length=length, seed=length)["input_ids"]
        torch.testing.assert_close(graph(ids), model(ids), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(
    ("target", "method"),
    [
        *(("qwen3_moe", method) for method in METHODS),
        *in_full(("gpt_oss", "budget"), ("gpt_oss", "rank"), ("llama4", "rank")),
    ],
)
def test_an_exported_graph_runs_at_every_length(target: str, method: str) -> None:
    model = compressed(target, method)
    ids = inputs_for(target)["input_ids"]
    length = torch.export.Dim("length", min=4, max=64)
    exported = torch.export.export(model, (ids,), dynamic_shapes=({1: length},), strict=False)
    assert_equal_at_two_lengths(exported.module(), model, target)


@pytest.mark.parametrize("method", ["budget", pytest.param("rank", marks=pytest.mark.full)])
def test_the_whole_model_is_one_graph(method: str) -> None:
    model = compressed("qwen3_moe", method)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    assert_equal_at_two_lengths(compiled, model, "qwen3_moe")
