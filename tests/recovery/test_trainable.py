"""What trains is found in every architecture, and gradients of every format are those of dense matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from optimum_moe import MoECompressor
from optimum_moe.algorithms.affine import AffineFit
from optimum_moe.formats import StoredExpert, StoredExperts, StoredMatrix, StoredPart
from optimum_moe.formats.affine import affine_part
from optimum_moe.formats.base import BodyFormat, get_format
from optimum_moe.formats.constant import constant_part
from optimum_moe.formats.rounded import ROUNDED
from optimum_moe.formats.shared_base import shared_base_part
from optimum_moe.formats.stored import stored_matrix
from optimum_moe.nn import FactorizedExperts
from optimum_moe.nn.factorized_layer import native_activation
from optimum_moe.plan import keep_all
from optimum_moe.recovery.trainable import blocks_of, norms, trained_names
from optimum_moe.surgeons import find_blocks
from tests.expert_forms import low_rank, mixture
from tests.factor_methods import calibration
from tests.test_reload import METHODS
from tests.tiny_models import Target, build, every_target, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


def parameters_by_id(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("method", ["", "map"])
@pytest.mark.parametrize("target", every_target())
def test_routers_and_experts_of_every_architecture(target: Target, method: str) -> None:
    model: Any = build(target)
    if method:
        stage = METHODS[method]
        model = MoECompressor.from_pretrained(model, stage, calibration(target), progress=False).apply()
    names = parameters_by_id(model)
    blocks = blocks_of(model)
    routers = {names[id(p)] for b in blocks for p in b.surgeon.router_parameters(b.module(model))}
    experts = {names[id(p)] for b in blocks for p in b.surgeon.expert_parameters(b.module(model))}
    small, large = set(trained_names(model, "router")), set(trained_names(model, "experts"))
    assert small == routers | {names[id(p)] for p in norms(model)} - (experts - small)
    assert large == small | experts
    assert experts
    assert not routers & experts
    for found in blocks:
        block = found.module(model)
        rows = found.surgeon.router_rows(block)
        inside = any(rows.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in block.parameters())
        owners = {p.untyped_storage().data_ptr() for p in found.surgeon.router_parameters(block)}
        # Where an input of the model selects the experts, no parameter does.
        assert (rows.untyped_storage().data_ptr() in owners) == inside
    assert set(trained_names(model, "full")) == set(names.values())


@pytest.mark.parametrize("target", every_target())
def test_every_router_gets_a_gradient(target: Target) -> None:
    model: Any = build(target)
    names = set(trained_names(model, "router"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    with torch.enable_grad():
        logits_of.__wrapped__(model, inputs_for(target, rows=4, length=32)).double().square().sum().backward()
    for found in blocks_of(model):
        own = found.surgeon.router_parameters(found.module(model))
        assert not own or any(p.grad is not None and bool(p.grad.any()) for p in own), found.info.name


def empty(expert: StoredExpert, instead: StoredPart) -> StoredExpert:
    """An expert in the place of which something else stands."""
    shape = {name: matrix.densified() for name, matrix in expert.matrices.items()}
    gate = None if expert.gate is None else stored_matrix(shape["gate"][:0])
    none = torch.zeros(0, dtype=torch.int64)
    return StoredExpert(stored_matrix(shape["up"][:0]), stored_matrix(shape["down"][:, :0]), gate, none, instead)


def rounded(expert: StoredExpert, bits: int) -> StoredExpert:
    form: Any = get_format(ROUNDED[bits], BodyFormat)
    made = {name: m.densified() for name, m in expert.matrices.items()}
    stored = {name: StoredMatrix(tuple(m.shape), (form.encode(m),)) for name, m in made.items()}
    return StoredExpert(stored["up"], stored["down"], stored.get("gate"))


def every_form(view: Any) -> StoredExperts:
    """Dense, low rank, sparse rows, narrow, empty, and in the place of four of them: constant, affine, 8 and 4 bits."""
    forms = list(mixture(view).experts)
    hidden = view.hidden_size
    fit = AffineFit(torch.randn(64, hidden), torch.randn(64, hidden), 4)
    forms[1] = empty(forms[1], constant_part(torch.randn(1, hidden), torch.float32))
    forms[2] = empty(forms[2], affine_part(fit, 4, torch.float32))
    forms[5] = rounded(forms[0], 8)
    forms[6] = rounded(forms[0], 4)
    return StoredExperts(tuple(forms))


def on_shared_bases(view: Any) -> StoredExperts:
    """Low rank on the base of one of two groups."""
    bases = [{n: torch.randn_like(getattr(view, n)[0]) / 8 for n in ("gate", "up", "down")} for _ in range(2)]

    def matrix(expert: int, name: str) -> StoredMatrix:
        own = low_rank(getattr(view, name)[expert].detach(), 8)
        return StoredMatrix(own.shape, (*own.parts, shared_base_part(expert % 2, bases[expert % 2][name])))

    made = (StoredExpert(matrix(e, "up"), matrix(e, "down"), matrix(e, "gate")) for e in range(view.num_experts))
    return StoredExperts(tuple(made))


def dense_output(factors: FactorizedExperts, experts: Any, expert: int, input_PH: torch.Tensor) -> torch.Tensor:
    """What an expert computes, through the dense matrices that its parameters stand for."""
    dense = factors.densified(expert)
    if dense:
        gate = input_PH @ dense["gate"].T if "gate" in dense else None
        return native_activation(experts, gate, input_PH @ dense["up"].T) @ dense["down"].T
    for module in factors.without_neurons:
        if expert in module.members:
            own = {name: getattr(module, name) for name, _ in module.named_parameters()}
            if "affine_u" in own:
                return own["affine_offset"] + input_PH @ (own["affine_v"].T @ own["affine_u"])
            return own["approx_value"].expand(len(input_PH), -1)
    return torch.zeros_like(input_PH)


@pytest.mark.parametrize("form", [every_form, on_shared_bases])
def test_gradients_are_those_of_dense_matrices(form: Any) -> None:
    model = build("qwen3_moe")
    found = find_blocks(model)[0]
    block: Any = found.module(model)
    with torch.no_grad():
        forms = form(found.surgeon.experts(block))
    plan = keep_all(found.info.name, found.info.num_experts)
    found.surgeon.carry_out(block, replace(plan, factors=forms))
    experts, factors = block.experts, block.experts.factors
    hidden_TH = torch.randn(200, found.info.hidden_size, requires_grad=True)
    index_T2 = torch.rand(200, 8).argsort(-1)[:, :2]
    weights_T2 = (torch.rand(200, 2) + 0.1).requires_grad_(True)
    direction_TH = torch.randn(200, found.info.hidden_size)
    leaves = {"input": hidden_TH, "weights": weights_T2, **dict(factors.named_parameters())}
    ours = experts(hidden_TH, index_T2, weights_T2)
    got = torch.autograd.grad((ours * direction_TH).sum(), list(leaves.values()))
    every = torch.stack([dense_output(factors, experts, e, hidden_TH) for e in range(8)], 1)
    chosen = every.gather(1, index_T2.unsqueeze(-1).expand(-1, -1, every.shape[-1]))
    dense = (chosen * weights_T2.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad((dense * direction_TH).sum(), list(leaves.values()))
    assert len(leaves) > 8
    for name, a, b in zip(leaves, got, expected, strict=True):
        assert bool(b.any()), name
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")
