"""What the commands understand and say: names of models and texts, errors in one line that name flags."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

import optimum_moe.compressor
from optimum_moe import CalibrationConfig
from optimum_moe.calibration import build_batches
from optimum_moe.checkpoint.names import check_checkpoint_name, data_set_name
from optimum_moe.cli.compress import CompressCommand
from optimum_moe.cli.errors import name_flags
from optimum_moe.engine.streaming import StreamingJob
from tests.cli.conftest import Run
from tests.fake_hub import FakeHub, fake_hub  # noqa: F401
from tests.tiny_checkpoints import documents, save_checkpoint, tokenizer


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Pass dequantize=True to read it.", "Pass --dequantize to read it."),
        ("or pass overwrite=True (--overwrite).", "or pass --overwrite."),
        ("seed=-1 is out of range.", "--seed -1 is out of range."),
        (
            "num_experts=2 is smaller than num_experts_per_tok=4.",
            "--num-experts 2 is smaller than num_experts_per_tok=4.",
        ),
        ('Pass mtp="copy" or mtp="drop".', "Pass --mtp copy or --mtp drop."),
        ("Pass tokenizer=, or text.", "Pass --tokenizer, or text."),
        ("Set text_column.", "Set --text-column."),
        ("Raise max_tokens or lower sequence_length.", "Raise --max-tokens or lower --sequence-length."),
        ("or pass packing=False.", "or pass --no-packing."),
        ('set unseen="keep" or unseen="prune".', "set --unseen keep or --unseen prune."),
        (
            'leave them out with protect=["*.0.*"] or layers=.',
            'leave them out with --set protect=["*.0.*"] or --set layers=.',
        ),
        ('Use allocation="uniform" or routing="map".', 'Use --set allocation="uniform" or --set routing="map".'),
        ("share=2.0 is out of range.", "--share 2.0 is out of range."),
        ('engine="streaming" needs output_dir. Pass output_dir=.', "--streaming needs --output. Pass --output."),
        ("calibration='corpus.txt'", "--calibration corpus.txt"),
        # Names of files and values are what they are.
        ("/data/max_tokens/seed=1.txt is 'max_tokens'", "/data/max_tokens/seed=1.txt is 'max_tokens'"),
    ],
)
def test_arguments_of_the_api_are_named_as_flags(message: str, said: str) -> None:
    assert name_flags(message, CompressCommand.parse_args) == said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-tokens", 8), "error: --max-tokens 8 is smaller than --sequence-length 512, so no row fits. Raise "),
        (("--seed", -1), "error: --seed -1 is out of range."),
        (("--keep-ratio", 0), "error: --keep-ratio 0.0 must lie in (0, 1]"),
        (("--text-column", "body"), "Set --text-column."),
        (("--max-shard-size", "huge"), "error: --max-shard-size huge is not a size."),
        (("--max-shard-size", "1GB", "--streaming"), "error: --max-shard-size 1GB is for a run without --streaming"),
        (("--tokenizer", "nowhere"), "error: nowhere is not a folder"),
        (("--max-memory", "1GB"), "error: --max-memory 1GB is for --streaming;"),
        (
            ("--push-to-hub", "a/b/c"),
            "--push-to-hub a/b/c is not a repository name. Use 'name' or 'user/name'.",
        ),
        (("--share", 0.5), "error: --share is not a setting of the recipe 'reap', which takes"),
    ],
)
def test_errors_name_flags(arguments: tuple, message: str, compress: Run, tmp_path: Path) -> None:
    status, _, err = compress("--recipe", "reap", "--output", tmp_path / "out", *arguments[:2], *arguments[2:])
    if "--max-tokens" in arguments:
        # The fixture gives a length of its own.
        message = message.replace("512", "64")
    last = err.splitlines()[-1]
    assert (status, last[: len("error: ")]) == (2, "error: ")
    assert message in last
    assert "=" not in last or "--set" in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flag", "value"), [("--num-experts", 4), ("--keep-ratio", 0.5)])
def test_a_number_of_experts_needs_another_recipe_than_the_default(
    flag: str, value: float, run: Run, checkpoint: Path
) -> None:
    status, _, err = run("preview", checkpoint, flag, value)
    assert status == 2
    assert err == (
        f"error: {flag} is not a setting of the recipe 'byte-budget', which takes --share, --target-size. "
        "Give one of these, or also another recipe: --recipe, one of hc-smoe, m-smoe, m-smoe-adaptive, m-smoe-plain, "
        "mc-smoe, mc-smoe-fast, merge, ream, reap, trim-slim-quantize.\n"
    )


def test_any_exception_ends_in_one_line(compress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error:\n  device-side assert\n")

    monkeypatch.setattr(optimum_moe.compressor, "write_model", fail)
    arguments = ("--recipe", "reap", "--output", tmp_path / "out", "--quiet")
    status, _, err = compress(*arguments)
    assert status == 1
    assert err.splitlines()[-1] == (
        "error: RuntimeError: CUDA error: device-side assert. Repeat the command with --debug for the traceback, and "
        "report it if it is a bug in optimum_moe."
    )
    assert "Traceback" not in err
    with pytest.raises(RuntimeError, match="device-side assert"):
        compress(*arguments, "--debug")
    (tmp_path / "out").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file"):
        compress(*arguments, "--debug")


MISTYPED = [
    ("inspect", "tini"),
    ("inspect", "models/tini"),
    ("preview", "./models/tini", "--share", "0.5"),
    ("preview", "models/tiny", "--recipe", "none.yaml"),
    ("compress", "models/a/b", "--output", "out"),
    ("compress", "models/tiny", "--output", "out", "--calibration", "corpus.txt"),
    ("compress", "models/tiny", "--output", "out", "--calibration", "models/corpus:2"),
    ("compress", "models/tiny", "--output", "out", "--calibration", "gone/corpus.jsonl"),
    ("compress", "models/tiny", "--output", "out", "--statistics", "nowhere"),
    ("evaluate", "models/tini", "--text", "held_out.txt"),
    ("evaluate", "models/tiny", "--text", "nowhere.txt"),
    ("evaluate", "models/tiny", "--text", "held_out.txt", "--calibration", "nowhere.txt"),
    ("evaluate", "models/tiny", "--text", "held_out.txt", "--reference", "models/tini"),
    ("verify", "models/tini"),
    ("verify", "models/tiny", "--against", "/nowhere/model"),
]


def test_mistyped_names_are_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """All in one process: each ends in one line with status 2, and neither torch nor the network is touched."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "held_out.txt").write_text("text", encoding="utf-8")
    code = f"""
import io, socket, sys
from contextlib import redirect_stderr
def refuse(*_): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from optimum.commands import optimum_cli
for arguments in {MISTYPED!r}:
    sys.argv = ["optimum-cli", "moe", *arguments]
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            optimum_cli.main()
    except SystemExit as end:
        print(end.code, said.getvalue().count(chr(10)), said.getvalue(), end="")
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(MISTYPED)
    assert all(line.startswith("2 1 error: ") for line in lines), done.stdout
    assert "tini is not a folder" in lines[0]
    assert "models/tini is not a folder; did you mean 'models/tiny'? Give a Hub id such as" in lines[1]
    assert "fetch a Hub model of that name first: hf download models/tini" in lines[1]
    assert "No recipe file none.yaml" in lines[3]
    assert f"--calibration corpus.txt: there is no such file (the working directory is {tmp_path})" in lines[5]
    assert "--statistics nowhere is not a folder" in lines[8]


def test_names_of_models_and_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file.txt").touch()
    for name in ("here", "org/model", "org/model-v1.2_x"):
        check_checkpoint_name(name)
    for name in ("here/model", "model", "org/a/b", "~/model", "file.txt", "org/model/", "a b/c", "org/..", ""):
        with pytest.raises(ValueError, match="is not a folder"):
            check_checkpoint_name(name, tmp_path)
    # What was fetched before is known, also beside a folder of that name.
    (tmp_path / "models--here--model").mkdir()
    check_checkpoint_name("here/model", tmp_path)
    assert data_set_name("org/name") == ("org/name", None, "train")
    assert data_set_name("org/name:test") == ("org/name", None, "test")
    assert data_set_name("org/name:fr:test") == ("org/name", "fr", "test")
    assert data_set_name("org/name-v1.5") == ("org/name-v1.5", None, "train")
    for name in (
        "file.txt",
        "corpus.jsonl",
        "gone/corpus.jsonl",
        "gone/a.csv:train",
        "here/corpus",
        "/data/x.txt",
        "org/name:",
        "a/b:c:d:e",
        "text of its own",
    ):
        assert data_set_name(name) is None


def test_model_in_its_place_or_by_name(run: Run, checkpoint: Path) -> None:
    expected = run("preview", checkpoint, "--recipe", "reap", "--json")
    assert expected[0] == 0
    assert run("preview", "--recipe", "reap", "--json", checkpoint) == expected
    assert run("preview", "--model", checkpoint, "--recipe", "reap", "--json") == expected
    for arguments in (
        ("preview",),
        ("preview", checkpoint, "--model", checkpoint),
        ("verify",),
        ("compress", "--output", "x"),
    ):
        status, _, err = run(*arguments)
        assert status == 2
        assert err.startswith("error: One MODEL is needed, got ")
    assert "A MODEL is needed" in run("evaluate", "--text", "x")[2]


def test_a_data_set_of_the_hub(run: Run, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, config: str | None, **how: Any) -> Any:
        asked.append((name, config, how))
        if name == "org/gone":
            raise FileNotFoundError("no such\ndata set")
        return datasets.Dataset.from_dict({"body": documents()}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    limits = ("--max-tokens", 512, "--sequence-length", 32, "--text-column", "body", "--recipe", "reap", "--quiet")
    texts = ("--calibration", "org/name:wiki:test:3", "--calibration", "org/other")
    status, _, err = run("compress", checkpoint, *limits, *texts, "--output", tmp_path / "out")
    assert status == 0, err
    how = {"streaming": True}
    assert asked == [("org/name", "wiki", {"split": "test", **how}), ("org/other", None, {"split": "train", **how})]
    sources = json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))["calibration"]["sources"]
    assert [(source["name"], source["tokens"]) for source in sources] == [
        ("org/name:wiki:test", 384),
        ("org/other", 128),
    ]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "512 tokens of org/name:wiki:test (weight 3, 384 tokens), org/other; rows of 32; seed 0;" in card
    status, _, err = run(
        "compress", checkpoint, "--calibration", "org/gone", "--recipe", "reap", "--output", tmp_path / "b"
    )
    assert status == 2
    assert "The dataset 'org/gone' could not be read (FileNotFoundError: no such data set). Check the network" in err
    # The same rows as from a data set in memory.
    config = CalibrationConfig("org/name", max_tokens=512, sequence_length=32, text_column="body")
    stream = build_batches(config, tokenizer())
    memory = build_batches(CalibrationConfig(iter(documents()), max_tokens=512, sequence_length=32), tokenizer())
    assert stream.hash == memory.hash


def test_flags_for_the_sample(run: Run, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    other = tokenizer()
    other.add_tokens(["<other>"])
    other.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "merges.txt").write_text("of the tokenizer that was given", encoding="utf-8")
    arguments = ("--no-packing", "--num-samples", 12, "--batch-size", 3, "--sequence-length", 40, "--unseen", "keep")
    more = ("--tokenizer", tmp_path / "tokenizer", "--max-shard-size", "200KB")
    out = tmp_path / "out"
    status, printed, err = run(
        "compress", checkpoint, "--recipe", "reap", "--calibration", corpus, *arguments, *more, "--output", out
    )
    assert status == 0, err
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))["calibration"]
    found = {name: plan[name] for name in ("packing", "num_samples", "batch_size", "sequence_length")}
    assert found == {"packing": False, "num_samples": 12, "batch_size": 3, "sequence_length": 40}
    assert f"Calibration: {plan['num_tokens']:,} tokens of corpus.jsonl; rows of 40; seed 0; sha256 " in printed
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert (out / "merges.txt").read_text(encoding="utf-8") == "of the tokenizer that was given"
    assert AutoTokenizer.from_pretrained(out).get_vocab() == other.get_vocab()


def test_evaluate_another_column_with_another_tokenizer(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "held_out.jsonl"
    text.write_text("".join(json.dumps({"body": body}) + "\n" for body in documents(seed=2)), encoding="utf-8")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    common = ("evaluate", checkpoint, "--text", text, "--max-tokens", 512, "--tasks", "perplexity", "--quiet")
    status, _, err = run(*common)
    assert status == 2
    assert "in line 1 of held_out.jsonl, which has ['body']; did you mean --text-column body?" in err
    status, out, err = run(*common, "--text-column", "body", "--tokenizer", tmp_path / "tokenizer")
    assert status == 0, err
    assert "perplexity" in out
    status, _, err = run(*common, "--text-column", "body", "--tokenizer", tmp_path / "tokenzer")
    assert (status, f"tokenzer is not a folder; did you mean '{tmp_path / 'tokenizer'}'?" in err) == (2, True)


def test_calibration_that_nothing_reads_is_said(run: Run, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ("--recipe", "reap", "--set", "saliency=aimer", "--calibration", corpus, "--output", tmp_path / "out")
    with pytest.warns(UserWarning, match="expert-pruning needs no data here: --calibration is not read"):
        status, printed, _ = run("compress", checkpoint, *arguments)
    assert status == 0
    assert "Calibration: none (data-free)" in printed


@pytest.mark.parametrize("streaming", [(), ("--streaming",)])
def test_push(streaming: tuple, run: Run, checkpoint: Path, tmp_path: Path, fake_hub: FakeHub) -> None:  # noqa: F811
    out = tmp_path / "out"
    arguments = ("--recipe", "reap", "--set", "saliency=aimer", "--output", out, *streaming, "--quiet")
    status, printed, err = run("compress", checkpoint, *arguments, "--push-to-hub", "me/small")
    assert (status, printed, err) == (0, f"{out}\n", "")
    local = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert fake_hub.files == {"me/small": local}
    assert b'AutoModelForCausalLM.from_pretrained("me/small")' in local["README.md"]
    fake_hub.failures = 1
    status, _, err = run("compress", checkpoint, *arguments, "--overwrite", "--push-to-hub", "--private")
    assert status == 2
    assert f"error: The checkpoint is complete in {out}, but was not uploaded to me/out: Storage is full (" in err
    assert err.endswith(f"Then upload it with: hf upload --private me/out {out}\n")
    assert fake_hub.private == {"me/out"}
    assert (out / "config.json").is_file()


@pytest.mark.parametrize(
    ("role", "flags", "said"),
    [
        ("read", ("--push-to-hub",), "The result cannot be uploaded to out: the token can only read. Create a token "),
        ("write", ("--private",), "--private is only for --push-to-hub. Add it, or leave --private out."),
    ],
)
def test_an_upload_that_cannot_be_is_refused_before_the_work(
    role: str,
    flags: tuple,
    said: str,
    run: Run,
    checkpoint: Path,
    tmp_path: Path,
    fake_hub: FakeHub,  # noqa: F811
) -> None:
    fake_hub.role = role
    out = tmp_path / "out"
    status, _, err = run("compress", checkpoint, "--recipe", "reap", "--output", out, *flags)
    assert (status, err.startswith(f"error: {said}"), err.count("\n")) == (2, True, 1)
    assert not out.exists()


def test_a_streaming_run_that_was_interrupted_goes_on_and_is_pushed(
    compress: Run,
    tmp_path: Path,
    fake_hub: FakeHub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("--recipe", "reap", "--output", tmp_path / "out", "--streaming", "--quiet", "--push-to-hub", "small")
    with monkeypatch.context() as patched:
        patched.setattr(StreamingJob, "complete", lambda *_: signal.raise_signal(signal.SIGINT))
        assert compress(*arguments)[0] == 130
    assert fake_hub.files == {}
    status, _, err = compress(*arguments)
    assert (status, err) == (0, "")
    assert b'from_pretrained("me/small")' in fake_hub.files["me/small"]["README.md"]
    assert {name for name in fake_hub.files["me/small"] if name.endswith(".safetensors")} == {
        *(f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)),
        "plan/tensors.safetensors",
    }


def test_inspect_a_compressed_checkpoint(run: Run, checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    short = ("--max-tokens", 512, "--sequence-length", 32, "--calibration", corpus, "--quiet")
    for name, recipe in {
        "map": ("--recipe", "m-smoe", "--num-experts", 3),
        "plain": ("--recipe", "reap", "--num-experts", 4),
        "rank": ("--recipe", "low-rank-sparse", "--set", "rank=8", "--set", "density=null"),
    }.items():
        assert run("compress", checkpoint, *short, *recipe, "--output", tmp_path / name)[0] == 0
    record = json.loads(run("inspect", tmp_path / "map", "--json")[1])
    assert record["blocks"][0]["num_experts"] == 3
    assert record["blocks"][0]["original_experts"] == 8
    assert (record["blocks"][0]["routing"], record["blocks"][0]["forms"]) == ("map", "stock")
    assert record["compressed"]["original"] == "tiny"
    assert record["compressed"]["experts"] == {f"model.layers.{i}.mlp": [8, 3] for i in range(3)}
    report = json.loads((tmp_path / "map" / "compression_report.json").read_text(encoding="utf-8"))
    assert record["bytes"] == report["after"]["bytes"] + 3 * (8 * 8 + 4)
    plain = json.loads(run("inspect", tmp_path / "plain", "--json")[1])
    assert [block["num_experts"] for block in plain["blocks"]] == [4, 4, 4]
    status, text, _ = run("inspect", tmp_path / "plain")
    assert status == 0
    assert text.splitlines()[-2].startswith("Compressed from tiny by expert-pruning (num_experts=4, saliency=reap, ")
    assert text.splitlines()[-2].endswith("experts 8 -> 4.")
    assert text.splitlines()[-1].startswith("Calibration: 512 tokens of corpus.jsonl; rows of 32; seed 0; sha256 ")
    status, text, _ = run("inspect", tmp_path / "rank")
    assert status == 0
    assert "of experts  routing  forms" in text
    assert "of rank 8 in" in text or "neurons" in text


def test_inspect_is_not_confused_by_a_plan_of_somebody_else(run: Run, tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model")
    (folder / "plan.json").write_text("a plan for tomorrow", encoding="utf-8")
    status, _, err = run("inspect", folder)
    assert (status, err) == (0, "")
