"""README and documentation: every code block runs, every public name and every example is there."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_moe import LowRankSparse, MoECompressor
from optimum_moe.stages.from_context import READABLE
from optimum_moe.stages.merge_choices import GROUPINGS, ROUTER_ROWS, WEIGHTINGS
from tests.mtp_checkpoints import save_with_mtp
from tests.quantized_checkpoints import to_fp8
from tests.run_page import blocks
from tests.tiny_checkpoints import VOCABULARY, save_checkpoint, tokenizer, write_text

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "docs" / "source"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(SOURCE.rglob("*.md"))]
WITH_CODE = [page for page in PAGES if blocks(page)]
QUESTIONS = [page for page in WITH_CODE if page.parent.name == "questions"]
"""Short pages, which one process runs."""
TOGETHER = [*([page] for page in WITH_CODE if page not in QUESTIONS), QUESTIONS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the names of the pages exist: models of `org`, texts, and a checkpoint of factors."""
    folder = tmp_path_factory.mktemp("docs")
    save_checkpoint(folder / "org" / "model")
    to_fp8(save_checkpoint(folder / "plain", dtype=torch.bfloat16), folder / "org" / "model-FP8")
    save_with_mtp(folder / "org" / "model-with-mtp", "deepseek_v3", vocab_size=VOCABULARY)
    tokenizer().save_pretrained(folder / "org" / "model-with-mtp")
    write_text(folder / "corpus.jsonl", count=40)
    lines = (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "corpus.txt").write_text("\n\n".join(lines), encoding="utf-8")
    write_text(folder / "held_out.jsonl", seed=5)
    # Names of the bundled model and its texts, with which the commands would run for minutes.
    reference = folder / "tests" / "data" / "reference"
    shutil.copytree(folder / "org" / "model", reference / "model")
    write_text(reference / "calibration.jsonl", count=40)
    write_text(reference / "held_out.jsonl", seed=5, count=40)
    for seed, domain in enumerate(("code", "chat", "maths"), start=6):
        write_text(folder / f"{domain}.jsonl", seed=seed)
    for number, split in enumerate(("train", "dev", "test")):
        # Other words in each split, of two kinds.
        records = [{"input": f"{'ab' * (n % 2 + 1)} {number}{n}:", "target": " yes"} for n in range(8)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    method = LowRankSparse(rank=8, whiten=False)
    compressor = MoECompressor.from_pretrained(folder / "org" / "model", method, progress=False)
    compressor.apply()
    compressor.save_pretrained(folder / "factorized")
    return folder


@pytest.mark.parametrize("pages", TOGETHER, ids=lambda pages: pages[0].name if len(pages) == 1 else "questions")
def test_every_code_block_runs(pages: list[Path], place: Path, tmp_path: Path):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.run_page", *map(str, pages)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_readme_fits_on_three_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_reference_documents_every_public_name():
    import optimum_moe

    documented = re.findall(r"^\[\[autodoc\]\] (\S+)\.(\w+)$", (SOURCE / "api.md").read_text(encoding="utf-8"), re.M)
    assert {name for module, name in documented if module == "optimum_moe"} == set(optimum_moe.__all__)
    for module, name in documented:
        assert getattr(importlib.import_module(module), name).__doc__


def test_the_page_on_extending_names_everything_that_a_function_may_read():
    page = (SOURCE / "extending.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|(?: `register_\w+` \|)? (.+?) \|", page, re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(READABLE) - named == set()
    for choice in (GROUPINGS, WEIGHTINGS, ROUTER_ROWS):
        assert set(choice.given) - named == set()


EXAMPLES = {
    "byte_budget": [
        "--calibration",
        "corpus.txt",
        "--text",
        "held_out.jsonl",
        "--output",
        "out",
        "--max-tokens",
        "512",
    ],
    "compare_methods": ["--calibration", "corpus.txt", "--text", "held_out.jsonl", "--max-tokens", "512"],
    "own_criterion": ["--num-experts", "4", "--calibration", "corpus.txt", "--output", "out"],
    "msmoe_on_a_task": [
        *("--train", "train.jsonl", "--dev", "dev.jsonl", "--test", "test.jsonl"),
        *("--output", "out", "--rank", "8", "--epochs-share", "0.05"),
    ],
    "larger_than_memory": ["--calibration", "corpus.txt", "--output", "out"],
}


GALLERY = {
    "qwen3_moe_16gb": ["--tokens", "4096"],
    "deepseek_groups": ["--tokens", "4096"],
    "switch_mc_smoe": ["--tokens", "8192"],
    "qwen3_vl_moe": [],
}
"""Examples that have a stand-in for their model, with settings that make them fast."""

NOT_TRIED = {"on_ray": "needs a Ray cluster"}
"""Examples that do not run here, and why."""


def test_every_example_is_tried():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, *GALLERY, *NOT_TRIED}


def run_example(name: str, arguments: list[str], folder: Path) -> str:
    """What an example prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs(name: str, place: Path, tmp_path: Path):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    run_example(name, ["org/model", *EXAMPLES[name]], tmp_path)


SHOWN = {
    "qwen3_moe_16gb": r"^after +perplexity (4[3-9]|5[0-5])\.\d+ +kl 0\.0",
    "deepseek_groups": r"layers\.3\.mlp: 12 experts in each router group -> 9, 9$",
    "switch_mc_smoe": r"^trained: \d,\d{3},\d{3} bytes of weights$",
    "qwen3_vl_moe": r"layers\.2\.mlp:( \d+\*?){8}$",
}


@pytest.mark.full
@pytest.mark.parametrize("name", GALLERY)
def test_the_gallery_runs_on_its_stand_ins(name: str, tmp_path: Path):
    printed = run_example(name, ["--stand-in", "--output", "out", *GALLERY[name]], tmp_path)
    ratio = float(re.findall(r"^bytes .+ ([\d.]+)$", printed, re.M)[0])
    assert 0.2 < ratio < 0.85
    assert re.search(SHOWN[name], printed, re.M), printed


@pytest.mark.full
@pytest.mark.parametrize("name", GALLERY)
def test_the_gallery_without_data_says_what_is_missing(name: str, tmp_path: Path):
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"error: Give --(calibration|text).* or --stand-in\.$", done.stderr.strip())
