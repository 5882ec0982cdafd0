import pytest
import torch

from optimum_moe.algorithms.similarity import gram_similarity, vector_similarity


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


def test_errors_name_the_shape_and_the_cause():
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        gram_similarity(torch.ones(2, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        gram_similarity(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        vector_similarity(torch.ones(4))
