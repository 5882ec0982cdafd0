"""What is observed, against direct computation from the modules."""

from __future__ import annotations

import pytest
import torch

from optimum_moe import CalibrationConfig, MoECompressor, MSMoE, Statistics
from optimum_moe.calibration.random_draws import generator_for
from optimum_moe.calibration.recorder import BlockRecorder
from optimum_moe.nn.merged_experts import expert_tensors, run_expert
from optimum_moe.surgeons import find_blocks
from tests.tiny_models import TARGETS, Target, build, by_name, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
EVERY = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


def observed(model, batches, **settings) -> Statistics:
    config = CalibrationConfig(batches, **settings)
    return MoECompressor.from_pretrained(model, MSMoE(num_experts=4), config, progress=False).calibrate()


def routing_of(model, found, inputs) -> tuple[torch.Tensor, ...]:
    """Logits, weights, ids and the experts' input of one block, from plain hooks."""
    seen = {}
    block = found.module(model)
    row = found.surgeon.architecture
    handles = [
        getattr(block, row.router)
        .get_submodule(row.logits or "")
        .register_forward_hook(lambda m, a, out: seen.update(logits=out if row.logits else out[0])),
        getattr(block, row.experts).register_forward_pre_hook(
            lambda m, args: seen.update(hidden=args[0], index=args[1], weights=args[2])
        ),
    ]
    logits_of(model, inputs)
    for handle in handles:
        handle.remove()
    return seen["logits"], seen["weights"], seen["index"], seen["hidden"]


@pytest.mark.parametrize("target", [t for t in TARGETS if t.implementations], ids=lambda t: t.name)
@torch.no_grad()
def test_sums_equal_direct_computation(target: Target) -> None:
    model, inputs = build(target), inputs_for(target)
    statistics = observed(model, [inputs])
    for found in find_blocks(model):
        block = statistics.blocks[found.info.name]
        logits, weights, index, hidden = routing_of(model, found, inputs)
        experts = getattr(found.module(model), found.surgeon.architecture.experts)
        assert block.num_tokens == len(hidden)
        rounding = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(block.router_gram_EE, logits.double().T @ logits.double(), **rounding)
        torch.testing.assert_close(block.router_sum_E, logits.double().sum(0), **rounding)
        for expert in range(found.info.num_experts):
            token, slot = (index == expert).nonzero(as_tuple=True)
            gate = weights[token, slot].double()
            inner, output = run_expert(experts, expert_tensors(experts), expert, hidden[token])
            norm = output.double().norm(dim=-1)
            assert block.token_count_E[expert] == len(token)
            expected = {
                "gate_sum_E": gate.sum(),
                "output_norm_sum_E": norm.sum(),
                "output_sq_sum_E": norm.square().sum(),
                "gated_norm_sum_E": (gate * norm).sum(),
                "gated_sq_sum_E": (gate * norm).square().sum(),
                "input_sq_EH": hidden[token].double().square().sum(0),
                "hidden_sq_EI": inner.double().square().sum(0),
            }
            for name, value in expected.items():
                torch.testing.assert_close(getattr(block, name)[expert], value, rtol=1e-5, atol=1e-7, msg=name)
        one_hot = torch.zeros_like(logits, dtype=torch.float64).scatter_(1, index, 1)
        torch.testing.assert_close(block.coactivation_EE, one_hot.T @ one_hot)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("target", [t for t in TARGETS if t.implementations], ids=lambda t: t.name)
def test_every_token_goes_where_the_stock_forward_sends_it(target: Target, dtype: torch.dtype) -> None:
    """Not one of 1,000 (token, slot) pairs differs, whichever implementation runs the experts and however it rounds."""
    model, inputs = build(target, dtype=dtype), inputs_for(target, rows=4, length=32)
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        watched = observed(model, [inputs]).blocks
        for found in find_blocks(model):
            sample = watched[found.info.name].reservoir
            _, weights, index, hidden = routing_of(model, found, inputs)
            assert torch.equal(sample.index_SK, index), (found.info.name, implementation)
            assert torch.equal(sample.weights_SK, weights)
            assert torch.equal(sample.experts_input_SH, hidden)


@EVERY
def test_padding_never_counts(target: Target) -> None:
    model = build(target)
    short = inputs_for(target, rows=1, length=10)
    padded = {}
    for name, ids in short.items():
        padded[name] = torch.nn.functional.pad(ids, (0, 6), value=5)
        mask = "decoder_attention_mask" if name.startswith("decoder") else "attention_mask"
        padded[mask] = torch.nn.functional.pad(torch.ones_like(ids), (0, 6))
    plain, masked = observed(model, [short]), observed(model, [padded])
    for name, block in plain.blocks.items():
        other = masked.blocks[name]
        assert other.num_tokens == block.num_tokens == 10
        assert torch.equal(other.token_count_E, block.token_count_E)
        torch.testing.assert_close(other.router_gram_EE, block.router_gram_EE, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.gated_norm_sum_E, block.gated_norm_sum_E, rtol=1e-4, atol=1e-6)


@EVERY
def test_observing_leaves_no_trace(target: Target) -> None:
    model, inputs = build(target), inputs_for(target)
    implementation = model.config._experts_implementation
    model.train()
    observed(model, [inputs])
    assert model.training
    assert model.config._experts_implementation == implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits_of(model.eval(), inputs), logits_of(build(target), inputs))


@EVERY
def test_statistics_do_not_grow_with_tokens_and_survive_saving(target: Target, tmp_path) -> None:
    model = build(target)
    batches = [inputs_for(target, rows=4, length=32, seed=seed) for seed in range(4)]
    few, many = observed(model, batches[:1], reservoir_tokens=50), observed(model, batches, reservoir_tokens=50)
    many.save_pretrained(tmp_path / "many")
    loaded = Statistics.from_pretrained(tmp_path / "many")
    assert loaded.calibration == many.calibration
    for name, block in many.blocks.items():
        assert len(block.reservoir.index_SK) == len(few.blocks[name].reservoir.index_SK) == 50
        for field in ("token_count_E", "router_gram_EE", "input_sq_EH"):
            assert getattr(block, field).shape == getattr(few.blocks[name], field).shape
            assert torch.equal(getattr(loaded.blocks[name], field), getattr(block, field))
        assert torch.equal(loaded.blocks[name].reservoir.experts_input_SH, block.reservoir.experts_input_SH)


def test_switch_tokens_beyond_capacity_do_not_count() -> None:
    model = build("switch_transformers", expert_capacity=1)
    statistics = observed(model, [inputs_for("switch_transformers", rows=2, length=16)])
    for block in statistics.blocks.values():
        assert block.num_tokens == 32
        # One token an expert and row of the batch.
        assert block.token_count_E.max() <= 2
        assert block.token_count_E.sum() < 32


def test_the_reservoir_is_a_uniform_sample_of_real_tokens() -> None:
    recorder = BlockRecorder(num_experts=4, intermediate_size=2, hidden_size=1, reservoir_tokens=200, seed=3)
    for start in range(0, 2000, 100):
        hidden_TH = torch.arange(start, start + 100, dtype=torch.float32).unsqueeze(-1)
        recorder.expect(start // 100, None)
        recorder.router(torch.zeros(100, 4), hidden_TH)
        recorder.begin(hidden_TH, torch.zeros(100, 1, dtype=torch.int64), torch.ones(100, 1))
    kept = recorder.statistics().reservoir.experts_input_SH[:, 0]
    assert len(kept.unique()) == 200
    assert torch.equal(kept, kept.sort().values)
    # Mean of 200 draws from 0..1999: standard deviation 41.
    assert abs(kept.mean() - 999.5) < 4 * 41


def test_sampled_tokens_have_labels_from_the_whole_vocabulary() -> None:
    """If one random number chose both, an eighth of the tokens would have labels of the first eighth of the mass."""
    keys_T, labels_T = (torch.rand(8000, generator=generator_for(what, 0, 0)) for what in ("sample", "labels"))
    sampled = labels_T[keys_T.topk(1000, largest=False).indices]
    # Standard deviation of the mean of 1000 uniform numbers: 0.0091.
    assert abs(float(sampled.mean()) - 0.5) < 4 * 0.0091
    assert abs(float(sampled.std()) - 12**-0.5) < 0.03


def test_the_sample_of_a_batch_does_not_depend_on_the_batches_before_it() -> None:
    def kept(batches: range, reservoir_tokens: int) -> torch.Tensor:
        recorder = BlockRecorder(4, intermediate_size=2, hidden_size=1, reservoir_tokens=reservoir_tokens, seed=3)
        for batch in batches:
            hidden_TH = torch.arange(100.0).unsqueeze(-1) + 100 * batch
            recorder.expect(batch, None)
            recorder.router(torch.zeros(100, 4), hidden_TH)
            recorder.begin(hidden_TH, torch.zeros(100, 1, dtype=torch.int64), torch.ones(100, 1))
        return recorder.statistics().reservoir.experts_input_SH[:, 0]

    together = kept(range(4), reservoir_tokens=80)
    for batch in range(4):
        its_own = together[(together // 100) == batch]
        assert 5 < len(its_own) < 40
        assert torch.equal(kept(range(batch, batch + 1), reservoir_tokens=len(its_own)), its_own)


def test_equal_seeds_give_equal_statistics() -> None:
    target = by_name("olmoe")
    batches = [inputs_for(target, rows=4, length=32, seed=seed) for seed in range(3)]
    first, second = (observed(build(target), batches, seed=7, reservoir_tokens=60) for _ in range(2))
    for name, block in first.blocks.items():
        assert torch.equal(block.router_gram_EE, second.blocks[name].router_gram_EE)
        assert torch.equal(block.reservoir.router_input_SH, second.blocks[name].reservoir.router_input_SH)


def test_mean_distinct_groups() -> None:
    target = by_name("mixtral")
    statistics = observed(build(target), [inputs_for(target, rows=4, length=32)])
    for block in statistics.blocks.values():
        index_SK = block.reservoir.index_SK
        assert block.mean_distinct(tuple(range(8))) == 2.0
        assert block.mean_distinct((0,) * 8) == 1.0
        pairs = (0, 0, 1, 1, 2, 2, 3, 3)
        same = (index_SK[:, 0] // 2 == index_SK[:, 1] // 2).double().mean()
        assert block.mean_distinct(pairs) == pytest.approx(2 - float(same))
