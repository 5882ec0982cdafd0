"""Checkpoints of whole and constant experts for vLLM as it is, which transformers loads with this package too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor, export
from optimum_moe.checkpoint.headers import read_headers
from tests.tiny_models import build, inputs_for, logits_of

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token", "ignore:No gradient of the loss")


FOR_VLLM = ByteBudget(share=0.4, runs_in="vllm")


def compressed(name: str, folder: Path, stage: ByteBudget = FOR_VLLM) -> Path:
    data = CalibrationConfig([inputs_for(name, rows=4, length=32, seed=seed) for seed in range(3)])
    compressor = MoECompressor.from_pretrained(build(name), stage, data, progress=False)
    compressor.apply()
    return compressor.save_pretrained(folder)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_replaced_experts_are_spelled_out(name: str, tmp_path: Path) -> None:
    checkpoint = compressed(name, tmp_path / "in")
    out = export(checkpoint, "vllm", tmp_path / "out")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    substitution = config["compression_config"]["transform_config"]["expert_substitution"]
    assert substitution["version"] == 1
    tensors = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
    own = load_file(checkpoint / "model.safetensors")
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert index.keys() == tensors.keys() == read_headers(out).tensors.keys()
    spelled = []
    for path, target in substitution["targets"].items():
        assert path.endswith(".experts")
        assert target["num_logical_experts"] == 8
        assert target["weight_layout"] == "compact_retained_experts"
        assert 0 < len(target["replacements"]) < 8
        for expert, replacement in target["replacements"].items():
            value = replacement["tensors"]["value"]
            spelled.append(value)
            wanted = own.get(f"{path}.{expert}.approx_value", torch.zeros(tensors[value].shape))
            assert torch.equal(tensors[value], wanted)
            assert not [key for key in tensors if key.startswith(f"{path}.{expert}.") and tensors[key].dim() == 2]
    # Older versions of vLLM do not know what these are, and stop at a name that is none of the model's.
    assert any(value.startswith("approximate_experts.") for value in spelled)
    model, loaded = (AutoModelForCausalLM.from_pretrained(folder) for folder in (checkpoint, out))
    assert torch.equal(logits_of(model, inputs_for(name)), logits_of(loaded, inputs_for(name)))


def test_without_this_package_it_does_not_load(tmp_path: Path) -> None:
    out = export(compressed("qwen3_moe", tmp_path / "in"), "vllm", tmp_path / "out")
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"OPTIMUM_MOE_AUTOLOAD": "0", "PATH": "", "HF_HUB_OFFLINE": "1"},
        timeout=240,
    )
    assert run.returncode != 0
    assert "Error" in run.stderr


def test_what_was_exported_is_not_taken_for_a_plain_checkpoint(tmp_path: Path) -> None:
    out = export(compressed("qwen3_moe", tmp_path / "in"), "vllm", tmp_path / "out")
    for to in ("gguf", "transformers4"):
        with pytest.raises(ValueError, match=r"has experts in compressed formats, which .* cannot express"):
            export(out, to, tmp_path / "again")
        assert not (tmp_path / "again").exists()


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    stage = ByteBudget(share=0.4, runs_in="transformers", formats=["constant"])
    checkpoint = compressed("gpt_oss", tmp_path / "in", stage)
    with pytest.raises(ValueError, match=r"vLLM replaces experts by constants only where .* not of gpt_oss"):
        export(checkpoint, "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_constants_are_added_by_the_weights_of_the_router(tmp_path: Path) -> None:
    """What vLLM computes by its documentation: kept experts and constants, each times the router's own weight."""
    out = export(compressed("qwen3_moe", tmp_path / "in"), "vllm", tmp_path / "out")
    tensors = {key: value for file in out.glob("*.safetensors") for key, value in load_file(file).items()}
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    targets = config["compression_config"]["transform_config"]["expert_substitution"]["targets"]
    model, seen = AutoModelForCausalLM.from_pretrained(out), {}
    for path in targets:
        block = model.get_submodule(path.removesuffix(".experts"))
        block.register_forward_hook(lambda _, given, result, path=path: seen.update({path: (given[0], result)}))
    with torch.no_grad():
        model(**inputs_for("qwen3_moe"))
    for path, target in targets.items():
        input_TH = seen[path][0].flatten(0, 1)
        scores_TE = (input_TH @ tensors[f"{path.removesuffix('.experts')}.gate.weight"].T).softmax(-1)
        weights_TK, index_TK = scores_TE.topk(config["num_experts_per_tok"])
        if config["norm_topk_prob"]:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        expected_TH = torch.zeros_like(input_TH)
        for expert in range(8):
            weight_T1 = (weights_TK * (index_TK == expert)).sum(-1, keepdim=True)
            if str(expert) in target["replacements"]:
                value = target["replacements"][str(expert)]["tensors"]["value"]
                expected_TH += weight_T1 * tensors[value]
                continue
            gate, up, down = (tensors[f"{path}.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            hidden_TI = torch.nn.functional.silu(input_TH @ gate.T) * (input_TH @ up.T)
            expected_TH += weight_T1 * (hidden_TI @ down.T)
        torch.testing.assert_close(seen[path][1].flatten(0, 1), expected_TH, rtol=1e-4, atol=1e-5)
