import re
from types import SimpleNamespace
from typing import Any

import pytest

from optimum_moe.formats import ExpertsSpec
from optimum_moe.vllm_plugin.blocks import GUARD, MAP, CompressedBlock
from optimum_moe.vllm_plugin.refusals import refuse_other_count, refuse_parallelism

NAME = "model.layers.0.mlp"
SPEC = ExpertsSpec(
    (8, 16, 0),
    ("gate", "up", "down"),
    {
        "low_rank": {"gate": (None, 4, None), "up": (None, 0, None)},
        "sparse_rows": {"gate": (0, 2, 0), "up": (0, 1, 0)},
    },
)


def entry(spec: ExpertsSpec | None = SPEC, experts: int = 3, groups: int = 3, routing: str = "map") -> dict[str, Any]:
    found: dict[str, Any] = {"num_experts": experts, "num_groups": groups, "routing": routing}
    return found if spec is None else found | {"factors": spec.to_dict()}


@pytest.mark.parametrize(
    ("stored", "parameter"),
    [
        ("experts.0.gate_proj.weight", "expert_0_gate_weight"),
        ("experts.0.w1.weight", "expert_0_gate_weight"),
        ("experts.1.gate_proj.weight_u", "expert_1_gate_weight_u"),
        ("experts.1.gate_proj.weight_row_index", "expert_1_gate_weight_row_index"),
        ("experts.2.down_proj.bias", "expert_2_down_bias"),
        ("router.expert_map", MAP),
        ("experts.routed_experts.expert_0_gate_weight", None),
        ("gate.weight", None),
        ("shared_experts.gate_proj.weight", None),
        # A matrix of rank 0 stores no factors, an empty expert no matrix, and there is no expert 7.
        ("experts.1.up_proj.weight_u", GUARD),
        ("experts.2.down_proj.weight", GUARD),
        ("experts.1.gate_proj.weight", GUARD),
        ("experts.7.down_proj.weight", GUARD),
        ("experts.0.other.weight", GUARD),
        ("experts.down_proj_bias", GUARD),
    ],
)
def test_names_of_stored_experts(stored: str, parameter: str | None) -> None:
    assert CompressedBlock.of_entry(NAME, entry()).renamed(stored) == parameter


@pytest.mark.parametrize(
    ("stored", "parameter"),
    [
        ("experts.1.gate_proj.weight", None),
        ("experts.gate_up_proj", None),
        ("experts.7.down_proj.weight", GUARD),
        ("gate.expert_map", MAP),
    ],
)
def test_names_of_stock_experts_behind_a_map(stored: str, parameter: str | None) -> None:
    assert CompressedBlock.of_entry(NAME, entry(None, experts=8)).renamed(stored) == parameter


def test_formats_that_are_not_built_are_refused_by_name() -> None:
    shared = ExpertsSpec((8, 8), ("up", "down"), {"low_rank": {"up": (4, 4)}, "shared_base": {"up": (0, 0)}})
    with pytest.raises(ValueError, match=f"{re.escape(NAME)} stores experts in the format 'shared_base'"):
        CompressedBlock.of_entry(NAME, entry(shared, 2, 2))
    added = ExpertsSpec((8, 8), ("up", "down"), {"sparse_rows": {"up": (0, 3)}})
    with pytest.raises(ValueError, match="adds sparse rows to the dense up matrix of expert 1"):
        CompressedBlock.of_entry(NAME, entry(added, 2, 2))
    with pytest.raises(ValueError, match=r"a router of 3 rows where config\.json says 8 experts"):
        CompressedBlock.of_entry(NAME, entry(experts=8, routing="reduce"))


def test_another_number_of_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 4 experts by config\.json and 3 by its quantization_config"):
        refuse_other_count(CompressedBlock.of_entry(NAME, entry()), 4)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("use_ep", True, "expert parallelism"),
        ("enable_eplb", True, "load balancing"),
        ("dp_size", 2, "data parallelism"),
        ("pcp_size", 2, "context parallelism"),
        ("is_sequence_parallel", True, "sequence parallelism"),
        ("is_lora_enabled", True, "LoRA"),
        ("aiter_fmoe_shared_expert_enabled", True, "shared experts that are fused"),
    ],
)
def test_what_splits_experts_otherwise_is_refused_by_name(field: str, value: Any, said: str) -> None:
    parallel = {"use_ep": False, "enable_eplb": False, "dp_size": 1, "pcp_size": 1, "is_sequence_parallel": False}
    engine = {"is_lora_enabled": False, "aiter_fmoe_shared_expert_enabled": False}

    def config(**changed: Any) -> SimpleNamespace:
        own = {name: changed.get(name, value) for name, value in parallel.items()}
        own_engine = {name: changed.get(name, value) for name, value in engine.items()}
        return SimpleNamespace(moe_parallel_config=SimpleNamespace(**own), **own_engine)

    refuse_parallelism(NAME, config())
    with pytest.raises(ValueError, match=f"{re.escape(NAME)} is compressed by optimum_moe.*{said}"):
        refuse_parallelism(NAME, config(**{field: value}))
