"""Merged blocks against a dense sum over all groups, for every experts implementation."""

import shutil

import pytest
import torch

from optimum_moe.nn import MergedExpertLayer
from optimum_moe.nn.merged_experts import eager_experts_forward, grouped_experts_forward
from optimum_moe.surgeons import find_blocks
from tests.tiny_models import build, inputs_for

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
TOP_K = 4


class Block:
    """The first cut block of a tiny model, taken apart."""

    def __init__(self, build_mapped, family: str, implementation: str = "eager", **kwargs) -> None:
        self.model = build_mapped(family, num_experts_per_tok=TOP_K, **kwargs)
        self.model.set_experts_implementation(implementation)
        found = find_blocks(self.model)[0]
        self.family, self.module = family, found.module(self.model)
        self.router = getattr(self.module, found.surgeon.architecture.router)
        self.experts = self.module.experts
        self.tensors = found.surgeon.experts(self.module)

    def routed(self, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Original ids and weights, without the map."""
        _, weights_TK, index_TK, *_ = self.router.original_class.forward(self.router, hidden_TH)
        return index_TK, weights_TK

    def dense(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
        """Every group on every token, weighted by the sum of its members' routing weights."""
        tensors, num_groups = self.tensors, self.experts.num_experts
        one_hot_TKG = torch.nn.functional.one_hot(self.router.expert_map[index_TK], num_groups)
        weights_TG = (one_hot_TKG * weights_TK.unsqueeze(-1)).sum(1)
        output_TH = torch.zeros_like(hidden_TH)
        for group in range(num_groups):
            gate_TI, up_TI = hidden_TH @ tensors.gate[group].T, hidden_TH @ tensors.up[group].T
            if self.family == "gpt_oss":
                gate_TI = (gate_TI + tensors.gate_bias[group]).clamp(max=7.0)
                up_TI = (up_TI + tensors.up_bias[group]).clamp(-7.0, 7.0)
                hidden_TI = (up_TI + 1) * gate_TI * torch.sigmoid(1.702 * gate_TI)
            else:
                hidden_TI = torch.nn.functional.silu(gate_TI) * up_TI
            expert_TH = hidden_TI @ tensors.down[group].T
            if self.family == "gpt_oss":
                expert_TH = expert_TH + tensors.down_bias[group]
            output_TH = output_TH + weights_TG[:, group, None] * expert_TH
        return output_TH


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert scale > 0
    assert difference <= tolerance * scale, f"{difference:.1e} of {scale:.1e}"


def first(output):
    return output[0] if isinstance(output, tuple) else output


def run_mapped(block: Block, hidden_TH: torch.Tensor) -> torch.Tensor:
    _, weights_TK, index_TK, *_ = block.router(hidden_TH)
    return block.experts(hidden_TH, index_TK, weights_TK)


class RowCounter:
    """Counts what goes through the gate function of an experts module, that is the (token, expert) pairs that run."""

    def __init__(self, experts) -> None:
        self.calls, self.rows = 0, 0
        original = experts._apply_gate

        def counted(gate_up):
            self.calls, self.rows = self.calls + 1, self.rows + len(gate_up)
            return original(gate_up)

        experts._apply_gate = counted


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_the_dense_sum(build_mapped, family, implementation):
    block = Block(build_mapped, family, implementation)
    assert isinstance(block.experts, MergedExpertLayer)
    for tokens in (1, 7, 40):
        hidden_TH = torch.randn(tokens, 64)
        assert_close(run_mapped(block, hidden_TH), block.dense(hidden_TH, *block.routed(hidden_TH)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_merged_expert_runs_once_a_token(build_mapped, family, implementation):
    block = Block(build_mapped, family, implementation)
    counter = RowCounter(block.experts)
    hidden_TH = torch.randn(40, 64)
    index_TK, _ = block.routed(hidden_TH)
    distinct = [row.unique().tolist() for row in block.router.expert_map[index_TK]]
    run_mapped(block, hidden_TH)
    assert counter.rows == sum(map(len, distinct)) < 40 * TOP_K
    if implementation == "eager":
        assert counter.calls == len({group for groups in distinct for group in groups})
    else:
        assert counter.calls == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_sentinel_ids_contribute_nothing(build_mapped, family, implementation):
    block = Block(build_mapped, family, implementation)
    num_groups = block.experts.num_experts
    hidden_TH = torch.randn(9, 64)
    index_TK = torch.rand(9, num_groups).argsort(-1)
    weights_TK = torch.rand(9, num_groups)
    kept_TK = torch.rand(9, num_groups) < 0.5
    kept_TK[0], kept_TK[1] = False, True
    wanted_TH = block.experts(hidden_TH, index_TK, weights_TK * kept_TK)
    for sentinel in (num_groups, num_groups + 5):
        masked_TK = index_TK.masked_fill(~kept_TK, sentinel)
        before = masked_TK.clone()
        output_TH = block.experts(hidden_TH, masked_TK, weights_TK * kept_TK)
        assert torch.equal(output_TH, wanted_TH)
        assert torch.equal(masked_TK, before)
    assert output_TH[0].abs().max() == 0
    assert output_TH[1:].abs().max() > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_nothing_routed_still_has_a_gradient(build_mapped, family, implementation):
    # A process of expert parallelism without tokens must reach the collectives of the backward pass.
    block = Block(build_mapped, family, implementation)
    hidden_TH = torch.randn(3, 64, requires_grad=True)
    index_TK = torch.full((3, TOP_K), block.experts.num_experts)
    output_TH = block.experts(hidden_TH, index_TK, torch.zeros(3, TOP_K))
    assert output_TH.abs().max() == 0
    output_TH.sum().backward()
    assert hidden_TH.grad.abs().max() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in block.experts.parameters())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_dense_sum(build_mapped, family, implementation):
    block = Block(build_mapped, family, implementation)
    leaves = [*block.experts.parameters(), block.router.weight, torch.randn(40, 64, requires_grad=True)]
    hidden_TH, upstream_TH = leaves[-1], torch.randn(40, 64)
    wanted = torch.autograd.grad(block.dense(hidden_TH, *block.routed(hidden_TH)), leaves, upstream_TH)
    actual = torch.autograd.grad(run_mapped(block, hidden_TH), leaves, upstream_TH)
    for gradient, expected in zip(actual, wanted, strict=True):
        assert_close(gradient, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16_is_as_near_as_the_stock_block(build_mapped, family, implementation):
    exact = Block(build_mapped, family)
    block = Block(build_mapped, family, implementation, dtype=torch.bfloat16)
    hidden_TH = torch.randn(40, 64).bfloat16()
    index_TK, weights_TK = block.routed(hidden_TH)
    wanted_TH = exact.dense(hidden_TH.float(), index_TK, weights_TK.float())
    output_TH = run_mapped(block, hidden_TH)
    assert output_TH.dtype == torch.bfloat16
    # Weights, neurons and output are rounded to 8 bits each.
    assert_close(output_TH.float(), wanted_TH, tolerance=0.02)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_own_loops_equal_the_stock_forward_of_an_uncut_block(family):
    model = build(family, num_experts_per_tok=TOP_K)
    found = find_blocks(model)[0]
    experts = found.module(model).experts
    hidden_TH, index_TK, weights_TK = torch.randn(30, 64), torch.rand(30, 8).argsort(-1)[:, :TOP_K], torch.rand(30, 4)
    for implementation, own in (("eager", eager_experts_forward), ("grouped_mm", grouped_experts_forward)):
        model.set_experts_implementation(implementation)
        assert_close(own(experts, hidden_TH, index_TK, weights_TK), experts(hidden_TH, index_TK, weights_TK))


@torch.no_grad()
def test_watching_changes_nothing_and_sees_each_pair(build_mapped):
    block = Block(build_mapped, "gpt_oss")
    hidden_TH, index_TK, weights_TK = torch.randn(12, 64), torch.rand(12, 4).argsort(-1), torch.rand(12, 4)
    index_TK[:, 2] = 4
    seen, total_TH = [], torch.zeros(12, 64)

    def watch(expert, token_P, weight_P, input_PH, hidden_PI, output_PH):
        assert torch.equal(input_PH, hidden_TH[token_P])
        assert torch.equal(
            output_PH, hidden_PI @ block.experts.down_proj[expert] + block.experts.down_proj_bias[expert]
        )
        seen.extend((token, expert) for token in token_P.tolist())
        total_TH.index_add_(0, token_P, output_PH * weight_P[:, None])

    watched_TH = eager_experts_forward(block.experts, hidden_TH, index_TK, weights_TK, watch)
    assert torch.equal(watched_TH, eager_experts_forward(block.experts, hidden_TH, index_TK, weights_TK))
    assert torch.equal(watched_TH, total_TH)
    assert sorted(seen) == sorted((t, int(e)) for t in range(12) for e in index_TK[t] if e < 4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@torch.no_grad()
def test_auxiliary_loss_is_the_original_routers(build_mapped, family):
    # One layer: nothing below the router differs from the original model.
    sizes = {"num_hidden_layers": 1, "num_experts_per_tok": TOP_K}
    inputs = inputs_for(family)
    original = build(family, **sizes)(**inputs, output_router_logits=True)
    merged = build_mapped(family, **sizes)(**inputs, output_router_logits=True)
    assert not torch.equal(original.logits, merged.logits)
    assert [logits.shape[-1] for logits in merged.router_logits] == [8]
    assert torch.equal(merged.router_logits[0], original.router_logits[0])
    assert merged.aux_loss == original.aux_loss
    assert original.aux_loss > 0


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_traced_in_one_graph_with_gradients(build_mapped, family, implementation):
    # Also the path of accelerators: the stock forwards with sentinel ids.
    block = Block(build_mapped, family, implementation)
    hidden_BSH = torch.randn(2, 9, 64)
    parameters = [*block.experts.parameters(), block.router.weight]
    compiled = torch.compile(block.module, backend="aot_eager", fullgraph=True)
    wanted_BSH, output_BSH = first(block.module(hidden_BSH)), first(compiled(hidden_BSH))
    assert_close(output_BSH, wanted_BSH)
    upstream_BSH = torch.randn_like(wanted_BSH)
    wanted = torch.autograd.grad(wanted_BSH, parameters, upstream_BSH)
    for gradient, expected in zip(torch.autograd.grad(output_BSH, parameters, upstream_BSH), wanted, strict=True):
        assert_close(gradient, expected)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_exported_with_any_number_of_tokens(build_mapped, family, implementation):
    block = Block(build_mapped, family, implementation)
    shapes = ({1: torch.export.Dim("length", min=2, max=64)},)
    program = torch.export.export(block.module, (torch.randn(1, 9, 64),), dynamic_shapes=shapes)
    hidden_BSH = torch.randn(1, 33, 64)
    assert_close(first(program.module()(hidden_BSH)), first(block.module(hidden_BSH)))


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compiled_equals_eager(build_mapped, family, implementation):
    block = Block(build_mapped, family, implementation)
    hidden_BSH = torch.randn(2, 9, 64)
    compiled = torch.compile(block.module, fullgraph=True)
    assert_close(first(compiled(hidden_BSH)), first(block.module(hidden_BSH)))
