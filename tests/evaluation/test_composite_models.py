"""Models around a mixture of experts are measured on text by the class that their config names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from optimum_moe.evaluation import evaluate
from tests.composites_table import COMPOSITES, Composite, build_composite
from tests.tiny_checkpoints import tokenizer
from tests.tiny_models import build

TEXT = torch.randint(3, 88, (6, 100), generator=torch.Generator().manual_seed(0)).tolist()
SETTINGS = {"sequence_length": 64, "max_tokens": 256, "num_prompts": 2, "new_tokens": 8, "progress": False}
DEFAULT = ("qwen3_vl_moe", "qwen3_omni_moe")


def marked(composite: Composite) -> object:
    broken = pytest.mark.skipif(
        transformers.__version__ == composite.broken_in,
        reason=f"{composite.architecture} of transformers {composite.broken_in} has a forward pass that raises",
    )
    full = [] if composite.name in DEFAULT else [pytest.mark.full]
    return pytest.param(composite, id=composite.name, marks=[broken, *full])


@pytest.mark.parametrize("composite", map(marked, COMPOSITES))
def test_a_composite_is_measured_from_memory_and_from_its_folder(composite: Composite, tmp_path: Path) -> None:
    model = build_composite(composite)
    model.save_pretrained(tmp_path)
    tasks = ["perplexity", "agreement", "generation"]
    result = evaluate(model, TEXT, tmp_path, tokenizer(), tasks=tasks, **SETTINGS)
    assert result.scores["kl"].value == pytest.approx(0, abs=1e-6)
    assert result.scores["top1_agreement"].value == 1
    assert 50 < result.scores["perplexity"].value < 300


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Ernie4_5_VLMoeTextModel has no head, so there are no predictions"):
        evaluate(build("ernie4_5_vl_moe"), TEXT, None, tokenizer(), tasks=["perplexity"], **SETTINGS)
