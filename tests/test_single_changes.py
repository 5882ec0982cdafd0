"""Whatever single thing is changed in a checkpoint is reported by the check that is about it; training is no fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimum_moe import ByteBudget, CalibrationConfig, ExpertPruning, LowRankSparse, MoECompressor, MSMoE, verify
from optimum_moe.checkpoint.comparison import Comparison, same_bits
from optimum_moe.recovery import RowPruning
from tests.quantized_checkpoints import edit_config
from tests.recovery.test_trained_experts import train
from tests.test_verification import failed
from tests.tiny_checkpoints import save_checkpoint
from tests.tiny_models import inputs_for

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:.*gradient")

METHODS = {
    "map": MSMoE(num_experts=4),
    "factors": [MSMoE(num_experts=4), LowRankSparse(rank=8, density=0.25)],
    "budget": ByteBudget(runs_in="transformers", share=0.5),
    "plain": ExpertPruning(num_experts=4, saliency="reap"),
}
ENGINES = {"map": "streaming", "factors": "memory", "budget": "streaming", "plain": "memory"}
CODE = ("modeling_optimum_moe.py", "optimum_moe.zip")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original with its tokenizer, and what four methods make of it."""
    folder = tmp_path_factory.mktemp("changes")
    save_checkpoint(folder / "original")
    with_zero = load_file(folder / "original" / "model.safetensors")
    with_zero["lm_head.weight"][5, 6] = 0
    save_file(with_zero, folder / "original" / "model.safetensors", metadata={"format": "pt"})
    for kind, engine in ENGINES.items():
        compress(folder / "original", folder / kind, kind, engine)
    return folder


def compress(original: Path, out: Path, kind: str, engine: str) -> Path:
    data = CalibrationConfig([inputs_for("qwen3_moe", rows=4, length=32, seed=seed) for seed in range(2)])
    settings = {"engine": engine, "output_dir": out, "progress": False}
    return MoECompressor.from_pretrained(original, METHODS[kind], data, **settings).apply()


@pytest.fixture(params=METHODS)
def changed(request: pytest.FixtureRequest, folders: Path, tmp_path: Path) -> Callable[..., Any]:
    """Copies a checkpoint, changes it, and says which checks fail."""

    def check(change: Callable[[Path], Any]) -> Any:
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folders / request.param, out)
        change(out)
        return verify(out, folders / "original")

    check.kind = request.param  # type: ignore[attr-defined]
    return check


def edit(out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            result = change(tensors[name])
            save_file(tensors | {} if result is None else tensors | {name: result}, file, metadata={"format": "pt"})
            return
    raise AssertionError(name)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("engine", ["memory", "streaming"])
def test_a_good_checkpoint_passes(kind: str, engine: str, folders: Path, tmp_path: Path) -> None:
    out = folders / kind
    if engine != ENGINES[kind]:
        out = compress(folders / "original", tmp_path / "out", kind, engine)
    report = verify(out, folders / "original")
    assert report.passed, str(report)
    assert report.trained == ()
    assert verify(out).passed


SETTINGS: dict[str, Any] = {
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-3,
    "hidden_act": "gelu",
    "norm_topk_prob": False,
    "max_position_embeddings": 77,
    "bos_token_id": 7,
}


def test_every_setting(changed: Any, tmp_path: Path) -> None:
    for name, value in SETTINGS.items():
        report = changed(lambda out, name=name, value=value: edit_config(out, **{name: value}))
        assert failed(report) == {"config"}, name
        assert len(report["config"].failures) == 1
        assert report["config"].failures[0].startswith(f"{name} is {json.dumps(value)}, the plan says ")
        # The plan knows by itself.
        assert failed(verify(tmp_path / "out")) == {"config"}, name
    told = changed(lambda out: edit_config(out, sliding_window=8))["config"].failures
    assert told == ("sliding_window is 8, and is read as null",)
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    told = changed(lambda out: edit_config(out, rope_parameters=rope, rope_theta=5000.0))["config"].failures
    assert told == ("rope_parameters.rope_theta is 5000.0, the plan says 10000.0",)
    told = changed(lambda out: edit_config(out, rope_theta=5000.0))["config"].failures
    assert told == ("rope_theta is 5000.0, rope_parameters say 10000.0",)
    told = changed(lambda out: edit_config(out, dtype="float16"))["config"].failures
    assert told == ("dtype is float16, most elements are stored in float32",)
    told = changed(lambda out: edit_config(out, attention_sinks=4))["config"].failures
    assert told == ("attention_sinks is 4, the original has no such setting",)


def test_what_transformers_rewrites_is_no_fault(changed: Any) -> None:
    def rewrite(out: Path) -> None:
        edit_config(out, transformers_version="5.99.0", use_cache=False, torch_dtype="float32")
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        del config["dtype"]
        (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (out / "README.md").write_text("# Mine", encoding="utf-8")

    report = changed(rewrite)
    assert report.passed, str(report)


def test_every_file_beside_the_weights(changed: Any) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "recipe.yaml", "compression_report.json"]
    names += [] if changed.kind == "plain" else CODE
    for name in names:
        report = changed(lambda out, name=name: (out / name).write_bytes((out / name).read_bytes() + b"\n"))
        assert failed(report) == {"side files"}, name
        assert report["side files"].failures == (f"{name} is not what was written",)
    report = changed(lambda out: (out / "tokenizer.json").unlink())
    assert report["side files"].failures == ("tokenizer.json is missing",)
    report = changed(lambda out: (out / "checksums.json").unlink())
    assert report["side files"].failures == (
        "checksums.json is missing, so the files beside the weights cannot be checked",
    )
    if changed.kind != "plain":
        report = changed(lambda out: edit_config(out, auto_map={"AutoModelForCausalLM": "mine.Model"}))
        assert failed(report) == {"side files"}
        assert "config.json runs other code: auto_map is {'AutoModelForCausalLM': 'mine.Model'}" in str(report)


def test_every_bit(changed: Any) -> None:
    def negative_zero(tensor: torch.Tensor) -> None:
        tensor[5, 6] = -0.0

    report = changed(lambda out: edit(out, "lm_head.weight", negative_zero))
    assert failed(report) == {"other tensors"}
    assert report["other tensors"].failures[0].startswith("lm_head.weight: 1 of ")
    report = changed(lambda out: edit(out, "model.layers.0.mlp.gate.weight", lambda tensor: tensor.half()))
    assert "shapes" in failed(report)
    assert "model.layers.0.mlp.gate.weight is stored in float16, the original in float32" in str(report)


def test_bits_of_numbers_that_equal_nothing_or_something_else() -> None:
    nan = torch.tensor([1.0, torch.nan])
    other = nan.view(torch.int32).clone()
    other[1] += 1
    other_nan = other.view(torch.float32)
    assert same_bits(nan, nan.clone())
    assert bool(other_nan[1].isnan())
    assert not same_bits(nan, other_nan)
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.empty(0, 3), torch.empty(0, 3))
    assert not same_bits(torch.ones(2, 3), torch.ones(3, 2))
    found = Comparison()
    found.compare("x", other_nan, nan)
    assert found.failures == ["x: 1 of 2 elements differ, by inf at most"]


def trained_copy(folders: Path, kind: str, place: Path, **settings: Any) -> Path:
    """What a user's training makes of a checkpoint that it loads and saves over."""
    out = Path(shutil.copytree(folders / kind, place))
    model = AutoModelForCausalLM.from_pretrained(out)
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[2].requires_grad_(False)
    train(model, place.parent / "run", "qwen3_moe", *settings.pop("callbacks", ()), steps=8)
    model.save_pretrained(out, **settings)
    return out


@pytest.mark.parametrize("kind", ["map", "factors", "budget"])
def test_a_trained_checkpoint_is_known_as_one(kind: str, folders: Path, tmp_path: Path) -> None:
    out = trained_copy(folders, kind, tmp_path / "out")
    for file in set(out.glob("*.safetensors")) - {out / "model.safetensors"}:
        file.unlink()
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    report = verify(out, folders / "original")
    assert report.passed, str(report)
    names = {text.split()[0].rstrip(":") for text in report.trained}
    assert {"lm_head.weight", "model.layers.0.mlp.gate.weight", "model.norm.weight"} <= names
    assert any(name.startswith("model.layers.1.mlp.experts.") for name in names)
    assert not [name for name in names if name.startswith(("model.layers.2.", "model.embed_tokens"))]
    assert f"trained ({len(report['other tensors'].trained)})" in str(report)
    # What was not trained is compared all the same, and so is the structure.
    assert failed(verify(out, folders / "original", trained=False)) >= {"experts", "routers", "other tensors"}
    edit_config(out, num_experts_per_tok=3)
    assert failed(verify(out, folders / "original")) == {"config"}
    edit_config(out, num_experts_per_tok=2)
    (out / "recipe.yaml").write_text("stage: reap\n", encoding="utf-8")
    assert failed(verify(out, folders / "original")) == {"side files"}


def test_rows_that_training_dropped(folders: Path, tmp_path: Path) -> None:
    out = trained_copy(folders, "factors", tmp_path / "out", callbacks=[RowPruning(0.1, warmup_steps=1)])
    report = verify(out, folders / "original")
    assert report.passed, str(report)
    assert any(".row_index does not match the digest in the plan" in text for text in report.trained)


def test_a_trained_plain_checkpoint_has_to_be_called_so(folders: Path, tmp_path: Path) -> None:
    """Stock transformers saves it, which leaves no mark."""
    out = trained_copy(folders, "plain", tmp_path / "out")
    assert {"experts", "routers", "other tensors"} <= failed(verify(out, folders / "original"))
    report = verify(out, folders / "original", trained=True)
    assert report.passed, str(report)
    assert any(text.startswith("lm_head.weight: ") for text in report.trained)
    edit(out, "model.layers.1.mlp.gate.weight", lambda tensor: tensor[:3].clone())
    assert {"counts", "shapes", "routers", "reload"} & failed(verify(out, folders / "original", trained=True))
