"""The byte budget for stock classes: one number of experts and one width, loaded by what loads the original."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from optimum_moe import ByteBudget, CalibrationConfig, CompressionPlan, LowRankSparse, MoECompressor, MSMoE
from optimum_moe.algorithms.rerouting import Rerouter
from optimum_moe.engine.disk_store import DiskStore
from optimum_moe.engine.layers import Layer
from optimum_moe.plan import BlockPlan
from optimum_moe.runtimes import get_quantizer, width_step
from optimum_moe.stages.plain_budget import possible_widths
from optimum_moe.surgeons import find_blocks, with_widths
from optimum_moe.verification import verify
from tests.mtp_checkpoints import save_with_mtp
from tests.test_reload import assert_same_tensors, move_out_of_the_file
from tests.tiny_models import Target, build, every_target, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")


def data_for(target: Target | str) -> list[dict[str, torch.Tensor]]:
    return [inputs_for(target, rows=4, length=32, seed=seed) for seed in range(3)]


def compressor_for(model, target: Target | str, **kwargs) -> MoECompressor:
    settings = {name: kwargs.pop(name) for name in ("share", "target_size", "curvature", "quantize") if name in kwargs}
    if isinstance(target, Target):
        settings.setdefault("curvature", target.curvature)
    stage = ByteBudget(runs_in="any", **settings)
    return MoECompressor.from_pretrained(model, stage, CalibrationConfig(data_for(target)), progress=False, **kwargs)


_OWN_RULES = (
    "longcat_flash",  # experts without weights take part in the selection
    "deepseek_v4-hash",  # a table of token ids
    "phimoe",  # the second expert is chosen after the first one, with weights of its own
    "inkling",  # shared experts take part in the weights
    "deepseek_v2-groups",  # router groups are ranked by their best expert
    "deepseek_ocr2-groups",
    "unlimited_ocr-groups",
)
"""Targets whose routers `Rerouter` does not know."""


@pytest.mark.parametrize("target", every_target())
def test_stock_classes_load_what_stays(target: Target, tmp_path: Path) -> None:
    if target.refuses_pruning:
        pytest.skip(target.refuses_pruning)
    original = build(target)
    original.save_pretrained(tmp_path / "original")
    try:
        compressor = compressor_for(original, target, share=0.5)
    except ValueError as refusal:
        if not any(text in str(refusal) for text in ('runs_in="transformers"', "cannot be factorized")):
            raise
        pytest.skip(str(refusal))
    before = sum(info.num_experts * info.expert_multiply_adds for info in compressor.source.info.blocks)
    model = compressor.apply()
    compressor.save_pretrained(tmp_path / "out")
    plans = compressor.plan.blocks.values()
    whole = compressor.source.info.blocks[0].intermediate_size
    assert len({(plan.num_groups, plan.width or whole) for plan in plans}) == 1
    assert compressor.plan.is_plain
    after = sum(
        plan.num_groups * info.expert_multiply_adds * (plan.width or whole) / whole
        for plan, info in zip(plans, compressor.source.info.blocks, strict=True)
    )
    assert after <= 0.5 * before

    loaded = getattr(transformers, target.architecture).from_pretrained(tmp_path / "out")
    assert "quantization_config" not in loaded.config.to_dict()
    assert_same_tensors(loaded, model)
    move_out_of_the_file(loaded)
    assert torch.equal(logits_of(loaded, inputs_for(target)), logits_of(model, inputs_for(target)))
    report = verify(tmp_path / "out", against=tmp_path / "original", inputs=inputs_for(target))
    assert report.passed, str(report)
    again = CompressionPlan.from_pretrained(tmp_path / "out")
    assert [plan.width for plan in again.blocks.values()] == [plan.width for plan in plans]
    assert again.settings == compressor.plan.settings


@pytest.mark.parametrize("target", every_target())
def test_neurons_that_give_nothing_cost_nothing(target: Target) -> None:
    """With two thirds of the neurons of every expert silent, about a third of the bytes gives the same outputs."""
    model = build(target)
    info = with_widths(model, find_blocks(model))[0].info
    if reason := info.fixed_width or info.no_factors:
        pytest.skip(reason)
    left = info.intermediate_size // 3
    assert left % width_step(info.intermediate_size) == 0
    with torch.no_grad():
        for found in find_blocks(model):
            for down_HI in found.surgeon.experts(found.module(model)).down:
                down_HI[:, torch.randperm(info.intermediate_size)[left:]] = 0.0
    expected = logits_of(model, inputs_for(target))
    compressor = compressor_for(model, target, share=0.36)
    actual = logits_of(compressor.apply(), inputs_for(target))
    assert {plan.num_groups for plan in compressor.plan.blocks.values()} == {info.num_experts}
    assert {plan.width for plan in compressor.plan.blocks.values()} == {left}
    assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("target", every_target())
def test_rerouting_is_what_the_smaller_router_does(target: Target) -> None:
    """Ids and weights of the sampled tokens after half of the experts are gone, against the cut model's own."""
    model, inputs = build(target), inputs_for(target, rows=4, length=32)
    data = CalibrationConfig([inputs])
    stage = ByteBudget(share=0.9, runs_in="transformers", curvature=False)
    try:
        statistics = MoECompressor.from_pretrained(model, stage, data, progress=False).calibrate()
    except ValueError as refusal:
        pytest.skip(str(refusal))
    # The inputs of the first block do not depend on any cut.
    found = find_blocks(model)[0]
    info, block = found.info, found.module(model)
    if info.fixed_router:
        pytest.skip(info.fixed_router)
    size = info.num_experts // info.router_groups
    kept = [group * size + slot for group in range(info.router_groups) for slot in range(0, size, 2)]
    sample = statistics.blocks[info.name].reservoir
    routed = Rerouter(
        router=found.surgeon.router(block),
        input_SX=sample.router_input_SH,
        index_SK=sample.index_SK,
        weights_SK=sample.weights_SK,
        router_groups=info.router_groups,
        groups_used=info.router_groups_used,
    ).route(kept)
    if routed is None:
        assert target.name in _OWN_RULES
        pytest.skip("its router has a rule of its own, so tokens of removed experts are left out of the refit")
    labels = [kept.index(expert) if expert in kept else -1 for expert in range(info.num_experts)]
    weights_E = torch.tensor([float(label >= 0) for label in labels], dtype=torch.float64)
    plan = BlockPlan(info.name, tuple(labels), tuple(kept), "reduce", weights_E, router_weights_E=weights_E)
    found.surgeon.carry_out(block, plan)
    seen = Seen()
    with torch.no_grad(), found.surgeon.watch(block, seen):
        model(**inputs)
    index_SK, weights_SK = routed
    order_SK, there_SK = index_SK.argsort(-1), seen.index_TK.argsort(-1)
    own_SK = torch.tensor(kept)[seen.index_TK.gather(1, there_SK)]
    same_S = (index_SK.gather(1, order_SK) == own_SK).all(-1)
    assert same_S.double().mean() >= 0.99
    off_SK = weights_SK.gather(1, order_SK) - seen.weights_TK.gather(1, there_SK)
    assert off_SK[same_S].abs().max() <= 1e-3 * seen.weights_TK.abs().max()


class Seen:
    """The routing of one call of a block."""

    def router(self, logits_TE: torch.Tensor, input_TH: torch.Tensor) -> None:
        """Not needed here."""

    def begin(self, input_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        self.index_TK, self.weights_TK = index_TK.long(), weights_TK

    def expert(self, *called: object) -> None:
        """Not needed here."""


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_streaming_writes_the_same(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "original")
    results = []
    for engine in ("memory", "streaming"):
        compressor = compressor_for(
            tmp_path / "original",
            name,
            share=0.5,
            curvature=False,
            engine=engine,
            output_dir=tmp_path / engine,
        )
        compressor.apply()
        results.append(compressor.plan)
        assert verify(tmp_path / engine, against=tmp_path / "original", inputs=inputs_for(name)).passed
    ours, theirs = ({n: (b.labels_E, b.width, b.digest) for n, b in plan.blocks.items()} for plan in results)
    assert ours == theirs


def test_a_streaming_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with error propagation, where the layers that were cut run again with their written experts."""
    build("qwen3_moe", num_hidden_layers=3).save_pretrained(tmp_path / "original")

    def run(name: str) -> dict[str, object]:
        compressor = compressor_for(
            tmp_path / "original",
            "qwen3_moe",
            share=0.5,
            engine="streaming",
            output_dir=tmp_path / name,
            error_propagation=True,
        )
        compressor.apply()
        assert verify(tmp_path / name, against=tmp_path / "original").passed
        return {block: (plan.labels_E, plan.width, plan.digest) for block, plan in compressor.plan.blocks.items()}

    whole, finish = run("whole"), DiskStore.finish

    def stop_after_two(store: DiskStore, layer: Layer, *arguments: object) -> None:
        finish(store, layer, *arguments)
        if layer.name.endswith(".1"):
            raise KeyboardInterrupt

    monkeypatch.setattr(DiskStore, "finish", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run("out")
    monkeypatch.undo()
    assert run("out") == whole


def test_a_target_size_is_met_by_the_files(tmp_path: Path) -> None:
    model = build("deepseek_v3", moe_intermediate_size=48)
    model.save_pretrained(tmp_path / "original")
    size = sum(path.stat().st_size for path in (tmp_path / "original").glob("*.safetensors"))
    for share in (0.6, 0.8):
        compressor = compressor_for(tmp_path / "original", "deepseek_v3", target_size=int(share * size))
        compressor.apply()
        compressor.save_pretrained(tmp_path / f"out{share}")
        files = (tmp_path / f"out{share}").glob("*.safetensors")
        assert 0.8 * share * size < sum(path.stat().st_size for path in files) <= share * size
        config = json.loads((tmp_path / f"out{share}" / "config.json").read_text(encoding="utf-8"))
        # The width of the shared expert does not change.
        assert config["moe_intermediate_size"] * config["n_shared_experts"] == 48
        width = config["moe_intermediate_size"]
        assert compressor.measured().widths == (None if width == 48 else (48, width))
        assert (f"of 48 -> {width} neurons" in str(compressor.measured())) == (width < 48)


def test_groups_of_a_router_stay_equal() -> None:
    compressor = compressor_for(build("deepseek_v3-groups"), "deepseek_v3-groups", share=0.6)
    compressor.apply()
    for plan in compressor.plan.blocks.values():
        halves = [sum(expert // 4 == group for expert in plan.dominants_G) for group in (0, 1)]
        assert halves[0] == halves[1] >= 2


def test_what_cannot_be_expressed_is_refused() -> None:
    model = build("qwen3_moe")
    with pytest.raises(ValueError, match="did you mean 'any'"):
        ByteBudget(share=0.5, runs_in="anny")
    with pytest.raises(
        ValueError, match=r"less than stock classes can express: 2 experts of 8 neurons .* share of 0\.08"
    ):
        compressor_for(model, "qwen3_moe", share=0.05)
    data = CalibrationConfig(data_for("qwen3_moe"))
    with pytest.raises(ValueError, match=r'leave out model\.layers\.1\.mlp.*runs_in="transformers"'):
        MoECompressor.from_pretrained(model, ByteBudget(share=0.5, runs_in="any", layers=[0]), data)
    with pytest.raises(ValueError, match=r'cannot follow m-smoe.*runs_in="transformers"'):
        MoECompressor.from_pretrained(model, [MSMoE(num_experts=4), ByteBudget(share=0.5, runs_in="any")], data)
    with pytest.raises(ValueError, match="cannot follow byte-budget"):
        MoECompressor.from_pretrained(model, [ByteBudget(share=0.5, runs_in="any"), LowRankSparse(rank=4)], data)


@pytest.mark.parametrize("option", ["copy", "cut"])
def test_experts_of_other_layers_would_keep_their_width(option: str, tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "in", "deepseek_v3")
    with pytest.raises(ValueError, match=rf"mtp='{option}' keeps experts of the original width .* mtp=\"drop\""):
        compressor_for(tmp_path / "in", "deepseek_v3", share=0.5, mtp=option)
    compressor = compressor_for(tmp_path / "in", "deepseek_v3", share=0.5, mtp="drop", output_dir=tmp_path / "out")
    compressor.apply()
    assert verify(tmp_path / "out", against=tmp_path / "in").passed


def test_without_the_package_the_same_model_loads(tmp_path: Path) -> None:
    compressor = compressor_for(build("mixtral"), "mixtral", share=0.5)
    expected = logits_of(compressor.apply(), inputs_for("mixtral"))
    compressor.save_pretrained(tmp_path / "out")
    code = (
        "import sys; sys.modules['optimum_moe'] = None\n"
        "import torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"ids = torch.tensor({inputs_for('mixtral')['input_ids'].tolist()})\n"
        "torch.save(model(input_ids=ids).logits, sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "logits.pt")], check=True, capture_output=True)
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() <= 1e-6


def test_widths_are_those_of_the_quantizer_and_of_the_processes() -> None:
    info = replace(with_widths(build("qwen3_moe"), find_blocks(build("qwen3_moe")))[0].info, intermediate_size=768)
    assert possible_widths(info) == [*range(32, 769, 32)]
    assert possible_widths(info, get_quantizer("q4_k_m")) == [256, 512, 768]
    assert possible_widths(info, get_quantizer("fp8"), tensor_parallel=2) == [256, 512, 768]
    assert possible_widths(info, get_quantizer("q8_0"), tensor_parallel=3) == [96 * n for n in range(1, 9)]
    assert possible_widths(replace(info, width_divides=1536), get_quantizer("q4_k_m")) == [256, 512, 768]
    odd = replace(info, intermediate_size=1408)
    # The width of the original is on the grid of q8_0, and not on that of the K-quants.
    assert possible_widths(odd, get_quantizer("q8_0"))[-1] == 1408
    assert possible_widths(odd, get_quantizer("q4_k_m")) == [256, 512, 768, 1024, 1280]
    assert possible_widths(replace(info, fixed_width="so"), get_quantizer("q4_k_m")) == [768]
    for block, quantizer, processes in ((replace(info, intermediate_size=96), "q4_k_m", 1), (info, "fp8", 7)):
        with pytest.raises(ValueError, match=rf"No width of at most {block.intermediate_size} neurons is a multiple"):
            possible_widths(block, get_quantizer(quantizer), processes)
    with pytest.raises(ValueError, match="fixed here"):
        possible_widths(replace(odd, fixed_width="fixed here"), get_quantizer("q4_k_m"))
    # As fine as can be chosen among where experts are small, and what every kernel takes where they are large.
    assert [width_step(size) for size in (24, 48, 80, 96, 192, 704, 768, 1408, 1000)] == [
        8,
        8,
        8,
        16,
        32,
        32,
        32,
        32,
        8,
    ]


def test_a_budget_for_a_quantizer_stays_on_its_grid() -> None:
    model = build("qwen3_moe", hidden_size=64, moe_intermediate_size=96)
    compressor = compressor_for(model, "qwen3_moe", share=0.45, quantize="q8_0", curvature=False)
    compressor.apply()
    assert {plan.width % 32 if plan.width else 0 for plan in compressor.plan.blocks.values()} == {0}
    with pytest.warns(UserWarning, match=r"hidden size 48 is no multiple of 32: .* is stored in a larger type"):
        compressor_for(
            build("qwen3_moe", hidden_size=48, moe_intermediate_size=96), "qwen3_moe", share=0.45, quantize="q4_0"
        )
    for settings, message in (
        ({"runs_in": "transformers", "quantize": "q4_0"}, r'does not write\. Pass runs_in="any"'),
        ({"runs_in": "transformers", "tensor_parallel": 2}, "has no meaning for runs_in='transformers'"),
        (
            {"runs_in": "any", "formats": ["low_rank"]},
            r"can take experts in the formats \['narrow'\], not in 'low_rank'",
        ),
        ({"runs_in": "any", "quantize": "q4_9"}, "quantize='q4_9' is unknown; did you mean 'q4_"),
        ({"runs_in": "any", "tensor_parallel": 0}, "tensor_parallel=0 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            ByteBudget(share=0.5, **settings)
    with pytest.raises(ValueError, match=r"tensor_parallel=5 does not divide the 48 neurons"):
        MoECompressor.from_pretrained(
            build("qwen3_moe", moe_intermediate_size=48),
            ByteBudget(share=0.5, runs_in="vllm", tensor_parallel=5),
            data_for("qwen3_moe"),
        )


def test_another_runtime_would_lose_less(tmp_path: Path) -> None:
    """The last sentence, which the plan keeps; none where nothing can be gained."""
    compressor = compressor_for(build("qwen3_moe", num_hidden_layers=3), "qwen3_moe", share=0.4)
    compressor.apply()
    (remark,) = compressor.plan.remarks
    assert re.search(r'With runs_in="transformers" as many bytes are expected to lose at least \d+% less', remark)
    compressor.save_pretrained(tmp_path / "out")
    assert CompressionPlan.from_pretrained(tmp_path / "out").remarks == (remark,)


def test_the_preview_shows_among_what_the_data_will_choose() -> None:
    preview = compressor_for(build("qwen3_moe", moe_intermediate_size=48), "qwen3_moe", share=0.5).preview()
    # Of pairs with as many experts the widest one.
    assert preview.choices == ((8, 24), (6, 32), (4, 48))
    assert "8 -> 8 of 24, 6 of 32 or 4 of 48 neurons, by the data; loads in any transformers" in str(preview)
    assert preview.to_dict()["choices"] == preview.choices


def test_a_small_sample_is_said() -> None:
    stage, target = ByteBudget(share=0.5, curvature=False), "qwen3_moe"
    for sample, expected in ((64, 1), (384, 0)):
        data = CalibrationConfig(data_for(target), reservoir_tokens=sample)
        compressor = MoECompressor.from_pretrained(build(target), stage, data, progress=False)
        compressor.apply()
        said = [remark for remark in compressor.plan.remarks if "reservoir_tokens=384" in remark]
        assert len(said) == expected
        assert all("a sample of 64 of 384 calibration tokens" in remark for remark in said)
