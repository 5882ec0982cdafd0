"""Layer drop: the routed experts of whole blocks go, and what is left is what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_moe import CalibrationConfig, LayerDrop, MoECompressor, verify
from optimum_moe.surgeons import find_blocks
from tests.test_streaming import assert_same
from tests.tiny_models import Target, build, every_target, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:Calibration gave no token", "ignore:All outputs are zero", "ignore:These weights are all zeros"
)


def data(target: Target | str, batches: int = 2) -> CalibrationConfig:
    return CalibrationConfig([inputs_for(target, seed=seed) for seed in range(batches)])


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
    compressor = MoECompressor.from_pretrained(model, LayerDrop(num_layers=1), data(target), progress=False)
    observed = compressor.calibrate().blocks[silent.info.name]
    assert observed.experts_cosine_sum.item() == pytest.approx(observed.num_tokens, abs=1e-6)
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
    build(name).save_pretrained(tmp_path / "original")
    written = {}
    for engine in ("memory", "streaming"):
        compressor = MoECompressor.from_pretrained(
            tmp_path / "original",
            LayerDrop(num_layers=1),
            data(name),
            engine=engine,
            output_dir=tmp_path / engine / "out",
            progress=False,
        )
        preview = compressor.preview()
        written[engine] = compressor.apply()
        assert compressor.measured().after.parameters <= preview.after.parameters < preview.before.parameters
    assert_same(written["memory"], written["streaming"])
    report = verify(written["memory"], tmp_path / "original")
    assert report.passed, str(report)
    loaded = AutoModelForCausalLM.from_pretrained(written["memory"]).eval()
    inputs = inputs_for(name, rows=1, length=8)
    cached = loaded.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(cached, loaded.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="Give exactly one of num_layers, keep_ratio"):
        LayerDrop()
    with pytest.raises(ValueError, match="num_layers=0 is out of range"):
        LayerDrop(num_layers=0)
    with pytest.raises(ValueError, match=r"drops the experts of 2 blocks, but layers=\[0\]"):
        MoECompressor.from_pretrained(build("qwen3_moe"), LayerDrop(num_layers=2, layers=[0]), data("qwen3_moe"))
