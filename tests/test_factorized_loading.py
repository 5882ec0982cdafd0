"""Checkpoints with compressed experts load in any way that their original would, and can be used and adapted."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from optimum_moe.recovery import RowPruning
from tests.factor_methods import METHODS, compressor_for
from tests.recovery.test_trained_experts import train
from tests.test_factorized_verification import save_mixture
from tests.test_loading import (
    DEVICE_MAPS,
    assert_loads_equal,
    gradients,
    randomized,
    without_noise,
)
from tests.test_reload import assert_same_tensors
from tests.tiny_models import build, by_name, in_full, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

FAMILIES = ("qwen3_moe", "gpt_oss", "switch_transformers")


class Saved:
    """A model of compressed experts in memory, and its checkpoint."""

    def __init__(self, family: str, kind: str, folder: Path) -> None:
        self.target, self.folder = by_name(family), folder / "out"
        if kind == "mixture":
            save_mixture(family, folder)
        else:
            compressor = compressor_for(build(family), METHODS[kind], family)
            compressor.apply()
            compressor.save_pretrained(self.folder)
        self.model: PreTrainedModel = copy.deepcopy(self.load()).eval()

    def load(self, folder: Path | None = None, **arguments: Any) -> Any:
        return getattr(transformers, self.target.architecture).from_pretrained(folder or self.folder, **arguments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Saved]:
    made: dict[tuple[str, str], Saved] = {}

    def get(family: str, kind: str) -> Saved:
        if (family, kind) not in made:
            made[family, kind] = Saved(family, kind, tmp_path_factory.mktemp(f"{family}-{kind}"))
        return made[family, kind]

    return get


@pytest.mark.parametrize("device_map", DEVICE_MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, *in_full(torch.bfloat16)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["as written", "sharded", "state_dict"])
@pytest.mark.parametrize("kind", ["map", "mixture"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reload_matrix(
    saved: Any, tmp_path: Path, family: str, kind: str, way: str, dtype: torch.dtype, device_map: str
) -> None:
    assert_loads_equal(saved(family, kind), tmp_path, way, dtype, device_map)


@pytest.mark.parametrize("kind", ["map", "mixture"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_half(saved: Any, family: str, kind: str) -> None:
    loaded = saved(family, kind).load()
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert_same_tensors(twin, loaded)
        assert [type(m) for m in twin.modules()] == [type(m) for m in loaded.modules()]
        assert torch.equal(logits_of(twin, inputs_for(family)), logits_of(copy.deepcopy(loaded), inputs_for(family)))
    half = loaded.half()
    assert {t.dtype for t in half.state_dict().values() if t.is_floating_point()} == {torch.float16}
    assert any(t.dtype == torch.int32 for t in half.state_dict().values())


@pytest.mark.parametrize("kind", ["map", "mixture"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(saved: Any, family: str, kind: str) -> None:
    source, inputs = saved(family, kind), {"input_ids": inputs_for(family)["input_ids"]}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    tokens = source.model.generate(**inputs, **settings)
    loaded = source.load()
    assert torch.equal(loaded.generate(**inputs, **settings), tokens)
    assert torch.equal(loaded.generate(**inputs, **settings, use_cache=False), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(saved: Any, family: str) -> None:
    loaded = without_noise(saved(family, "mixture").load())
    plain = gradients(loaded, by_name(family))
    loaded.gradient_checkpointing_enable()
    checkpointed = gradients(loaded, by_name(family))
    assert checkpointed.keys() == plain.keys()
    assert any(name.endswith("_stacks.u") for name in plain)
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_implementations(saved: Any, family: str, implementation: str) -> None:
    source, inputs = saved(family, "mixture"), inputs_for(family)
    loaded = source.load(experts_implementation=implementation)
    assert (logits_of(loaded, inputs) - logits_of(source.model, inputs)).abs().max().item() < 1e-5


@pytest.mark.parametrize("parameters", ["factors", "dense", "rows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora(saved: Any, tmp_path: Path, family: str, parameters: str) -> None:
    """On the factors themselves, on matrices kept dense, and on sparse rows."""
    source, inputs = saved(family, "mixture"), inputs_for(family)
    targets = {
        "factors": ["up_stacks.u", "up_stacks.v", "down_stacks.u", "down_stacks.v"],
        "dense": ["up_stacks.weight", "down_stacks.weight"],
        "rows": ["up_stacks.rows"],
    }[parameters]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=targets)
    adapter = randomized(get_peft_model(source.load(), config))
    logits = logits_of(adapter, inputs)
    assert (logits - logits_of(source.model, inputs)).abs().max() > 1e-3
    adapter.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(source.load(), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again, inputs), logits)
    merged = again.merge_and_unload()
    assert (logits_of(merged, inputs) - logits).abs().max().item() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    assert_same_tensors(source.load(tmp_path / "merged"), merged)


def test_an_adapter_trains_and_rows_beside_it_are_pruned(saved: Any, tmp_path: Path) -> None:
    source = saved("qwen3_moe", "map")
    targets = ["up_stacks.u", "up_stacks.v"]
    adapter = get_peft_model(source.load(), LoraConfig(r=2, target_modules=[], target_parameters=targets))
    for name, parameter in adapter.named_parameters():
        if name.endswith(".rows"):
            parameter.requires_grad_(True)
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    train(adapter, tmp_path / "run", "qwen3_moe", RowPruning(0.1, warmup_steps=1), steps=10)
    moved = [n for n, p in adapter.named_parameters() if "lora_B" in n and not torch.equal(p, before[n])]
    assert len(moved) == 3 * len(targets)
    still = [n for n in before if n.endswith("up_stacks.u") or ".parametrizations." in n or "gate_stacks.v" in n]
    assert all(torch.equal(before[n], dict(adapter.named_parameters())[n]) for n in still)
    merged = adapter.merge_and_unload()
    kept = sum(p.numel() for n, p in merged.named_parameters() if n.endswith(".rows"))
    assert kept < 0.5 * sum(t.numel() for n, t in before.items() if n.endswith(".rows"))
    merged.save_pretrained(tmp_path / "merged")
    assert_same_tensors(source.load(tmp_path / "merged"), merged)
