"""Pruning criteria: against public implementations, and against what removing an expert really changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor
from optimum_moe.algorithms.grouping import dominant_experts
from optimum_moe.algorithms.removal import over_tokens, removal_changes
from optimum_moe.calibration.recorder import BlockRecorder
from optimum_moe.stages import BlockContext
from optimum_moe.stages.saliency import SALIENCIES
from optimum_moe.statistics import BlockStatistics
from tests.block_output import output_of
from tests.expert_order import running_order, silence
from tests.tiny_models import Target, build, every_target, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

PARITY = load_file(Path(__file__).parent / "data" / "parity_criteria.safetensors")

OWN_RULES = ("longcat_flash", "deepseek_v4-hash", "phimoe", "inkling")
"""Targets whose routers select by a rule that does not follow from the logits alone."""


def recorded(
    prefix: str, batches: int, routing: str, weights_of, with_mask: bool
) -> tuple[BlockStatistics, dict[str, torch.Tensor]]:
    """Statistics of expert outputs that are given, and the values of a public implementation for them."""
    given = {key.removeprefix(f"{prefix}/"): value for key, value in PARITY.items() if key.startswith(f"{prefix}/")}
    experts, _, hidden = given["in/act0"].shape
    recorder = BlockRecorder(experts, 2, hidden, reservoir_tokens=0)
    for batch in range(batches):
        act_ETH, index_TK = given[f"in/act{batch}"], given[f"in/{routing}{batch}"]
        weights_TK, input_TH = weights_of(given, batch, index_TK), torch.zeros(act_ETH.shape[1], hidden)
        recorder.expect(batch, given[f"in/mask{batch}"] if with_mask else None)
        recorder.router(given[f"in/logits{batch}"], input_TH)
        recorder.begin(input_TH, index_TK, weights_TK)
        for expert in range(experts):
            token_P, slot_P = (index_TK == expert).nonzero(as_tuple=True)
            hidden_PI, output_PH = torch.zeros(len(token_P), 2), act_ETH[expert, token_P]
            recorder.expert(expert, token_P, weights_TK[token_P, slot_P], input_TH[token_P], hidden_PI, output_PH)
    return recorder.statistics(), given


def saliency(name: str, statistics: BlockStatistics) -> torch.Tensor:
    function = SALIENCIES[name]
    return function.function(**{part: getattr(statistics, part) for part in function.parts})


def shares(given: dict[str, torch.Tensor], batch: int, index_TK: torch.Tensor) -> torch.Tensor:
    chosen_TK = given[f"in/logits{batch}"].softmax(-1).gather(1, index_TK)
    return chosen_TK / chosen_TK.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("reap", "chk/reap"),
        ("gate_sum", "chk/weighted_expert_frequency_sum"),
        ("output_norm", "chk/ean_mean"),
        ("ean", "out/ean_sum"),
    ],
)
def test_criteria_are_those_of_the_public_reap(name: str, theirs: str) -> None:
    statistics, given = recorded("reap_criterion_renorm1", 3, "selected", shares, with_mask=True)
    assert torch.equal(statistics.token_count_E, given["out/expert_frequency"].double())
    assert statistics.num_tokens == int(given["out/total_tokens"])
    torch.testing.assert_close(saliency(name, statistics), given[theirs], rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.gated_norm_sum_E, given["chk/weighted_ean_sum"], rtol=1e-6, atol=0)
    frequency_E = given["out/expert_frequency"] / given["out/expert_frequency"].sum()
    torch.testing.assert_close(saliency("frequency", statistics), frequency_E.double(), rtol=1e-7, atol=0)


def test_reap_is_that_of_llm_compressor() -> None:
    def real(given: dict[str, torch.Tensor], batch: int, index_TK: torch.Tensor) -> torch.Tensor:
        return given[f"in/w{batch}"]

    statistics, given = recorded("llmcompressor_reap", 2, "idx", real, with_mask=False)
    saliency_E = saliency("reap", statistics)
    torch.testing.assert_close(saliency_E, given["out/llmc_saliency"], rtol=1e-6, atol=0)
    assert sorted(dominant_experts(saliency_E, 4)) == given["out/retained_drop4"].tolist()
    assert sorted(dominant_experts(saliency_E, 4, 2)) == given["out/retained_2groups_drop2each"].tolist()


def first_context(model, saliency: str, inputs, num_experts: int = 4) -> BlockContext:
    """The first block that runs, as a criterion sees it."""
    stage = ExpertPruning(num_experts=num_experts, saliency=saliency)
    statistics = MoECompressor.from_pretrained(model, stage, CalibrationConfig([inputs]), progress=False).calibrate()
    found = running_order(model, inputs)[0]
    block = found.module(model)
    return BlockContext(
        info=found.info,
        experts=found.surgeon.experts(block),
        router=found.surgeon.router(block),
        generator=torch.Generator(),
        statistics=statistics.blocks[found.info.name],
    )


@pytest.mark.parametrize("target", every_target())
def test_razor_is_what_removing_an_expert_changes(target: Target) -> None:
    """Token by token, against the model with the expert's router logit at minus 60."""
    if target.refuses_pruning:
        pytest.skip(target.refuses_pruning)
    # Fewer tokens than channels, so that a router row with a given logit on all of them exists.
    inputs = inputs_for(target, rows=2, length=16)
    model = build(target)
    context = first_context(model, "razor", inputs)
    if context.experts.fixed_neurons:
        with pytest.raises(ValueError, match="meet what all experts share"):
            SALIENCIES["razor"](context)
        return
    sample = context.sample()
    change_SK = removal_changes(context.experts, sample, context.rerouter())
    if change_SK is None:
        assert target.name in OWN_RULES or target.name.endswith("-groups")
        with pytest.raises(ValueError, match='Use "rcs"'):
            SALIENCIES["razor"](context)
        return
    before_TH, tested = output_of(model, context.info.name, inputs), 0
    for expert in range(8):
        chosen_SK = (sample.index_SK == expert) & (sample.weights_SK != 0)
        if not chosen_SK.any() or tested == 2:
            continue
        model = build(target)
        silence(model, [expert], inputs)
        expected_T = (output_of(model, context.info.name, inputs) - before_TH).norm(dim=-1)
        rounding = 1e-5 * float(before_TH.norm(dim=-1).max())
        torch.testing.assert_close(change_SK[chosen_SK], expected_T[chosen_SK.any(-1)], rtol=1e-4, atol=rounding)
        tested += 1
    assert tested == 2
    sum_E, count_E = over_tokens(change_SK.square(), sample, 8)
    torch.testing.assert_close(SALIENCIES["razor"](context), (sum_E / count_E.clamp(min=1)).sqrt())


EVERY_EXPERT = {"num_experts_per_tok": 8}
"""A router that selects all experts, so that none comes in for one that is removed."""


@pytest.mark.filterwarnings("ignore:expert-pruning with num_experts=8 removes nothing")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_razor_is_what_removing_an_expert_changes_where_none_comes_in(name: str) -> None:
    inputs = inputs_for(name, rows=2, length=16)
    model = build(name, **EVERY_EXPERT)
    context = first_context(model, "razor", inputs, num_experts=8)
    sample = context.sample()
    assert sample.index_SK.shape[1] == 8
    change_SK = removal_changes(context.experts, sample, context.rerouter())
    before_TH = output_of(model, context.info.name, inputs)
    for expert in (0, 5):
        model = build(name, **EVERY_EXPERT)
        silence(model, [expert], inputs)
        expected_T = (output_of(model, context.info.name, inputs) - before_TH).norm(dim=-1)
        rounding = 1e-5 * float(before_TH.norm(dim=-1).max())
        torch.testing.assert_close(change_SK[sample.index_SK == expert], expected_T, rtol=1e-4, atol=rounding)


@pytest.mark.filterwarnings("ignore:expert-pruning with num_experts=8 removes nothing")
def test_razor_is_the_formula_of_the_paper_where_no_expert_comes_in() -> None:
    """w / (1 - w) ||f - c||, written out for a router that divides weights by their sum, in float64."""
    model, inputs = build("qwen3_moe", norm_topk_prob=True, **EVERY_EXPERT), inputs_for("qwen3_moe", rows=4, length=32)
    context = first_context(model, "razor", inputs, num_experts=8)
    output_SEH = outputs_of_all(context)
    share_SE = (context.sample().input_SH.double() @ context.router.rows_NX.double().T).softmax(-1)
    mean_S1H = (share_SE[..., None] * output_SEH).sum(1, keepdim=True)
    change_SE = share_SE / (1 - share_SE) * (output_SEH - mean_S1H).norm(dim=-1)
    expected_E = change_SE.square().mean(0).sqrt()
    torch.testing.assert_close(SALIENCIES["razor"](context), expected_E.detach(), rtol=1e-4, atol=0)


def test_razor_is_the_formula_of_the_paper() -> None:
    """Written out for a router that divides weights by their sum, in float64."""
    model, inputs = build("qwen3_moe", norm_topk_prob=True), inputs_for("qwen3_moe", rows=4, length=32)
    context = first_context(model, "razor", inputs)
    sample, rows_EH = context.sample(), context.router.rows_NX.double()
    score_SE = (sample.input_SH.double() @ rows_EH.T).softmax(-1)
    output_SEH = outputs_of_all(context)
    best_SK = score_SE.topk(3).indices
    share_SE = score_SE / score_SE.gather(1, best_SK[:, :2]).sum(-1, keepdim=True)
    square_E, count_E, first_E = torch.zeros(3, 8, dtype=torch.float64)
    for s, (one, two, comes_in) in enumerate(best_SK.tolist()):
        w, f = share_SE[s], output_SEH[s]
        c = w[one] * f[one] + w[two] * f[two]
        for i in (one, two):
            change = w[i] * (f[i] - c) - w[comes_in] * (f[comes_in] - c)
            square_E[i] += (change.norm() / (1 - w[i] + w[comes_in])) ** 2
            first_E[i] += (w[i] * (f[i] - c)).norm() ** 2
            count_E[i] += 1
    torch.testing.assert_close(SALIENCIES["razor"](context), (square_E / count_E).sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(SALIENCIES["rcs"](context), (first_E / count_E).sqrt(), rtol=1e-4, atol=0)


def outputs_of_all(context: BlockContext) -> torch.Tensor:
    """(S, E, H) float64 outputs of all experts on all sampled tokens."""
    experts, input_SH = context.experts, context.sample().input_SH.double()

    def output(e: int) -> torch.Tensor:
        gate_SI, up_SI = input_SH @ experts.gate[e].double().T, input_SH @ experts.up[e].double().T
        return torch.nn.functional.silu(gate_SI) * up_SI @ experts.down[e].double().T

    return torch.stack([output(e) for e in range(experts.num_experts)], dim=1).detach()


PRE_NORM = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "aria", "nemotron_h", "switch_transformers")


@pytest.mark.parametrize("name", PRE_NORM)
def test_the_residual_stream_is_what_the_output_of_the_block_is_added_to(name: str) -> None:
    model, inputs = build(name), inputs_for(name)
    context = first_context(model, "easy_ep", inputs)
    block = model.get_submodule(context.info.name)
    layer = model.get_submodule(context.info.name.rpartition(".")[0])
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str):
        def after(module, args, output) -> None:
            summed = output[0] if isinstance(output, tuple) else output
            seen[key] = summed.detach().flatten(0, -2).clone()

        return after

    handles = [block.register_forward_hook(keep("block")), layer.register_forward_hook(keep("layer"))]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    residual_SH = context.observed().reservoir.residual_SH
    torch.testing.assert_close(residual_SH, seen["layer"] - seen["block"], rtol=1e-5, atol=1e-6)


def test_easy_ep_is_the_formula_of_the_paper() -> None:
    """Written out in float64."""
    model, inputs = build("qwen3_moe"), inputs_for("qwen3_moe", rows=4, length=32)
    context = first_context(model, "easy_ep", inputs)
    sample, output_SEH = context.sample(), outputs_of_all(context)
    expected_E = torch.zeros(8, dtype=torch.float64)
    for s, (chosen, weights) in enumerate(zip(sample.index_SK.tolist(), sample.weights_SK.double(), strict=True)):
        x = context.observed().reservoir.residual_SH[s].double()
        y = x + sum(w * output_SEH[s, e] for w, e in zip(weights, chosen, strict=True))
        turned = 1 - x @ y / (x.norm() * y.norm())
        for w, e in zip(weights, chosen, strict=True):
            expected_E[e] += w * output_SEH[s, e].norm() * turned
    torch.testing.assert_close(SALIENCIES["easy_ep"](context), expected_E, rtol=1e-4, atol=0)


def test_mone_is_frequency_times_the_variance_of_the_output() -> None:
    """Written out in float64; what a constant gives does not count."""
    model, inputs = build("qwen3_moe"), inputs_for("qwen3_moe", rows=4, length=32)
    context = first_context(model, "mone", inputs)
    sample, output_SEH = context.sample(), outputs_of_all(context)
    expected = []
    for e in range(8):
        output_PH = output_SEH[(sample.index_SK == e).any(-1), e]
        expected.append(len(output_PH) * output_PH.var(0, correction=0).sum())
    torch.testing.assert_close(SALIENCIES["mone"](context), torch.stack(expected), rtol=1e-4, atol=0)


def test_the_residual_stream_is_observed_only_where_a_criterion_reads_it() -> None:
    model, inputs = build("qwen3_moe"), inputs_for("qwen3_moe")
    statistics = applied(model, "razor", inputs).statistics
    assert all(block.reservoir.residual_SH is None for block in statistics.blocks.values())
    assert ExpertPruning(num_experts=4, saliency="razor").needs == {"sample"}
    assert ExpertPruning(num_experts=4, saliency="rcs").needs == {"sample"}
    assert ExpertPruning(num_experts=4, saliency="easy_ep").needs == {"sample", "residual"}


@pytest.mark.parametrize("saliency", ["razor", "rcs", "easy_ep", "mone"])
def test_streaming_prunes_the_same_experts(saliency: str, tmp_path: Path) -> None:
    build("deepseek_v3").save_pretrained(tmp_path / "original")
    data = CalibrationConfig([inputs_for("deepseek_v3", rows=4, length=32, seed=seed) for seed in range(2)])
    labels = []
    for engine in ("memory", "streaming"):
        stage, output = ExpertPruning(num_experts=4, saliency=saliency), tmp_path / engine
        compressor = MoECompressor.from_pretrained(
            tmp_path / "original", stage, data, engine=engine, output_dir=output, progress=False
        )
        compressor.apply()
        labels.append([plan.labels_E for plan in compressor.plan.blocks.values()])
    assert labels[0] == labels[1]


def applied(model, saliency: str, inputs) -> MoECompressor:
    stage = ExpertPruning(num_experts=4, saliency=saliency)
    compressor = MoECompressor.from_pretrained(model, stage, CalibrationConfig([inputs]), progress=False)
    compressor.apply()
    return compressor


def test_statistics_without_the_residual_stream_are_refused() -> None:
    inputs = inputs_for("qwen3_moe")
    statistics = applied(build("qwen3_moe"), "razor", inputs).statistics
    stage, data = ExpertPruning(num_experts=4, saliency="easy_ep"), CalibrationConfig([inputs])
    compressor = MoECompressor.from_pretrained(build("qwen3_moe"), stage, data, progress=False)
    with pytest.raises(ValueError, match=r"'easy_ep' reads the residual stream before .*, which the statistics do not"):
        compressor.apply(statistics)
