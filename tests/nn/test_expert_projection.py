"""Gradients of factorized experts: the same however the stacked tensors are read, and read once a pass."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from optimum_moe.formats import ExpertsSpec
from optimum_moe.nn import FactorizedExperts
from optimum_moe.nn.factorized_layer import run_factorized
from optimum_moe.nn.merged_experts import run_routed

EXPERTS, HIDDEN, WIDTH = 6, 16, 24
PROJECTIONS = ("gate", "up", "down")
SIZES = ExpertsSpec(
    (WIDTH, WIDTH, WIDTH, WIDTH, 8, 0),
    PROJECTIONS,
    {
        "low_rank": dict.fromkeys(PROJECTIONS, (8, None, 8, 16, None, None)),
        "sparse_rows": dict.fromkeys(PROJECTIONS, (3, 0, 0, 2, 0, 0)),
    },
)


def activate(gate_Pn: torch.Tensor, up_Pn: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate_Pn) * up_Pn


@pytest.fixture
def factors() -> FactorizedExperts:
    torch.manual_seed(0)
    made = FactorizedExperts(SIZES, HIDDEN, ("gate", "up", "down"))
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def output_of(factors: FactorizedExperts, tokens: int, opened: dict | None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    hidden_TH = torch.randn(tokens, HIDDEN, generator=generator)
    index_TK = torch.rand(tokens, EXPERTS + 1, generator=generator).argsort(-1)[:, :3]
    weights_TK = torch.rand(tokens, 3, generator=generator)
    run = partial(run_factorized, factors, activate, None, opened=opened)
    return run_routed(run, EXPERTS, hidden_TH, index_TK, weights_TK)


@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_gradients_do_not_depend_on_how_tensors_are_read(factors: FactorizedExperts, tokens: int) -> None:
    gradients, outputs = [], []
    for opened in (None, {}):
        factors.zero_grad()
        outputs.append(output_of(factors, tokens, opened))
        outputs[-1].square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in factors.named_parameters() if p.grad is not None})
    with torch.no_grad():
        outputs.append(output_of(factors, tokens, {}))
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[1])
    assert max(g.abs().max() for g in gradients[0].values()) > 0.1
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, msg=name)


def test_one_token_is_a_row_of_many(factors: FactorizedExperts) -> None:
    run = partial(run_factorized, factors, activate, None)
    hidden_TH, weights_TK = torch.randn(20, HIDDEN), torch.rand(20, 3)
    # The id beyond the experts is a sentinel.
    index_TK = torch.rand(20, EXPERTS + 1).argsort(-1)[:, :3]
    index_TK[0] = EXPERTS
    with torch.no_grad():
        together = run_routed(run, EXPERTS, hidden_TH, index_TK, weights_TK)
        for row in range(20):
            rows = slice(row, row + 1)
            alone = run_routed(run, EXPERTS, hidden_TH[rows], index_TK[rows], weights_TK[rows])
            torch.testing.assert_close(alone, together[rows], rtol=1e-5, atol=1e-5 * float(together.abs().max()))
    assert not together[0].any()


class Counted(nn.Module):
    """A parametrization that counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return 1 * tensor


@pytest.mark.parametrize("learning", [True, False])
def test_an_adapted_tensor_is_computed_once_a_pass(factors: FactorizedExperts, learning: bool) -> None:
    projection = factors.classes[1].projection("up")
    counted = Counted()
    expected = output_of(factors, 50, {})
    parametrize.register_parametrization(projection, "v", counted)
    counted.calls = 0
    with torch.set_grad_enabled(learning):
        assert torch.equal(output_of(factors, 50, {}), expected)
    assert counted.calls == 1
