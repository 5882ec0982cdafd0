"""The streaming engine: layer by layer from disk to disk, with the same bits as in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_moe import CalibrationConfig, CompressionPlan, ExpertPruning, MoECompressor, MSMoE
from optimum_moe.calibration import build_batches, observe
from optimum_moe.checkpoint.headers import read_headers
from optimum_moe.checkpoint.source import open_source
from optimum_moe.checkpoint.streamed import StreamedModel, align
from optimum_moe.engine import streaming as streaming_module
from optimum_moe.engine.activations import Activations
from optimum_moe.engine.layers import find_layers
from optimum_moe.engine.lockstep import Lockstep
from optimum_moe.stages import BlockContext
from optimum_moe.surgeons import find_blocks, guarded
from tests.composites_table import build_composite, composite_named, inputs_with_media
from tests.mtp_checkpoints import save_with_mtp
from tests.test_composites import reached_only
from tests.test_released_sources import EVEN
from tests.test_released_sources import written as written_quantized
from tests.tiny_checkpoints import save_checkpoint, write_text
from tests.tiny_models import build, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

FAMILIES = (
    *("qwen3_moe", "mixtral", "olmoe", "deepseek_v3-groups", "gpt_oss", "switch_transformers", "aria", "nemotron_h"),
    *("gemma4", "qwen3_vl_moe", "llama4", "dbrx", "jetmoe", "longcat_flash"),
)
METHODS: dict[str, Any] = {
    "map": MSMoE(num_experts=4),
    "reduce": MSMoE(num_experts=4, routing="reduce"),
    "prune": ExpertPruning(num_experts=4, saliency="aimer"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("streaming")

    def saved(name: str) -> Path:
        if not (folder / name).is_dir():
            build(name).save_pretrained(folder / name)
        return folder / name

    return saved


def calibration(name: str, batches: int = 3, **settings: Any) -> CalibrationConfig:
    return CalibrationConfig([inputs_for(name, seed=seed) for seed in range(batches)], **settings)


def compressed(checkpoint: Path, method: Any, data: Any, out: Path, engine: str, **settings: Any) -> Path:
    arguments = {"engine": engine, "output_dir": out, "progress": False} | settings
    return MoECompressor.from_pretrained(checkpoint, method, data, **arguments).apply()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(found)
        found |= part
    return found


def beside_the_weights(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    weights = set(folder.glob("model*.safetensors*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path not in weights}


def assert_same(one: Path, other: Path) -> None:
    """Every tensor has the same bits under the same name, and every other file the same bytes."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
    assert beside_the_weights(one) == beside_the_weights(other)


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_streaming_equals_memory(name: str, how: str, checkpoints: Any, tmp_path: Path) -> None:
    data = None if how == "prune" else calibration(name)
    written = {}
    for engine in ("memory", "streaming"):
        written[engine] = compressed(checkpoints(name), METHODS[how], data, tmp_path / engine / "out", engine)
    assert_same(written["memory"], written["streaming"])
    assert len(read_headers(written["streaming"]).files) > len(find_layers(build(name), find_blocks(build(name))))
    assert [path.name for path in (tmp_path / "streaming").iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["qwen3_moe", "switch_transformers"])
@pytest.mark.parametrize("propagate", [False, True])
def test_adaptive_budget_takes_two_passes(name: str, propagate: bool, checkpoints: Any, tmp_path: Path) -> None:
    method, written = MSMoE(num_experts=4, allocation="adaptive"), {}
    for engine in ("memory", "streaming"):
        out = tmp_path / engine / "out"
        settings = {"error_propagation": propagate}
        written[engine] = compressed(checkpoints(name), method, calibration(name), out, engine, **settings)
    assert_same(written["memory"], written["streaming"])
    counts = [block.num_groups for block in CompressionPlan.from_pretrained(written["memory"]).blocks.values()]
    assert len(set(counts)) > 1


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "switch_transformers", "jetmoe", "qwen3_vl_moe"])
def test_statistics_equal_those_in_memory(name: str, checkpoints: Any, tmp_path: Path) -> None:
    data, found = calibration(name), {}
    for engine in ("memory", "streaming"):
        where = {"output_dir": tmp_path / "never"} if engine == "streaming" else {}
        compressor = MoECompressor.from_pretrained(
            checkpoints(name), METHODS["map"], data, engine=engine, progress=False, **where
        )
        compressor.calibrate().save_pretrained(tmp_path / engine)
        found[engine] = compressor
    one, other = (load_file(tmp_path / engine / "statistics" / "tensors.safetensors") for engine in found)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    records = [(tmp_path / engine / "statistics.json").read_text(encoding="utf-8") for engine in found]
    assert records[0] == records[1]
    # Statistics that were given make one pass over the tensors, without running the model.
    path = found["streaming"].apply(found["memory"].statistics)
    assert_same(path, compressed(checkpoints(name), METHODS["map"], data, tmp_path / "whole" / "never", "memory"))


def test_given_plan(checkpoints: Any, tmp_path: Path) -> None:
    data = calibration("mixtral")
    whole = compressed(checkpoints("mixtral"), METHODS["map"], data, tmp_path / "a" / "out", "memory")
    compressor = MoECompressor.from_pretrained(
        checkpoints("mixtral"),
        METHODS["map"],
        data,
        engine="streaming",
        output_dir=tmp_path / "b" / "out",
        progress=False,
    )
    path = compressor.apply(plan=CompressionPlan.from_pretrained(whole))
    one, other = tensors(whole), tensors(path)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_text_with_padding_and_tokenizer(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "original")
    text = write_text(tmp_path / "text.jsonl")
    data = CalibrationConfig(str(text), sequence_length=40, batch_size=3, packing=False, max_tokens=2000)
    written = {}
    for engine in ("memory", "streaming"):
        written[engine] = compressed(checkpoint, METHODS["map"], data, tmp_path / engine / "out", engine)
    assert_same(written["memory"], written["streaming"])
    model = AutoModelForCausalLM.from_pretrained(written["streaming"])
    assert torch.isfinite(logits_of(model, inputs_for("qwen3_moe"))).all()


@pytest.mark.parametrize("engine", ["memory", "streaming"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_error_propagation_by_hand(engine: str, name: str, checkpoints: Any, tmp_path: Path) -> None:
    method, data = METHODS["map"], calibration(name)
    # The watched and the ordinary forward of a cut block are the same loop then.
    settings = {"error_propagation": True, "experts_implementation": "eager"}
    path = compressed(checkpoints(name), method, data, tmp_path / "out", engine, **settings)
    model = align(AutoModelForCausalLM.from_pretrained(checkpoints(name), experts_implementation="eager"))
    for found in find_blocks(model):
        statistics = observe(model, [found], build_batches(data), data, progress=False)
        block = found.module(model)
        context = BlockContext(
            info=found.info,
            experts=found.surgeon.experts(block),
            router=found.surgeon.router(block),
            generator=torch.Generator().manual_seed(found.info.index),
            statistics=statistics.blocks[found.info.name],
        )
        with torch.no_grad():
            plan = method.decide(context, 4)
        with guarded(model, found, needed=True):
            found.surgeon.cut(block, plan)
    model.save_pretrained(tmp_path / "hand")
    left, right = tensors(tmp_path / "hand"), tensors(path)
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[key]) for key, tensor in left.items())
    plain = compressed(checkpoints(name), method, data, tmp_path / "plain", engine, experts_implementation="eager")
    assert any(not torch.equal(tensor, right[key]) for key, tensor in tensors(plain).items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtype(dtype: str, checkpoints: Any, tmp_path: Path) -> None:
    written = {}
    for engine in ("memory", "streaming"):
        out = tmp_path / engine / "out"
        written[engine] = compressed(
            checkpoints("deepseek_v3-groups"),
            METHODS["reduce"],
            calibration("deepseek_v3-groups"),
            out,
            engine,
            dtype=dtype,
        )
    assert_same(written["memory"], written["streaming"])


@pytest.mark.parametrize("equal", [True, False])
def test_tied_embeddings_that_the_checkpoint_holds_twice(equal: bool, tmp_path: Path) -> None:
    build("qwen3_moe", tie_word_embeddings=False).save_pretrained(tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    stored = load_file(file)
    if equal:
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "original" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "original" / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8"
    )
    written = {}
    for engine in ("memory", "streaming"):
        out = tmp_path / engine / "out"
        written[engine] = compressed(tmp_path / "original", METHODS["prune"], None, out, engine)
    assert_same(written["memory"], written["streaming"])
    assert ("lm_head.weight" in tensors(written["streaming"])) != equal


def test_activations_go_to_disk_with_the_same_bits(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = []

    class Full(Activations):
        def __init__(self, folder: Path, limit: int) -> None:
            super().__init__(folder, 0)
            stores.append(self)

    data = calibration("switch_transformers")
    whole = compressed(checkpoints("switch_transformers"), METHODS["map"], data, tmp_path / "a" / "out", "memory")
    monkeypatch.setattr(streaming_module, "Activations", Full)
    path = compressed(checkpoints("switch_transformers"), METHODS["map"], data, tmp_path / "b" / "out", "streaming")
    assert_same(whole, path)
    # 3 batches of 2 x 16 tokens of 64 float32 leave each of the 7 layers before the last MoE block.
    assert stores[0].on_disk >= 3 * 7 * 2 * 16 * 64 * 4


def test_activations_stay_in_memory_below_the_limit(tmp_path: Path) -> None:
    store = Activations(tmp_path, 1000)
    first = store.keep((torch.ones(200), "mask"))
    assert (store.in_memory, store.on_disk) == (800, 0)
    second = store.keep([torch.arange(100.0).view(10, 10)])[0]
    assert (store.in_memory, store.on_disk) == (800, 400)
    assert torch.equal(second, torch.arange(100.0).view(10, 10))
    assert list(tmp_path.iterdir()) == []
    del first
    assert store.in_memory == 0


def test_one_layer_at_a_time_is_loaded(checkpoints: Any) -> None:
    streamed = StreamedModel(open_source(checkpoints("qwen3_moe")), torch.device("cpu"))
    model = streamed.model
    inside = [f"{name}." for name in ("model.layers.0", "model.layers.1", "model.layers.2")]

    def loaded() -> set[str]:
        stores = ((path, module._parameters) for path, module in model.named_modules())
        held = [(f"{path}.{key}", tensor) for path, store in stores for key, tensor in dict.items(store)]
        return {name for name, tensor in held if tensor is not None and not tensor.is_meta}

    assert loaded() == set()
    streamed.load(streamed.names("model.layers.1"))
    assert {name for name in loaded() if name.startswith(inside[1])} == loaded() != set()
    streamed.free("model.layers.1")
    assert loaded() == set()
    with streamed.loading_at_first_use():
        logits = logits_of(model, inputs_for("qwen3_moe"))
        assert "lm_head.weight" in loaded()
        streamed.free_lent()
        assert loaded() == set()
    expected = align(AutoModelForCausalLM.from_pretrained(checkpoints("qwen3_moe")))
    assert torch.equal(logits, logits_of(expected, inputs_for("qwen3_moe")))


class Stack(nn.Module):
    """Layers that say when they run; the second batch skips the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))
        self.log: list[tuple[int, int]] = []

    def forward(self, batch: int) -> None:
        for number, layer in enumerate(self.layers):
            if (batch, number) != (1, 1):
                layer(torch.zeros(1))
                self.log.append((number, batch))


def go_through(lockstep: Lockstep) -> None:
    with lockstep:
        for _, runners in lockstep.turns():
            for runner in runners:
                runner.advance()


def test_all_batches_pass_a_layer_before_the_next() -> None:
    model = Stack()
    layers = [f"layers.{number}" for number in range(3)]
    calls = [lambda batch=batch: model(batch) for batch in range(3)]
    go_through(Lockstep(model, layers, calls, lambda output: output))
    assert model.log == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)]
    assert all("forward" not in vars(layer) for layer in model.layers)


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_an_error_ends_every_thread(raised: type[BaseException]) -> None:
    model = Stack()
    ended = []

    def call(batch: int) -> None:
        try:
            model(batch)
        finally:
            ended.append(batch)

    calls = [lambda batch=batch: call(batch) for batch in range(3)]
    model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(raised("stop")))
    lockstep = Lockstep(model, ["layers.0", "layers.1"], calls, lambda output: output)
    with pytest.raises(raised, match="stop"):
        go_through(lockstep)
    assert sorted(ended) == [0, 1, 2]
    assert not any(runner.is_alive() for runner in lockstep.runners)


def test_wrong_settings_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    checkpoint, method = checkpoints("qwen3_moe"), METHODS["prune"]
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (checkpoint, {"engine": "streaming"}, r'engine="streaming" writes during the run and needs output_dir'),
        (build("qwen3_moe"), {"engine": "streaming", "output_dir": tmp_path / "o"}, "this model is in memory"),
        (checkpoint, {"engine": "stream"}, "did you mean 'streaming'"),
        (checkpoint, {"engine": "memory", "max_memory": "1GB"}, r'max_memory=.1GB. is for engine="streaming"'),
        (checkpoint, {"error_propagation": True}, "expert-pruning needs no data"),
        (
            checkpoint,
            {"engine": "streaming", "output_dir": tmp_path / "o", "device_map": "auto"},
            "computes on one device, not device_map='auto'",
        ),
    ]
    for model, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            MoECompressor.from_pretrained(model, method, **settings)


def test_memory_below_one_layer_is_refused_with_what_is_needed(checkpoints: Any, tmp_path: Path) -> None:
    arguments = (checkpoints("qwen3_moe"), METHODS["prune"], None, tmp_path / "out", "streaming")
    with pytest.raises(ValueError, match=r"max_memory=1,000 bytes is less than the [0-9,]+ that") as error:
        compressed(*arguments, max_memory=1000)
    needed = int(str(error.value).split("less than the ")[1].split(" ")[0].replace(",", ""))
    layer = sum(p.numel() * 4 for p in build("qwen3_moe").model.layers[0].parameters())
    assert layer < needed < 3 * layer
    assert compressed(*arguments, max_memory=needed) == tmp_path / "out"


def test_auto_streams_what_is_larger_than_memory(
    checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(**settings: Any) -> bool:
        compressor = MoECompressor.from_pretrained(checkpoints("qwen3_moe"), METHODS["prune"], **settings)
        return compressor.streaming is not None

    assert not chosen(output_dir=tmp_path / "out")
    free = type("Free", (), {"available": open_source(checkpoints("qwen3_moe")).info.bytes - 1})
    monkeypatch.setattr(streaming_module.psutil, "virtual_memory", lambda: free)
    assert chosen(output_dir=tmp_path / "out")
    assert not chosen()
    assert not chosen(output_dir=tmp_path / "out", engine="memory")


def test_lines_say_what_was_done(checkpoints: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = calibration("qwen3_moe")
    compressed(checkpoints("qwen3_moe"), METHODS["map"], data, tmp_path / "out", "streaming", progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert len(lines) == 3
    for number, line in enumerate(lines):
        assert line.startswith(f"[{number + 1}/3] model.layers.{number}:  8 -> 4 experts  error 0.")
        assert line.endswith(" s left")
    compressed(checkpoints("qwen3_moe"), METHODS["map"], data, tmp_path / "quiet", "streaming")
    assert "[" not in capsys.readouterr().err


def test_a_compressor_that_streamed_has_nothing_more_to_save(checkpoints: Any, tmp_path: Path) -> None:
    compressor = MoECompressor.from_pretrained(
        checkpoints("qwen3_moe"), METHODS["prune"], engine="streaming", output_dir=tmp_path / "out", progress=False
    )
    path = compressor.apply()
    stored = sum(tensor.numel() for tensor in tensors(path).values())
    assert compressor.measured().after.parameters == stored
    with pytest.raises(ValueError, match=r"apply\(\) wrote the checkpoint to .*out already"):
        compressor.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="already cut"):
        compressor.apply()


def test_broken_sources_are_refused(checkpoints: Any, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "broken"))
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"is truncated or corrupt: its header describes"):
        compressed(broken, METHODS["prune"], None, tmp_path / "out", "streaming")
    (broken / "model.safetensors").rename(broken / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ValueError, match=r"names shards that do not exist: model-00002-of-00002"):
        compressed(broken, METHODS["prune"], None, tmp_path / "out", "streaming")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("option", ["copy", "cut", "drop"])
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next"])
def test_multi_token_prediction_layers(name: str, option: str, tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "original", name)
    method = METHODS["map" if option == "copy" else "reduce"]
    written = {}
    for engine in ("memory", "streaming"):
        out = tmp_path / engine / "out"
        written[engine] = compressed(tmp_path / "original", method, calibration(name), out, engine, mtp=option)
    assert_same(written["memory"], written["streaming"])


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_dequantized_on_the_way(name: str, tmp_path: Path) -> None:
    original = written_quantized(name, tmp_path / "original", **EVEN)
    written = {}
    for engine in ("memory", "streaming"):
        out = tmp_path / engine / "out"
        written[engine] = compressed(original, METHODS["map"], calibration(name), out, engine, dequantize=True)
    assert_same(written["memory"], written["streaming"])


@pytest.mark.parametrize("composite", ["qwen3_vl_moe", "ernie4_5_vl_moe", "qwen3_omni_moe"])
def test_composites_with_media(composite: str, tmp_path: Path) -> None:
    found = composite_named(composite)
    model = build_composite(found)
    model.save_pretrained(tmp_path / "original")
    method = reached_only(METHODS["map"], model, found)
    data = CalibrationConfig([inputs_with_media(found, seed=seed) for seed in range(3)])
    written = {}
    for engine in ("memory", "streaming"):
        written[engine] = compressed(tmp_path / "original", method, data, tmp_path / engine / "out", engine)
    assert_same(written["memory"], written["streaming"])
