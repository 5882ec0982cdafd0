"""Experts in compressed forms, on every architecture: lossless forms change nothing, and all forms survive a reload."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from optimum_moe.checkpoint.compatibility import mark_structure
from optimum_moe.checkpoint.source import open_source
from optimum_moe.plan import CompressionPlan, keep_all
from optimum_moe.surgeons import find_blocks, guarded
from tests.expert_forms import joint, lossless, mixture
from tests.test_reload import assert_same_tensors, move_out_of_the_file
from tests.tiny_models import Target, build, every_target, inputs_for, logits_of


def factorized(model, make) -> CompressionPlan:
    """Carry out forms on all blocks of a model."""
    plans = {}
    for found in find_blocks(model):
        block = found.module(model)
        with torch.no_grad():
            factors = make(found.surgeon.experts(block))
        plan = replace(keep_all(found.info.name, found.info.num_experts), factors=factors)
        with guarded(model, found, plan.needs_guard):
            plans[found.info.name] = found.surgeon.carry_out(block, plan)
    return CompressionPlan(plans)


def skip_without_factors(target: Target) -> None:
    reason = next((found.info.no_factors for found in find_blocks(build(target)) if found.info.no_factors), "")
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("target", every_target())
def test_lossless_forms_change_nothing(target: Target) -> None:
    skip_without_factors(target)
    model = build(target)
    expected = logits_of(model, inputs_for(target))
    factorized(model, lossless)
    actual = logits_of(model, inputs_for(target))
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("make", [mixture, joint])
@pytest.mark.parametrize("target", every_target())
def test_reload_is_bit_equal(target: Target, make, tmp_path: Path) -> None:
    skip_without_factors(target)
    model = build(target)
    views = [found.surgeon.experts(found.module(model)) for found in find_blocks(model)]
    if make is joint and any(view.gate is None or view.fixed_neurons for view in views):
        pytest.skip("its experts have no gate, or neurons whose number is fixed")
    source = open_source(model)
    before = logits_of(model, inputs_for(target))
    mark_structure(model, source, factorized(model, make))
    expected = logits_of(model, inputs_for(target))
    # The negative control: the forms do change the model.
    assert (expected - before).abs().max() > 1e-4 * before.abs().max()
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, target.architecture).from_pretrained(tmp_path)
    assert_same_tensors(loaded, model)
    move_out_of_the_file(loaded)
    assert torch.equal(logits_of(loaded, inputs_for(target)), expected)
