import pytest
import torch

from optimum_moe.algorithms.expert_tokens import SampledTokens
from optimum_moe.algorithms.experts import ExpertTensors
from optimum_moe.algorithms.similarity import gram_similarity, mean_gated_outputs, vector_similarity
from optimum_moe.stages.merge_choices import expert_weights


@pytest.mark.parametrize("family", ["stats/switch/", "stats/mixtral/"])
def test_router_logit_similarity_matches_public_code(parity, blocks, family):
    names = blocks(family)
    assert len(names) >= 3
    for block in names:
        logits_TE = parity[f"{family}{block}/router_logits"].flatten(0, -2).double()
        similarity_EE = gram_similarity(logits_TE.T @ logits_TE)
        expected_EE = parity[f"{family}{block}/similarity"].double()
        torch.testing.assert_close(similarity_EE, expected_EE, rtol=0, atol=1e-6)


def test_router_row_similarity_matches_public_code(parity, blocks):
    for block in blocks("stats/switch/"):
        similarity_EE = vector_similarity(parity[f"switch/in/{block}/router"])
        expected_EE = parity[f"stats/switch/{block}/similarity_router-weight"].double()
        torch.testing.assert_close(similarity_EE, expected_EE, rtol=0, atol=1e-6)


def test_weight_similarity_matches_public_code(parity, blocks):
    for block in blocks("stats/switch/"):
        experts = ExpertTensors(parity[f"switch/in/{block}/wi"], parity[f"switch/in/{block}/wo"])
        expected_EE = parity[f"stats/switch/{block}/similarity_weight"].double()
        torch.testing.assert_close(expert_weights(experts), expected_EE, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "top_k"), [("stats/switch/", 1), ("stats/mixtral/", 2)])
def test_usage_from_router_logits_matches_public_code(parity, blocks, family, top_k):
    for block in blocks(family):
        logits_TE = parity[f"{family}{block}/router_logits"].flatten(0, -2)
        count_E = torch.bincount(logits_TE.topk(top_k, dim=-1).indices.flatten(), minlength=logits_TE.shape[-1])
        share_E = count_E.double() / count_E.sum()
        expected_E = parity[f"{family}{block}/usage"].double()
        torch.testing.assert_close(share_E, expected_E, rtol=0, atol=1e-6)


def test_zero_vector_has_cosine_zero_to_others():
    similarity_EE = vector_similarity(torch.tensor([[0.0, 0.0], [3.0, 0.0], [-2.0, 0.0], [0.0, 5.0]]))
    expected_EE = torch.tensor(
        [[1.0, 0.5, 0.5, 0.5], [0.5, 1.0, 0.0, 0.5], [0.5, 0.0, 1.0, 0.5], [0.5, 0.5, 0.5, 1.0]], dtype=torch.float64
    )
    torch.testing.assert_close(similarity_EE, expected_EE)


def test_tiny_norms_do_not_underflow():
    similarity_EE = vector_similarity(torch.tensor([[1e-90, 0.0], [1e-90, 1e-90]], dtype=torch.float64))
    assert similarity_EE[0, 1].item() == pytest.approx((2**-0.5 + 1) / 2)


def test_mean_gated_outputs_are_what_experts_add_to_the_output():
    generator = torch.Generator().manual_seed(0)
    up_EIH, down_EHI = torch.randn(4, 6, 5, generator=generator), torch.randn(4, 5, 6, generator=generator)
    bias_EH = torch.randn(4, 5, generator=generator)
    experts = ExpertTensors(up_EIH, down_EHI, down_bias=bias_EH, activate=lambda gate, up: up.relu())
    input_SH = torch.randn(9, 5, generator=generator)
    # Expert 3 is not reached, and the slot of weight 0 counts for nothing.
    index_SK = torch.tensor([[0, 1], [1, 2], [2, 0]]).repeat(3, 1)
    weights_SK = torch.rand(9, 2, generator=generator)
    weights_SK[0, 0] = 0.0
    expected_EH = torch.zeros(4, 5, dtype=torch.float64)
    for s in range(9):
        for e, g in zip(index_SK[s].tolist(), weights_SK[s].double(), strict=True):
            output_H = down_EHI[e].double() @ (up_EIH[e].double() @ input_SH[s].double()).relu() + bias_EH[e].double()
            expected_EH[e] += g * output_H / 9
    found_EH = mean_gated_outputs(experts, SampledTokens(input_SH, index_SK, weights_SK))
    torch.testing.assert_close(found_EH, expected_EH, rtol=1e-5, atol=1e-6)
    assert torch.equal(found_EH[3], torch.zeros(5, dtype=torch.float64))


def test_errors_name_the_shape_and_the_cause():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        gram_similarity(torch.ones(2, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        gram_similarity(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        vector_similarity(torch.ones(4))
