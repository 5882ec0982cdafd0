"""What config and headers tell is what the model's class tells; where they may not, the class is asked."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optimum_moe.checkpoint.dtypes import DTYPES
from optimum_moe.checkpoint.headers import ITEMSIZES, Headers, read_headers
from optimum_moe.checkpoint.location import raw_config
from optimum_moe.checkpoint.regular_layout import _LAYOUTS, regular_model
from optimum_moe.cli.inspect import _inspected_as_built, inspected
from tests.tiny_models import Target, build, every_target

REFERENCES = [Path("tests/data") / name / "model" for name in ("reference", "reference_deepseek")]


REGULAR = [each for each in every_target() if each.values[0].name.partition("-")[0] in _LAYOUTS]


def test_every_layout_has_a_model_that_shows_it() -> None:
    assert {each.values[0].name for each in REGULAR} >= _LAYOUTS.keys()


@pytest.mark.parametrize("target", REGULAR)
def test_the_same_as_from_the_class(target: Target, tmp_path: Path) -> None:
    build(target).save_pretrained(tmp_path)
    headers = read_headers(tmp_path)
    assert regular_model(raw_config(tmp_path), headers) is not None
    same = inspected(str(tmp_path), dtype="auto")
    assert same == _inspected_as_built(str(tmp_path), tmp_path, headers, {"dtype": "auto"})


@pytest.mark.parametrize("folder", REFERENCES, ids=lambda path: path.parent.name)
def test_the_bundled_models(folder: Path) -> None:
    headers = read_headers(folder)
    assert regular_model(raw_config(folder), headers) is not None
    same = inspected(str(folder), dtype="auto")
    assert same == _inspected_as_built(str(folder), folder, headers, {"dtype": "auto"})


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name) and None


def reshaped(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        dtype, shape, size = tensors[name]
        tensors[name] = dtype, (shape[0] - 1, *shape[1:]), size

    return change


CONFIGS: dict[str, dict[str, Any]] = {
    "other class": {"architectures": ["Qwen3MoeModel"]},
    "other type": {"model_type": "qwen2_moe"},
    "quantized": {"quantization_config": {"quant_method": "fp8"}},
    "more layers": {"num_hidden_layers": 5},
    "more experts": {"num_experts": 64},
    "two counts": {"num_experts": 32, "num_local_experts": 16},
    "wider": {"moe_intermediate_size": 160},
    "larger": {"hidden_size": 256},
    "more words": {"vocab_size": 100_000},
    "no top-k": {"num_experts_per_tok": None},
    "dense layers": {"mlp_only_layers": [1]},
    "every other layer": {"decoder_sparse_step": 2},
}
FILES = {
    "an expert's matrix": without("model.layers.1.mlp.experts.7.up_proj.weight"),
    "attention": without("model.layers.2.self_attn.q_proj.weight"),
    "the router": without("model.layers.3.mlp.gate.weight"),
    "the norm": without("model.norm.weight"),
    "the embeddings": without("model.embed_tokens.weight"),
    "another shape": reshaped("model.layers.1.mlp.experts.7.up_proj.weight"),
    "another router": reshaped("model.layers.1.mlp.gate.weight"),
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_that_differs_is_left_to_the_class(change: dict[str, Any]) -> None:
    config = {key: value for key, value in raw_config(REFERENCES[0]).items() if key not in ("num_local_experts",)}
    headers = read_headers(REFERENCES[0])
    assert regular_model(config | {"num_experts": 32}, headers) is not None
    assert regular_model({**config, "num_experts": 32, **change}, headers) is None


@pytest.mark.parametrize("change", FILES.values(), ids=FILES.keys())
def test_files_that_lack_something_are_left_to_the_class(change: Callable[[dict[str, Any]], None]) -> None:
    headers = read_headers(REFERENCES[0])
    tensors = dict(headers.tensors)
    change(tensors)
    assert regular_model(raw_config(REFERENCES[0]), replace(headers, tensors=tensors)) is None


def test_multi_token_prediction_costs_no_flops_of_a_token() -> None:
    config, headers = raw_config(REFERENCES[0]), read_headers(REFERENCES[0])
    more = {f"mtp.{name}": entry for name, entry in headers.tensors.items() if name.startswith("model.layers.0.")}
    more |= {name.replace("layers.0.", "layers.4."): headers.tensors[name] for name in headers.tensors}
    with_mtp = Headers({**more, **headers.tensors}, headers.files)
    assert regular_model(config, with_mtp) == regular_model(config, headers)


def test_inspect_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from optimum.commands import optimum_cli; "
        f"sys.argv = ['optimum-cli', 'moe', 'inspect', {str(REFERENCES[0])!r}]; optimum_cli.main(); "
        "sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4,736,384 parameters, 9,472,768 bytes, 2,588,672 FLOPs per token" in done.stdout


def test_sizes_without_torch_are_those_of_its_dtypes() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == ITEMSIZES
