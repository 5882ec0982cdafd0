"""What cannot work is refused before a weight is read, with the rule, the actual values and the remedy."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_moe import CalibrationConfig, CompressionPlan, ExpertPruning, MoECompressor, MSMoE, Statistics
from optimum_moe.checkpoint import destination
from optimum_moe.checkpoint.identity import identity
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.stages import Stage
from tests.tiny_checkpoints import documents, save_checkpoint
from tests.tiny_models import build

SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("wrong") / "qwen3_moe")


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


@pytest.fixture(autouse=True)
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ModelSource) -> None:
        raise AssertionError("weights were read before the input was checked")

    monkeypatch.setattr(ModelSource, "load", fail)


@pytest.fixture(scope="session")
def models() -> Callable[[str], Any]:
    built: dict[str, Any] = {}
    return lambda name: built.setdefault(name, build(name))


def opened(model: Any, method: Any = "m-smoe", calibration: Any = None, **settings: Any) -> MoECompressor:
    return MoECompressor.from_pretrained(model, method, calibration, progress=False, **settings)


def edit_config(checkpoint: Path, **fields: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


@pytest.mark.parametrize("kind", ["name", "path", "model"])
def test_a_compressor_is_made_by_from_pretrained(kind: str, checkpoint: Path, models: Callable[[str], Any]) -> None:
    model = {"name": str(checkpoint), "path": checkpoint, "model": models("qwen3_moe")}[kind]
    said = rf"opened and checked, got {type(model).__name__}\. Use MoECompressor\.from_pretrained\(model, recipe"
    with pytest.raises(ValueError, match=said):
        MoECompressor(model, MSMoE(num_experts=4), str(checkpoint))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"Give exactly one of num_experts, keep_ratio, target_size; got none of them"),
        ({"num_experts": 4, "keep_ratio": 0.5}, r"exactly one .* got num_experts=4, keep_ratio=0.5"),
        ({"keep_ratio": 0.5, "target_size": "1MB"}, r"got keep_ratio=0.5, target_size='1MB'"),
        ({"num_experts": 0}, r"num_experts=0 keeps no expert. Use at least 1"),
        ({"num_experts": -3}, r"num_experts=-3 keeps no expert"),
        ({"num_experts": 4.5}, r"num_experts=4.5 must be an integer. .*use keep_ratio"),
        ({"num_experts": "four"}, r"num_experts='four' must be an integer"),
        ({"keep_ratio": 0.0}, r"keep_ratio=0.0 must lie in \(0, 1\]"),
        ({"keep_ratio": 1.5}, r"keep_ratio=1.5 must lie in \(0, 1\]"),
        ({"keep_ratio": float("nan")}, r"keep_ratio=nan must lie in \(0, 1\]"),
        ({"keep_ratio": "half"}, r"keep_ratio='half' must be a number"),
        ({"target_size": "big"}, r"target_size='big' is not a size. .*'16GB'"),
        ({"target_size": "1.2.3GB"}, r"target_size='1.2.3GB' is not a size"),
        ({"target_size": -5}, r"target_size=-5 is not a size"),
    ],
)
@pytest.mark.parametrize("method", [MSMoE, ExpertPruning])
def test_impossible_settings(method: type[Stage], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MSMoE(num_experts=4, similarity="router_logit"),
            r"similarity='router_logit' is unknown; did you mean 'r",
        ),
        (
            lambda: MSMoE(num_experts=4, allocation="adaptiv"),
            r"allocation='adaptiv' is unknown; did you mean 'adaptive'",
        ),
        (lambda: MSMoE(num_experts=4, grouping="randm"), r"grouping='randm' .* 'random'"),
        (lambda: MSMoE(num_experts=4, weighting="freq"), r"weighting='freq' .*'frequency'"),
        (lambda: MSMoE(num_experts=4, routing="reduced"), r"routing='reduced' .*did you mean 'reduce'"),
        (lambda: MSMoE(num_experts=4, router_rows="max"), r"router_rows='max' .*'dominant', 'fit', 'mean'"),
        (lambda: ExpertPruning(num_experts=4, saliency="reep"), r"saliency='reep' is unknown; did you mean 'reap'"),
        (lambda: CalibrationConfig(["text"], unseen="ignore"), r"unseen='ignore' is not one of"),
    ],
)
def test_unknown_names_name_the_nearest(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        (
            "qwen3_moe",
            MSMoE(num_experts=9),
            r"num_experts=9 is larger than the 8 experts of model.layers.0.mlp. .*at most 8",
        ),
        ("qwen3_moe", ExpertPruning(num_experts=9), r"num_experts=9 is larger than the 8 experts"),
        (
            "qwen3_moe",
            ExpertPruning(num_experts=1),
            r"num_experts=1 is smaller than num_experts_per_tok=2: .*at least 2",
        ),
        ("qwen3_moe", MSMoE(num_experts=1, routing="reduce"), r"cannot pick 2 of 1. Use at least 2, .*routing=\"map\""),
        ("deepseek_v3-groups", ExpertPruning(num_experts=5), r"num_experts=5 does not fit the 2 router groups"),
        ("deepseek_v3-groups", MSMoE(num_experts=2, routing="reduce"), r"2 router groups .*multiple of 2 from 4 up"),
        (
            "deepseek_v3-groups",
            MSMoE(num_experts=4, routing="reduce", allocation="adaptive"),
            r"cannot keep router groups equal .*allocation=\"uniform\"",
        ),
        (
            "qwen3_moe",
            MSMoE(target_size=1000),
            r"target_size=1,000 bytes cannot be reached: .* still leave [\d,]+ of [\d,]+",
        ),
        ("qwen3_moe", ExpertPruning(target_size=1000), r"target_size=1,000 bytes cannot be reached"),
        (
            "qwen3_moe",
            MSMoE(num_experts=4, layers=[0, 3]),
            r"layers=\[3\] do not exist: the model has MoE blocks 0 to 2",
        ),
        ("qwen3_moe", MSMoE(num_experts=4, layers=1), r"layers=1 .* must be lists"),
        (
            "qwen3_moe",
            MSMoE(num_experts=4, protect=["*.9.*"]),
            r"protect='\*.9.\*' matches no MoE block. .*layers.0.mlp",
        ),
        ("qwen3_moe", MSMoE(num_experts=4, protect=["*"]), r"select none of the 3 MoE blocks"),
    ],
)
def test_counts_that_the_model_cannot_have(models, name: str, method: Stage, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(models(name), method)


def test_smallest_target_size_that_is_named_works(models) -> None:
    for method in (ExpertPruning, MSMoE):
        with pytest.raises(ValueError, match="cannot be reached") as error:
            opened(models("qwen3_moe"), method(target_size=1000))
        smallest = int(str(error.value).split("still leave ")[1].split(" of ")[0].replace(",", ""))
        after = opened(models("qwen3_moe"), method(target_size=smallest)).preview().after
        assert after.bytes <= smallest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: m-smoe\nkeep_rato: 0.5\n", r"Unknown field 'keep_rato'; did you mean 'keep_ratio'\?"),
        ("stage: m-smo\nkeep_ratio: 0.5\n", r"stage='m-smo' is unknown; did you mean 'm-smoe'"),
        (
            "keep_ratio: 0.5\n",
            r"A recipe needs a field 'stage', one of block-drop, byte-budget, expert-merging",
        ),
        ("- m-smoe\n", r"must be a mapping with a field 'stage' or 'stages', got list"),
        ("stage: [m-smoe\n", r"(?s)is not valid YAML: .*Correct it"),
        (
            "stage: m-smoe\nkeep_ratio: 0.5\ncalibration: corpus.txt\n",
            r"'calibration' must be a mapping, got 'corpus.txt'",
        ),
        ("stage: m-smoe\nkeep_ratio: 0.5\nseed: often\n", r"seed='often' is out of range"),
        (
            "stage: m-smoe\nkeep_ratio: 0.5\ncalibration: {max_token: 5}\n",
            r"Unknown field 'max_token'; did you mean 'max_tokens'\?",
        ),
    ],
)
def test_wrong_recipes(models, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        opened(models("qwen3_moe"), tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("m-smoo", {}, r"recipe='m-smoo' is unknown; did you mean 'm-smoe'\?"),
        ("missing.yaml", {}, r"No recipe file missing.yaml. Give an existing one, or a preset: "),
        ([MSMoE(num_experts=4), MSMoE(num_experts=2)], {}, r"m-smoe cannot follow m-smoe: .*that merges or prunes"),
        (4, {}, r"recipe=int is not a recipe. Pass a stage such as MSMoE\(num_experts=8\)"),
        ("m-smoe", {"engine": "streeming"}, r"engine='streeming' is unknown"),
        ("m-smoe", {"calibration": {"source": ["text"], "seeds": 1}}, r"Unknown field 'seeds'; did you mean 'seed'"),
    ],
)
def test_wrong_arguments(models, method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(models("qwen3_moe"), method, **settings)


def test_a_model_without_moe_blocks() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no MoE blocks\. `optimum-cli moe inspect`"):
        opened(model)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, r"m-smoe needs calibration data. Pass calibration="),
        ([], r"calibration source is empty"),
        ([""], r"holds no text \(1 documents, all empty\). Add data"),
        (["a few words"], r"has \d+ tokens, fewer than one packed row of sequence_length=512. Add data"),
        ("missing.txt", r"There is no file 'missing.txt'"),
        ("plain text, not a path", r"pass text itself as a list of strings"),
        (CalibrationConfig(documents(2), max_tokens=512, sequence_length=256, packing=True), None),
    ],
)
def test_calibration_data_are_checked_before_weights(original: Path, calibration: Any, message: str | None) -> None:
    with pytest.raises(ValueError if message else AssertionError, match=message or "weights were read"):
        opened(original, calibration=calibration).apply()


def test_quantized_and_compressed_checkpoints(checkpoint: Path) -> None:
    edit_config(checkpoint, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(ValueError, match=r"already quantized \(fp8\).*dequantize=True"):
        opened(checkpoint)
    blocks = {"model.layers.0.mlp": {"num_experts": 8, "num_groups": 4, "routing": "map"}}
    edit_config(checkpoint, quantization_config={"quant_method": "optimum_moe", "blocks": blocks, "format_version": 2})
    with pytest.raises(ValueError, match=r"already compressed by optimum_moe. Start from the original"):
        opened(checkpoint)


def cut_off(checkpoint: Path) -> None:
    os.truncate(checkpoint / SHARD, (checkpoint / SHARD).stat().st_size - 1000)


def empty_shard(checkpoint: Path) -> None:
    (checkpoint / SHARD).write_bytes(b"")


def corrupt_header(checkpoint: Path) -> None:
    with (checkpoint / SHARD).open("r+b") as stream:
        stream.seek(8)
        stream.write(b"\xff" * 32)


def huge_header(checkpoint: Path) -> None:
    with (checkpoint / SHARD).open("r+b") as stream:
        stream.write(struct.pack("<Q", 1 << 60))


def odd_header(checkpoint: Path) -> None:
    header = json.dumps({"weight": {"shape": [1]}}).encode()
    (checkpoint / SHARD).write_bytes(struct.pack("<Q", len(header)) + header)


def pickles_only(checkpoint: Path) -> None:
    (checkpoint / SHARD).rename(checkpoint / "pytorch_model.bin")


def index_of(checkpoint: Path, **weights: str) -> None:
    (checkpoint / SHARD).rename(checkpoint / "model-00001-of-00002.safetensors")
    here = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": here | weights}), encoding="utf-8")


def missing_shard(checkpoint: Path) -> None:
    index_of(checkpoint, weight="model-00002-of-00002.safetensors")


def missing_tensor(checkpoint: Path) -> None:
    index_of(checkpoint, weight="model-00001-of-00002.safetensors")


def corrupt_index(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_text('{"weight_map": ', encoding="utf-8")


def no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, r"model.safetensors is truncated or corrupt: its header describes [\d,]+ bytes, it has [\d,]+"),
        (empty_shard, r"model.safetensors is not a readable safetensors file \(0 bytes\). Copy or download it again"),
        (corrupt_header, r"model.safetensors is not a readable safetensors file"),
        (huge_header, r"model.safetensors is not a readable safetensors file"),
        (odd_header, r"model.safetensors is not a readable safetensors file"),
        (pickles_only, r"It has pytorch_model.bin, which would need unpickling. Give a checkpoint in safetensors"),
        (missing_shard, r"shards that do not exist: model-00002-of-00002.safetensors. Copy or download them"),
        (missing_tensor, r"lists 1 tensors that no shard has \(weight\). They would be random"),
        (corrupt_index, r"is not a readable index of shards. Copy or download it again"),
        (no_config, r"has no config.json. Give the folder of a checkpoint"),
    ],
)
def test_broken_checkpoints(checkpoint: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(checkpoint)
    with pytest.raises(ValueError, match=message):
        opened(checkpoint)


def test_names_that_lead_nowhere(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a folder. Give a Hub id"):
        opened(tmp_path / "missing")
    with pytest.raises(ValueError, match="'no/model' is neither a local folder nor a Hub model that could be fetched"):
        opened("no/model", local_files_only=True)
    with pytest.raises(ValueError, match="dtype='bfloat61' is unknown; did you mean 'bfloat16'"):
        opened(original, dtype="bfloat61")


@pytest.fixture
def destinations(tmp_path: Path) -> Iterator[Path]:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep", encoding="utf-8")
    yield tmp_path
    assert (full / "mine.txt").read_text(encoding="utf-8") == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("full", r"full is not empty. Choose another folder, or pass overwrite=True"),
        ("full/mine.txt", r"mine.txt is a file. Give a folder"),
        ("full/mine.txt/out", r"mine.txt is a file, so .*out cannot be created"),
    ],
)
def test_destination_is_checked_before_the_model(destinations: Path, place: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened("no/such/model", output_dir=destinations / place)


def test_destination_that_must_not_be_replaced(
    original: Path, destinations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (original, original.parent):
        with pytest.raises(ValueError, match="holds the original checkpoint, which would be replaced"):
            opened(original, output_dir=place, overwrite=True)
    monkeypatch.chdir(destinations / "full")
    for place in (".", ".."):
        with pytest.raises(ValueError, match=r"holds the working directory.* Give a folder inside it"):
            opened(original, output_dir=place, overwrite=True)
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match="/proc is a mount point, which cannot be replaced"):
        opened(original, output_dir="/proc", overwrite=True)


def test_no_permission_to_write(original: Path, destinations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the system's answer is replaced.
    monkeypatch.setattr(destination.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"No permission to write in .*full. Choose another folder"):
        opened(original, output_dir=destinations / "full" / "out")


def test_statistics_and_plans_of_another_model(original: Path, tmp_path: Path) -> None:
    compressor = opened(original)
    here = identity(compressor.source)
    others = ({"architecture": "OtherModel"}, {"num_experts": {"model.layers.0.mlp": 16}})
    for changed in others:
        other = here | {"name": "other"} | changed
        with pytest.raises(ValueError, match=f"statistics .*belong to other .*whose {next(iter(changed))} differs"):
            compressor.apply(statistics=Statistics({}, source=other))
        with pytest.raises(ValueError, match=f"plan .*belong to other .*whose {next(iter(changed))} differs"):
            compressor.apply(plan=CompressionPlan({}, source=other))
    with pytest.raises(ValueError, match=r"No statistics.json in .*Give a folder"):
        Statistics.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"No plan.json in .*Give a folder"):
        CompressionPlan.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Nothing to save yet. Call apply\(\) first"):
        compressor.save_pretrained(tmp_path / "out")


def test_a_hub_model_is_previewed_without_its_weights(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two calls to the Hub are answered from a folder; everything behind them is real."""
    from huggingface_hub import get_local_safetensors_metadata

    asked = {}
    weightless = tmp_path / "snapshots" / ("a" * 40)
    shutil.copytree(original, weightless, ignore=shutil.ignore_patterns("*.safetensors"))

    def snapshot(name: str, ignore_patterns: list[str], **arguments: object) -> str:
        asked.update(name=name, ignored=ignore_patterns, **arguments)
        return str(weightless)

    monkeypatch.setattr("optimum_moe.checkpoint.location.snapshot_download", snapshot)
    monkeypatch.setattr(
        "optimum_moe.checkpoint.location.get_safetensors_metadata",
        lambda name, **arguments: get_local_safetensors_metadata(original),
    )
    source = MoECompressor.from_pretrained("org/model", MSMoE(num_experts=4), revision="v1", progress=False).source
    assert asked["name"] == "org/model"
    assert asked["revision"] == "v1"
    assert "*.safetensors" in asked["ignored"]
    assert source.info == opened(original).source.info
    assert source.location == "org/model"
    # What the branch pointed to when its headers were read is what is loaded later.
    assert source.load_arguments["revision"] == "a" * 40
