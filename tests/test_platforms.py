"""What must not depend on the machine: counts of references, calls of one system only, the locale."""

from __future__ import annotations

import ast
import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import optimum_moe
from optimum_moe import ExpertPruning, MoECompressor, verify
from optimum_moe.checkpoint import system
from optimum_moe.checkpoint.buffers import Buffers
from tests.tiny_checkpoints import documents, save_checkpoint
from tests.tiny_models import build

ROOT = Path(__file__).parents[1]
SHAPE = torch.Size((4, 1024))
LETTERS = "modèl-模型-ß"


def buffer(buffers: Buffers, shape: torch.Size = SHAPE) -> torch.Tensor:
    return buffers.empty(shape, torch.float32)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 99])
def test_memory_is_lent_to_one_tensor_whatever_references_count(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.14 counts a variable that is only read not at all, and a build without the global lock in two places."""
    monkeypatch.setattr(sys, "getrefcount", lambda _: count)
    buffers = Buffers()
    tensors = [buffer(buffers) for _ in range(4)]
    assert len({tensor.data_ptr() for tensor in tensors}) == 4
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [2], [3]]


def test_memory_comes_back_with_the_last_that_shares_it() -> None:
    buffers = Buffers()
    keepers: list[Any] = [
        lambda tensor: tensor[1:],
        lambda tensor: torch.nn.Parameter(tensor),
        lambda tensor: tensor.detach().numpy()[0],
        lambda tensor: memoryview(tensor.view(-1).view(torch.uint8).numpy())[8:],
        lambda tensor: tensor.view(torch.int32).untyped_storage(),
    ]
    first = buffer(buffers)
    place = first.data_ptr()
    for keep in keepers:
        kept = keep(first)
        del first
        # In use: another one gets other memory, and that is let go as the address below shows.
        assert buffer(buffers).data_ptr() != place
        buffers.release()
        del kept
        first = buffer(buffers)
        assert first.data_ptr() == place
    del first
    # Of another size nothing is idle, and what was idle is gone then.
    other = buffer(buffers, torch.Size((3, 1024)))
    assert [len(idle) for idle in buffers._idle] == []
    assert other.shape == (3, 1024)


def test_memory_survives_the_buffers_it_came_from() -> None:
    buffers = Buffers()
    tensor = buffer(buffers).fill_(7)
    del buffers
    gc.collect()
    assert tensor.unique().tolist() == [7]


def test_no_decision_counts_references() -> None:
    for file in (ROOT / "optimum_moe").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "getrefcount" not in text, file
        if file.name != "system.py":
            assert not re.search(r"\bfcntl\b|posix_|preadv|MAP_PRIVATE", text), file


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_streaming_without_the_calls_of_linux(platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither macOS nor Windows was there to run on: what they lack is taken away here."""
    build("qwen3_moe").save_pretrained(tmp_path / "source")
    method = ExpertPruning(num_experts=4, saliency="aimer")

    def run(name: str) -> Path:
        settings = {"engine": "streaming", "output_dir": tmp_path / name, "progress": False}
        return MoECompressor.from_pretrained(tmp_path / "source", method, **settings).apply()

    expected = load_file_all(run("as it is"))
    for name in ("posix_fadvise", "posix_fallocate", *(["preadv"] if platform == "win32" else [])):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(system.sys, "platform", platform)
    found = load_file_all(run("without"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def load_file_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_reserving_without_the_call_of_posix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    for size in (1, 1 << 20, (1 << 20) + 5):
        with (tmp_path / str(size)).open("wb") as stream:
            system.reserve(stream.fileno(), size)
        assert (tmp_path / str(size)).stat().st_size == size


SCRIPT = """
import os, sys
assert sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode
from optimum_moe import LowRankSparse, MoECompressor, Statistics, verify
from transformers import AutoModelForCausalLM
from tests.test_platforms import LETTERS
letters = os.fsdecode(LETTERS.encode())
for number, (engine, folder) in enumerate([("memory", letters), ("streaming", letters), ("streaming", LETTERS)]):
    # The last as a program spells it whose text is UTF-8, the others as the command line gives them.
    out = f"{folder}-out-{number}"
    suffix = ("txt", "parquet", "jsonl")[number]
    settings = {"engine": engine, "output_dir": out, "progress": False}
    data = f"{folder}.{suffix}"
    compressor = MoECompressor.from_pretrained(folder, LowRankSparse(rank=8), data, **settings)
    path = compressor.apply()
    AutoModelForCausalLM.from_pretrained(path)
    report = verify(path, letters)
    assert report.passed, str(report)
    if compressor.statistics is not None:
        compressor.statistics.save_pretrained(f"{letters}-statistics-{number}")
        Statistics.from_pretrained(f"{letters}-statistics-{number}")
"""


@pytest.mark.filterwarnings("ignore:Calibration gave no token")
def test_letters_of_other_scripts_under_a_locale_that_has_none(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    save_checkpoint(tmp_path / LETTERS)
    texts = [f"äöü {text}" for text in documents()]
    rows = datasets.Dataset.from_dict({"text": texts})
    rows.to_parquet(tmp_path / f"{LETTERS}.parquet")
    rows.to_json(tmp_path / f"{LETTERS}.jsonl", force_ascii=False)
    (tmp_path / f"{LETTERS}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    environment = {**plain, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert run.returncode == 0, run.stdout + run.stderr
    for number in range(3):
        out = tmp_path / f"{LETTERS}-out-{number}"
        assert f"# {out.name}\n" in (out / "README.md").read_text(encoding="utf-8")
        assert verify(out, tmp_path / LETTERS).passed
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def _text_without_encoding(tree: ast.Module) -> list[int]:
    """Lines that read or write text in whatever encoding the locale has."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        method = isinstance(node.func, ast.Attribute)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in given or None in given:
            continue
        if method and name in ("read_text", "write_text"):
            found.append(node.lineno)
        if name == "open":
            modes = [argument for argument in [*node.args, given.get("mode")] if isinstance(argument, ast.Constant)]
            owner = node.func.value.id if method and isinstance(node.func.value, ast.Name) else ""
            binary = any(isinstance(mode.value, str) and "b" in mode.value for mode in modes)
            if not binary and owner not in ("os", "Image", "tarfile"):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("folder", ["optimum_moe", "tests", "benchmarks"])
def test_every_text_names_its_encoding(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        lines = _text_without_encoding(ast.parse(file.read_text(encoding="utf-8")))
        assert not lines, f"{file.relative_to(ROOT)}:{lines}: pass encoding="


def test_the_promised_python_is_the_same_everywhere() -> None:
    setup, project = ((ROOT / name).read_text(encoding="utf-8") for name in ("setup.py", "pyproject.toml"))
    assert 'python_requires=">=3.11"' in setup
    assert 'target-version = "py311"' in project
    assert 'python_version = "3.11"' in project
    assert "Python 3.11 or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert optimum_moe.__all__
