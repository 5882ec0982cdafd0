"""Checkpoints in the runtimes themselves; `make test-serving` makes their environments and runs this."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_moe import ByteBudget, CalibrationConfig, ExpertPruning, MoECompressor, export
from optimum_moe.calibration.data import build_batches
from optimum_moe.exporting.environment import run_script
from optimum_moe.exporting.gguf_file import read_gguf
from optimum_moe.exporting.importance import importance_of
from optimum_moe.exporting.runs_in import reference_run, run_in

DATA = Path(__file__).parents[1] / "data"
REFERENCES = [DATA / "reference" / "model", DATA / "reference_deepseek" / "model"]
CALIBRATION = DATA / "reference" / "calibration.jsonl"
FOLDER = Path(os.environ.get("OPTIMUM_MOE_SERVING", "none"))

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason="OPTIMUM_MOE_SERVING does not name the environments"),
    pytest.mark.filterwarnings("ignore"),
]


def python(name: str) -> str:
    return str(FOLDER / name / "bin" / "python")


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    return next((FOLDER / "downloads").glob("llama_cpp_python-*.tar.gz"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pruned checkpoint and a plain byte budget of the bundled Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("plain")
    stages = {"pruned": ExpertPruning(num_experts=16), "budget": ByteBudget(share=0.5, runs_in="any")}
    calibration = CalibrationConfig(str(CALIBRATION), max_tokens=4096, sequence_length=256)
    for name, stage in stages.items():
        compressor = MoECompressor.from_pretrained(str(REFERENCES[0]), stage, calibration=calibration, progress=False)
        compressor.apply()
        compressor.save_pretrained(str(folder / name))
    return {name: folder / name for name in stages}


@pytest.mark.parametrize("checkpoint", REFERENCES, ids=["qwen3_moe", "deepseek_v3"])
def test_importances_are_those_of_llama_cpps_own_graph(checkpoint: Path, llama_cpp: Path, tmp_path: Path) -> None:
    file = export(checkpoint, "gguf", tmp_path / "a.gguf", quantize="f32", llama_cpp=llama_cpp)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 4000, (4, 32), generator=generator).tolist()
    asked, answer = tmp_path / "request.json", tmp_path / "answer.json"
    asked.write_text(json.dumps({"checkpoint": str(file), "prompts": rows}), encoding="utf-8")
    script = Path(__file__).parent / "llama_cpp_sums.py"
    subprocess.run([python("llama_cpp"), str(script), str(asked), str(answer)], check=True, cwd=tmp_path)
    theirs = json.loads(answer.read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    own = importance_of(model, build_batches(CalibrationConfig(rows, sequence_length=32, max_tokens=128)), 32)
    # What older converters do not split by head has an entry as well.
    assert set(own.sums) - set(theirs) == {name for name in own.sums if "attn_kv_b" in name}
    assert set(theirs) <= set(own.sums)
    for name, entry in theirs.items():
        assert entry["counts"] == own.counts[name].tolist(), name
        np.testing.assert_allclose(own.sums[name].numpy(), np.array(entry["sums"]), rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("checkpoint", REFERENCES, ids=["qwen3_moe", "deepseek_v3"])
def test_the_bundled_models_in_llama_cpp(checkpoint: Path, llama_cpp: Path) -> None:
    reference = reference_run(checkpoint)
    for kind in ("f32", "bf16", "f16"):
        found = run_in(
            "llama.cpp",
            checkpoint,
            python=python("llama_cpp"),
            llama_cpp=llama_cpp,
            quantize=kind,
            reference=reference,
        )
        assert found.outcome == "same", (kind, found)


def test_plain_checkpoints_in_every_runtime(plain: dict[str, Path], llama_cpp: Path) -> None:
    for name, checkpoint in plain.items():
        reference = reference_run(checkpoint)
        for runtime, folder in (("llama.cpp", "llama_cpp"), ("mlx", "mlx"), ("transformers4", "transformers4")):
            found = run_in(runtime, checkpoint, python=python(folder), llama_cpp=llama_cpp, reference=reference)
            assert found.outcome == "same", (name, found)


def test_llama_cpp_reads_text_as_the_tokenizer_does(llama_cpp: Path, tmp_path: Path) -> None:
    checkpoint = REFERENCES[0]
    file = export(checkpoint, "gguf", tmp_path / "a.gguf", llama_cpp=llama_cpp)
    lines = (DATA / "reference" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"][:2000] for line in lines[:20]]
    texts += ["I'll  say\n\n 'tis 1234567 £5…", "naïve café ÀÉ 你好 🚀\t\r\n x"]
    request = {"checkpoint": str(file), "prompts": [[1, 2]], "num_tokens": 1, "text": texts}
    answer = run_script(python("llama_cpp"), "run_llama_cpp", request, "read text")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert answer["text_tokens"] == [tokenizer(text)["input_ids"] for text in texts]


def test_quantized_files_and_their_importance_matrix(plain: dict[str, Path], llama_cpp: Path, tmp_path: Path) -> None:
    sizes = {}
    for kind in ("q8_0", "q4_0", "iq4_nl"):
        file = export(
            plain["budget"],
            "gguf",
            tmp_path / f"{kind}.gguf",
            quantize=kind,
            calibration=CalibrationConfig(str(CALIBRATION), max_tokens=2048, sequence_length=256),
            llama_cpp=llama_cpp,
            python=python("llama_cpp"),
        )
        sizes[kind] = file.stat().st_size
        experts = {t.type for name, t in read_gguf(file).tensors.items() if "_exps.weight" in name}
        assert kind.upper() in experts
    assert sizes["q4_0"] < sizes["q8_0"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "optimum_moe"))] == []


def test_four_bits_in_mlx(plain: dict[str, Path], tmp_path: Path) -> None:
    widths = json.loads((plain["budget"] / "config.json").read_text(encoding="utf-8"))["moe_intermediate_size"]
    if widths % 32:
        with pytest.raises(ValueError, match="multiples of 32"):
            export(plain["budget"], "mlx", tmp_path / "mlx", quantize="4bit", python=python("mlx"))
        return
    out = export(plain["budget"], "mlx", tmp_path / "mlx", quantize="4bit", python=python("mlx"))
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization"]["bits"] == 4
