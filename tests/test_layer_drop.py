"""Layer drop: the routed experts of whole blocks go, and what is left is what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_moe import CalibrationConfig, LayerDrop, MoECompressor
from optimum_moe.surgeons import find_blocks
from tests.dropping import WARNINGS, data_for, write_with_both_engines
from tests.tiny_models import Target, build, every_target, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings(*WARNINGS)


@pytest.mark.parametrize("target", every_target())
def test_dropping_experts_that_give_zeros_changes_no_bit(target: Target) -> None:
    model = build(target)
    silent = find_blocks(model)[-1]
    with torch.no_grad():
        experts = silent.surgeon.experts(silent.module(model))
        for values in (experts.down, experts.down_bias):
            for tensor in () if values is None else values:
                tensor.zero_()
    inputs = inputs_for(target)
    expected = logits_of(model, inputs)
    if target.fixed_neurons:
        with pytest.raises(ValueError, match="cannot be factorized"):
            MoECompressor.from_pretrained(model, LayerDrop(num_layers=1), data_for(target), progress=False)
        return
    compressor = MoECompressor.from_pretrained(model, LayerDrop(num_layers=1), data_for(target), progress=False)
    observed = compressor.calibrate().blocks[silent.info.name]
    assert observed.experts_cosine_sum.item() == pytest.approx(observed.layer_tokens.item(), abs=1e-6)
    after = compressor.apply()
    emptied = [name for name, plan in compressor.plan.blocks.items() if plan.sizes is not None]
    assert emptied == [silent.info.name]
    actual = logits_of(after, inputs)
    if target.name == "longcat_flash":
        # Its zero experts, which stay, are added up in another order.
        assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()
    else:
        assert torch.equal(actual, expected)


def test_the_importance_is_that_of_the_routed_experts() -> None:
    model = build("qwen2_moe")
    inputs = inputs_for("qwen2_moe")
    compressor = MoECompressor.from_pretrained(
        model, LayerDrop(num_layers=1), CalibrationConfig([inputs]), progress=False
    )
    statistics = compressor.calibrate()
    for found in find_blocks(model):
        stream: list[torch.Tensor] = []
        layer: Any = model.get_submodule(found.info.layer)
        handle = layer.register_forward_hook(
            lambda m, a, output, stream=stream: stream.append(output.flatten(0, 1).double())
        )
        logits_of(model, inputs)
        silence: Any = layer.mlp.experts.register_forward_hook(lambda m, a, output: torch.zeros_like(output))
        logits_of(model, inputs)
        silence.remove()
        handle.remove()
        expected = torch.nn.functional.cosine_similarity(*stream, dim=-1).sum().item()
        assert statistics.blocks[found.info.name].experts_cosine_sum.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "longcat_flash"])
def test_streaming_equals_memory_and_verifies(name: str, tmp_path: Path) -> None:
    written = write_with_both_engines(name, LayerDrop(num_layers=1), tmp_path)
    preview = written.compressor.preview()
    measured = written.compressor.measured().after.parameters
    assert measured <= preview.after.parameters < preview.before.parameters
    loaded = AutoModelForCausalLM.from_pretrained(written.folder).eval()
    inputs = inputs_for(name, rows=1, length=8)
    cached = loaded.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(cached, loaded.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="Give exactly one of num_layers, keep_ratio"):
        LayerDrop()
    with pytest.raises(ValueError, match="num_layers=0 is out of range"):
        LayerDrop(num_layers=0)
    with pytest.raises(ValueError, match=r"drops the experts of 2 blocks, but layers=\[0\]"):
        MoECompressor.from_pretrained(build("qwen3_moe"), LayerDrop(num_layers=2, layers=[0]), data_for("qwen3_moe"))
