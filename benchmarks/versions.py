"""Which versions of transformers load what optimum_moe writes: all tensors equal, or an exception; nothing else.

Makes tiny checkpoints of several families, plain ones and such that need our structure, and loads each in every
version, with and without this package, with its own config and with the original's. Every version gets an environment
of its own in a cache folder; torch comes from the running one. A load counts as equal where saving again gives the same
tensors.

Example:
    python benchmarks/versions.py --output benchmarks/results/versions.md
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import optimum_moe
from optimum_moe import ByteBudget, CalibrationConfig, ExpertPruning, LowRankSparse, MoECompressor, MSMoE
from optimum_moe.autoload import SWITCH
from optimum_moe.hf.quantizer import SUPPORTED_TRANSFORMERS

VERSIONS = ("4.57.6", "5.0.0", "5.4.0", "5.10.4", "5.20.2", "5.23.0", "5.24.0")
CACHE = Path(__file__).parents[1] / ".cache" / "versions"
RECIPES = {
    "plain": ExpertPruning(num_experts=4),
    "map": MSMoE(num_experts=4),
    "factors": LowRankSparse(rank=8),
    "map and factors": [MSMoE(num_experts=4), LowRankSparse(rank=8)],
    "budget": ByteBudget(runs_in="transformers", share=0.5),
}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": SIZES | {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 16},
    "Mixtral": SIZES | {"num_local_experts": 8},
    "Olmoe": SIZES | {"num_experts": 8},
    "DeepseekV3": SIZES
    | _MLA
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "GptOss": SIZES | {"num_local_experts": 8, "head_dim": 16, "sliding_window": 16},
    "SwitchTransformers": {
        "vocab_size": 99,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 4,
        "num_decoder_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        "num_experts": 8,
    },
}
LOAD = """
import json, sys, tempfile
from pathlib import Path

from safetensors import safe_open
import transformers

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
transformers.logging.disable_progress_bar()


def stored(folder):
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found.update({name: tensors.get_tensor(name) for name in tensors.keys()})
    return found


def attempt(folder, original):
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    cls = getattr(transformers, config["architectures"][0], None)
    if cls is None:
        return "no such model"
    try:
        arguments = {"config": transformers.AutoConfig.from_pretrained(original)} if original else {}
        model, info = cls.from_pretrained(folder, output_loading_info=True, **arguments)
    except Exception as error:
        return type(error).__name__
    if info["missing_keys"]:
        return "%d RANDOM" % len(info["missing_keys"])
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        ours, theirs = stored(folder), stored(again)
    differing = [n for n in {**ours, **theirs} if n not in ours or n not in theirs or not ours[n].equal(theirs[n])]
    return "%d DIFFER" % len(differing) if differing else "equal"


for folder, original in json.loads(sys.argv[1]):
    print(json.dumps([folder, original, attempt(folder, original)]), flush=True)
"""


def environment(version: str) -> Path:
    """A folder with that version and what it requires, but for torch."""
    folder = CACHE / version
    if not (folder / "transformers").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-conflicts", "--target", str(folder)]
        subprocess.run([*command, f"transformers=={version}"], check=True)
    return folder


def make_checkpoints(folder: Path) -> Iterator[tuple[str, str, Path, Path]]:
    """`(family, kind, checkpoint, original)`."""
    for family, fields in FAMILIES.items():
        config = getattr(transformers, f"{family}Config")(**fields)
        head = "ForConditionalGeneration" if config.is_encoder_decoder else "ForCausalLM"
        original = folder / family / "original"
        torch.manual_seed(0)
        getattr(transformers, f"{family}{head}")(config).save_pretrained(original)
        # Released configs have the names that older versions know; transformers 5 saves some under another.
        written = json.loads((original / "config.json").read_text(encoding="utf-8"))
        (original / "config.json").write_text(json.dumps(fields | written), encoding="utf-8")
        ids = {"input_ids": torch.randint(3, 99, (8, 32))}
        yield family, "original", original, original
        data = [ids | ({"decoder_input_ids": ids["input_ids"]} if config.is_encoder_decoder else {})]
        for kind, method in RECIPES.items():
            checkpoint = folder / family / kind
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Calibration gave no token")
                compressor = MoECompressor.from_pretrained(original, method, CalibrationConfig(data), progress=False)
                compressor.apply()
            compressor.save_pretrained(checkpoint)
            yield family, kind, checkpoint, original


def load_all(version: str, ours: bool, jobs: list[tuple[str, str | None]]) -> dict[tuple[str, str | None], str]:
    """What became of each `(checkpoint, folder with the config to load it with)` in one version."""
    paths = [str(environment(version)), *([str(Path(optimum_moe.__file__).parents[1])] if ours else [])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), SWITCH: str(int(ours)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ("import optimum_moe\n" if ours else "") + LOAD, json.dumps(jobs)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"transformers {version} does not run here:\n{done.stderr[-2000:]}")
    return {(folder, original): outcome for folder, original, outcome in map(json.loads, done.stdout.splitlines())}


def may_load(version: str, ours: bool, kind: str, own_config: bool) -> bool:
    """Whether a load is one that should succeed: all others have to raise."""
    first, after = SUPPORTED_TRANSFORMERS
    supported = first <= tuple(map(int, version.split(".")[:2])) < after
    return kind == "original" or (own_config and (kind == "plain" or (ours and supported)))


def is_right(cell: str, loads: bool, original: str) -> bool:
    """Whether an outcome is what it has to be; a version that cannot load the original need not load ours."""
    raised = cell not in ("equal", "no such model") and " " not in cell
    return cell == "equal" or cell == original if loads else raised or cell == original != "equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file for the tables")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="of transformers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    lines, failures = [f"Checkpoints written by transformers {transformers.__version__}."], []
    with tempfile.TemporaryDirectory() as folder:
        made = list(make_checkpoints(Path(folder)))
        jobs = [(str(path), config) for _, _, path, original in made for config in (None, str(original))]
        for ours in (False, True):
            found = {version: load_all(version, ours, jobs) for version in arguments.versions}
            for own in (True, False):
                config = "its own config" if own else "`config=` of the original"
                lines += ["", f"## {'With' if ours else 'Without'} optimum_moe, {config}", ""]
                lines += ["| checkpoint | " + " | ".join(arguments.versions) + " |"]
                lines += ["|---" * (1 + len(arguments.versions)) + "|"]
                for family, kind, path, original in made:
                    key, first = (str(path), None if own else str(original)), (str(original), None)
                    cells = [found[version][key] for version in arguments.versions]
                    failures += [
                        f"{family}, {kind} in {version}, {'with' if ours else 'without'} optimum_moe, {config}: {cell}"
                        for version, cell in zip(arguments.versions, cells, strict=True)
                        if not is_right(cell, may_load(version, ours, kind, own), found[version][first])
                    ]
                    lines.append(f"| {family}, {kind} | " + " | ".join(cells) + " |")
    text = "\n".join([*lines, "", f"{len(failures)} failures.", *failures]) + "\n"
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
