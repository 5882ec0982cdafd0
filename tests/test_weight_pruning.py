"""Zeros in the experts of whole models: where they are, that they load anywhere, and that they save no bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_moe import (
    BlockDrop,
    ByteBudget,
    CalibrationConfig,
    CompressionPlan,
    ExpertPruning,
    ExpertSkipping,
    LayerDrop,
    LowRankSparse,
    MoECompressor,
    MSMoE,
    NeuronPruning,
    Rounding,
    WeightPruning,
)
from optimum_moe.formats import PROJECTIONS
from optimum_moe.surgeons import find_blocks
from optimum_moe.verification import verify
from tests.test_reload import assert_same_tensors, move_out_of_the_file
from tests.tiny_models import Target, build, every_target, in_full, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")

MIXED = ("qwen3_moe", "gpt_oss", "nemotron_h", "llama4", "jetmoe", "switch_transformers")
"""Plain; interleaved with biases; without a gate; inputs scaled by the router; attention experts; encoder-decoder."""


def data_for(target: Target | str) -> CalibrationConfig:
    return CalibrationConfig([inputs_for(target, rows=4, length=32, seed=seed) for seed in range(3)])


def matrices_of(model) -> dict[str, torch.Tensor]:
    """All expert matrices by block, projection and expert, inputs last."""
    found = {}
    for block in find_blocks(model):
        view = block.surgeon.experts(block.module(model))
        for name in PROJECTIONS:
            for expert, matrix in enumerate(getattr(view, name) if getattr(view, name) is not None else ()):
                found[f"{block.info.name} {name} {expert}"] = matrix.detach().clone()
    return found


def stored_bytes(folder: Path) -> int:
    return sum(t.numel() * t.element_size() for file in folder.glob("*.safetensors") for t in load_file(file).values())


@pytest.mark.parametrize("target", every_target())
def test_two_of_four_weights_stay_as_they_are(target: Target, tmp_path: Path) -> None:
    original = build(target)
    original.save_pretrained(tmp_path / "original")
    before = matrices_of(original)
    stage = WeightPruning(pattern="2:4")
    try:
        compressor = MoECompressor.from_pretrained(original, stage, data_for(target), progress=False)
    except ValueError as refusal:
        if "cannot be factorized" not in str(refusal):
            raise
        pytest.skip(str(refusal))
    model = compressor.apply()
    for name, matrix in matrices_of(model).items():
        assert set((matrix.unflatten(1, (-1, 4)) == 0).sum(-1).flatten().tolist()) == {2}, name
        assert torch.equal(matrix, before[name].where(matrix != 0, 0)), name
    compressor.save_pretrained(tmp_path / "out")
    assert compressor.plan.is_plain
    loaded = getattr(transformers, target.architecture).from_pretrained(tmp_path / "out")
    assert "quantization_config" not in loaded.config.to_dict()
    assert_same_tensors(loaded, model)
    report = verify(tmp_path / "out", against=tmp_path / "original", inputs=inputs_for(target))
    assert report.passed, str(report)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
@pytest.mark.parametrize("name", MIXED)
def test_engines_agree_and_bytes_stay(name: str, method: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "original")
    data = data_for(name) if method != "magnitude" else None
    stage = WeightPruning(method=method, sparsity=0.6)
    kept = []
    for engine in ("memory", "streaming"):
        given = {"engine": engine, "output_dir": tmp_path / engine} if engine == "streaming" else {}
        compressor = MoECompressor.from_pretrained(tmp_path / "original", stage, data, progress=False, **given)
        preview = compressor.preview()
        assert preview.after == preview.before
        assert "sets 0.6 of the weights of experts to zero in dense tensors: this saves no bytes" in str(preview)
        compressor.apply()
        if engine == "memory":
            compressor.save_pretrained(tmp_path / engine)
        assert stored_bytes(tmp_path / engine) == stored_bytes(tmp_path / "original")
        assert verify(tmp_path / engine, against=tmp_path / "original", inputs=inputs_for(name)).passed
        loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / engine)
        kept.append(matrices_of(loaded))
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(matrix, kept[1][key]) for key, matrix in kept[0].items())
    assert all(abs(float((matrix == 0).float().mean()) - 0.6) < 0.02 for matrix in kept[0].values())
    report = json.loads((tmp_path / "memory" / "compression_report.json").read_text(encoding="utf-8"))
    assert "this saves no bytes" in report["only_values"][0]
    assert "experts were partly set to zero" in (tmp_path / "memory" / "README.md").read_text(encoding="utf-8")


def test_bfloat16_weights_keep_their_bits(tmp_path: Path) -> None:
    model = build("qwen3_moe", dtype=torch.bfloat16)
    before = matrices_of(model)
    found = matrices_of(
        MoECompressor.from_pretrained(model, WeightPruning(), data_for("qwen3_moe"), progress=False).apply()
    )
    assert all(torch.equal(matrix, before[key].where(matrix != 0, 0)) for key, matrix in found.items())
    assert {matrix.dtype for matrix in found.values()} == {torch.bfloat16}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_what_verification_finds(method: str, tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "original")
    stage = WeightPruning(method=method)
    compressor = MoECompressor.from_pretrained(tmp_path / "original", stage, data_for("qwen3_moe"), progress=False)
    compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "experts.0.down_proj" in name)
    tensors[name][tensors[name] == 0] = 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    report = str(verify(tmp_path / "out", against=tmp_path / "original"))
    assert "does not match the digest in the plan" in report
    assert ("down of expert 0 has weights that the original does not have" in report) == (method == "wanda")


def test_blocks_that_are_left_out_keep_their_bits(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    before, name = matrices_of(model), find_blocks(model)[0].info.name
    stage = WeightPruning(method="magnitude", protect=[name])
    found = matrices_of(MoECompressor.from_pretrained(model, stage, progress=False).apply())
    same = {key: torch.equal(matrix, before[key]) for key, matrix in found.items()}
    assert all(is_same == key.startswith(f"{name} ") for key, is_same in same.items())


@pytest.mark.parametrize("routing", ["map", "reduce"])
def test_merged_experts_are_pruned_after_it(routing: str, tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "original")
    stages = [MSMoE(num_experts=4, routing=routing), WeightPruning(pattern="2:4")]
    compressor = MoECompressor.from_pretrained(tmp_path / "original", stages, data_for("qwen3_moe"), progress=False)
    model = compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    loaded = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_tensors(loaded, model)
    halves = {float((matrix == 0).float().mean()) for matrix in matrices_of(loaded).values()}
    assert halves == {0.5}
    assert verify(tmp_path / "out", against=tmp_path / "original", inputs=inputs_for("qwen3_moe")).passed
    again = CompressionPlan.from_pretrained(tmp_path / "out")
    assert {plan.weights for plan in again.blocks.values()} == {"masked"}


def test_rounding_follows_it_and_keeps_the_zeros(tmp_path: Path) -> None:
    build("qwen3_moe").save_pretrained(tmp_path / "original")
    stages = [ExpertPruning(num_experts=4), WeightPruning(pattern="2:4"), Rounding(fitted=False)]
    compressor = MoECompressor.from_pretrained(tmp_path / "original", stages, data_for("qwen3_moe"), progress=False)
    compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    alone = MoECompressor.from_pretrained(tmp_path / "original", stages[:2], data_for("qwen3_moe"), progress=False)
    pruned = matrices_of(alone.apply())
    loaded = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out")
    for block in find_blocks(build("qwen3_moe")):
        held = block.surgeon.factors(loaded.get_submodule(block.info.name))
        for expert in range(4):
            for name, matrix in held.densified(expert).items():
                expected = pruned[f"{block.info.name} {name} {expert}"]
                assert not matrix[expected == 0].any()
                assert float((matrix - expected).norm() / expected.norm()) < 0.15
    assert verify(tmp_path / "out", against=tmp_path / "original", inputs=inputs_for("qwen3_moe")).passed


def test_experts_without_tokens_are_named(recwarn: pytest.WarningsRecorder) -> None:
    data = CalibrationConfig([{"input_ids": torch.tensor([[5, 6]])}])
    compressor = MoECompressor.from_pretrained(build("qwen3_moe"), WeightPruning(), data, progress=False)
    compressor.apply()
    unseen = sum(len(block.unseen) for block in compressor.statistics.blocks.values())
    assert unseen > 0
    assert compressor.plan.remarks == (
        f"weight-pruning pruned {unseen} experts without calibration tokens by magnitude, not by wanda.",
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "wandas"}, "did you mean 'wanda'"),
        ({"pattern": "4:2"}, "n at least 1 and less than m"),
        ({"pattern": "two of four"}, "pattern='two of four' must be 'unstructured', or 'n:m'"),
        ({"sparsity": 1.0}, r"sparsity=1.0 must lie in \(0, 1\)"),
        ({"sparsity": 0}, r"sparsity=0 must lie in \(0, 1\)"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "which leaves 2 of 4 weights. Leave sparsity out"),
    ],
)
def test_settings_that_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        WeightPruning(**given)


def test_rows_of_no_whole_groups_are_refused() -> None:
    model = build("qwen3_moe", moe_intermediate_size=22)
    with pytest.raises(ValueError, match=r"needs rows of whole groups of 4, but a matrix of .* has 22 columns"):
        MoECompressor.from_pretrained(model, WeightPruning(pattern="2:4"), data_for("qwen3_moe"), progress=False)


@pytest.mark.parametrize("target", every_target())
def test_a_third_of_the_neurons_stays(target: Target, tmp_path: Path) -> None:
    original = build(target)
    original.save_pretrained(tmp_path / "original")
    stage = NeuronPruning(keep_ratio=1 / 3, curvature=False)
    try:
        compressor = MoECompressor.from_pretrained(original, stage, data_for(target), progress=False)
    except ValueError as refusal:
        if "cannot lose neurons" not in str(refusal) and "differ" not in str(refusal):
            raise
        pytest.skip(str(refusal))
    whole = compressor.source.info.blocks[0].intermediate_size
    preview = compressor.preview()
    model = compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    assert compressor.measured().after == preview.after
    (width,) = {plan.width for plan in compressor.plan.blocks.values()}
    assert preview.widths == compressor.measured().widths == (whole, width)
    assert width == whole / 3
    assert compressor.plan.is_plain
    loaded = getattr(transformers, target.architecture).from_pretrained(tmp_path / "out")
    assert_same_tensors(loaded, model)
    assert {matrix.shape[0] for key, matrix in matrices_of(loaded).items() if " up " in key} == {width}
    report = verify(tmp_path / "out", against=tmp_path / "original", inputs=inputs_for(target))
    assert report.passed, str(report)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_trim_slim_round_loads(name: str, tmp_path: Path) -> None:
    model = build(name)
    whole = find_blocks(model)[0].info.intermediate_size
    model.save_pretrained(tmp_path / "original")
    stages = [
        ExpertPruning(num_experts=4),
        NeuronPruning(num_neurons=whole - 8, curvature=False),
        WeightPruning(sparsity=0.25),
        Rounding(bits=8),
    ]
    plain = MoECompressor.from_pretrained(tmp_path / "original", stages[:3], data_for(name), progress=False).apply()
    outputs = []
    for engine in ("memory", "streaming"):
        given = {"engine": engine, "output_dir": tmp_path / engine} if engine == "streaming" else {}
        compressor = MoECompressor.from_pretrained(
            tmp_path / "original", stages, data_for(name), progress=False, **given
        )
        compressor.apply()
        if engine == "memory":
            compressor.save_pretrained(tmp_path / engine)
        assert verify(tmp_path / engine, against=tmp_path / "original", inputs=inputs_for(name)).passed
        loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path / engine)
        outputs.append(logits_of(loaded, inputs_for(name)))
    assert torch.equal(*outputs)
    hidden = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    for found in find_blocks(model):
        with torch.no_grad():
            near, rounded = (each.get_submodule(found.info.name)(hidden) for each in (plain, loaded))
        near, rounded = (output[0] if isinstance(output, tuple) else output for output in (near, rounded))
        # Eight bits are near to what they round, so all that was cut before arrived.
        assert float((rounded - near).norm() / near.norm()) < 0.01


def test_the_preview_of_all_stages_is_what_is_written() -> None:
    stages = [ExpertPruning(num_experts=4), NeuronPruning(keep_ratio=1 / 3), WeightPruning(), Rounding()]
    compressor = MoECompressor.from_pretrained(build("qwen3_moe"), stages, data_for("qwen3_moe"), progress=False)
    expected = compressor.preview().after
    compressor.apply()
    assert compressor.measured().after == expected


def test_the_preset_trims_slims_and_quantizes() -> None:
    compressor = MoECompressor.from_pretrained(
        build("qwen3_moe"), "trim-slim-quantize", data_for("qwen3_moe"), progress=False
    )
    compressor.apply()
    for plan in compressor.plan.blocks.values():
        assert plan.num_groups == 6
        assert set(plan.sizes.widths) == {16}
        assert set(plan.sizes.parts) == {"int4"}
        assert all(len(neurons) == 16 for neurons in plan.neurons)


NARROW = NeuronPruning(num_neurons=8, curvature=False)
BESIDE = {
    "ranks": [NARROW, LowRankSparse(rank=8, layers=[1])],
    "four bits": [NARROW, Rounding(layers=[1])],
    "budget": [NARROW, ByteBudget(share=0.5, runs_in="transformers", layers=[1], curvature=False)],
    "no experts": [NARROW, LayerDrop(num_layers=1)],
    "skipping": [ExpertSkipping(), NARROW],
    "fewer experts": [ExpertPruning(num_experts=4, layers=[1]), NARROW],
    "fewer experts everywhere": [ExpertPruning(num_experts=4), NARROW, Rounding(layers=[1])],
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("qwen3_moe", kind) for kind in ("ranks", "no experts", "fewer experts everywhere")),
        *in_full(*(("qwen3_moe", kind) for kind in ("four bits", "budget", "skipping", "fewer experts"))),
        *in_full(*((name, kind) for name in ("mixtral", "glm4_moe", "gpt_oss", "olmoe") for kind in BESIDE)),
    ],
)
def test_narrow_stock_experts_load_beside_blocks_of_another_kind(name: str, kind: str, tmp_path: Path) -> None:
    """Where stock classes cannot load the whole, the config still says the width of the experts that are stock."""
    model, stages = build(name), BESIDE[kind]
    model.save_pretrained(tmp_path / "original")
    opened = MoECompressor.from_pretrained(tmp_path / "original", stages, data_for(name), progress=False)
    expected = opened.preview().after.bytes
    cut = opened.apply()
    opened.save_pretrained(tmp_path / "memory")
    MoECompressor.from_pretrained(
        tmp_path / "original",
        stages,
        data_for(name),
        engine="streaming",
        output_dir=tmp_path / "streaming",
        progress=False,
    ).apply()
    logits = logits_of(cut, inputs_for(name))
    for engine in ("memory", "streaming"):
        loaded = type(model).from_pretrained(tmp_path / engine)
        move_out_of_the_file(loaded)
        assert torch.equal(logits_of(loaded, inputs_for(name)), logits)
        assert verify(tmp_path / engine, against=tmp_path / "original", inputs=inputs_for(name)).passed
    assert opened.measured().after.bytes <= expected


def test_widths_have_to_suit_shared_experts_without_layers_too() -> None:
    """Half of 24 neurons would be 16, but the shared expert of 24 takes its width from the same setting."""
    stages = [BlockDrop(num_blocks=1), NeuronPruning(keep_ratio=0.5, curvature=False)]
    with pytest.raises(ValueError, match="gives 24 of the 24 neurons of every expert"):
        MoECompressor.from_pretrained(build("glm4_moe_lite"), stages, data_for("glm4_moe_lite"), progress=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Give exactly one of num_neurons, keep_ratio"),
        ({"keep_ratio": 0.5, "quantize": "q4_km"}, "did you mean 'q4_k_m'"),
        ({"num_neurons": 0}, "Pass an integer of at least 1"),
    ],
)
def test_widths_that_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        NeuronPruning(**given)


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (NeuronPruning(num_neurons=20, quantize="q8_0"), "num_neurons=20 is no multiple of 32"),
        (NeuronPruning(num_neurons=20), "num_neurons=20 is no multiple of 8, which grouped matmuls need. Use 16"),
        (NeuronPruning(keep_ratio=0.5, quantize="w4a16"), "can have no fewer neurons"),
        (NeuronPruning(keep_ratio=1.0), "Experts of this model can have 8, 16, 24, 32, 40, 48, 56 neurons"),
        ([MSMoE(num_experts=4), NeuronPruning(keep_ratio=0.5)], 'Pass routing="reduce" to it'),
        ([Rounding(), NeuronPruning(keep_ratio=0.5)], "stores experts in other formats"),
        (
            [NeuronPruning(num_neurons=32), MSMoE(num_experts=4)],
            "m-smoe cannot follow neuron-pruning: experts are merged",
        ),
        ([NeuronPruning(num_neurons=32), ExpertPruning(num_experts=4)], "Put neuron-pruning after expert-pruning"),
        ([NeuronPruning(num_neurons=32), ByteBudget(share=0.5)], r'Use it alone, or pass runs_in="transformers"'),
    ],
)
def test_recipes_that_are_refused(stages, said: str) -> None:
    model = build("qwen3_moe", moe_intermediate_size=64)
    with pytest.raises(ValueError, match=said):
        MoECompressor.from_pretrained(model, stages, data_for("qwen3_moe"), progress=False)
