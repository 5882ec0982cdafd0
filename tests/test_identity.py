"""Two models are the same by what they are, wherever they lie and however they are stored, not by shapes alone."""

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

from optimum_moe import ByteBudget, CompressionPlan, LowRankSparse, MoECompressor, MSMoE, Statistics
from optimum_moe.checkpoint.identity import identity
from optimum_moe.checkpoint.source import open_source
from optimum_moe.checkpoint.value_digest import RUN, sample_runs
from optimum_moe.engine.decision import Decider
from tests.factor_methods import calibration
from tests.quantized_checkpoints import edit_config, to_fp8
from tests.test_resume import contents, interrupted, stream
from tests.tiny_models import build, every_target

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

SHARD = "model.safetensors"
METHOD = MSMoE(num_experts=4)
CONTENT = r"whose content \(other values in tensors of the same shapes: a fine-tune, or a file that was.*\) differs"


def values(model: Any, **settings: Any) -> list[str]:
    return identity(open_source(model, **settings))["values"]


def opened(model: Any, method: Any = METHOD, **settings: Any) -> MoECompressor:
    return MoECompressor.from_pretrained(model, method, calibration("qwen3_moe"), progress=False, **settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity") / "model"
    build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune: every tensor has its shape, one of them another number."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = build("qwen3_moe")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 5, 7] += 1e-3
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def observed(checkpoint: Path) -> Statistics:
    return opened(checkpoint).calibrate()


@pytest.mark.parametrize("target", every_target())
def test_one_model_has_one_identity(target: Any, tmp_path: Path) -> None:
    model = build(target)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    found = [identity(open_source(place)) for place in (model, tmp_path / "one", tmp_path / "shards")]
    for each in found:
        each.pop("name")
        each.pop("dtype")
    assert found[0] == found[1] == found[2]
    assert len(found[0]["values"]) == 1


def test_layout_links_and_the_cache_make_no_difference(checkpoint: Path, tmp_path: Path) -> None:
    expected = values(checkpoint)
    fused = tmp_path / "fused"
    shutil.copytree(checkpoint, fused)
    save_file(dict(build("qwen3_moe").state_dict()), fused / SHARD, metadata={"format": "pt"})
    assert len(load_file(fused / SHARD)) < len(load_file(checkpoint / SHARD))
    assert values(fused) == expected
    # As the Hub's cache has it: links to files that are called by their hashes.
    cache = tmp_path / "hub" / "models--org--model"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "main").mkdir(parents=True)
    for file in checkpoint.iterdir():
        shutil.copy(file, cache / "blobs" / file.name[::-1])
        (cache / "snapshots" / "main" / file.name).symlink_to(Path("../../blobs") / file.name[::-1])
    assert values(cache / "snapshots" / "main") == expected


def test_a_dtype_counts_by_the_numbers_that_it_holds(checkpoint: Path, tmp_path: Path) -> None:
    build("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    narrow = values(tmp_path / "bf16")
    AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="float32").save_pretrained(tmp_path / "wide")
    assert values(tmp_path / "wide") == narrow
    assert values(checkpoint) != narrow
    # As stored, and as loaded: a run of either is of this checkpoint.
    assert values(checkpoint, dtype="bfloat16") == values(checkpoint) + narrow
    assert values(AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16")) == narrow


def test_every_tensor_counts(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "changed")
    source, tensors = open_source(tmp_path / "changed"), load_file(checkpoint / SHARD)
    expected = identity(source)["values"]
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(torch.inf))
        save_file(tensors | {name: changed}, tmp_path / "changed" / SHARD, metadata={"format": "pt"})
        assert identity(source)["values"] != expected, name


def test_the_sample_of_a_large_tensor() -> None:
    experts, up, down = 128, 1536 * 2048, 2048 * 768
    runs = sample_runs("gate_up_proj", (experts, 1536, 2048))
    # Six spans of 2^19 numbers an expert.
    assert len(runs) == 6 * experts
    assert {count for _, count in runs} == {RUN}
    halves = {first // (up // 2) for first, _ in runs}
    assert halves == set(range(2 * experts))
    assert len(sample_runs("down_proj", (experts, 2048, 768))) == 3 * experts
    assert all(0 <= first <= experts * down - RUN for first, _ in sample_runs("down_proj", (experts, 2048, 768)))
    # Each expert of a fine-grained model has two runs, one in its gate and one in its up.
    assert len(sample_runs("gate_up_proj", (256, 256, 512))) == 2 * 256
    assert sample_runs("router", (128, 2048)) == [(0, 128 * 2048)]
    assert sample_runs("embedding", (150_000, 2048)) != sample_runs("lm_head", (150_000, 2048))
    assert sample_runs("nothing", (0, 3)) == [(0, 0)]


def test_samples_lie_at_the_same_numbers_in_every_layout(
    checkpoint: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimum_moe.checkpoint.value_digest.WHOLE", 64)
    monkeypatch.setattr("optimum_moe.checkpoint.value_digest.SPAN", 96)
    monkeypatch.setattr("optimum_moe.checkpoint.value_digest.RUN", 48)
    build("qwen3_moe").save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    expected = values(checkpoint)
    assert values(build("qwen3_moe")) == values(tmp_path / "shards") == expected
    assert values(build("qwen3_moe", seed=1)) != expected


@pytest.mark.parametrize("engine", ["memory", "streaming"])
@pytest.mark.parametrize(
    "method", [METHOD, LowRankSparse(rank=8, density=0.25), ByteBudget(runs_in="transformers", share=0.5)]
)
def test_a_fine_tune_is_refused(
    method: Any, engine: str, checkpoint: Path, other: Path, observed: Statistics, tmp_path: Path
) -> None:
    settings = {"engine": engine, "output_dir": tmp_path / "out"}
    with pytest.raises(ValueError, match=f"statistics passed to apply.. belong to .*, {CONTENT}"):
        opened(other, method, **settings).apply(statistics=observed)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())


def test_statistics_and_plans_go_with_the_model_through_files(
    checkpoint: Path, other: Path, observed: Statistics, tmp_path: Path
) -> None:
    observed.save_pretrained(tmp_path / "statistics")
    read = Statistics.from_pretrained(tmp_path / "statistics")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    compressor = opened(model)
    compressor.apply(statistics=read)
    compressor.plan.save_pretrained(tmp_path)
    plan = CompressionPlan.from_pretrained(tmp_path)
    opened(checkpoint).apply(plan=plan)
    for source in (other, AutoModelForCausalLM.from_pretrained(other)):
        with pytest.raises(ValueError, match=f"plan passed to apply.. belong to .*, {CONTENT}"):
            opened(source).apply(plan=plan)
    with pytest.raises(ValueError, match=CONTENT):
        opened(AutoModelForCausalLM.from_pretrained(other)).apply(statistics=read)


def test_other_settings_are_another_model(checkpoint: Path, observed: Statistics, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "changed")
    edit_config(tmp_path / "changed", num_experts_per_tok=3)
    with pytest.raises(ValueError, match=r"whose num_experts_per_tok \(2, here 3\) differs from that of"):
        opened(tmp_path / "changed").apply(statistics=observed)
    shutil.copy(checkpoint / "config.json", tmp_path / "changed")
    edit_config(tmp_path / "changed", transformers_version="5.0.0", use_cache=False, dtype="float32")
    opened(tmp_path / "changed").apply(statistics=observed)
    slower = build("qwen3_moe", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    with pytest.raises(ValueError, match=r"whose rope_parameters.rope_theta \(10000.0, here 5000.0\) differs"):
        opened(slower).apply(statistics=observed)


def new_values(folder: Path) -> None:
    build("qwen3_moe", seed=1).save_pretrained(folder)


def new_settings(folder: Path) -> None:
    edit_config(folder, norm_topk_prob=False)


def no_file(folder: Path) -> None:
    (folder / SHARD).unlink()


def longer_file(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"]] * 2)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


@pytest.mark.parametrize("engine", ["memory", "streaming"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (new_values, CONTENT),
        (new_settings, "config.json of .* was changed since it was opened: norm_topk_prob was true and is false"),
        (no_file, r"model.safetensors was removed since it was opened. Copy it again, or make a new MoECompressor"),
        (longer_file, r"model.safetensors was changed since it was opened. Make a new MoECompressor"),
    ],
)
def test_a_source_that_changes_after_calibrate(
    change: Callable[[Path], None], text: str, engine: str, checkpoint: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    compressor = opened(source, engine=engine, output_dir=tmp_path / "out")
    compressor.calibrate()
    change(source)
    with pytest.raises(ValueError, match=text):
        compressor.apply()
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_that_is_trained_after_calibrate() -> None:
    model = build("qwen3_moe")
    compressor = opened(model)
    compressor.calibrate()
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[2] *= 1.01
    with pytest.raises(ValueError, match=CONTENT):
        compressor.apply()


def test_a_run_goes_on_with_the_same_model_and_no_other(
    checkpoint: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = Path(shutil.copytree(checkpoint, tmp_path / "source")), tmp_path / "result" / "out"
    interrupted(source, out, monkeypatch)
    for changed in (other, tmp_path / "settings"):
        if changed != other:
            shutil.copytree(checkpoint, changed)
            edit_config(changed, rms_norm_eps=1e-3)
        with pytest.raises(ValueError, match=r"holds an unfinished run with another model: \{"):
            stream(changed, out)
    # Another path, new times, other shards.
    source.rename(tmp_path / "moved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "moved").save_pretrained(tmp_path / "new", max_shard_size="100KB")
    (tmp_path / "link").symlink_to(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    stream(Path("link"), out)
    expected = contents(stream(checkpoint, tmp_path / "undisturbed" / "out"))
    found = contents(out)
    assert found.keys() == expected.keys()
    assert all(found[name] == data for name, data in expected.items() if name.endswith(".safetensors"))
    assert json.loads(found["plan.json"])["source"]["values"] == json.loads(expected["plan.json"])["source"]["values"]


def test_what_a_budget_saw_is_remembered_with_the_model(
    checkpoint: Path, other: Path, observed: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics that name no model are taken for any, but profiles are those of the model that was looked at."""
    anonymous, method = Statistics(observed.blocks), ByteBudget(runs_in="transformers", share=0.5)
    looks: list[int] = []
    real = Decider._take_profiles

    def counted(*arguments: Any) -> Any:
        looks.append(1)
        return real(*arguments)

    monkeypatch.setattr(Decider, "_take_profiles", counted)
    for model, expected in ((checkpoint, 1), (checkpoint, 1), (other, 2)):
        with pytest.warns(UserWarning, match="gradient"):
            opened(model, method).apply(statistics=anonymous)
        assert len(looks) == expected


def test_a_quantized_checkpoint_counts_by_its_bytes(tmp_path: Path) -> None:
    build("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    original = to_fp8(tmp_path / "plain", tmp_path / "fp8")
    expected = values(original, dequantize=True)
    shard = next(original.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name].view(torch.uint8)[1, 2] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert values(original, dequantize=True) != expected


def test_statistics_that_differ_in_anything_begin_another_run(checkpoint: Path, observed: Statistics) -> None:
    before = observed.digest()
    block = next(iter(observed.blocks.values()))
    block.hidden_sq_EI[1, 2] += 1
    assert observed.digest() != before
    block.hidden_sq_EI[1, 2] -= 1
    assert observed.digest() == before
