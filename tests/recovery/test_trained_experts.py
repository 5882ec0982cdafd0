"""Compressed experts trained with the Trainer: rows shrink for real, and what is saved then loads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_moe import LowRankSparse, MSMoE
from optimum_moe.checkpoint.headers import read_headers
from optimum_moe.nn import FactorizedExperts
from optimum_moe.recovery import RowPruning
from optimum_moe.recovery.row_pruning import sparse_modules
from tests.factor_methods import compressor_for
from tests.test_reload import assert_same_tensors, move_out_of_the_file
from tests.tiny_models import build, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")


def compressed(family: str, folder: Path, density: float | None = 1.0) -> Any:
    method = [MSMoE(num_experts=4), LowRankSparse(rank=8, density=density)]
    compressor = compressor_for(build(family), method, family)
    compressor.apply()
    compressor.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def train(
    model: Any, folder: Path, family: str, *callbacks: Any, steps: int = 20, resume: Path | None = None, **settings: Any
) -> Trainer:
    rows = inputs_for(family, rows=16, seed=7)["input_ids"]
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "save_strategy": "no",
    }
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, TrainingArguments(str(folder), **arguments | settings), train_dataset=data)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def stored_rows(model: Any) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(".rows"))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_rows_shrink_and_the_smaller_checkpoint_loads(family: str, tmp_path: Path) -> None:
    model = compressed(family, tmp_path / "before")
    before, whole = {n: p.detach().clone() for n, p in model.named_parameters()}, stored_rows(model)
    trainer = train(model, tmp_path / "run", family, RowPruning(0.25, warmup_steps=2))
    # A quarter, and less without the row at the threshold.
    assert 0.25 * whole <= stored_rows(model) < 0.25 * whole + 65
    factors = [n for n in before if ".factors." in n and not n.endswith(".rows")]
    assert [n for n in factors if torch.equal(model.get_parameter(n), before[n])] == []
    trainer.save_model(str(tmp_path / "after"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert_same_tensors(loaded, model)
    for either in (loaded, model):
        move_out_of_the_file(either)
    assert torch.equal(logits_of(loaded, inputs_for(family)), logits_of(model.eval(), inputs_for(family)))
    held = [module for module in model.modules() if isinstance(module, FactorizedExperts)]
    structure = loaded.config.quantization_config.blocks
    assert [entry["factors"] for entry in structure.values()] == [module.sizes.to_dict() for module in held]
    # Experts keep different numbers of rows.
    assert len({n for module in held for counts in module.sizes.table("sparse_rows").values() for n in counts}) > 2
    sizes = [read_headers(tmp_path / place).bytes for place in ("before", "after")]
    indices = [
        sum(shape[0] for n, (_, shape, _) in read_headers(tmp_path / place).tensors.items() if n.endswith("row_index"))
        for place in ("before", "after")
    ]
    assert sizes[0] - sizes[1] == 4 * (whole - stored_rows(model)) + 4 * (indices[0] - indices[1])


def test_a_projection_that_loses_every_row(tmp_path: Path) -> None:
    """The ones of the highest importance all lie elsewhere."""
    model = compressed("qwen3_moe", tmp_path / "before", density=0.1)
    modules = sparse_modules(model)
    name, module = next(iter(modules.items()))
    part = module.sparse_parts()["rows"]

    class Freeze(RowPruning):
        def _mask(self, parts, ratio):
            super()._mask(parts, ratio)
            self._masks[f"{name}.rows"] = torch.zeros(len(part.row_index), dtype=torch.bool)

    train(model, tmp_path / "run", "qwen3_moe", Freeze(0.02, warmup_steps=1), steps=8)
    assert not hasattr(module, "rows")
    model.save_pretrained(tmp_path / "after")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert_same_tensors(loaded, model)
    for either in (loaded, model):
        move_out_of_the_file(either)
    assert torch.equal(logits_of(loaded, inputs_for("qwen3_moe")), logits_of(model.eval(), inputs_for("qwen3_moe")))


def test_training_resumes_from_a_checkpoint_of_the_trainer(tmp_path: Path) -> None:
    folder, saving = tmp_path / "before", {"save_strategy": "steps", "save_steps": 6}
    whole = compressed("qwen3_moe", folder)
    train(whole, tmp_path / "whole", "qwen3_moe", RowPruning(0.25, warmup_steps=1), steps=12, **saving)
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    resumed = AutoModelForCausalLM.from_pretrained(checkpoint)
    pruning = RowPruning(0.25, warmup_steps=1)
    train(resumed, tmp_path / "whole", "qwen3_moe", pruning, steps=12, resume=checkpoint, **saving)
    assert_same_tensors(resumed, whole)
