"""The weights that are compressed are those that transformers loads, in both engines; what holds others is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_moe import ByteBudget, ExpertPruning, MoECompressor, MSMoE
from optimum_moe.stages import Stage
from tests.tiny_checkpoints import documents, save_checkpoint, tensors_in
from tests.tiny_models import build

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HALF = ExpertPruning(num_experts=4, saliency="aimer")
LORA = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of equal shapes and different numbers."""
    folder = tmp_path_factory.mktemp("sources")
    return save_checkpoint(folder / "one"), save_checkpoint(folder / "two", seed=5)


def opened(model: Any, method: Stage = HALF, calibration: Any = None, **settings: Any) -> MoECompressor:
    return MoECompressor.from_pretrained(model, method, calibration, progress=False, **settings)


def edit(file: Path, **fields: Any) -> None:
    record = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps({key: value for key, value in record.items() if value is not None}), encoding="utf-8")


def saved(source: Path, folder: Path, **how: Any) -> Path:
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, **how)
    return folder


def single_beside_index(one: Path, two: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(one, folder)
    for file in saved(two, folder.with_name("shards"), max_shard_size="100KB").glob("model*"):
        shutil.copy(file, folder)
    return {}


def stray_shards(one: Path, two: Path, folder: Path) -> dict[str, Any]:
    saved(one, folder, max_shard_size="100KB")
    shutil.copy(two / SINGLE, folder / "model-00099-of-00099.safetensors")
    return {}


def named_by_config(one: Path, two: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(one, folder)
    shutil.copy(two / SINGLE, folder / "other.safetensors")
    edit(folder / "config.json", transformers_weights="other.safetensors")
    return {}


def variant(one: Path, two: Path, folder: Path) -> dict[str, Any]:
    saved(one, folder)
    saved(two, folder, variant="fp16", max_shard_size="100KB")
    return {"variant": "fp16"}


def subfolder(one: Path, two: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(one, folder)
    shutil.copytree(two, folder / "inner")
    return {"subfolder": "inner"}


@pytest.mark.parametrize("engine", ["memory", "streaming"])
@pytest.mark.parametrize("make", [single_beside_index, stray_shards, named_by_config, variant, subfolder])
@pytest.mark.filterwarnings("ignore:.*transformers loads model.safetensors")
def test_both_engines_take_what_transformers_takes(
    sources: tuple[Path, Path], tmp_path: Path, make: Callable[..., dict[str, Any]], engine: str
) -> None:
    how = make(*sources, tmp_path / "model")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **how)
    out = opened(tmp_path / "model", engine=engine, output_dir=tmp_path / "out", **how).apply()
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    kept = [name for name in found if ".experts." not in name and "gate.weight" not in name]
    assert len(kept) > 20
    for name in kept:
        assert torch.equal(found[name], wanted.state_dict()[name]), name
    assert "transformers_weights" not in json.loads((out / "config.json").read_text(encoding="utf-8"))


def test_two_checkpoints_in_one_folder_are_told_apart(sources: tuple[Path, Path], tmp_path: Path) -> None:
    single_beside_index(*sources, tmp_path / "model")
    with pytest.warns(UserWarning, match=r"model.safetensors, so that file is compressed. Remove it to use the shards"):
        opened(tmp_path / "model")


def beside(one: Path, folder: Path) -> dict[str, Any]:
    get_peft_model(AutoModelForCausalLM.from_pretrained(one), LORA).save_pretrained(folder)
    shutil.copytree(one, folder, dirs_exist_ok=True)
    return {}


def alone(one: Path, folder: Path) -> dict[str, Any]:
    get_peft_model(AutoModelForCausalLM.from_pretrained(one), LORA).save_pretrained(folder)
    return {}


def no_metadata(one: Path, folder: Path) -> dict[str, Any]:
    saved(one, folder, max_shard_size="100KB")
    edit(folder / INDEX, metadata=None)
    return {}


def stale_index(one: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(one, folder)
    (folder / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model-1.safetensors"}}), encoding="utf-8"
    )
    return {}


def unasked_variant(one: Path, folder: Path) -> dict[str, Any]:
    saved(one, folder, variant="fp16")
    return {}


def ranks(one: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(one, folder)
    (folder / "shard-00000-model-00001-of-00002.safetensors").touch()
    return {}


def outside(one: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(one, folder)
    edit(folder / "config.json", transformers_weights="../one/model.safetensors")
    return {}


def unnamed_subfolder(one: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(one, folder / "inner")
    return {}


def copied(**how: Any) -> Callable[[Path, Path], dict[str, Any]]:
    def make(one: Path, folder: Path) -> dict[str, Any]:
        shutil.copytree(one, folder)
        return how

    return make


@pytest.mark.parametrize("engine", ["memory", "streaming"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            beside,
            r"model holds an adapter \(adapter_config.json\) beside the weights, .* Merge it first: PeftModel.from_p",
        ),
        (alone, r"model holds an adapter \(adapter_config.json\) of .*one and no model. Merge it first"),
        (
            no_metadata,
            r'index of .*model has no "metadata", without which transformers cannot load it. Add "metadata": {}',
        ),
        (
            stale_index,
            r"names shards that do not exist: model-1.safetensors. .*or remove the index if it is outdated",
        ),
        (unasked_variant, r"has neither .* It has the variants fp16: pass variant='fp16' for one of them"),
        (ranks, r"holds shards of single ranks \(shard-00000-model-00001-of-00002.safetensors, ...\), .* save it with"),
        (outside, r"transformers_weights='../one/model.safetensors', not a safetensors file. Correct it"),
        (unnamed_subfolder, r"has no config.json. .* It has the folders inner: pass subfolder='inner'"),
        (copied(variant="bf16"), r"has neither model.bf16.safetensors nor model.safetensors.index.bf16.json"),
        (
            copied(gguf_file="x.gguf"),
            r"gguf_file= cannot be used .* GGUF file. Give the safetensors checkpoint",
        ),
        (copied(use_safetensors=False), r"use_safetensors=False loads pickled weights, .* Leave it out"),
        (copied(torch_dtype="bfloat16"), r"torch_dtype= cannot be used .*: transformers 5 calls it dtype=. Pass that"),
        (copied(state_dict={}), r"state_dict= cannot be used .* pass the model instead of its path"),
    ],
)
def test_other_weights_are_refused(
    sources: tuple[Path, Path], tmp_path: Path, make: Callable[..., dict[str, Any]], message: str, engine: str
) -> None:
    how = make(sources[0], tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "model", engine=engine, output_dir=tmp_path / "out", **how)


def test_a_hub_model_in_the_cache_is_enough_when_offline(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    shutil.copytree(sources[0], repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # A file of that name where the command is run is no part of the Hub model.
    shutil.copy(sources[1] / SINGLE, tmp_path)
    monkeypatch.chdir(tmp_path)
    results = {}
    for model, how in (("org/tiny", {"cache_dir": tmp_path / "hub"}), (sources[0], {})):
        for engine in ("memory", "streaming"):
            out = tmp_path / f"{Path(model).name}-{engine}"
            results[out] = tensors_in(opened(model, engine=engine, output_dir=out, **how).apply())
    first, *others = results.values()
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


def forward_compiled(model: PreTrainedModel) -> Any:
    model.forward = torch.compile(model.forward)
    return model


def part_compiled(model: Any) -> Any:
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


def compiled(model: Any) -> Any:
    model.compile()
    return model


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda m: get_peft_model(m, LORA),
            r"PeftModel cannot be compressed. It holds an adapter: pass model.merge_and_",
        ),
        (
            lambda m: inject_adapter_in_model(LORA, m),
            r"has an adapter in it \(model.layers.0.self_attn.q_proj is a Linear",
        ),
        (torch.compile, r"OptimizedModule cannot be compressed. It is compiled: pass the model that torch.compile was"),
        (forward_compiled, r"in memory is compiled \(Qwen3MoeForCausalLM\), .* compile the result"),
        (part_compiled, r"in memory is compiled \(model.layers.1\)"),
        (compiled, r"in memory is compiled \(Qwen3MoeForCausalLM\)"),
        (torch.nn.DataParallel, r"DataParallel cannot be compressed. It wraps a model: pass model.module"),
        (
            lambda m: m.state_dict(),
            r"OrderedDict cannot be compressed. Pass a PreTrainedModel, a Hub id, or the folder",
        ),
    ],
)
def test_models_that_are_not_what_they_compute(wrap: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(wrap(build("qwen3_moe")))


def test_a_merged_adapter_is_welcome() -> None:
    plain = build("qwen3_moe")
    merged = get_peft_model(build("qwen3_moe"), LORA).merge_and_unload()
    before = merged.state_dict()["model.layers.0.self_attn.q_proj.weight"].clone()
    assert not torch.equal(before, plain.state_dict()["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(opened(merged).apply().state_dict()["model.layers.0.self_attn.q_proj.weight"], before)


@pytest.mark.parametrize(
    "method",
    [HALF, ExpertPruning(num_experts=4), MSMoE(num_experts=4), ByteBudget(runs_in="transformers", share=0.5)],
    ids=["data-free", "prune", "merge", "budget"],
)
def test_offloaded_weights_are_observed_and_never_cut(
    sources: tuple[Path, Path], tmp_path: Path, method: Stage
) -> None:
    spilled = {"device_map": "auto", "max_memory": {"cpu": "300KB"}, "offload_folder": str(tmp_path / "off")}
    texts = documents(4)
    compressor = opened(sources[0], method, texts, output_dir=tmp_path / "out", **spilled)
    with pytest.raises(ValueError, match=r"tensors of the model are offloaded .* or pass engine=\"streaming\" with"):
        compressor.apply()
    assert not (tmp_path / "out").exists()
    if method.needs:
        here, there = opened(sources[0], method, texts).calibrate(), compressor.calibrate()
        for name, block in here.blocks.items():
            assert torch.equal(block.gated_norm_sum_E, there.blocks[name].gated_norm_sum_E)
            assert torch.equal(block.reservoir.index_SK, there.blocks[name].reservoir.index_SK)


def test_a_model_in_memory_that_was_offloaded_is_not_cut_and_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensors of the model are offloaded"):
        opened(cpu_offload(build("qwen3_moe"))).apply()
    compressor = opened(build("qwen3_moe"))
    cpu_offload(compressor.apply())
    with pytest.raises(ValueError, match=r"tensors of the model are offloaded"):
        compressor.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
