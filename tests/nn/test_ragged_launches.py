"""Experts in any mixture of forms in launches of Triton; on a CPU in its interpreter (`make test-serving`)."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; make test-serving has it")

from optimum_moe.kernels.ragged_matmul import UNSORTED_SLOTS, Tiles, tiles_for
from optimum_moe.nn.factorized_layer import native_activation, native_finish, run_factorized
from optimum_moe.nn.merged_experts import run_routed
from optimum_moe.nn.ragged_launches import Watched, launches_of
from tests.nn.test_factorized_experts import FAMILIES, Held

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="without a GPU Triton needs TRITON_INTERPRET=1 before it is imported; make test-serving sets it",
)


@pytest.fixture(params=FAMILIES)
def held(request: pytest.FixtureRequest) -> Held:
    made = Held(request.param)
    made.experts.to(DEVICE)
    return made


@pytest.mark.parametrize("tokens", [1, 7, UNSORTED_SLOTS])
@torch.no_grad()
def test_launches_give_what_single_experts_give(held: Held, tokens: int) -> None:
    activate = partial(native_activation, held.experts)
    hidden_TH, index_T2, weights_T2 = (tensor.to(DEVICE) for tensor in held.routed(tokens))
    # Slots that count for nothing.
    index_T2[0, 1] = held.factors.num_experts + 3
    launches = launches_of(held.factors)
    assert launches is not None
    run = partial(run_factorized, held.factors, activate, None)
    expected = run_routed(run, held.factors.num_experts, hidden_TH, index_T2, weights_T2)
    found = launches(activate, None, hidden_TH, index_T2, weights_T2)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    doubled = launches(activate, lambda output_SH: 2 * output_SH, hidden_TH, index_T2, weights_T2)
    torch.testing.assert_close(doubled, 2 * expected, rtol=0, atol=4e-5 * float(expected.abs().max()))
    assert native_finish(held.experts) is None


def test_adapters_are_left_to_torch(held: Held) -> None:
    torch.nn.utils.parametrizations.weight_norm(held.factors.classes[0].stored("down"), "weight")
    assert launches_of(held.factors) is None


def test_changes_are_seen(held: Held) -> None:
    watched = Watched(held.factors)
    assert watched.is_unchanged()
    down = held.factors.classes[0].stored("down")
    kept = down.weight.data
    down.weight.data = kept.clone()
    assert not watched.is_unchanged()
    down.weight.data = kept
    assert watched.is_unchanged()
    held.factors.classes[0].down_stacks = torch.nn.Sequential(down)
    assert not watched.is_unchanged()


def test_tiles_fit_the_shared_memory() -> None:
    assert tiles_for(8, 2, torch.device("cpu")) == Tiles(16, 32, 128, 2, 3)
    # What compilers asked for on an H200.
    assert Tiles(128, 128, 64, 8, 4).bytes(2) == 262_144
    assert Tiles(64, 256, 64, 4, 3).bytes(2) == 245_760
