"""The routing map against loops written out, and the mask of Switch Transformers."""

import pytest
import torch

from optimum_moe.nn import map_routing
from optimum_moe.surgeons import find_blocks
from tests.tiny_models import build

NUM_EXPERTS, NUM_GROUPS = 12, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_routing(top_k: int, dtype: torch.dtype, tokens: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    index_TK = torch.rand(tokens, NUM_EXPERTS).topk(top_k, -1).indices
    expert_map_N = torch.randint(NUM_GROUPS, (NUM_EXPERTS,))
    return index_TK, (torch.rand(tokens, top_k) + 0.01).to(dtype), expert_map_N


def by_loop(
    index_TK: torch.Tensor, weights_TK: torch.Tensor, expert_map_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    groups_TK, summed_TK = torch.empty_like(index_TK), torch.empty_like(weights_TK)
    wide = torch.promote_types(weights_TK.dtype, torch.float32)
    for token in range(len(index_TK)):
        sums: dict[int, torch.Tensor] = {}
        first: dict[int, int] = {}
        for slot, expert in enumerate(index_TK[token].tolist()):
            group = int(expert_map_N[expert])
            groups_TK[token, slot] = group
            first.setdefault(group, slot)
            sums[group] = sums.get(group, torch.zeros((), dtype=wide)) + weights_TK[token, slot].to(wide)
        summed_TK[token] = 0
        for group, slot in first.items():
            summed_TK[token, slot] = sums[group].to(weights_TK.dtype)
    return groups_TK, summed_TK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", range(1, 9))
def test_map_equals_a_loop_bit_by_bit(top_k, dtype):
    index_TK, weights_TK, expert_map_N = random_routing(top_k, dtype)
    before = index_TK.clone(), weights_TK.clone()
    groups_TK, summed_TK = map_routing(index_TK, weights_TK, expert_map_N)
    wanted_groups_TK, wanted_TK = by_loop(index_TK, weights_TK, expert_map_N)
    assert torch.equal(groups_TK, wanted_groups_TK)
    assert torch.equal(summed_TK, wanted_TK)
    assert (groups_TK.dtype, summed_TK.dtype) == (index_TK.dtype, dtype)
    assert torch.equal(index_TK, before[0])
    assert torch.equal(weights_TK, before[1])


def test_sums_are_rounded_once():
    # One step of bfloat16 at 256 is 2: added one after the other in bfloat16 the ones would all be lost.
    weights_TK = torch.tensor([[256.0] + [1.0] * 7], dtype=torch.bfloat16)
    _, summed_TK = map_routing(torch.arange(8)[None], weights_TK, torch.zeros(8, dtype=torch.int64))
    assert summed_TK.tolist() == [[264.0] + [0.0] * 7]


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_all_in_one_group_and_all_apart(top_k):
    index_TK = torch.arange(top_k)[None]
    weights_TK = torch.rand(1, top_k)
    groups_TK, summed_TK = map_routing(index_TK, weights_TK, torch.full((NUM_EXPERTS,), 3))
    assert groups_TK.tolist() == [[3] * top_k]
    assert summed_TK[0, 0] == weights_TK.sum()
    assert summed_TK[0, 1:].tolist() == [0.0] * (top_k - 1)
    groups_TK, summed_TK = map_routing(index_TK, weights_TK, torch.arange(NUM_EXPERTS).flip(0))
    assert torch.equal(groups_TK, NUM_EXPERTS - 1 - index_TK)
    assert torch.equal(summed_TK, weights_TK)


def test_int32_ids_and_leading_axes():
    index_TK, weights_TK, expert_map_N = random_routing(4, torch.float32)
    wanted = map_routing(index_TK, weights_TK, expert_map_N)
    groups, summed = map_routing(index_TK.int().view(5, 8, 4), weights_TK.view(5, 8, 4), expert_map_N)
    assert groups.dtype == torch.int32
    assert torch.equal(groups.view(40, 4).long(), wanted[0])
    assert torch.equal(summed.view(40, 4), wanted[1])


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_gradient_of_weights(top_k):
    index_TK, weights_TK, expert_map_N = random_routing(top_k, torch.float64, tokens=6)
    weights_TK.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: map_routing(index_TK, w, expert_map_N)[1], weights_TK)
    # Each slot's gradient is that of the slot its weight went to.
    groups_TK, summed_TK = map_routing(index_TK, weights_TK, expert_map_N)
    upstream_TK = torch.randn_like(weights_TK)
    (gradient_TK,) = torch.autograd.grad(summed_TK, weights_TK, upstream_TK)
    for token in range(6):
        groups = groups_TK[token].tolist()
        for slot, group in enumerate(groups):
            assert gradient_TK[token, slot] == upstream_TK[token, groups.index(group)]


def test_mapped_router_keeps_its_logits(build_mapped):
    for name in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"):
        model = build_mapped(name)
        found = find_blocks(model)[0]
        router = getattr(found.module(model), found.surgeon.architecture.router)
        hidden_TH = torch.randn(10, 64)
        logits_TN, weights_TK, index_TK, *_ = router.original_class.forward(router, hidden_TH)
        mapped = router(hidden_TH)
        groups_TK, summed_TK = by_loop(index_TK, weights_TK, router.expert_map)
        assert torch.equal(mapped[0], logits_TN)
        assert logits_TN.shape == (10, 8)
        assert torch.equal(mapped[1], summed_TK)
        assert torch.equal(mapped[2], groups_TK)


@pytest.mark.parametrize("capacity", [2, 64])
def test_switch_marks_move_from_expert_to_group(build_mapped, capacity):
    original = build("switch_transformers", expert_capacity=capacity)
    mapped = build_mapped("switch_transformers", expert_capacity=capacity)
    for found in find_blocks(original):
        hidden_BSH = torch.randn(3, 30, 64)
        mask_BSN, probability_BS1, logits_BSN = found.module(original).router(hidden_BSH)
        router = found.module(mapped).router
        moved_BSN, *rest = router(hidden_BSH)
        wanted_BSN = torch.zeros_like(mask_BSN)
        for expert, group in enumerate(router.expert_map.tolist()):
            wanted_BSN[..., group] += mask_BSN[..., expert]
        assert torch.equal(moved_BSN, wanted_BSN)
        assert moved_BSN.dtype == mask_BSN.dtype
        assert torch.equal(rest[0], probability_BS1)
        assert torch.equal(rest[1], logits_BSN)
        assert moved_BSN[..., 4:].sum() == 0
        # Capacity counts tokens of an original expert: group 0, with four members, takes up to four times as many.
        dropped = int((mask_BSN.sum(-1) == 0).sum())
        assert int((moved_BSN.sum(-1) == 0).sum()) == dropped
        assert mask_BSN.sum(1).max() <= capacity
        if capacity == 2:
            assert dropped > 0
            assert moved_BSN.sum(1).max() > capacity


def test_switch_block_runs_the_merged_experts(build_mapped):
    model = build_mapped("switch_transformers", expert_capacity=3)
    found = find_blocks(model)[0]
    block = found.module(model)
    hidden_BSH = torch.randn(2, 20, 64)
    mask_BSN, probability_BS1, _ = block.router(hidden_BSH)
    wanted_BSH = torch.zeros_like(hidden_BSH)
    for batch, position, group in mask_BSN.nonzero().tolist():
        expert = block.experts[f"expert_{group}"]
        hidden_I = torch.relu(expert.wi.weight @ hidden_BSH[batch, position])
        wanted_BSH[batch, position] = expert.wo.weight @ hidden_I * probability_BS1[batch, position]
    torch.testing.assert_close(block(hidden_BSH), wanted_BSH)
