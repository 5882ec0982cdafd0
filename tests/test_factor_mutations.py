"""Sizes of compressed experts that were changed by hand load the same model, or raise an error that says so."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_moe import CompressionPlan
from optimum_moe.formats import ExpertsSpec
from optimum_moe.records import digest
from tests.test_factorized_verification import save_mixture
from tests.test_mutations import CASES, at, outcome, places
from tests.tiny_models import in_full

pytestmark = pytest.mark.filterwarnings("ignore")

numbers = st.one_of(st.just("-"), st.integers(-1, 30), st.integers(10**6, 10**30))
tables = st.lists(numbers, min_size=6, max_size=9).map(lambda found: " ".join(map(str, found)))
values = st.one_of(
    tables,
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.integers(10**6, 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["gate", "up", "", "8"]),
    st.lists(st.one_of(st.none(), st.integers(-1, 30)), max_size=9),
    st.dictionaries(st.sampled_from(["up", "down", "gate", "x"]), tables, max_size=3),
)


@st.composite
def mutations(draw: st.DrawFn, tree: dict[str, Any]) -> Any:
    """A config with one to three values of its `factors` replaced, removed, added or copied."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        inside = [path for path in places(tree["quantization_config"]["blocks"]) if "factors" in path[1:]]
        if not inside:
            break
        path = draw(st.sampled_from(inside))
        parent = at(tree["quantization_config"]["blocks"], path[:-1])
        kind = draw(st.sampled_from(["replace", "remove", "add", "copy"]))
        if kind == "remove":
            del parent[path[-1]]
        elif kind == "add" and isinstance(parent, dict):
            parent[
                draw(st.sampled_from(["gate", "projections", "sparse_rows", "shared_base", "empty", "dense", "extra"]))
            ] = draw(values)
        elif kind == "copy":
            source = at(tree["quantization_config"]["blocks"], draw(st.sampled_from(inside)))
            parent[path[-1]] = copy.deepcopy(source)
        else:
            parent[path[-1]] = draw(values)
    return tree


@pytest.fixture(scope="module", params=["qwen3_moe", *in_full("gpt_oss")])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_mixture(request.param, tmp_path_factory.mktemp("sizes")) / "out"
    return folder, AutoModelForCausalLM.from_pretrained(folder)


@given(data=st.data())
@CASES
def test_changed_sizes_load_the_same_model_or_say_why_not(
    saved: tuple[Path, PreTrainedModel], tmp_path: Path, data: Any
) -> None:
    directory, model = saved
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    changed = data.draw(mutations(config))
    target = tmp_path / "changed"
    if not target.exists():
        shutil.copytree(directory, target)
    (target / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    loaded = outcome(lambda: AutoModelForCausalLM.from_pretrained(target))
    if loaded is None:
        return
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    sizes = [json.dumps(block, sort_keys=True) for block in structure(loaded.config)]
    assert sizes == [json.dumps(block, sort_keys=True) for block in structure(model.config)]


def structure(config: Any) -> list[Any]:
    return [ExpertsSpec.from_dict(entry["factors"]).to_dict() for entry in config.quantization_config.blocks.values()]


@given(data=st.data())
@CASES
def test_sizes_of_a_plan_that_somebody_else_wrote_are_checked(saved: Any, tmp_path: Path, data: Any) -> None:
    directory, _ = saved
    plan = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    wrapped = {"quantization_config": {"blocks": {b["name"]: b for b in plan["blocks"]}}}
    plan["blocks"] = list(data.draw(mutations(wrapped))["quantization_config"]["blocks"].values())
    plan.pop("digest", None)
    plan["digest"] = digest(plan, load_file(directory / "plan" / "tensors.safetensors"))
    shutil.copytree(directory / "plan", tmp_path / "plan", dirs_exist_ok=True)
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    loaded = outcome(lambda: CompressionPlan.from_pretrained(tmp_path))
    if loaded is not None:
        for block in loaded.blocks.values():
            assert block.sizes is None or len(block.sizes.widths) == block.num_groups == 8
