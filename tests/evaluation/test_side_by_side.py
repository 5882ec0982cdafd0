"""A compressed model beside its original: errors are what a comparison by hand gives."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_moe import BlockDrop, CalibrationConfig, ExpertPruning, MoECompressor
from optimum_moe.evaluation.side_by_side import side_by_side
from tests.tiny_checkpoints import documents, save_checkpoint

SAMPLE = CalibrationConfig(documents(), max_tokens=1024, sequence_length=64)
TEXT = documents(seed=5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    save_checkpoint(folder / "original")
    methods = {"pruned": ExpertPruning(num_experts=5, layers=[0, 2]), "shallow": BlockDrop(num_blocks=1)}
    for name, method in methods.items():
        compressor = MoECompressor.from_pretrained(folder / "original", method, SAMPLE, progress=False)
        compressor.apply()
        compressor.save_pretrained(folder / name)
    return folder


def hooked(model: PreTrainedModel, name: str, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into a module, and what comes out."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: found.extend((args[0], output)))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return found[0], found[1]


def test_errors_are_those_of_a_comparison_by_hand(folders: Path) -> None:
    old, new = (AutoModelForCausalLM.from_pretrained(folders / name).eval() for name in ("original", "pruned"))
    names = [f"model.layers.{number}.mlp" for number in range(3)]
    found = side_by_side(folders / "pruned", folders / "original", TEXT, blocks=names, max_tokens=512, num_prompts=2)
    from optimum_moe.evaluation.heldout import prepare
    from optimum_moe.evaluation.models import find_tokenizer

    tokenizer = find_tokenizer(None, [folders / "original"])
    held_out = prepare(TEXT, tokenizer, max_tokens=512, sequence_length=256, batch_size=1, seed=0)
    ids = torch.cat([batch["input_ids"] for batch in held_out.windows])
    assert ids.shape == (2, 256)
    for name in names:
        given, before = hooked(old, name, ids)
        with torch.no_grad():
            alone = new.get_submodule(name)(given)
        assert found.block_errors[name] == pytest.approx(float((alone - before).norm() / before.norm()), rel=1e-3)
        layer = name.removesuffix(".mlp")
        was, now = (hooked(model, layer, ids)[1] for model in (old, new))
        assert found.layer_errors[name] == pytest.approx(float((now - was).norm() / was.norm()), rel=1e-3)
    assert found.block_errors["model.layers.1.mlp"] == 0.0
    # What the first layer lost reaches the second one.
    assert min(found.layer_errors["model.layers.1.mlp"], found.block_errors["model.layers.0.mlp"]) > 0.01
    assert [len(tokenizer(sample["prompt"])["input_ids"]) for sample in found.samples] == [64, 64]
    assert all(set(sample) == {"prompt", "original", "model"} for sample in found.samples)


def test_a_model_has_no_error_beside_itself(folders: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders / "original")
    names = [f"model.layers.{number}.mlp" for number in range(3)]
    found = side_by_side(folders / "original", deepcopy(model), TEXT, blocks=names, max_tokens=512, num_prompts=1)
    assert {*found.block_errors.values(), *found.layer_errors.values()} == {0.0}
    assert found.samples[0]["original"] == found.samples[0]["model"] != ""


def test_layers_that_follow_dropped_ones_are_compared_with_their_own(folders: Path) -> None:
    from optimum_moe import CompressionPlan

    plan = CompressionPlan.from_pretrained(folders / "shallow")
    arguments = {"blocks": list(plan.blocks), "max_tokens": 512, "num_prompts": 1}
    found = side_by_side(folders / "shallow", folders / "original", TEXT, dropped=plan.dropped, **arguments)
    assert len(plan.blocks) == 2
    assert list(found.block_errors.values()) == [0.0, 0.0]
    with pytest.raises(
        ValueError, match=re.escape("The original has 3 MoE blocks, and the compressed model 2 of them")
    ):
        side_by_side(folders / "shallow", folders / "original", TEXT, **arguments)
