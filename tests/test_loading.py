"""A compressed checkpoint loads wherever its original would: by any way of saving, dtype, device map and use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils.modeling import get_state_dict_offloaded_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from optimum_moe import CalibrationConfig, MoECompressor, MSMoE
from optimum_moe.hf.quantizer import quantize_on_load, quantized_tensors
from tests.tiny_models import TARGETS, Target, build, by_name, in_full, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

METHODS = {
    "map": MSMoE(num_experts=4),
    "adaptive": MSMoE(num_experts=4, allocation="adaptive"),
    "reduce": MSMoE(num_experts=4, routing="reduce"),
}
USUAL = ("qwen3_moe", "gpt_oss", "deepseek_v3-groups", "switch_transformers")


def cases(*methods: str, families: tuple[str, ...] = USUAL) -> Any:
    """Pairs of target and method; what is no usual family belongs to the full matrix."""
    return pytest.mark.parametrize(
        ("target", "method"),
        [
            pytest.param(target, method, id=f"{target.name}-{method}", marks=marks)
            for target in TARGETS
            for marks in [[] if target.name in families else [pytest.mark.full]]
            for method in methods
        ],
    )


class Saved:
    """A compressed model in memory and the checkpoint it was saved to."""

    def __init__(self, target: Target, method: str, folder: Path, **fields: Any) -> None:
        data = [inputs_for(target, rows=4, length=32, seed=seed) for seed in range(2)]
        compressor = MoECompressor.from_pretrained(
            build(target, **fields), METHODS[method], CalibrationConfig(data), progress=False
        )
        self.target, self.folder = target, folder
        self.model: PreTrainedModel = compressor.apply()
        compressor.save_pretrained(folder)

    def load(self, folder: Path | None = None, **arguments: Any) -> Any:
        return getattr(transformers, self.target.architecture).from_pretrained(folder or self.folder, **arguments)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Target | str, str], Saved]:
    made: dict[tuple[str, str], Saved] = {}

    def get(target: Target | str, method: str) -> Saved:
        target = by_name(target) if isinstance(target, str) else target
        if (target.name, method) not in made:
            folder = tmp_path_factory.mktemp("loading") / f"{target.name}-{method}"
            made[target.name, method] = Saved(target, method, folder)
        return made[target.name, method]

    return get


def save_sharded(loaded: PreTrainedModel, folder: Path) -> None:
    loaded.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1


def save_state_dict(loaded: PreTrainedModel, folder: Path) -> None:
    """Other values than the model's own, so that a forgotten argument shows."""
    with torch.no_grad():
        state = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.save_pretrained(folder, state_dict=state)


def save_copy(loaded: PreTrainedModel, folder: Path) -> None:
    copy.deepcopy(loaded).save_pretrained(folder)


WAYS_OF_SAVING = {"as written": None, "again": PreTrainedModel.save_pretrained, "sharded": save_sharded}
WAYS_OF_SAVING |= {"state_dict": save_state_dict, "copied": save_copy}
DEVICE_MAPS: dict[str, Any] = {"none": None, "auto": "auto", "cpu": "cpu", "disk": {"": "disk"}}


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    on_disk = any(parameter.device.type == "meta" for parameter in model.parameters())
    return get_state_dict_offloaded_model(model) if on_disk else model.state_dict()


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    parts = [part.strip(r"^$.*\b()") for part in model._get_dtype_plan(dtype)]
    return lambda name: any(part in name for part in parts)


_RUNS_OFFLOADED: dict[str, bool] = {}


def original_runs_offloaded(target: Target, tmp_path: Path) -> bool:
    """Some stock experts are read outside of the forward pass whose hook loads them: an error, or NaN."""
    if target.name not in _RUNS_OFFLOADED:
        original = build(target)
        original.save_pretrained(tmp_path / "original")
        loaded = getattr(transformers, target.architecture).from_pretrained(
            tmp_path / "original", device_map={"": "disk"}, offload_folder=tmp_path / "originals"
        )
        try:
            same = torch.allclose(logits_of(loaded, inputs_for(target)), logits_of(original, inputs_for(target)))
        except (NotImplementedError, RuntimeError):
            same = False
        _RUNS_OFFLOADED[target.name] = same
    return _RUNS_OFFLOADED[target.name]


def assert_loads_equal(source: Any, tmp_path: Path, way: str, dtype: torch.dtype, device_map: str) -> None:
    """Saved in a way and loaded in another, all tensors are those of the model in memory, and so are the logits."""
    folder = source.folder
    if WAYS_OF_SAVING[way] is not None:
        folder = tmp_path / "out"
        WAYS_OF_SAVING[way](source.load(), folder)
    offload = {"offload_folder": tmp_path / "offload"} if device_map == "disk" else {}
    loaded = source.load(folder, dtype=dtype, device_map=DEVICE_MAPS[device_map], **offload)
    expected, tensors = source.model.state_dict(), tensors_of(loaded)
    in_float32 = kept_in_float32(loaded, dtype)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        wanted = tensor if not tensor.is_floating_point() or in_float32(name) else tensor.to(dtype)
        assert tensors[name].dtype == wanted.dtype, name
        assert torch.equal(tensors[name], wanted), name
    if device_map == "disk":
        assert all(parameter.device.type == "meta" for parameter in loaded.parameters())
        if not original_runs_offloaded(source.target, tmp_path):
            pytest.skip("tensors are equal; the original itself does not run when all of it is offloaded")
    # In bfloat16 against the same values in memory: rounded values may choose other experts than those before.
    reference = copy.deepcopy(source.model)
    for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]:
        tensor.data = tensors.get(name, tensor.data)
    inputs = inputs_for(source.target)
    assert (logits_of(loaded, inputs) - logits_of(reference, inputs)).abs().max().item() < 1e-5


@pytest.mark.parametrize("device_map", DEVICE_MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, *in_full(torch.bfloat16)], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS_OF_SAVING)
@cases("map", "adaptive", "reduce")
def test_reload_matrix(
    saved: Any, tmp_path: Path, target: Target, method: str, way: str, dtype: torch.dtype, device_map: str
) -> None:
    assert_loads_equal(saved(target, method), tmp_path, way, dtype, device_map)


@cases("map", "reduce")
def test_copies_of_a_loaded_model(saved: Any, target: Target, method: str) -> None:
    source = saved(target, method)
    loaded = source.load()
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        tensors = twin.state_dict()
        assert tensors.keys() == loaded.state_dict().keys()
        assert [n for n, t in loaded.state_dict().items() if not torch.equal(tensors[n], t)] == []
        assert [type(m) for m in twin.modules()] == [type(m) for m in loaded.modules()]
    half = loaded.half()
    assert {t.dtype for t in half.state_dict().values() if t.is_floating_point()} == {torch.float16}
    expected = {n: t.half() if t.is_floating_point() else t for n, t in source.model.state_dict().items()}
    assert [n for n, t in half.state_dict().items() if not torch.equal(t, expected[n])] == []


@pytest.mark.parametrize("method", ["map", "reduce"])
@pytest.mark.parametrize("name", ["qwen3_moe", "switch_transformers"])
def test_tied_weights_stay_tied(name: str, method: str, tmp_path: Path) -> None:
    source = Saved(by_name(name), method, tmp_path / "out", tie_word_embeddings=True)
    loaded = source.load()
    loaded.save_pretrained(tmp_path / "again")
    for model in (loaded, source.load(tmp_path / "again")):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        tensors = model.state_dict()
        assert [n for n, t in source.model.state_dict().items() if not torch.equal(tensors[n], t)] == []


def gradients(model: PreTrainedModel, target: Target) -> dict[str, torch.Tensor]:
    model.zero_grad()
    inputs = inputs_for(target)
    labels = inputs.pop("decoder_input_ids", inputs["input_ids"])
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_noise(model: PreTrainedModel) -> PreTrainedModel:
    """In training mode, but computing the same each time."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "jitter_noise"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


@cases("map", "reduce")
def test_gradient_checkpointing(saved: Any, target: Target, method: str) -> None:
    loaded = without_noise(saved(target, method).load())
    if not loaded.supports_gradient_checkpointing:
        pytest.skip(f"{target.architecture} has no gradient checkpointing")
    plain = gradients(loaded, target)
    loaded.gradient_checkpointing_enable()
    checkpointed = gradients(loaded, target)
    assert checkpointed.keys() == plain.keys()
    assert any(".experts." in name for name in plain)
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@cases("map", "adaptive", "reduce")
def test_experts_implementations(saved: Any, target: Target, method: str, implementation: str) -> None:
    source = saved(target, method)
    if not target.implementations:
        pytest.skip("transformers has one implementation for these experts")
    loaded = source.load(experts_implementation=implementation)
    inputs = inputs_for(target)
    assert (logits_of(loaded, inputs) - logits_of(source.model, inputs)).abs().max().item() < 1e-5


def graph_of(kind: str, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Callable[..., Any]:
    torch._dynamo.reset()
    if kind == "compile":
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            compiled(**inputs)
        return compiled
    with torch.no_grad():
        return torch.export.export(model, (), inputs | {"use_cache": False}, strict=False).module()


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        ("compile", "grouped_mm"),
        ("export", "batched_mm"),
        *in_full(("compile", "batched_mm"), ("export", "grouped_mm")),
    ],
)
@cases("map", "reduce", families=("qwen3_moe", "gpt_oss"))
def test_graphs(saved: Any, target: Target, method: str, kind: str, implementation: str) -> None:
    """Where the original compiles to one graph or exports, ours does, and computes the same."""
    source, inputs = saved(target, method), inputs_for(target)
    original = build(target)
    try:
        original.set_experts_implementation(implementation)
        graph_of(kind, original, inputs)
    except Exception as error:
        pytest.skip(f"the original does not {kind}: {type(error).__name__}: {str(error)[:80]}")
    loaded = source.load(experts_implementation=implementation)
    graph = graph_of(kind, loaded, inputs)
    with torch.no_grad():
        arguments = {} if kind == "compile" else {"use_cache": False}
        logits = graph(**inputs, **arguments).logits
    assert (logits - logits_of(source.model, inputs)).abs().max().item() < 1e-5


@cases("map", "adaptive", "reduce")
def test_greedy_tokens_with_every_cache(saved: Any, target: Target, method: str) -> None:
    source = saved(target, method)
    loaded, inputs = source.load(), {"input_ids": inputs_for(target)["input_ids"]}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    tokens = source.model.generate(**inputs, **settings)
    assert torch.equal(loaded.generate(**inputs, **settings), tokens)
    assert torch.equal(loaded.generate(**inputs, **settings, use_cache=False), tokens)
    if not loaded._can_compile_fullgraph or target.is_encoder_decoder:
        pytest.skip(f"{target.architecture} has no static cache")
    assert torch.equal(loaded.generate(**inputs, **settings, cache_implementation="static"), tokens)


def randomized(peft_model: Any) -> Any:
    """LoRA starts as a change of nothing: give it values."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return peft_model.eval()


LORA = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
}


@pytest.mark.parametrize("adapted", LORA)
@cases("map", "reduce", families=("qwen3_moe", "gpt_oss"))
def test_lora(saved: Any, tmp_path: Path, target: Target, method: str, adapted: str) -> None:
    source, inputs = saved(target, method), inputs_for(target)
    fits = {n.rpartition(".")[2] for n, _ in source.model.named_modules()} | {
        ".".join(n.split(".")[-2:]) for n, _ in source.model.named_parameters()
    }
    if not set(LORA[adapted]["target_modules"] + LORA[adapted].get("target_parameters", [])) <= fits:
        pytest.skip(f"{target.architecture} names its {adapted} otherwise")
    config = LoraConfig(r=2, lora_alpha=4, **LORA[adapted])
    adapter = randomized(get_peft_model(source.load(), config))
    logits = logits_of(adapter, inputs)
    assert (logits - logits_of(source.model, inputs)).abs().max() > 1e-3
    adapter.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(source.load(), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again, inputs), logits)
    merged = again.merge_and_unload()
    assert (logits_of(merged, inputs) - logits).abs().max().item() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    reloaded, tensors = source.load(tmp_path / "merged").state_dict(), merged.state_dict()
    assert reloaded.keys() == tensors.keys()
    assert [n for n, t in tensors.items() if not torch.equal(reloaded[n], t)] == []


def train(model: PreTrainedModel, target: Target, folder: Path, steps: int, resume: bool = False) -> Trainer:
    rows = inputs_for(target, rows=16, seed=7)["input_ids"]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": r, "labels": r} for r in rows])
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@cases("map", "reduce", families=("qwen3_moe", "switch_transformers"))
def test_training_resumed_equals_uninterrupted(saved: Any, tmp_path: Path, target: Target, method: str) -> None:
    source = saved(target, method)
    whole = train(source.load(), target, tmp_path / "whole", steps=4)
    train(source.load(), target, tmp_path / "parts", steps=2)
    # From the checkpoint: Trainer itself restores no experts that are stored one by one, in transformers 5.23.
    model = source.load(tmp_path / "parts" / "checkpoint-2")
    resumed = train(model, target, tmp_path / "parts", steps=4, resume=True)
    assert len(losses(whole)) == 4
    assert losses(resumed) == losses(whole)
    tensors, ours, before = whole.model.state_dict(), resumed.model.state_dict(), source.model.state_dict()
    assert [n for n, t in tensors.items() if not torch.equal(ours[n], t)] == []
    trained = {n: t for n, t in tensors.items() if ".experts." in n and t.is_floating_point()}
    assert [n for n, t in trained.items() if torch.equal(before[n], t)] == []
    reloaded = source.load(tmp_path / "whole" / "checkpoint-4").state_dict()
    assert [n for n, t in tensors.items() if not torch.equal(reloaded[n], t)] == []


EXPERTS = r"re:.*experts\.(gate_up_proj|down_proj)"


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_fp8_experts_on_top(tmp_path: Path, name: str, method: str) -> None:
    """torchao quantizes the merged experts, really and only those, and the result loads again."""
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    source = Saved(by_name(name), method, tmp_path / "out", dtype=torch.bfloat16)
    fp8 = transformers.TorchAoConfig(torchao.FqnToConfig({EXPERTS: torchao.Float8WeightOnlyConfig()}))
    # torchao has no grouped or batched matmul for every layout.
    arguments: dict[str, Any] = {"experts_implementation": "eager"}
    if method == "reduce":
        loaded = source.load(quantization_config=fp8, **arguments)
    else:
        config = transformers.AutoConfig.from_pretrained(source.folder)
        loaded = source.load(config=quantize_on_load(config, fp8), **arguments)
    quantized = quantized_tensors(loaded)
    experts = [n for n, _ in source.model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))]
    assert quantized == dict.fromkeys(experts, "Float8Tensor")
    inputs, before = inputs_for(name), source.model.state_dict()
    for tensor_name, parameter in loaded.named_parameters():
        if tensor_name in quantized:
            error = (parameter.dequantize().float() - before[tensor_name].float()).norm() / before[tensor_name].norm()
            assert 0.005 < error < 0.05
        else:
            assert torch.equal(parameter, before[tensor_name])
    loaded.save_pretrained(tmp_path / "fp8")
    again = source.load(tmp_path / "fp8", **arguments)
    assert quantized_tensors(again) == quantized
    for tensor_name, parameter in again.named_parameters():
        ours, theirs = (
            t.dequantize() if tensor_name in quantized else t for t in (parameter, loaded.get_parameter(tensor_name))
        )
        assert torch.equal(ours, theirs), tensor_name
    assert torch.equal(logits_of(again, inputs), logits_of(loaded, inputs))


def test_only_structured_checkpoints_are_quantized_on_load(saved: Any) -> None:
    plain = transformers.AutoConfig.from_pretrained(saved("qwen3_moe", "reduce").folder)
    with pytest.raises(ValueError, match=r"got quantization_config=None. Pass quantization_config= to from_pretrained"):
        quantize_on_load(plain, transformers.BitNetQuantConfig())
    structured = transformers.AutoConfig.from_pretrained(saved("qwen3_moe", "map").folder)
    quantize_on_load(structured, transformers.BitNetQuantConfig())
    with pytest.raises(ValueError, match="is not quantized, got"):
        quantize_on_load(structured, transformers.BitNetQuantConfig())
    assert quantized_tensors(saved("qwen3_moe", "map").load()) == {}
