"""Exports: what is refused before anything is read, what the converters see, and that a failure leaves nothing."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, MSMoE, export
from optimum_moe.exporting import llama_cpp_tools, to_gguf, to_mlx
from optimum_moe.exporting.environment import RuntimeFailed, check_python, reason_of, run_script
from optimum_moe.exporting.gguf_file import GGUFHeader, GGUFTensor
from optimum_moe.exporting.gguf_types import file_type
from optimum_moe.exporting.importance import ImportanceMatrix
from optimum_moe.exporting.pre_tokenizers import known_pre_tokenizer
from tests.tiny_checkpoints import save_checkpoint
from tests.tiny_models import build

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

ROWS = [[(5 + 7 * i * (row + 2)) % 90 + 3 for i in range(16)] for row in range(6)]
CONVERTER = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
for name in ("--outfile", "--outtype", "--model-name"):
    parser.add_argument(name)
parser.add_argument("model")
args = parser.parse_args()
folder = pathlib.Path(args.model)
pathlib.Path(args.outfile).write_text("half")
if (pathlib.Path(__file__).parent / "fails").exists():
    raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
seen = {
    "files": sorted(path.name for path in folder.rglob("*")),
    "config": json.loads((folder / "config.json").read_text()),
    "tokenizer": json.loads((folder / "tokenizer_config.json").read_text()),
    "type": args.outtype,
    "name": args.model_name,
}
pathlib.Path(args.outfile).write_text(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("plain") / "tiny", "qwen3_moe")


@pytest.fixture(scope="module")
def mapped(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mapped") / "out"
    compressor = MoECompressor.from_pretrained(
        str(plain), MSMoE(num_experts=4), CalibrationConfig(ROWS, sequence_length=16), progress=False
    )
    compressor.apply()
    compressor.save_pretrained(str(out))
    return out


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER, encoding="utf-8")
    return folder


def test_the_converter_sees_no_code_and_all_spellings(plain: Path, converter: Path, tmp_path: Path) -> None:
    source = tmp_path / "with code"
    shutil.copytree(plain, source)
    (source / "modeling_evil.py").write_text("raise SystemExit('this ran')", encoding="utf-8")
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((source / name).read_text(encoding="utf-8"))
        values["auto_map"] = {"AutoTokenizer": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
        (source / name).write_text(json.dumps(values), encoding="utf-8")
    out = export(source, "gguf", tmp_path / "new" / "out.gguf", llama_cpp=converter)
    seen = json.loads(out.read_text(encoding="utf-8"))
    assert "modeling_evil.py" not in seen["files"]
    assert "pytorch_model.bin" not in seen["files"]
    assert "model.safetensors" in seen["files"]
    assert "auto_map" not in seen["config"]
    assert "auto_map" not in seen["tokenizer"]
    assert seen["config"]["num_experts"] == seen["config"]["num_local_experts"] == 8
    assert seen["config"]["rope_theta"] == seen["config"]["rope_parameters"]["rope_theta"]
    assert (seen["type"], seen["name"]) == ("f32", "with code")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.gguf"]


def test_settings_that_transformers_has_built_in_are_spelled_out(converter: Path, tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "deepseek", "deepseek_v3")
    assert "scoring_func" not in json.loads((source / "config.json").read_text(encoding="utf-8"))
    seen = json.loads(export(source, "gguf", llama_cpp=converter).read_text(encoding="utf-8"))
    assert (seen["config"]["scoring_func"], seen["config"]["topk_method"]) == ("sigmoid", "noaux_tc")


def test_the_source_distribution_is_unpacked(plain: Path, converter: Path, tmp_path: Path) -> None:
    archive = tmp_path / "llama_cpp_python-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(converter / "convert_hf_to_gguf.py", "llama_cpp_python-1/vendor/llama.cpp/convert_hf_to_gguf.py")
        outside = tarfile.TarInfo("llama_cpp_python-1/vendor/llama.cpp/conversion/../../outside.py")
        tar.addfile(outside, io.BytesIO(b""))
    with pytest.raises(ValueError, match="cannot be unpacked"):
        export(plain, "gguf", tmp_path / "out.gguf", llama_cpp=archive)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(converter / "convert_hf_to_gguf.py", "llama_cpp_python-1/vendor/llama.cpp/convert_hf_to_gguf.py")
    assert export(plain, "gguf", tmp_path / "out.gguf", llama_cpp=archive).is_file()


def test_a_failed_export_leaves_nothing(plain: Path, converter: Path, tmp_path: Path) -> None:
    (converter / "fails").touch()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="--pre-tokenizer"):
        export(plain, "gguf", tmp_path / "out" / "a.gguf", llama_cpp=converter)
    (tmp_path / "out" / "a.gguf").write_text("before", encoding="utf-8")
    with pytest.raises(ValueError, match="--pre-tokenizer"):
        export(plain, "gguf", tmp_path / "out" / "a.gguf", llama_cpp=converter, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.gguf"]
    assert (tmp_path / "out" / "a.gguf").read_text(encoding="utf-8") == "before"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "ggfu"}, "did you mean 'gguf'"),
        ({"to": "gguf", "quantize": "q4_km"}, "did you mean 'q4_k_m'"),
        ({"to": "gguf"}, "pip download --no-deps --no-binary :all: llama-cpp-python"),
        ({"to": "gguf", "llama_cpp": "/nowhere"}, "/nowhere has no convert_hf_to_gguf.py"),
        ({"to": "vllm", "quantize": "q4_0"}, "quantize='q4_0' has no effect"),
        ({"to": "mlx", "calibration": "text.txt"}, "calibration= is for to='gguf'"),
        ({"to": "mlx"}, "pip install mlx-lm"),
        ({"to": "gguf", "python": "/nowhere/python"}, "not an executable file"),
    ],
)
def test_what_is_refused_before_the_checkpoint_is_opened_or_read(
    plain: Path, tmp_path: Path, arguments: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(plain, output=tmp_path / "x.gguf", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_types_that_need_an_importance_matrix_or_have_none(plain: Path, converter: Path) -> None:
    with pytest.raises(ValueError, match="only with an importance matrix"):
        export(plain, "gguf", quantize="iq2_xs", llama_cpp=converter)
    with pytest.raises(ValueError, match="has no effect"):
        export(plain, "gguf", quantize="f16", calibration="corpus.txt", llama_cpp=converter)


def test_a_missing_quantizer(plain: Path, converter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(llama_cpp_tools, "has_module", lambda python, module: False)
    with pytest.raises(ValueError, match="pip install llama-cpp-python"):
        export(plain, "gguf", quantize="q4_0", llama_cpp=converter)


@pytest.mark.parametrize("to", ["gguf", "mlx", "transformers4"])
def test_a_map_is_refused_with_what_to_run_instead(mapped: Path, to: str) -> None:
    with pytest.raises(ValueError, match=r"a map of the router's experts .* cannot express.*--runs-in any"):
        export(mapped, to)


def test_constants_are_refused_but_for_vllm(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "constants"
    shutil.copytree(plain, source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"approximate_experts": {"1": [3]}}), encoding="utf-8")
    with pytest.raises(ValueError, match="constant output"):
        export(source, "mlx")


def test_where_it_is_written(plain: Path, converter: Path, tmp_path: Path) -> None:
    source = tmp_path / "tiny"
    shutil.copytree(plain, source)
    assert export(source, "gguf", llama_cpp=converter) == tmp_path / "tiny.gguf"
    with pytest.raises(ValueError, match=r"tiny\.gguf exists.*--overwrite"):
        export(source, "gguf", llama_cpp=converter)
    with pytest.raises(ValueError, match=r"ends in \.gguf"):
        export(source, "gguf", tmp_path / "other", llama_cpp=converter)
    with pytest.raises(ValueError, match="holds the checkpoint"):
        export(source, "transformers4", source, overwrite=True)
    with pytest.raises(ValueError, match="is not a folder"):
        export(tmp_path / "none", "transformers4")


def test_the_folder_for_transformers_4(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "saved again", "qwen3_moe")
    tokenizer = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["tokenizer_class"] == "TokenizersBackend"
    out = export(source, "transformers4")
    assert out == tmp_path / "saved again-transformers4"
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["num_experts"] == config["num_local_experts"] == 8
    tokenizer = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_stacked_experts_are_refused_where_others_read_single_ones(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    with pytest.raises(ValueError, match="save_original_format=True"):
        export(tmp_path / "stacked", "vllm")


def test_the_pre_tokenizer_of_gpt2_is_recognized_by_its_definition(tmp_path: Path, plain: Path) -> None:
    tokenizer = json.loads((plain / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer["pre_tokenizer"]["use_regex"] is True
    assert known_pre_tokenizer(plain) == "gpt-2"
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": tokenizer["pre_tokenizer"] | {"add_prefix_space": True}},
        {"model": tokenizer["model"] | {"ignore_merges": True}},
        {"model": None},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | change), encoding="utf-8")
        assert known_pre_tokenizer(tmp_path) is None
    assert known_pre_tokenizer(tmp_path / "none") is None


def test_groups_of_mlx(plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(to_mlx, "has_module", lambda python, module: True)
    with pytest.raises(ValueError, match=r"rows of (24|48).*multiples of 32"):
        export(plain, "mlx", quantize="4bit")
    wide = build("qwen3_moe", moe_intermediate_size=32, hidden_size=64, intermediate_size=64)
    wide.save_pretrained(tmp_path / "wide")
    planned = to_mlx.plan_mlx(to_mlx_checkpoint(tmp_path / "wide"), "4bit", sys.executable)
    assert (planned.bits, planned.group) == (4, 32)


def to_mlx_checkpoint(folder: Path):
    from optimum_moe.exporting.exported import open_exported

    return open_exported(folder)


def header(**shapes: tuple[int, ...]) -> GGUFHeader:
    tensors = {f"blk.0.{name}.weight": GGUFTensor("Q5_0", shape) for name, shape in shapes.items()}
    return GGUFHeader({"general.architecture": "olmoe", "olmoe.embedding_length": 256}, tensors)


def test_larger_types_are_said() -> None:
    with pytest.warns(UserWarning, match=r'ffn_down_exps.weight \(rows of 96\) as Q5_0.*quantize="q4_k_m"'):
        to_gguf.warn_fallbacks(header(ffn_down_exps=(8, 256, 96), attn_q=(256, 256)), file_type("q4_k_m"))
    with pytest.warns(UserWarning, match="no widths of experts"):
        to_gguf.warn_fallbacks(header(attn_kv=(256, 96)), file_type("q4_k_m"))


def test_matrices_without_importances_are_said() -> None:
    matrix = ImportanceMatrix()
    matrix.add("blk.0.attn_q.weight", torch.ones(1, 64), torch.tensor([1]))
    with pytest.warns(UserWarning, match=r"1 matrices .* blk.0.attn_gate.weight"):
        to_gguf.warn_incomplete(matrix, header(attn_q=(64, 64), attn_gate=(64, 64)), file_type("q4_0"))
    with pytest.raises(ValueError, match=r"\(1, 32\)"):
        to_gguf.warn_incomplete(matrix, header(attn_q=(64, 32)), file_type("q4_0"))


def test_scripts_that_fail(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFailed, match="could not convert") as failure:
        run_script(sys.executable, "convert_to_gguf", {"checkpoint": "none"}, "convert")
    assert failure.value.reason.startswith("KeyError")
    assert reason_of(["a", "ValueError: the cause", "b"]) == "ValueError: the cause"
    assert reason_of(["RuntimeError: in Linear:", "size mismatch"]) == "RuntimeError: in Linear: size mismatch"
    assert check_python(None) == sys.executable


def test_pruned_checkpoints_are_exported(plain: Path, converter: Path, tmp_path: Path) -> None:
    compressor = MoECompressor.from_pretrained(
        str(plain), ExpertPruning(num_experts=4), CalibrationConfig(ROWS, sequence_length=16), progress=False
    )
    compressor.apply()
    compressor.save_pretrained(str(tmp_path / "pruned"))
    seen = json.loads(export(tmp_path / "pruned", "gguf", llama_cpp=converter).read_text(encoding="utf-8"))
    assert seen["config"]["num_experts"] == 4
    # What describes the compression is no business of a converter.
    assert not {"plan.json", "checksums.json", "modeling_optimum_moe.py"} & set(seen["files"])
