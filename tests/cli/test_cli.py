"""`optimum-cli moe` through optimum's own entry point, on tiny checkpoints."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from optimum.commands import optimum_cli
from transformers import AutoModelForCausalLM

import optimum_moe.compressor
from optimum_moe import CompressionPlan, Statistics
from optimum_moe.cli.common import table, text_source
from optimum_moe.cli.evaluate import named_models
from optimum_moe.cli.moe import MoECommand
from optimum_moe.evaluation import EvaluationResult
from tests.mtp_checkpoints import save_with_mtp
from tests.quantized_checkpoints import to_fp8
from tests.run_page import blocks
from tests.tiny_checkpoints import write_text

Run = Callable[..., tuple[int, str, str]]

RECIPE = {"--model", "--recipe", "--set", "--mtp", "--runs-in", "--quantize", "--tensor-parallel", "--bits"}
RECIPE |= {"--num-experts", "--keep-ratio", "--target-size", "--share"}
CHECKPOINT = {"--revision", "--subfolder", "--variant", "--trust-remote-code", "--dequantize", "--dtype"}
# A change here is a change of what users have in their scripts.
COMMANDS_PAGE = Path(__file__).parents[2] / "docs" / "source" / "commands.md"
OPTIONS = {
    "completion": set(),
    "inspect": {
        *{
            "--model",
            "--list",
            "--json",
            "--statistics",
            "--calibration",
            "--text-column",
            "--tokenizer",
            "--num-samples",
        },
        *{"--max-tokens", "--sequence-length", "--batch-size", "--no-packing", "--seed", "--output", "--device-map"},
        *{"--max-memory", *CHECKPOINT},
    },
    "preview": {"--json", *RECIPE, *CHECKPOINT},
    "compress": {
        "--output",
        "--overwrite",
        "--calibration",
        "--text-column",
        "--tokenizer",
        "--num-samples",
        "--max-tokens",
        "--sequence-length",
        "--batch-size",
        "--no-packing",
        "--unseen",
        *{"--guard", "--guard-text", "--guard-repair"},
        "--statistics",
        "--save-statistics",
        "--seed",
        "--device-map",
        "--streaming",
        "--max-memory",
        "--error-propagation",
        "--max-shard-size",
        "--private",
        "--push-to-hub",
        "--no-report",
        "--json",
        "--quiet",
        *RECIPE,
        *CHECKPOINT,
    },
    "evaluate": {
        "--model",
        "--text",
        "--reference",
        "--calibration",
        "--text-column",
        "--tokenizer",
        "--tasks",
        "--lm-eval",
        "--tasks-dir",
        "--limit",
        "--max-tokens",
        "--sequence-length",
        "--batch-size",
        "--num-questions",
        "--num-prompts",
        "--json",
        "--new-tokens",
        "--seed",
        "--output",
        "--quiet",
    },
    "recover": {
        *{"--model", "--teacher", "--data", "--output", "--overwrite", "--train", "--max-tokens", "--held-out"},
        *{"--held-out-share", "--text-column", "--sequence-length", "--batch-size", "--tokenizer", "--learning-rate"},
        *{"--alpha", "--temperature", "--task-weight", "--hidden-weight", "--final-density", "--lora-rank"},
        *{"--seed", "--json", "--quiet", "--reconstruct"},
    },
    "sweep": {
        *{"--model", "--recipes", "--keep", "--target-size", "--calibration", "--text", "--text-column", "--tokenizer"},
        *{"--max-tokens", "--sequence-length", "--evaluation-tokens", "--tasks", "--at-once", "--device-map", "--seed"},
        *{"--output", "--write", "--json", "--quiet", *CHECKPOINT},
    },
    "verify": {
        *{"--model", "--against", "--json", "--quiet", "--trained"},
        *{"--runs-in", "--exported", "--quantize", "--llama-cpp", "--python"},
    },
    "report": {
        *{"--model", "--output", "--statistics", "--evaluation", "--reference", "--sweep", "--original", "--text"},
        "--json",
    },
    "export": {
        *{"--model", "--to", "--output", "--overwrite", "--quantize", "--calibration"},
        *{"--llama-cpp", "--pre-tokenizer", "--python", "--json"},
    },
}


def test_commands_and_options_are_frozen():
    group = MoECommand(optimum_cli.RootOptimumCLICommand("test").subparsers)
    found = {
        command.COMMAND.name: {name for action in command.parser._actions for name in action.option_strings}
        for command in group.registered_subcommands
    }
    assert found == {name: {"-h", "--help", "--debug", "--import", *options} for name, options in OPTIONS.items()}


def test_streaming(compress: Run, tmp_path: Path):
    arguments = ("--recipe", "m-smoe", "--num-experts", 4, "--output", tmp_path / "out")
    status, _, err = compress(*arguments, "--streaming", "--max-memory", "1KB")
    assert status == 2
    assert "--max-memory 1,000 bytes is less than" in err
    # Nothing was finished, so that other settings may begin in the same folder.
    status, _, err = compress(*arguments, "--streaming", "--max-memory", "1GB", "--error-propagation")
    assert status == 0
    assert err.count(" -> 4 experts") == 3
    status, out, err = compress(*arguments, "--streaming", "--quiet", "--overwrite")
    assert (status, out.strip(), err.strip()) == (0, str(tmp_path / "out"), "")
    assert len(list((tmp_path / "out").glob("model-0000?-of-00004.safetensors"))) == 4
    status, out, err = compress("--recipe", "m-smoe", "--num-experts", 4, "--output", tmp_path / "b", "--streaming")
    assert status == 0
    assert "[3/3] model.layers.2:  8 -> 4 experts  error 0." in err
    assert "Saved to" in out


def test_registering_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from optimum.commands.register import register_moe; "
        "from optimum.commands.optimum_cli import RootOptimumCLICommand; "
        "[c(RootOptimumCLICommand('x').subparsers) for c in register_moe.REGISTER_COMMANDS]; "
        "sys.exit(', '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_help_of_the_installed_command(run: Run):
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "moe", "--help"]
    assert "compress" in subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert run()[0] == 0
    for name in OPTIONS:
        status, out, _ = run(name, "--help")
        assert status == 0
        assert "--" in out


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"completion"}))
def test_the_example_of_every_help_is_run_by_the_page_of_commands(name: str, run: Run):
    example = run(name, "--help")[1].partition("\nexample:\n")[2].strip()
    assert example.startswith(f"optimum-cli moe {name} ")
    ran = [line for language, code, _ in blocks(COMMANDS_PAGE) if language == "bash" for line in code.splitlines()]
    assert any(line.startswith(example) for line in ran), example


def test_inspect_a_checkpoint(run: Run, checkpoint: Path):
    status, out, _ = run("inspect", checkpoint, "--json")
    record = json.loads(out)
    assert status == 0
    assert record["architecture"] == "Qwen3MoeForCausalLM"
    assert record["surgeon"] == "qwen3_moe"
    assert [block["name"] for block in record["blocks"]] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert record["blocks"][0]["num_experts"] == 8
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    experts = sum(p.numel() for p in model.model.layers[0].mlp.experts.parameters())
    assert record["blocks"][0]["expert_parameters"] == experts
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    status, out, _ = run("inspect", checkpoint)
    assert status == 0
    assert f"{record['parameters']:,} parameters" in out
    assert "model.layers.2.mlp" in out


def test_inspect_lists_what_is_supported(run: Run):
    for arguments in ((), ("--list",)):
        status, out, _ = run("inspect", *arguments)
        assert status == 0
        for name in ("qwen3_moe", "switch_transformers", "m-smoe-adaptive", "expert-pruning", "reap", "frequency"):
            assert name in out
    record = json.loads(run("inspect", "--json")[1])
    choices = {"saliencies", "similarities", "groupings", "weightings", "router_rows"}
    assert set(record) == {"architectures", "presets", "stages", *choices}
    assert record["router_rows"]["dominant"] == "Take the router row of each group's dominant expert."
    assert all(set(record[choice]) for choice in choices)
    assert all(record["stages"].values())
    assert record["saliencies"]["frequency"].startswith("Share of the (token, expert) pairs")
    assert record["saliencies"]["reap"].startswith("Mean of g ||f(x)||")


def test_preview_overrides_the_recipe(run: Run, checkpoint: Path, tmp_path: Path):
    def preview(*arguments: object) -> dict:
        status, out, err = run("preview", checkpoint, "--json", *arguments)
        assert status == 0, err
        return json.loads(out)

    blocks = [f"model.layers.{i}.mlp" for i in range(3)]
    assert preview("--recipe", "m-smoe")["counts"] == {name: [8, 4] for name in blocks}
    assert preview("--recipe", "m-smoe", "--num-experts", 3)["counts"] == {name: [8, 3] for name in blocks}
    partly = preview("--recipe", "m-smoe", "--keep-ratio", 0.25, "--set", "layers=[1]")
    assert [partly["counts"][name][1] for name in blocks] == [8, 2, 8]
    adaptive = preview("--recipe", "m-smoe-adaptive", "--num-experts", 3)
    assert adaptive["counts"] == {name: [8, 3] for name in blocks}
    # Who only says a size gets the byte budget, as a plain checkpoint.
    assert preview("--share", 0.25)["after"]["bytes"] < preview("--share", 0.5)["after"]["bytes"]
    assert preview("--target-size", preview("--share", 0.5)["after"]["bytes"])["plain"] is True
    assert preview("--share", 0.5, "--runs-in", "transformers")["plain"] is False
    full = preview("--recipe", "reap", "--set", "num_experts=8")
    assert full["before"] == full["after"]
    target = full["before"]["bytes"] * 3 // 4
    assert preview("--recipe", "reap", "--target-size", target)["after"]["bytes"] <= target
    (tmp_path / "mine.yaml").write_text(
        "stage: expert-pruning\nnum_experts: 2\nsaliency: frequency\n", encoding="utf-8"
    )
    assert preview("--recipe", tmp_path / "mine.yaml")["counts"][blocks[0]] == [8, 2]
    assert "parameters" in run("preview", checkpoint, "--recipe", "m-smoe")[1]


def test_compress_writes_what_it_says(compress: Run, tmp_path: Path):
    out = tmp_path / "out"
    status, printed, err = compress("--recipe", "m-smoe", "--num-experts", 3, "--output", out, "--seed", 7)
    assert status == 0, err
    assert printed.index("Preview") < printed.index("Measured") < printed.index("With optimum-moe installed")
    assert "8 -> 3" in printed
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.model.layers[0].mlp.experts.down_proj.shape[0] == 3
    recipe = (out / "recipe.yaml").read_text(encoding="utf-8")
    assert "num_experts: 3" in recipe
    assert "keep_ratio" not in recipe
    assert "max_tokens: 1024" in recipe
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    assert plan["seed"] == 7
    assert plan["calibration"]["num_tokens"] == 1024
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_last_line_is_the_command_that_vllm_needs(compress: Run, run: Run, tmp_path: Path):
    out = tmp_path / "with space"
    status, printed, err = compress("--share", 0.5, "--runs-in", "vllm", "--output", out)
    assert status == 0, err
    command = shlex.split(printed.strip().splitlines()[-1])
    assert command[:3] == ["optimum-cli", "moe", "export"]
    assert run(*command[2:])[0] == 0
    config = json.loads((tmp_path / "with space-vllm" / "config.json").read_text(encoding="utf-8"))
    assert "compression_config" in config
    last = compress("--share", 0.5, "--output", tmp_path / "any")[1].strip().splitlines()[-1]
    assert last.startswith("Next: optimum-cli moe evaluate")


def test_compress_again_from_saved_statistics(compress: Run, run: Run, checkpoint: Path, tmp_path: Path):
    kept, first, second = tmp_path / "statistics", tmp_path / "first", tmp_path / "second"
    status, printed, _ = compress("--recipe", "reap", "--output", first, "--save-statistics", kept, "--quiet")
    assert (status, printed.strip()) == (0, str(first))
    assert Statistics.from_pretrained(kept).calibration["num_tokens"] == 1024
    common = ("compress", checkpoint, "--recipe", "reap", "--quiet", "--statistics", kept)
    assert run(*common, "--output", second)[0] == 0
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    status, _, err = run(*common, "--output", tmp_path / "third", "--max-tokens", 512)
    assert status == 2
    assert "--statistics replaces the observation" in err
    assert "--max-tokens" in err


def test_compress_a_mixture_in_another_dtype(run: Run, checkpoint: Path, corpus: Path, tmp_path: Path):
    other = write_text(tmp_path / "other.jsonl", seed=1)
    out = tmp_path / "out"
    limits = ("--max-tokens", 1024, "--sequence-length", 32, "--dtype", "bfloat16", "--quiet")
    texts = ("--calibration", f"{corpus}:3", "--calibration", f"{other}:1")
    status, _, err = run("compress", checkpoint, "--recipe", "reap", *texts, *limits, "--output", out)
    assert status == 0, err
    sources = json.loads((out / "plan.json").read_text(encoding="utf-8"))["calibration"]["sources"]
    assert [source["tokens"] for source in sources] == [768, 256]
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_data_free_compression_needs_no_text(run: Run, checkpoint: Path, tmp_path: Path):
    arguments = ("--recipe", "reap", "--set", "saliency=aimer", "--output", tmp_path / "out", "--quiet")
    status, _, err = run("compress", checkpoint, *arguments)
    assert status == 0, err


def test_evaluate_prints_and_saves(run: Run, checkpoint: Path, corpus: Path, tmp_path: Path):
    held_out = write_text(tmp_path / "held_out.jsonl", seed=2)
    limits = ("--max-tokens", 512, "--sequence-length", 64, "--tasks", "perplexity", "agreement", "--quiet")
    common = ("evaluate", "--text", held_out, "--reference", checkpoint, *limits)
    output = tmp_path / "result.json"
    status, out, err = run(*common, "--model", checkpoint, "--calibration", corpus, "--output", output)
    assert status == 0, err
    assert "perplexity" in out
    result = EvaluationResult.load(output)
    assert result.scores["kl"].value == pytest.approx(0, abs=1e-6)
    assert result.data["calibration_overlap"] == 0
    status, out, _ = run(*common, "--model", f"a={checkpoint}", "--model", f"b={checkpoint}", "--output", output)
    assert status == 0
    assert out.splitlines()[0].split() == ["score", "a", "b"]
    assert EvaluationResult.load(tmp_path / "result.b.json").scores == result.scores
    status, _, err = run(*common, "--model", checkpoint, "--calibration", held_out)
    assert status == 2
    assert "held-out" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Pass --text with held-out text, --lm-eval, or both"),
        (("--lm-eval", "films", "--limit", 0), "optimum-moe[eval]" if find_spec("lm_eval") is None else "limit=0"),
    ],
)
def test_evaluate_needs_text_or_tasks(run: Run, checkpoint: Path, arguments: tuple, message: str):
    status, _, err = run("evaluate", checkpoint, *arguments)
    assert status == 2
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "m-smo"), "did you mean 'm-smoe'"),
        (("--recipe", "none.yaml"), "No recipe file none.yaml"),
        (("--recipe", "m-smoe", "--num-experts", 4, "--keep-ratio", 0.5), "Give exactly one of"),
        (("--recipe", "m-smoe", "--num-experts", 9), "larger than the 8 experts"),
        (("--recipe", "m-smoe", "--num-experts", 3, "--set", "num_experts=4"), "given twice"),
        (("--recipe", "m-smoe", "--set", "similarty=router_weights"), "did you mean 'similarity'"),
        (("--recipe", "m-smoe", "--set", "align"), "has no value"),
        (("--recipe", "m-smoe", "--set", "protect=*.0.*"), "is not a YAML value"),
        (("--recipe", "m-smoe", "--set", "layers=1"), "must be lists"),
        (("--recipe", "m-smoe", "--dtype", "bfloat61"), "did you mean 'bfloat16'"),
    ],
)
def test_user_errors_have_no_traceback_and_exit_with_2(run: Run, checkpoint: Path, arguments: tuple, message: str):
    status, out, err = run("preview", checkpoint, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_destination_is_checked_first(run: Run, compress: Run, tmp_path: Path):
    (tmp_path / "file.txt").write_text("mine", encoding="utf-8")
    arguments = ("org/model", "--recipe", "reap", "--output", tmp_path)
    status, _, err = run("compress", *arguments)
    assert status == 2
    assert "is not empty" in err
    status, _, err = compress("--recipe", "reap", "--output", tmp_path / "out", "--save-statistics", tmp_path)
    assert status == 2
    assert "is not empty" in err
    out = tmp_path / "out"
    for kept in (out, out / "statistics"):
        status, _, err = compress("--recipe", "reap", "--output", out, "--save-statistics", kept)
        assert status == 2
        assert f"--save-statistics {kept} is in --output {out}, which is replaced as a whole" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_missing_data_and_wrong_arguments(run: Run, checkpoint: Path, tmp_path: Path):
    common = ("compress", checkpoint, "--recipe", "m-smoe")
    status, _, err = run(*common, "--output", tmp_path / "out")
    assert status == 2
    assert "Give --calibration" in err
    assert run(*common)[0] == 2
    assert run("preview", "--mod", checkpoint, "--recipe", "m-smoe")[0] == 2
    assert list(tmp_path.iterdir()) == []


FUNCTIONS = """
from __future__ import annotations

from dataclasses import dataclass

import torch

from optimum_moe import ExpertPruning, register_saliency, register_stage


@register_saliency("last_experts")
def last_experts(info) -> torch.Tensor:
    \"\"\"The later an expert, the better.\"\"\"
    return torch.arange(info.num_experts)


@register_saliency("no_tensor")
def no_tensor(info) -> list[int]:
    return list(range(info.num_experts))


@register_saliency("fails")
def fails(info) -> torch.Tensor:
    return torch.ones(info.number_of_experts)


@register_stage
@dataclass(frozen=True)
class KeepLast(ExpertPruning):
    \"\"\"Keep the last experts.\"\"\"

    name = "keep-last"

    saliency: str = "last_experts"
"""


def test_functions_and_stages_of_an_imported_file(run: Run, checkpoint: Path, tmp_path: Path):
    (tmp_path / "own.py").write_text(FUNCTIONS, encoding="utf-8")
    (tmp_path / "own.yaml").write_text("stage: keep-last\nnum_experts: 4\n", encoding="utf-8")
    imported = ("--import", tmp_path / "own.py")
    # Once more in one process, as no command does, the file replaces its own functions.
    for recipe in (("reap", "--set", "saliency=last_experts", "--num-experts", 4), (tmp_path / "own.yaml",)):
        out = tmp_path / f"out{len(recipe)}"
        status, _, err = run("compress", checkpoint, *imported, "--recipe", *recipe, "--output", out, "--quiet")
        assert (status, err) == (0, "")
        assert CompressionPlan.from_pretrained(out).blocks["model.layers.0.mlp"].dominants_G == (4, 5, 6, 7)
        assert run("verify", out, "--against", checkpoint, "--quiet")[0] == 0
    assert "The later an expert, the better." in run("inspect", "--list", *imported)[1]

    def pruned(saliency: str) -> tuple[int, str]:
        recipe = ("--recipe", "reap", "--set", f"saliency={saliency}", "--num-experts", 4)
        status, _, err = run("compress", checkpoint, *imported, *recipe, "--output", tmp_path / "none", "--quiet")
        return status, err.splitlines()[-1]

    assert pruned("no_tensor") == (
        2,
        "error: saliency 'no_tensor' must return a tensor of 8 finite values; for model.layers.0.mlp it returned a "
        "value of type list. Return a torch.Tensor.",
    )
    assert pruned("fails") == (
        1,
        "error: AttributeError: 'BlockInfo' object has no attribute 'number_of_experts'. It was raised in the saliency "
        "'fails' for model.layers.0.mlp. Repeat the command with --debug for the traceback, and report it if it is a "
        "bug in optimum_moe.",
    )
    status, err = pruned("first_experts")
    assert status == 2
    assert "saliency='first_experts' is unknown; did you mean 'last_experts'?" in err
    assert err.endswith("or register it first, with register_saliency (for a command, in a file: --import FILE).")


def test_files_that_cannot_be_imported(run: Run, checkpoint: Path, tmp_path: Path):
    for name in ("none.py", "own.yaml"):
        status, _, err = run("inspect", checkpoint, "--import", tmp_path / name)
        assert status == 2
        assert err == (
            f"error: --import {tmp_path / name}: there is no such Python file (the working directory is {Path.cwd()}). "
            "Give the path of a .py file that registers functions or stages of your own.\n"
        )
    broken = tmp_path / "broken.py"
    broken.write_text("import torch\nx = undefined\n", encoding="utf-8")
    status, _, err = run("inspect", checkpoint, "--import", broken)
    assert status == 1
    assert err.startswith(f"error: NameError: name 'undefined' is not defined. It was raised by --import {broken}. ")
    broken.write_text(
        "import optimum_moe\noptimum_moe.register_saliency('q')(lambda token_count: 1)\n", encoding="utf-8"
    )
    status, _, err = run("inspect", checkpoint, "--import", broken)
    assert status == 2
    assert err.startswith("error: saliency 'q': parameter='token_count' is unknown; did you mean 'token_count_E'?")
    assert err.endswith(f"'token_count_E'. It was raised by --import {broken}.\n")


def test_interrupt_exits_with_130(compress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optimum_moe.compressor, "write_model", lambda *_: signal.raise_signal(signal.SIGINT))
    status, _, err = compress("--recipe", "reap", "--output", tmp_path / "new" / "out", "--quiet")
    assert status == 130
    assert err.splitlines()[-1] == "interrupted"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_system_errors_exit_with_1(compress: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(optimum_moe.compressor, "write_model", fail)
    status, _, err = compress("--recipe", "reap", "--output", tmp_path / "out", "--quiet")
    assert status == 1
    assert "error: [Errno 5] Input/output error" in err
    assert list(tmp_path.iterdir()) == []


def test_values_of_arguments(tmp_path: Path):
    odd = tmp_path / "name:2"
    odd.touch()
    assert text_source(None) is None
    assert text_source(["a.txt"]) == "a.txt"
    assert text_source(["a.txt:2"]) == [("a.txt", 2.0)]
    assert text_source(["a.txt", "b:x.txt:0.5"]) == [("a.txt", 1.0), ("b:x.txt", 0.5)]
    assert text_source([str(odd)]) == str(odd)
    assert named_models(["org/a", "b=out/c"]) == {"a": "org/a", "b": "out/c"}
    with pytest.raises(ValueError, match="Two models are named 'a'"):
        named_models(["a", "x/a"])
    with pytest.raises(ValueError, match="lacks a path"):
        named_models(["a="])
    assert table([("name", "count"), ("a", 1000)]) == "name  count\na     1,000"


def test_warnings_are_plain_in_the_commands_only(run: Run, monkeypatch: pytest.MonkeyPatch):
    shown = []
    monkeypatch.setattr(
        "optimum_moe.cli.inspect.supported",
        lambda: shown.append(warnings.formatwarning("Add data.", UserWarning, "file.py", 1)) or {},
    )
    assert run("inspect", "--json")[0] == 0
    assert shown == ["warning: Add data.\n"]
    assert "file.py:1" in warnings.formatwarning("Add data.", UserWarning, "file.py", 1)


def test_verify_prints_the_checks_and_says_by_its_status_whether_they_passed(
    run: Run, compress: Run, checkpoint: Path, tmp_path: Path
):
    out = tmp_path / "out"
    compress("--recipe", "m-smoe", "--num-experts", 4, "--output", out, "--quiet")
    status, text, _ = run("verify", out, "--against", checkpoint, "--quiet")
    assert status == 0
    assert [line.split("  ")[0] for line in text.splitlines()] == [
        *("files", "side files", "plan", "config", "keys", "counts", "shapes", "experts", "routers", "other tensors"),
        *("mtp layers", "reload"),
    ]
    assert [line.split("  ok")[0].strip() for line in text.splitlines() if "  ok" in line][-1] == "reload"
    assert len([line for line in text.splitlines() if "  ok" in line]) == 12
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}), encoding="utf-8")
    status, text, _ = run("verify", out)
    assert status == 1
    assert "config      FAILED (" in text
    status, _, error = run("verify", tmp_path / "nothing")
    assert status == 2
    assert "is not a folder" in error


def test_released_checkpoints(run: Run, tmp_path: Path):
    save_with_mtp(tmp_path / "plain", "deepseek_v3", torch.bfloat16)
    original = to_fp8(tmp_path / "plain", tmp_path / "original")
    (tmp_path / "recipe.yaml").write_text("stage: expert-pruning\nnum_experts: 4\nsaliency: aimer\n", encoding="utf-8")
    recipe = (original, "--recipe", tmp_path / "recipe.yaml")
    status, _, error = run("preview", *recipe, "--mtp", "cut")
    assert status == 2
    assert "already quantized (fp8). Pass --dequantize to" in error
    status, _, error = run("compress", *recipe, "--dequantize", "--output", tmp_path / "out")
    assert status == 2
    assert "Pass --mtp copy" in error
    status, text, _ = run("inspect", original, "--dequantize", "--json")
    assert status == 0
    plain = json.loads(run("inspect", tmp_path / "plain", "--json")[1])
    # The class loads two routers of 8 x 64 and their biases in float32.
    assert {**json.loads(text), "model": ""} == {**plain, "model": "", "bytes": plain["bytes"] + 2 * 2 * 8 * 65}
    out = ("--output", tmp_path / "out", "--quiet")
    status, _, error = run("compress", *recipe, "--dequantize", "--mtp", "cut", *out)
    assert (status, error) == (0, "")
    assert run("verify", tmp_path / "out", "--against", original, "--quiet")[0] == 0


def test_statistics_of_a_checkpoint(run: Run, checkpoint: Path, corpus: Path, tmp_path: Path):
    looking = ("--statistics", "--calibration", corpus, "--max-tokens", 512, "--sequence-length", 64)
    status, out, err = run("inspect", checkpoint, *looking, "--output", tmp_path / "looked")
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["MoE", "block", "experts", "no"]
    assert [line.split()[:2] for line in lines[1:4]] == [[f"model.layers.{layer}.mlp", "8"] for layer in range(3)]
    assert f"{tmp_path / 'looked'}/look_inside.json" in lines[-1]
    written = json.loads((tmp_path / "looked" / "look_inside.json").read_text(encoding="utf-8"))
    assert {path.name for path in (tmp_path / "looked").glob("*.png")} == {
        "overview.png",
        *(f"block-00{number}.png" for number in range(3)),
    }
    status, out, _ = run("inspect", checkpoint, *looking, "--json")
    assert status == 0
    assert json.loads(out) == written
    assert written["calibration"]["num_tokens"] == 512
    status, _, err = run("inspect", checkpoint, *looking, "--output", tmp_path / "looked")
    assert status == 2
    assert "is not empty" in err


def test_a_recipe_that_trains_afterwards(compress: Run, run: Run, checkpoint: Path, corpus: Path, tmp_path: Path):
    text = {"source": str(corpus), "sequence_length": 32, "batch_size": 2}
    recipe = {"stage": "expert-pruning", "num_experts": 4, "recover": {"data": text, "learning_rate": 1e-4}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    given = ("--recipe", tmp_path / "recipe.yaml", "--set", "recover.max_tokens=1500")
    status, out, err = run("preview", checkpoint, *given)
    assert (status, err) == (0, "")
    assert "then trained: routers and norms, on 1,500 tokens" in out
    status, out, err = compress(*given, "--output", tmp_path / "out")
    assert status == 0, err
    assert "Routers and norms were trained on 1," in out
    assert run("verify", tmp_path / "out", "--against", checkpoint, "--quiet")[0] == 0
    written = (tmp_path / "out" / "recipe.yaml").read_text(encoding="utf-8")
    assert "recover:\n  max_tokens: 1500\n  data:\n    source: corpus.jsonl\n" in written
    status, out, _ = compress(*given, "--set", "recover.train=experts", "--output", tmp_path / "more", "--json")
    assert json.loads(out)["recovery"]["train"] == "experts"
    for arguments, message in (
        (("--set", "recover.trian=full"), "'trian'; did you mean 'train'. .* \\(--set recover.FIELD=VALUE\\)"),
        (("--set", "recover=router"), "recover='router' must be a mapping"),
        (("--streaming",), "Choose a run without --streaming where they fit"),
    ):
        status, _, err = compress(*given, "--output", tmp_path / "none", *arguments)
        assert status == 2
        assert re.search(message, err), err
    free = ("--recipe", "reap", "--set", "saliency=aimer", "--set", "recover={}", "--output", tmp_path / "none")
    status, _, err = run("compress", checkpoint, *free)
    assert status == 2
    assert "there is no text to train on" in err
    assert not (tmp_path / "none").exists()


def test_statistics_need_a_model_and_text(run: Run, checkpoint: Path, corpus: Path, tmp_path: Path):
    def refused(*arguments: object) -> str:
        status, _, err = run("inspect", *arguments)
        assert status == 2
        return err

    assert "Give it, as --calibration corpus.txt." in refused(checkpoint, "--statistics")
    assert "One MODEL is needed" in refused("--statistics", "--calibration", corpus)
    assert "there is no such file" in refused(checkpoint, "--statistics", "--calibration", tmp_path / "gone.txt")
    assert "Give one of the two." in refused(checkpoint, "--statistics", "--list", "--calibration", corpus)
    given = refused(checkpoint, "--calibration", corpus, "--no-packing", "--seed", 0)
    assert given == (
        "error: These are only for --statistics: --calibration, --no-packing, --seed. Add it, or leave them out.\n"
    )
    assert "max-memory 1,000 bytes is less" in refused(
        *(checkpoint, "--statistics", "--calibration", corpus, "--max-tokens", 512, "--sequence-length", 64),
        *("--max-memory", "1KB"),
    )


def test_recover_trains_and_says_what_it_won(compress: Run, run: Run, checkpoint: Path, corpus: Path, tmp_path: Path):
    small, better = tmp_path / "small", tmp_path / "better"
    assert compress("--recipe", "reap", "--num-experts", 4, "--output", small, "--quiet")[0] == 0
    common = ("recover", small, "--teacher", checkpoint, "--data", corpus, "--sequence-length", 32, "--batch-size", 2)
    status, out, err = run(*common, "--max-tokens", "1.5k", "--learning-rate", 1e-4, "--output", better)
    assert status == 0, err
    assert "Routers and norms were trained on 1," in out
    record = json.loads((better / "recovery.json").read_text(encoding="utf-8"))
    assert record["settings"]["max_tokens"] == 1500
    assert record["data"]["sources"][0]["name"] == "corpus.jsonl"
    assert run("verify", better, "--against", checkpoint, "--quiet")[0] == 0
    assert "Trained afterwards" in (better / "README.md").read_text(encoding="utf-8")
    for arguments, message in (
        (("--train", "expert"), "--train expert is unknown; did you mean 'experts'"),
        (("--held-out", corpus), "are in the training text .* as --held-out"),
        (("--max-tokens", "many"), "invalid tokens value: 'many'"),
        (("--data", tmp_path / "none.txt"), "there is no such file"),
    ):
        status, _, err = run(*common, "--output", tmp_path / "other", *arguments)
        assert status == 2
        assert re.search(message, err), err
    assert not (tmp_path / "other").exists()
