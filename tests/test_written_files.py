"""What stands beside the weights: files of the original byte for byte, a true card, permissions of new files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub import metadata_load
from transformers import AutoTokenizer

import optimum_moe
from optimum_moe import CalibrationConfig, ExpertPruning, LowRankSparse, MoECompressor, MSMoE, Statistics
from optimum_moe.checkpoint.carried_files import carried_files
from optimum_moe.checkpoint.identity import identity
from optimum_moe.checkpoint.source import open_source
from optimum_moe.recipe import Recipe, calibration_config, load_recipe
from tests.mtp_checkpoints import save_with_mtp
from tests.tiny_checkpoints import documents, save_checkpoint, tokenizer, write_text
from tests.tiny_models import build

DATA_FREE = ExpertPruning(num_experts=4, saliency="aimer")
ENGINES = ("memory", "streaming")

CARRIED = (
    *("LICENSE", "LICENCE.txt", "NOTICE", "USE_POLICY.md", "Notice.pdf", "COPYING"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "qwen.tiktoken", "tekken.json", "tokenizer.model.v3"),
    *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "chat_template.json"),
    *("tool_parser.py", "reasoning/parser.py", "generation_config.json", "preprocessor_config.json"),
    *("video_preprocessor_config.json", "processor_config.json", "configuration.json"),
)
NOT_CARRIED = (
    *("model-00007-of-00009.safetensors", "pytorch_model.bin", "consolidated.00.pth", "model.gguf", "params.json"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors.part"),
    *("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "training_args.bin", "trainer_state.json"),
    *("README.md", "README_zh.md", "banner.png", "figures/plot.svg", "report.pdf", ".gitattributes"),
    *(".cache/huggingface/parser.py", "hf_quant_config.json", "all_results.json", "events.out.tfevents.1"),
    *("checkpoint-5/optimizer.pt", "checkpoint-5/chat_template.jinja", "evaluation/scores.json"),
)


def put(folder: Path, names: tuple[str, ...]) -> None:
    """Files whose bytes no writer would give; what is there stays."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_bytes(b'{"odd" :1}\r\n' if file.suffix == ".json" else f"odd\r\n{name}".encode())


def compressed(original: Any, out: Path, method: Any = DATA_FREE, calibration: Any = None, **settings: Any) -> Path:
    compressor = MoECompressor.from_pretrained(
        original, method, calibration, output_dir=out, progress=False, **settings
    )
    return compressor.apply()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("written") / "mymodel")


def test_which_files_are_carried(tmp_path: Path) -> None:
    put(tmp_path, CARRIED + NOT_CARRIED)
    assert {path.as_posix() for path in carried_files(tmp_path)} == set(CARRIED)


@pytest.mark.parametrize("engine", ENGINES)
def test_files_are_carried_byte_for_byte(engine: str, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "original")
    put(folder, ("LICENSE", "tool_parser.py", "additional_chat_templates/tool_use.jinja", "vocab.txt", "banner.png"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "unknown_to_transformers": [1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=5), encoding="utf-8")
    (folder / "generation_config.json").write_text(
        '{"temperature": 0.6, "do_sample": false,\n "mine": 1}', encoding="utf-8"
    )
    out = compressed(folder, tmp_path / "out", engine=engine)
    for path in carried_files(folder):
        assert (out / path).read_bytes() == (folder / path).read_bytes(), path
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    shards = {name for name in written if name.startswith("model") and name != "modeling_optimum_moe.py"}
    assert written - shards == {
        *("LICENSE", "tool_parser.py", "additional_chat_templates/tool_use.jinja", "vocab.txt", "tokenizer.json"),
        *("tokenizer_config.json", "generation_config.json", "config.json", "README.md", "recipe.yaml", "plan.json"),
        *("plan/tensors.safetensors", "compression_report.json", "checksums.json", "report.html"),
    }
    assert AutoTokenizer.from_pretrained(out)("abc").input_ids == tokenizer()("abc").input_ids


def test_a_parser_is_never_executed(original: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "original")
    (tmp_path / "original" / "parser.py").write_text("raise SystemExit('executed')", encoding="utf-8")
    out = compressed(tmp_path / "original", tmp_path / "out")
    assert (out / "parser.py").read_text(encoding="utf-8") == "raise SystemExit('executed')"


def test_a_tokenizer_that_cannot_be_loaded_is_carried_where_no_text_is_read(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "original")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "OfNoKnownKind"}', encoding="utf-8")
    (folder / "tokenizer.json").write_text("of another program", encoding="utf-8")
    out = compressed(folder, tmp_path / "out")
    assert (out / "tokenizer.json").read_text(encoding="utf-8") == "of another program"


def test_a_given_tokenizer(original: Path, tmp_path: Path) -> None:
    """One of a folder is copied from there, one that was changed since is saved; never two mixed."""
    same = compressed(original, tmp_path / "same", tokenizer=AutoTokenizer.from_pretrained(original))
    assert (same / "tokenizer_config.json").read_bytes() == (original / "tokenizer_config.json").read_bytes()
    folder = tmp_path / "other"
    tokenizer().save_pretrained(folder)
    put(folder, ("spiece.model", "LICENSE"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "mine": 1}', encoding="utf-8"
    )
    shutil_original = save_checkpoint(tmp_path / "original")
    put(shutil_original, ("vocab.json", "NOTICE"))
    of_other = compressed(shutil_original, tmp_path / "a", tokenizer=AutoTokenizer.from_pretrained(folder))
    assert json.loads((of_other / "tokenizer_config.json").read_text(encoding="utf-8"))["mine"] == 1
    assert (of_other / "spiece.model").is_file()
    assert (of_other / "NOTICE").is_file()
    assert not (of_other / "vocab.json").exists()
    assert not (of_other / "LICENSE").exists()
    changed = AutoTokenizer.from_pretrained(folder)
    changed.add_tokens(["<new>"])
    for model in (shutil_original, build("qwen3_moe")):
        out = compressed(model, tmp_path / type(model).__name__, tokenizer=changed)
        assert "<new>" in AutoTokenizer.from_pretrained(out).get_vocab()
        assert not (out / "vocab.json").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_permissions_are_those_of_new_files(engine: str, tmp_path: Path) -> None:
    save_with_mtp(tmp_path / "original", "deepseek_v3", torch.bfloat16)
    (tmp_path / "original" / "LICENSE").touch(0o600)
    before = os.umask(0o027)
    try:
        out = compressed(tmp_path / "original", tmp_path / "out", engine=engine, mtp="cut")
        Statistics({}, {}, {}).save_pretrained(out / "plan")
    finally:
        os.umask(before)
    files = [out, *out.rglob("*")]
    assert {oct(path.stat().st_mode & 0o777) for path in files if path.is_file()} == {"0o640"}
    assert {oct(path.stat().st_mode & 0o777) for path in files if path.is_dir()} == {"0o750"}


@pytest.mark.parametrize("engine", ENGINES)
def test_config_has_one_line_for_the_numbers_of_all_experts(engine: str, original: Path, tmp_path: Path) -> None:
    out = compressed(original, tmp_path / "out", LowRankSparse(rank=8, whiten=False, density=0.1), engine=engine)
    text = (out / "config.json").read_text(encoding="utf-8")
    assert text.count('"down": "8 8 8 8 8 8 8 8"') == 3
    assert not [line for line in text.splitlines() if line.strip().rstrip(",").isdigit()]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    loaded.save_pretrained(tmp_path / "again")
    saved = (tmp_path / "again" / "config.json").read_text(encoding="utf-8")
    again = json.loads(text)["quantization_config"] | {"saved_again": True}
    assert json.loads(saved)["quantization_config"] == again
    assert not [line for line in saved.splitlines() if line.strip().rstrip(",").isdigit()]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_card_says_what_was_done_and_not_where(
    engine: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_text(tmp_path / "corpus.jsonl")
    monkeypatch.chdir(original.parent)
    sample = CalibrationConfig(corpus, max_tokens=512, sequence_length=64, seed=3)
    out = compressed("mymodel", tmp_path / "out", ExpertPruning(num_experts=4), sample, engine=engine, seed=7)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert metadata_load(out / "README.md") == {
        "library_name": "transformers",
        "tags": ["optimum_moe", "mixture-of-experts", "expert-pruning"],
    }
    assert "`mymodel`, compressed by optimum_moe" in card
    digest = json.loads((out / "plan.json").read_text(encoding="utf-8"))["calibration"]["hash"][:12]
    versions = f"optimum_moe {optimum_moe.__version__}, torch {torch.__version__}, transformers "
    assert (
        "Stages: expert-pruning (num_experts=4, saliency=reap, allocation=uniform, leaves=nothing). "
        "Calibration: 512 tokens of corpus.jsonl; rows of 64; "
        f"seed 3; sha256 {digest}. Seed: 7. Made with {versions}{transformers.__version__}." in card
    )
    texts = [path for path in out.rglob("*") if path.suffix in (".md", ".json", ".yaml", ".py", ".jinja", ".html")]
    assert [path.name for path in texts if str(tmp_path.parent) in path.read_text(encoding="utf-8")] == []
    recipe = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe.pop("calibration") == {
        "max_tokens": 512,
        "sequence_length": 64,
        "batch_size": 8,
        "packing": True,
        "seed": 3,
    }
    assert recipe == {"stage": "expert-pruning", "num_experts": 4, "seed": 7}
    assert json.loads((out / "compression_report.json").read_text(encoding="utf-8"))["versions"]["torch"] == str(
        torch.__version__
    )


def test_the_written_recipe_draws_the_same_sample(original: Path, tmp_path: Path) -> None:
    """Also where the sample came from statistics, and where it had no limit."""
    method, texts = MSMoE(num_experts=4), documents(4)
    made = MoECompressor.from_pretrained(
        original,
        method,
        CalibrationConfig(texts, max_tokens=None, sequence_length=32, packing=False, seed=5),
        progress=False,
    )
    statistics = made.calibrate()
    recipe = Recipe((method,), {"source": "/home/me/data/corpus.txt", "sequence_length": 128})
    compressor = MoECompressor.from_pretrained(original, recipe, texts, progress=False)
    compressor.apply(statistics)
    compressor.save_pretrained(tmp_path / "out")
    written = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert written.calibration["source"] == "corpus.txt"
    again = calibration_config(written, texts, None)
    assert (again.max_tokens, again.sequence_length, again.packing, again.seed) == (None, 32, False, 5)
    repeated = MoECompressor.from_pretrained(original, tmp_path / "out" / "recipe.yaml", texts, progress=False)
    assert repeated.calibrate().calibration["hash"] == statistics.calibration["hash"]


@pytest.mark.parametrize(
    ("block", "inherited"),
    [
        (
            "license: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage:\n- no\n- en\nbase_model: a/b\n"
            "pipeline_tag: text-generation\nthumbnail: banner.png\nmodel-index:\n- name: x",
            {
                "license": "other",
                "license_name": "mine",
                "license_link": "LICENSE",
                "language": ["no", "en"],
                "pipeline_tag": "text-generation",
            },
        ),
        ("license: mit\nlanguage: {a: b}", {"license": "mit"}),
        ("- a list", {}),
        ("license: [unclosed", None),
    ],
)
def test_the_license_and_language_of_the_original(
    block: str, inherited: dict[str, Any] | None, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = save_checkpoint(tmp_path / "original")
    (folder / "README.md").write_text(f"---\n{block}\n---\n# The original\n", encoding="utf-8")
    out = compressed(folder, tmp_path / "out", engine="streaming")
    found = metadata_load(out / "README.md")
    assert found == {
        "library_name": "transformers",
        "tags": ["optimum_moe", "mixture-of-experts", "expert-pruning"],
        **(inherited or {}),
    }
    assert "The original" not in (out / "README.md").read_text(encoding="utf-8")
    warned = [str(w.message) for w in recwarn if "README.md are not valid YAML" in str(w.message)]
    assert len(warned) == (inherited is None)


def test_a_model_of_the_cache_of_the_hub_is_named_by_its_id(original: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0a1b"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(original)
    source = open_source(snapshot)
    assert (source.hub_id, source.title, identity(source)["name"]) == ("org/name", "org/name", "org/name")
    assert open_source(f"{original}/").hub_id is None
    assert open_source(f"{original}/").title == "mymodel"
    live = open_source(transformers.AutoModelForCausalLM.from_pretrained(original))
    assert (live.hub_id, live.title) == (None, "Qwen3MoeForCausalLM")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "There is no file 'nowhere.jsonl'"),
        (Path("gone/corpus.txt"), "There is no file 'gone/corpus.txt'"),
        ({"gone/corpus.txt": 2, "org/name": 1}, "There is no file 'gone/corpus.txt'"),
        ("corpus.jsonll", "Unknown file type '.jsonll' of 'corpus.jsonll'; did you mean '.jsonl'"),
    ],
)
def test_missing_calibration_data_are_refused_also_where_nothing_reads_them(
    source: Any, message: str, original: Path
) -> None:
    for method in (DATA_FREE, MSMoE(num_experts=4)):
        with pytest.raises(ValueError, match=message):
            MoECompressor.from_pretrained(original, method, source, progress=False)
        with pytest.raises(ValueError, match=message):
            MoECompressor.from_pretrained(original, Recipe((method,), {"source": source}), progress=False)
