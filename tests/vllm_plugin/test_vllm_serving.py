"""Compressed checkpoints give the same greedy tokens in vLLM as in transformers, and broken ones raise.

vLLM has an environment of its own, whose interpreter `OPTIMUM_MOE_VLLM_PYTHON` names; `make test-serving` makes it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_moe import (
    ByteBudget,
    CalibrationConfig,
    LowRankSparse,
    MoECompressor,
    MSMoE,
    NeuronPruning,
    Rounding,
    export,
)
from optimum_moe.exporting.runs_in import reference_run
from optimum_moe.surgeons import find_blocks
from tests.tiny_models import build

PYTHON = os.environ.get("OPTIMUM_MOE_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="needs an environment with vLLM: make test-serving")

REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "model"
TOKENS = 12
# vLLM's kernels for a CPU want sizes that are multiples of 32, and MLA heads of these sizes.
SIZES = {"hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 32, "vocab_size": 128}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "head_dim": 64}
SPELLED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v3": {"q_lora_rank": 64, **LATENT, **SPELLED},
    "gpt_oss": {},
}
STAGES: dict[str, Callable[[], Any]] = {
    "plain": lambda: MSMoE(num_experts=4, routing="reduce"),
    "map": lambda: MSMoE(num_experts=4),
    "budget": lambda: ByteBudget(share=0.4, runs_in="vllm+optimum_moe"),
    "some layers": lambda: ByteBudget(share=0.7, runs_in="vllm+optimum_moe", layers=[1]),
    "factors": lambda: LowRankSparse(rank_ratio=0.5, density=0.1),
    "narrow and factors": lambda: [
        NeuronPruning(num_neurons=32),
        ByteBudget(share=0.7, runs_in="vllm+optimum_moe", layers=[1]),
    ],
    "map and factors": lambda: [MSMoE(num_experts=4), LowRankSparse(rank_ratio=0.5, density=0.1)],
}
PROMPTS = [
    torch.randint(3, 99, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (5, 9, 14)
]


def original(name: str) -> PreTrainedModel:
    if name == "reference":
        return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32)
    model = build(name, **SIZES | ARCHITECTURES[name])
    for parameter_name, parameter in model.named_parameters():
        if "kv_a_proj_with_mqa" in parameter_name:
            # vLLM on a CPU rotates these rows in another way than transformers, in the original as well.
            parameter.data[512:] = 0
    return model


class Checkpoints:
    """Checkpoints of all kinds, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str, kind: str) -> Path:
        place = self._folder / f"{name}-{kind.replace(' ', '-')}"
        if not place.is_dir():
            data = [
                {"input_ids": torch.randint(3, 99, (2, 64), generator=torch.Generator().manual_seed(row))}
                for row in range(4)
            ]
            compressor = MoECompressor.from_pretrained(original(name), STAGES[kind](), calibration=data)
            compressor.apply()
            compressor.save_pretrained(place)
        return place

    def broken(self, name: str, kind: str, why: str, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
        """A copy with other tensors or another config."""
        place = self._folder / f"broken-{why.replace(' ', '-')}"
        shutil.copytree(self.path(name, kind), place)
        file, config_file = place / "model.safetensors", place / "config.json"
        tensors, config = load_file(file), json.loads(config_file.read_text(encoding="utf-8"))
        change(tensors, config)
        save_file(tensors, file, {"format": "pt"})
        config_file.write_text(json.dumps(config), encoding="utf-8")
        return place


def in_transformers(place: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=TOKENS,
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def in_vllm(requests: list[tuple[Path, dict[str, Any]]], folder: Path) -> list[dict[str, Any]]:
    asked, answered = folder / "requests.json", folder / "answers.json"
    given = [
        {
            "checkpoint": str(place),
            "prompts": PROMPTS,
            "tokens": TOKENS,
            "options": options | ({"attention_config": {"backend": "CPU_MLA"}} if "deepseek" in place.name else {}),
        }
        for place, options in requests
    ]
    asked.write_text(json.dumps(given), encoding="utf-8")
    script = Path(__file__).with_name("serve.py")
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [str(PYTHON), str(script), str(asked), str(answered)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    return json.loads(answered.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


SERVED: list[tuple[str, str, dict[str, Any]]] = [
    *((name, kind, {}) for name in ARCHITECTURES for kind in ("plain", "map", "budget")),
    ("olmoe", "some layers", {}),
    ("qwen3_moe", "narrow and factors", {}),
    ("mixtral", "factors", {}),
    ("gpt_oss", "factors", {}),
    ("qwen3_moe", "map and factors", {}),
    ("reference", "map", {}),
    ("reference", "budget", {}),
    ("olmoe", "map", {"enforce_eager": False}),
    ("mixtral", "budget", {"enforce_eager": False}),
    ("olmoe", "map", {"tensor_parallel_size": 2}),
    ("mixtral", "budget", {"tensor_parallel_size": 2}),
    ("mixtral", "factors", {"tensor_parallel_size": 2}),
    ("gpt_oss", "budget", {"tensor_parallel_size": 2}),
    ("deepseek_v3", "budget", {"tensor_parallel_size": 2}),
]


@pytest.fixture(scope="module")
def served(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    requests = [(checkpoints.path(name, kind), options) for name, kind, options in SERVED]
    return in_vllm(requests, tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("case", range(len(SERVED)), ids=["-".join(map(str, case)) for case in SERVED])
def test_greedy_tokens_are_those_of_transformers(
    case: int, served: list[dict[str, Any]], checkpoints: Checkpoints
) -> None:
    name, kind, _ = SERVED[case]
    assert served[case] == {"tokens": in_transformers(checkpoints.path(name, kind))}


@contextmanager
def server(place: Path, log: Path) -> Iterator[str]:
    """The address of vLLM's server for a checkpoint, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(place), "--enforce-eager"]
    command += ["--served-model-name", "it", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    # By default it starts only where nothing else uses the memory.
    command += ["--kv-cache-memory-bytes", str(2**28)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process,
    ):
        try:
            while True:
                is_starting = process.poll() is None and time.monotonic() < deadline
                assert is_starting, log.read_text(encoding="utf-8")[-3000:]
                try:
                    urlopen(f"{address}/health", timeout=5).close()
                    break
                except (URLError, OSError):
                    time.sleep(1)
            yield address
        finally:
            process.terminate()


@pytest.mark.parametrize("kind", ["plain", "map"])
def test_the_server_answers_requests(kind: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    place = Path(shutil.copytree(checkpoints.path("reference", kind), tmp_path / kind))
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    tokenizer.save_pretrained(place)
    asked = {"model": "it", "prompt": "And it came to pass", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    with server(place, tmp_path / "log.txt") as address:
        body, kind_of_body = json.dumps(asked).encode(), {"Content-Type": "application/json"}
        with urlopen(Request(f"{address}/v1/completions", body, kind_of_body), timeout=60) as answer:
            written = json.loads(answer.read())["choices"][0]["text"]
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    prompt = tokenizer(asked["prompt"], return_tensors="pt")
    out = model.generate(**prompt, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    assert written == tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled Qwen3-MoE with experts of 64 neurons in four bits, and beside it its export for vLLM."""
    place = tmp_path_factory.mktemp("packed") / "rounded"
    data = CalibrationConfig(str(REFERENCE.parent / "calibration.jsonl"), max_tokens=4096, sequence_length=256)
    stages = [NeuronPruning(num_neurons=64, curvature=False), Rounding()]
    compressor = MoECompressor.from_pretrained(str(REFERENCE), stages, data, progress=False)
    compressor.apply()
    compressor.save_pretrained(place)
    export(place, "compressed-tensors", place.with_name("packed"))
    return place


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="on a CPU without AMX vLLM has no kernel for experts in four bits"
)
def test_packed_experts_need_no_plugin(rounded: Path, tmp_path: Path) -> None:
    """Up to ties: on a CPU vLLM multiplies by bfloat16 activations that it rounds to eight bits."""
    expected = reference_run(rounded, PROMPTS)
    expected = replace(expected, tokens=[tokens[:TOKENS] for tokens in expected.tokens])
    answer = in_vllm([(rounded.with_name("packed"), {"dtype": "bfloat16"})], tmp_path)[0]
    same, said = expected.compare(answer["tokens"])
    assert same, said


def test_compressed_tensors_unpacks_the_same_values(rounded: Path, tmp_path: Path) -> None:
    script, output = Path(__file__).with_name("load_packed.py"), tmp_path / "unpacked.safetensors"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [str(PYTHON), str(script), str(rounded.with_name("packed")), str(output)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    unpacked, model = load_file(output), AutoModelForCausalLM.from_pretrained(rounded, dtype="auto")
    blocks = find_blocks(AutoModelForCausalLM.from_pretrained(REFERENCE, dtype="auto"))
    assert len(unpacked) == 2 * len(blocks)
    for found in blocks:
        held = found.surgeon.factors(model.get_submodule(found.info.name))
        for expert in range(found.info.num_experts):
            own = held.densified(expert)
            stacked = torch.cat([own["gate"], own["up"]])
            assert torch.equal(unpacked[f"{found.info.name}.experts.gate_up_proj"][expert], stacked)
            assert torch.equal(unpacked[f"{found.info.name}.experts.down_proj"][expert], own["down"])


def first(tensors: dict[str, Any], *words: str) -> str:
    return next(name for name in tensors if all(word in name for word in words))


def without(*words: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        del tensors[first(tensors, *words)]

    return change


def with_shape(*words: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        name = first(tensors, *words)
        tensors[name] = tensors[name][:-1].clone()

    return change


def further_map(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    tensors[first(tensors, "expert_map")][0] = 4


def unknown_tensor(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    name = first(tensors, "layers.1", "experts.0.")
    tensors[name.rpartition(".experts.")[0] + ".experts.9.w1.weight"] = tensors[name].clone()


def with_structure(**fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        config["quantization_config"] |= fields

    return change


def with_other_names(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    structure = config["quantization_config"]
    structure["blocks"] = {
        name.replace("block_sparse_moe", "mlp"): entry for name, entry in structure["blocks"].items()
    }


BROKEN: list[tuple[str, str, str, Callable[[dict[str, Any], dict[str, Any]], None], str]] = [
    ("a map is gone", "mixtral", "map", without("expert_map"), "1 tensors that config.json promises are not"),
    ("a map leads nowhere", "mixtral", "map", further_map, "where config.json says 4 groups"),
    ("a map of another size", "mixtral", "map", with_shape("expert_map"), "a tensor of shape (7,) for routing_map"),
    ("a merged expert is gone", "mixtral", "map", without("experts.1.w1"), "(w13_weight of expert 1)"),
    ("a fused bias is gone", "gpt_oss", "map", without("down_proj_bias"), "w2_bias of expert 0"),
    ("a matrix is gone", "mixtral", "budget", without("experts.0.w2.weight"), "(expert_0_down_weight)"),
    ("a bias is gone", "gpt_oss", "budget", without("experts.0.", "bias"), "_bias)"),
    ("a matrix of another size", "mixtral", "budget", with_shape("experts.0.w2.weight"), "for expert_0_down_weight"),
    ("a tensor too many", "mixtral", "budget", unknown_tensor, "where config.json says (1,)"),
    (
        "an untouched expert is gone",
        "olmoe",
        "some layers",
        without("layers.0", "experts.3.up_proj"),
        "w13",
    ),
    ("a router is gone", "mixtral", "budget", without("layers.1", "gate.weight"), "not initialized from checkpoint"),
    ("a norm is gone", "olmoe", "map", without("layers.1.input_layernorm"), "not initialized from checkpoint"),
    ("another version", "mixtral", "map", with_structure(format_version=99), "format_version=99"),
    (
        "quantized twice",
        "mixtral",
        "map",
        with_structure(quantization={"quant_method": "fp8"}),
        "compressed and quantized at once (quant_method='fp8')",
    ),
    ("names of another version", "mixtral", "map", with_other_names, "the names do not match"),
]


@pytest.fixture(scope="module")
def refused(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    requests = [(checkpoints.broken(name, kind, why, change), {}) for why, name, kind, change, _ in BROKEN]
    return in_vllm(requests, tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize("case", range(len(BROKEN)), ids=[case[0] for case in BROKEN])
def test_broken_checkpoints_raise(case: int, refused: list[dict[str, Any]]) -> None:
    assert BROKEN[case][4] in refused[case].get("error", f"answered {refused[case]}")
