"""A config or plan that was changed by hand loads as what it was, or raises an error that says so."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_moe import CalibrationConfig, CompressionPlan, MoECompressor, MSMoE
from optimum_moe.hf.structure import METHOD, SENTINEL
from optimum_moe.records import digest
from tests.tiny_models import build, inputs_for

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = settings(
    max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
OURS = ("quantization_config", "fusion_config")
"""What of config.json is ours. A value of another type in their place, or as the name of the method, is refused by
transformers before it asks us."""
COUNTS = ("num_experts", "num_local_experts")

values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["map", "reduce", "", "optimum_moe", "model.layers.1.mlp", "cut"]),
    st.lists(st.integers(-1, 9), max_size=9),
    st.dictionaries(st.sampled_from(["num_groups", "routing", "x"]), st.integers(0, 9), max_size=3),
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@st.composite
def mutations(draw: st.DrawFn, tree: Any, under: tuple[str, ...] | None = None) -> Any:
    """A tree with one to three values replaced, removed, added or copied from elsewhere in it."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in places(tree) if under is None or (path[0] in under and len(path) > 1)]
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        parent, key = at(tree, path[:-1]), path[-1]
        kind = draw(st.sampled_from(["replace", "remove", "add", "copy"]))
        if kind == "remove":
            del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["extra", "blocks", "routing", "num_groups"]))] = draw(values)
        elif kind == "copy":
            parent[key] = copy.deepcopy(at(tree, draw(st.sampled_from(paths))))
        else:
            parent[key] = draw(values)
    return tree


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    """A checkpoint whose blocks keep 5, 4 and 3 of 8 experts, with its model."""
    data = [inputs_for("qwen3_moe", rows=4, length=32, seed=seed) for seed in range(3)]
    method = MSMoE(num_experts=4, allocation="adaptive")
    compressor = MoECompressor.from_pretrained(build("qwen3_moe"), method, CalibrationConfig(data), progress=False)
    model = compressor.apply()
    directory = tmp_path_factory.mktemp("saved") / "out"
    compressor.save_pretrained(directory)
    return directory, model


def outcome(load: Any, errors: tuple[type[Exception], ...] = (ValueError,)) -> Any:
    """What loading gives; None after a clear error, which is a ValueError with a whole sentence."""
    try:
        return load()
    except errors as error:
        message = str(error)
    assert len(message.split()) > 3, message
    return None


@given(data=st.data())
@CASES
def test_a_changed_config_loads_the_same_model_or_says_why_not(saved, tmp_path: Path, data) -> None:
    directory, model = saved
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    changed = data.draw(mutations(config, OURS))
    for name in data.draw(st.sets(st.sampled_from(COUNTS))) if data.draw(st.booleans()) else ():
        changed[name] = data.draw(st.integers(-2, 12))
    method = changed.get("quantization_config", {}).get("quant_method")
    if method is not None and not isinstance(method, str):
        changed["quantization_config"]["quant_method"] = "other"
    target = tmp_path / "changed"
    if not target.exists():
        shutil.copytree(directory, target)
    (target / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    fusion = changed.get("fusion_config")
    errors: tuple[type[Exception], ...] = (ValueError,)
    if method != METHOD and fusion != SENTINEL:
        # Nothing names us any more: it is transformers that refuses tensors of the wrong size.
        errors += (RuntimeError,)
    if fusion not in (SENTINEL, {}, None):
        # Fusions are transformers' own, and so is its error for an unknown one.
        errors += (AssertionError,)
    loaded = outcome(lambda: AutoModelForCausalLM.from_pretrained(target), errors)
    if loaded is not None:
        ours, theirs = loaded.state_dict(), model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@given(data=st.data())
@CASES
def test_a_changed_plan_is_refused(saved, tmp_path: Path, data) -> None:
    directory, _ = saved
    plan = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    changed = data.draw(mutations(plan))
    shutil.copytree(directory / "plan", tmp_path / "plan", dirs_exist_ok=True)
    (tmp_path / "plan.json").write_text(json.dumps(changed), encoding="utf-8")
    assert changed == plan or outcome(lambda: CompressionPlan.from_pretrained(tmp_path)) is None


@given(data=st.data())
@CASES
def test_a_plan_that_somebody_else_wrote_is_checked(saved, tmp_path: Path, data) -> None:
    """With a digest that fits, only what a plan says can tell whether it makes sense."""
    directory, _ = saved
    plan = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    changed = data.draw(mutations(plan, ("blocks",)))
    changed.pop("digest", None)
    changed["digest"] = digest(changed, load_file(directory / "plan" / "tensors.safetensors"))
    shutil.copytree(directory / "plan", tmp_path / "plan", dirs_exist_ok=True)
    (tmp_path / "plan.json").write_text(json.dumps(changed), encoding="utf-8")
    loaded = outcome(lambda: CompressionPlan.from_pretrained(tmp_path))
    if loaded is None:
        return
    original = CompressionPlan.from_pretrained(directory)
    compressor = MoECompressor.from_pretrained(
        build("qwen3_moe"), MSMoE(num_experts=4), [inputs_for("qwen3_moe")], progress=False
    )
    model = outcome(lambda: compressor.apply(plan=loaded))
    if model is not None:
        # It has all blocks and fitting tensors, so at most the way to the same groups differs.
        assert loaded.blocks.keys() == original.blocks.keys()
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
