"""Architectures with a surgeon of their own: statistics against their formulas, what runs after a cut, training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import one_hot, silu

from optimum_moe import CalibrationConfig, MoECompressor, MSMoE
from optimum_moe.surgeons import find_blocks
from tests.tiny_models import Target, build, by_name, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

LANGUAGE_MODELS = ["longcat_flash", "dbrx", "llama4", "llama4-top1", "jetmoe", "switch_transformers"]
ODD = [*LANGUAGE_MODELS[:5], "step3p7", "vitpose_backbone"]


def routing_of(name: str, block, logits_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, K) weights and ids by the formula of an architecture."""
    top_k = find_top_k(name, block)
    if name == "longcat_flash":
        scores_TN = logits_TN.softmax(-1)
        index_TK = (scores_TN + block.router.e_score_correction_bias).topk(top_k).indices
        return scores_TN.gather(1, index_TK) * block.router.routed_scaling_factor, index_TK
    if name == "step3p7":
        scores_TN = logits_TN.sigmoid()
        index_TK = (scores_TN + block.gate.e_score_correction_bias).topk(top_k).indices
        weights_TK = scores_TN.gather(1, index_TK)
        return weights_TK / weights_TK.sum(-1, keepdim=True), index_TK
    values_TK, index_TK = logits_TN.topk(top_k)
    if name.startswith("llama4"):
        return values_TK.sigmoid(), index_TK
    # A softmax over the selected ones is one over all that is divided by its sum.
    return values_TK.softmax(-1), index_TK


def find_top_k(name: str, block) -> int:
    return block.top_k if name == "dbrx" or name.startswith("llama4") else getattr(block, router_name(name)).top_k


def router_name(name: str) -> str:
    return "gate" if name == "step3p7" else "router"


def observed(model, batches) -> dict:
    compressor = MoECompressor.from_pretrained(model, MSMoE(num_experts=4), CalibrationConfig(batches), progress=False)
    return compressor.calibrate().blocks


@pytest.mark.parametrize("name", ODD[:-1])
@torch.no_grad()
def test_sums_equal_the_formulas(name: str) -> None:
    model, inputs = build(name), inputs_for(name, rows=2, length=32)
    statistics = observed(model, [inputs])
    for found in find_blocks(model):
        block, stats, count = found.module(model), statistics[found.info.name], found.info.num_experts
        seen: dict[str, torch.Tensor] = {}
        router = getattr(block, router_name(name))
        handle = router.register_forward_hook(lambda m, args, out, seen=seen: seen.update(hidden=args[0], out=out))
        logits_of(model, inputs)
        handle.remove()
        hidden_TH = seen["hidden"].reshape(-1, 64)
        place = {"jetmoe": 4, "llama4": 1, "llama4-top1": 1}.get(name, 0)
        logits_TN = seen["out"] if name == "dbrx" else seen["out"][place]
        logits_TE = logits_TN[:, :count].double()
        weights_TK, index_TK = routing_of(name, block, logits_TN)
        torch.testing.assert_close(stats.router_gram_EE, logits_TE.T @ logits_TE, rtol=1e-5, atol=1e-5)
        chosen_TE = one_hot(index_TK, count + 4).sum(1)[:, :count].double()
        assert torch.equal(stats.token_count_E, chosen_TE.sum(0))
        torch.testing.assert_close(stats.coactivation_EE, chosen_TE.T @ chosen_TE)
        if found.surgeon.name == "jetmoe_attention":
            continue
        experts = found.surgeon.experts(block)
        for expert in range(count):
            token_P, slot_P = (index_TK == expert).nonzero(as_tuple=True)
            weight_P = weights_TK[token_P, slot_P].double()
            scale_P1 = weight_P[:, None].float() if name.startswith("llama4") else 1.0
            input_PH = hidden_TH[token_P] * scale_P1
            gate_PI, up_PI = input_PH @ experts.gate[expert].T, input_PH @ experts.up[expert].T
            if name == "step3p7":
                limit = block.experts.limit
                hidden_PI = silu(gate_PI).clamp(max=limit) * up_PI.clamp(-limit, limit)
            else:
                hidden_PI = silu(gate_PI) * up_PI
            norm_P = (hidden_PI @ experts.down[expert].T).double().norm(dim=-1)
            added_P = norm_P if name.startswith("llama4") else norm_P * weight_P
            expected = {
                "gate_sum_E": weight_P.sum(),
                "gated_norm_sum_E": added_P.sum(),
                "gated_sq_sum_E": added_P.square().sum(),
                "input_sq_EH": input_PH.double().square().sum(0),
                "hidden_sq_EI": hidden_PI.double().square().sum(0),
            }
            for field, value in expected.items():
                torch.testing.assert_close(getattr(stats, field)[expert], value, rtol=1e-4, atol=1e-7, msg=field)


def test_attention_experts_are_observed_with_what_they_add() -> None:
    """All tokens' outputs of the attention experts, weighted, are the attention's output without its bias."""
    model, inputs = build("jetmoe"), inputs_for("jetmoe", rows=1, length=24)
    added: dict[str, torch.Tensor] = {}
    block = model.model.layers[1].self_attention.experts

    class Watcher:
        def router(self, *seen) -> None:
            added["sum"] = torch.zeros(24, 64)

        def begin(self, *seen) -> None:
            pass

        def expert(self, expert, token_P, weight_P, input_PH, hidden_PI, output_PH) -> None:
            added["sum"].index_add_(0, token_P, output_PH * weight_P[:, None])

    found = next(found for found in find_blocks(model) if found.module(model) is block)
    seen = {}
    model.model.layers[1].self_attention.register_forward_hook(lambda m, args, out: seen.update(out=out[0]))
    with torch.no_grad(), found.surgeon.watch(block, Watcher()):
        model(**inputs)
    torch.testing.assert_close(added["sum"], seen["out"][0] - block.bias, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_images_count_for_the_expert_of_their_data_set() -> None:
    model, inputs = build("vitpose_backbone"), inputs_for("vitpose_backbone", rows=12)
    statistics = observed(model, [inputs])
    images_E = one_hot(inputs["dataset_index"], 8).sum(0).double()
    for found in find_blocks(model):
        block, stats = found.module(model), statistics[found.info.name]
        # 4 x 4 patches of an image.
        assert torch.equal(stats.token_count_E, 16 * images_E)
        assert torch.equal(stats.router_gram_EE, torch.diag(16 * images_E))
        seen = {}
        handle = block.experts.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(hidden=args[0]))
        model(**inputs)
        handle.remove()
        for expert, module in enumerate(block.experts):
            hidden_PI = seen["hidden"][inputs["dataset_index"] == expert].flatten(0, 1)
            norm = module(hidden_PI).double().norm(dim=-1).sum()
            torch.testing.assert_close(stats.output_norm_sum_E[expert], norm, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ODD)
def test_sizes_are_the_same_on_the_meta_device(name: str) -> None:
    model = build(name)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    real, empty = ([dataclasses.asdict(found.info) for found in find_blocks(m)] for m in (model, skeleton))
    assert real == empty
    assert {block["num_experts"] for block in real} == {8}
    for found in find_blocks(model):
        experts = found.surgeon.expert_parameters(found.module(model))
        trailing = 4 * 2 * 24 * 64 if name == "longcat_flash" else 0
        assert sum(p.numel() for p in experts) == 8 * found.info.expert_parameters + trailing


def merged(target: Target, **settings) -> torch.nn.Module:
    data = CalibrationConfig([inputs_for(target, rows=4, length=32)])
    method = MSMoE(num_experts=4, **settings)
    return MoECompressor.from_pretrained(build(target), method, data, progress=False).apply()


@pytest.mark.parametrize("routing", ["map", "reduce"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_compressed_models_generate(name: str, routing: str) -> None:
    """Greedy tokens with a cache are those of forward passes over the whole text."""
    target = by_name(name)
    model, inputs = merged(target, routing=routing), inputs_for(target, rows=1, length=6)
    model.generation_config.eos_token_id = None
    if target.is_encoder_decoder:
        # Generation puts the start token in front of what does not begin with it.
        inputs["decoder_input_ids"][:, 0] = model.generation_config.decoder_start_token_id
    tokens = inputs["decoder_input_ids" if target.is_encoder_decoder else "input_ids"]
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for _ in range(4):
        whole = inputs | {"decoder_input_ids": tokens} if target.is_encoder_decoder else {"input_ids": tokens}
        tokens = torch.cat([tokens, logits_of(model, whole)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, tokens)


@pytest.mark.parametrize("routing", ["map", "reduce"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_gradients_reach_experts_and_router(name: str, routing: str) -> None:
    target = by_name(name)
    model, inputs = merged(target, routing=routing), inputs_for(target, rows=4, length=32)
    model.train()
    model(**inputs).logits.square().mean().backward()
    of_a_block = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(part in name for part in (".experts.", "router", "_linear."))
    }
    assert len(of_a_block) >= 3 * sum(1 for module in model.modules() if hasattr(module, "router"))
    for parameter_name, parameter in of_a_block.items():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@torch.no_grad()
def test_a_merged_attention_expert_projects_a_token_once() -> None:
    model, inputs = merged(by_name("jetmoe")), inputs_for("jetmoe")
    for layer in model.model.layers:
        for block in (layer.mlp, layer.self_attention.experts):
            rows = {}
            handles = [
                block.router.register_forward_hook(lambda m, args, out, rows=rows: rows.update(logits=out[4])),
                block.output_linear.register_forward_hook(lambda m, args, out, rows=rows: rows.update(ran=len(out))),
            ]
            model(**inputs)
            for handle in handles:
                handle.remove()
            groups_TK = block.router.expert_map[rows["logits"].topk(2).indices]
            repeats = int((groups_TK[:, 0] == groups_TK[:, 1]).sum())
            assert repeats > 0
            assert rows["ran"] == 2 * len(groups_TK) - repeats


@pytest.mark.parametrize(("name", "columns"), [("llama4", 8), ("llama4-top1", 4)])
@torch.no_grad()
def test_llama4_keeps_the_scores_of_merged_experts_apart(name: str, columns: int) -> None:
    """E(s1 x) + E(s2 x) is no E of anything: each selected expert has a column in its group."""
    model = merged(by_name(name))
    block = model.model.layers[1].feed_forward
    scores_TC, logits_TN = block.router(torch.randn(50, 64))
    assert scores_TC.shape == (50, columns)
    assert logits_TN.shape == (50, 8)
    top_k = columns // 4
    values_TK, index_TK = logits_TN.topk(top_k)
    groups_TK = block.router.expert_map[index_TK]
    for slot in range(top_k):
        column_T1 = groups_TK[:, slot : slot + 1] * top_k + slot
        torch.testing.assert_close(scores_TC.gather(1, column_T1), values_TK[:, slot : slot + 1].sigmoid())
    assert ((scores_TC != 0).sum(-1) == top_k).all()


@torch.no_grad()
def test_zero_experts_stay_what_they_are() -> None:
    for routing in ("map", "reduce"):
        model = merged(by_name("longcat_flash"), routing=routing)
        experts = model.model.layers[0].mlp.experts
        assert (experts.num_routed_experts, experts.total_experts) == (4, 8)
        assert (len(experts.gate_up_proj), len(experts.down_proj)) == (8, 4)
        hidden_TH, weights_TK = torch.randn(5, 64), torch.rand(5, 2)
        index_TK = torch.tensor([[4, 5], [5, 4], [6, 7], [7, 6], [4, 7]])
        torch.testing.assert_close(experts(hidden_TH, index_TK, weights_TK), hidden_TH * weights_TK.sum(-1)[:, None])
    original = build("longcat_flash").model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(experts.gate_up_proj[4:], original[8:])
