"""Experts in compressed forms compute what their dense matrices do, one by one and in grouped matmuls."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from optimum_moe.formats import ExpertsSpec, StoredExperts
from optimum_moe.nn import FactorizedExperts, HasSparseRows
from optimum_moe.nn.factorized_layer import native_activation, run_grouped
from optimum_moe.plan import keep_all
from optimum_moe.surgeons import find_blocks
from tests.expert_forms import mixture
from tests.tiny_models import build

# Gated; gated, interleaved and with biases; without a gate.
FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h")


class Held:
    """The experts module of a tiny model whose first block holds a mixture of all forms, and what these forms are."""

    def __init__(self, family: str) -> None:
        self.model = build(family)
        found = find_blocks(self.model)[0]
        block = found.module(self.model)
        view = found.surgeon.experts(block)
        with torch.no_grad():
            self.forms: StoredExperts = mixture(view)
            self.biases = {
                name: [bias.clone() for bias in values]
                for name in ("gate", "up", "down")
                if (values := getattr(view, f"{name}_bias")) is not None
            }
        plan = keep_all(found.info.name, found.info.num_experts)
        self.width = found.info.intermediate_size
        found.surgeon.carry_out(block, replace(plan, factors=self.forms))
        self.experts: Any = next(m for m in block.modules() if hasattr(m, "factors"))
        self.factors: FactorizedExperts = self.experts.factors
        self.hidden_size = found.info.hidden_size

    def routed(self, tokens: int = 40, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, two different experts for each, and weights."""
        generator = torch.Generator().manual_seed(seed)
        hidden_TH = torch.randn(tokens, self.hidden_size, generator=generator)
        index_T2 = torch.rand(tokens, 8, generator=generator).argsort(-1)[:, :2]
        return hidden_TH, index_T2, torch.rand(tokens, 2, generator=generator) + 0.1

    def grouped(self, *routed: torch.Tensor) -> torch.Tensor:
        return run_grouped(self.experts, partial(native_activation, self.experts), *routed)

    def by_hand(self, expert: int, input_PH: torch.Tensor) -> torch.Tensor:
        """Of the forms that were put in, in dense matrices."""
        form = self.forms.experts[expert]
        if form.width == 0:
            bias = self.biases["down"][expert] if "down" in self.biases else torch.zeros(self.hidden_size)
            return bias.expand(len(input_PH), -1)

        def project(name: str, input_PX: torch.Tensor) -> torch.Tensor:
            output_PO = input_PX @ form.matrices[name].densified().T
            if name not in self.biases:
                return output_PO
            kept = slice(None) if form.neurons is None or name == "down" else form.neurons
            return output_PO + self.biases[name][expert][kept]

        gate_Pn = project("gate", input_PH) if form.gate is not None else None
        return project("down", native_activation(self.experts, gate_Pn, project("up", input_PH)))


@pytest.fixture(params=FAMILIES)
def held(request: pytest.FixtureRequest) -> Held:
    return Held(request.param)


def assert_rounding(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-12)


def test_the_mixture_has_every_form(held: Held) -> None:
    sizes, count = held.factors.sizes, len(held.factors.classes)
    assert sizes.widths == (*[held.width] * 5, 8, 8, 0)
    assert {sizes.table("low_rank")["up"][e] for e in range(7)} == {None, 4, 8, 16}
    assert sizes.table("sparse_rows")["up"] == (0, 0, 0, 0, 4, 0, 0, 0)
    assert count == 2
    assert bool(held.factors.without_neurons) == ("down" in held.biases)


def test_both_paths_equal_dense_matrices(held: Held) -> None:
    hidden_TH, index_T2, weights_T2 = held.routed()
    expected = torch.zeros_like(hidden_TH)
    for token, slot in ((t, s) for t in range(len(hidden_TH)) for s in range(2)):
        output_1H = held.by_hand(int(index_T2[token, slot]), hidden_TH[token : token + 1])
        expected[token] += weights_T2[token, slot] * output_1H[0]
    with torch.no_grad():
        assert_rounding(held.experts(hidden_TH, index_T2, weights_T2), expected)
        assert_rounding(held.grouped(hidden_TH, index_T2, weights_T2), expected)


def test_gradients_of_both_paths_are_equal(held: Held) -> None:
    hidden_TH, index_T2, weights_T2 = held.routed()
    found = {}
    for name, run in (("one by one", held.experts), ("grouped", held.grouped)):
        held.experts.zero_grad()
        leaves = hidden_TH.clone().requires_grad_(), weights_T2.clone().requires_grad_()
        run(leaves[0], index_T2, leaves[1]).square().sum().backward()
        gradients = {key: p.grad.clone() for key, p in held.factors.named_parameters()}
        found[name] = gradients | {"hidden": leaves[0].grad, "weights": leaves[1].grad}
    assert found["grouped"].keys() == found["one by one"].keys()
    for key, gradient in found["one by one"].items():
        assert gradient.abs().max() > 0, key
        assert_rounding(found["grouped"][key], gradient)


@pytest.mark.parametrize("path", ["one by one", "grouped"])
def test_slots_that_count_for_nothing(held: Held, path: str) -> None:
    """Ids beyond the experts are sentinels, and so are slots of weight 0; no tokens at all are fine."""
    run = held.experts if path == "one by one" else held.grouped
    hidden_TH, index_T2, weights_T2 = held.routed()
    with torch.no_grad():
        expected = run(hidden_TH, index_T2[:, :1], weights_T2[:, :1])
        sentinels = torch.cat([index_T2[:, :1], torch.full_like(index_T2[:, :1], 8)], 1)
        assert_rounding(run(hidden_TH, sentinels, weights_T2), expected)
        weights = weights_T2.clone()
        weights[:, 1] = 0
        if path == "one by one":
            assert_rounding(run(hidden_TH, index_T2, weights), expected)
        none = run(hidden_TH, torch.full_like(index_T2, 8), weights_T2)
        assert torch.equal(none, torch.zeros_like(hidden_TH))
        assert run(hidden_TH[:0], index_T2[:0], weights_T2[:0]).shape == (0, held.hidden_size)


@pytest.mark.parametrize("path", ["one by one", "grouped"])
def test_an_empty_expert_gives_its_bias_or_nothing(held: Held, path: str) -> None:
    run = held.experts if path == "one by one" else held.grouped
    hidden_TH = held.routed()[0]
    index_T1, weights_T1 = torch.full((len(hidden_TH), 1), 7), torch.full((len(hidden_TH), 1), 0.5)
    with torch.no_grad():
        output_TH = run(hidden_TH, index_T1, weights_T1)
    expected_H = 0.5 * held.biases["down"][7] if "down" in held.biases else torch.zeros(held.hidden_size)
    assert torch.equal(output_TH, expected_H.expand_as(output_TH))


def test_densified(held: Held) -> None:
    for expert, form in enumerate(held.forms.experts):
        dense = held.factors.densified(expert)
        assert set(dense) == (set() if form.width == 0 else set(form.matrices))
        for name, matrix_OX in dense.items():
            assert_rounding(matrix_OX.detach(), form.matrices[name].densified())
            if form.matrices[name].is_dense:
                assert torch.equal(matrix_OX, form.matrices[name].densified())


def test_copies(held: Held) -> None:
    routed = held.routed()
    expected = held.experts(*routed)
    for twin in (copy.deepcopy(held.experts), pickle.loads(pickle.dumps(held.experts))):
        assert type(twin) is type(held.experts)
        assert twin.factors.sizes == held.factors.sizes
        assert torch.equal(twin(*routed), expected)
        with torch.no_grad():
            next(twin.factors.parameters()).zero_()
        assert torch.equal(held.experts(*routed), expected)


def test_sizes_are_written_as_one_text_for_all_experts() -> None:
    sizes = ExpertsSpec(
        (4, 3, 0),
        ("up", "down"),
        {"low_rank": {"up": (2, None, None)}, "sparse_rows": {"up": (0, 1, 0)}, "shared_base": {"up": (0, 0, 1)}},
    )
    record = sizes.to_dict()
    checksum = record.pop("checksum")
    tables = {
        "widths": "4 3 0",
        "projections": "up down",
        "low_rank": {"up": "2 - -"},
        "sparse_rows": {"up": "0 1 0"},
        "shared_base": {"up": "0 0 1"},
    }
    assert record == tables
    assert ExpertsSpec.from_dict(tables | {"checksum": checksum}) == sizes
    for odd in ("4  3", "4 3 0 ", "", "-1 3 0", "1_0 3 0", "1e9 3 0", "\u0664 3 0", "9" * 20 + " 3 0"):
        with pytest.raises(ValueError, match=r"no whole number. Restore the saved config.json"):
            ExpertsSpec.from_dict(tables | {"widths": odd})
    for odd in ([4, 3, 0], 4, None, {"4": 3}):
        with pytest.raises(ValueError, match=r"Sizes of experts cannot be read .* Restore the saved config.json"):
            ExpertsSpec.from_dict(tables | {"widths": odd})
    with pytest.raises(ValueError, match="must give each expert a width"):
        ExpertsSpec.from_dict(tables | {"widths": "4 - 0"})


def test_sizes_give_the_empty_tensors_on_the_meta_device(held: Held) -> None:
    sizes = ExpertsSpec.from_dict(held.factors.sizes.to_dict())
    assert sizes == held.factors.sizes
    empty = FactorizedExperts(sizes, held.hidden_size, list(held.biases), device="meta")
    state = held.factors.state_dict()
    assert {k: (t.shape, t.dtype) for k, t in empty.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in state.items()
    }
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    stored = sum(t.numel() for t in state.values())
    biases = sum(p.numel() for name, p in held.factors.named_parameters() if name.endswith("bias"))
    assert stored - biases == sum(sizes.numbers(expert, held.hidden_size) for expert in range(8))
    assert stored - biases == sum(form.numbers for form in held.forms.experts)
    empty.load_state_dict(state, assign=True)
    held.experts.factors = empty
    routed = held.routed()
    assert_rounding(held.experts(*routed), held.grouped(*routed))


def assert_sizes_say_what_is_stored(held: Held) -> None:
    empty = FactorizedExperts(held.factors.sizes, held.hidden_size, list(held.biases), device="meta")
    stored = {key: tensor.shape for key, tensor in held.factors.state_dict().items()}
    assert {key: tensor.shape for key, tensor in empty.state_dict().items()} == stored


def test_fewer_rows_compute_what_zeroed_rows_do(held: Held) -> None:
    routed, expert = held.routed(), 4
    class_, slot = held.factors.home(expert)
    projection = class_.projection("down")
    assert isinstance(projection, HasSparseRows)
    part = projection.sparse_parts()["rows"]
    # The rows lie in one tall matrix of all experts; only this expert has some.
    place = projection.place_C[slot]
    assert part.row_index.tolist() == [projection.outputs * place + row for row in range(4)]
    mask = torch.tensor([True, False, True, False])
    with torch.no_grad():
        zeroed = copy.deepcopy(held.experts)
        other, _ = zeroed.factors.home(expert)
        other.projection("down").rows[~mask] = 0
        expected = zeroed(*routed)
    parameter = projection.rows
    projection.keep_rows(mask)
    assert projection.rows is parameter
    assert parameter.shape == (2, held.width)
    assert projection.row_index.tolist() == [0, 2]
    assert projection.row_index.dtype == torch.int32
    assert held.factors.sizes.table("sparse_rows")["down"] == (0, 0, 0, 0, 2, 0, 0, 0)
    assert held.factors.sizes.table("sparse_rows")["up"] == (0, 0, 0, 0, 4, 0, 0, 0)
    for run in (held.experts, held.grouped):
        with torch.no_grad():
            assert_rounding(run(*routed), expected)
    assert_sizes_say_what_is_stored(held)
    # Without any row left there is no sparse part.
    projection.keep_rows(torch.tensor([False, False]))
    assert projection.sparse_parts() == {}
    assert "down" not in held.factors.sizes.parts["sparse_rows"]
    assert_sizes_say_what_is_stored(held)
    with torch.no_grad():
        zeroed.factors.home(expert)[0].projection("down").rows.zero_()
        assert_rounding(held.experts(*routed), zeroed(*routed))
