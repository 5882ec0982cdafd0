"""Digests of what every preset makes of the reference model and six tiny families: proof that a change changes nothing.

    python benchmarks/digests.py --write before.json          # before the first move
    python benchmarks/digests.py --check before.json          # after it: exit code 1 and the names of what differs
    python benchmarks/digests.py --check benchmarks/results/digests.json --seeds 0    # as `make test-all` does

One line for each model, recipe, engine and seed: a digest of every tensor of the checkpoint (name, dtype, shape, bytes)
and one of the plan in a neutral form (which experts form a group, their weights and orders, router rows, sizes). Equal
digests are promised for one kind of machine only, which the file names: other processors and versions round sums
differently, and there --check says so and compares nothing. A change that is meant to change results writes the file
again, and its commit says which digests it changes. `--seeds 0` takes minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from reference import CALIBRATION, REFERENCES, ROOT
from safetensors import safe_open

from optimum_moe import (
    ByteBudget,
    CalibrationConfig,
    CompressionPlan,
    ExpertPruning,
    LowRankSparse,
    MoECompressor,
    MSMoE,
)

sys.path.insert(0, str(ROOT))

from tests.tiny_models import build, by_name, inputs_for

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "switch_transformers")
ENGINES = ("memory", "streaming")


def recipes(rank: int) -> dict[str, Any]:
    """The presets, with a rank that fits the model."""
    adaptive = MSMoE(keep_ratio=0.5, allocation="adaptive")
    return {
        "m-smoe": MSMoE(keep_ratio=0.5),
        "m-smoe-plain": MSMoE(keep_ratio=0.5, routing="reduce"),
        "m-smoe-adaptive": adaptive,
        "mc-smoe": [adaptive, LowRankSparse(rank=rank, whiten=False)],
        "mc-smoe-fast": [adaptive, LowRankSparse(rank=rank)],
        "reap": ExpertPruning(keep_ratio=0.5),
        "budget": ByteBudget(runs_in="transformers", share=0.5),
    }


def runs(seeds: list[int], engines: list[str], models: list[str], folder: Path) -> Iterator[tuple[str, Path, Any, Any]]:
    """Name, checkpoint, recipe and calibration of every run."""
    for name in models:
        if name == "reference":
            checkpoint, rank = REFERENCES["reference"].model, 32
        else:
            checkpoint, rank = folder / name, 8
            if not checkpoint.is_dir():
                build(name).save_pretrained(checkpoint)
        for recipe, method in recipes(rank).items():
            if name != "reference" and by_name(name).refuses(recipe.replace("m-smoe-plain", "reduce")):
                continue
            for seed in seeds:
                for engine in engines:
                    if name == "reference":
                        data = CalibrationConfig(str(CALIBRATION), sequence_length=256, max_tokens=8192, seed=seed)
                    else:
                        batches = [inputs_for(name, rows=4, length=32, seed=10 * seed + i) for i in range(4)]
                        data = CalibrationConfig(batches, seed=seed)
                    yield f"{name}/{recipe}/{engine}/{seed}", checkpoint, method, data


def tensors_digest(checkpoint: Path) -> str:
    """Of every tensor of a checkpoint: name, dtype, shape and bytes."""
    lines = []
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name).contiguous()
                data = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
                lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {data}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def plan_digest(plan: CompressionPlan) -> str:
    """Of what a plan decided, in words that do not change with its classes."""
    record: dict[str, Any] = {}
    for name, block in plan.blocks.items():
        sizes = block.sizes
        record[name] = {
            "labels": list(block.labels_E),
            "dominants": list(block.references_G),
            "routing": block.routing,
            "weights": of_tensor(block.merge_weights_E.double()),
            "orders": of_tensor(None if block.permutations_EI is None else block.permutations_EI.long()),
            "router weights": of_tensor(None if block.router_weights_E is None else block.router_weights_E.double()),
            "widths": None if sizes is None else list(sizes.widths),
            "ranks": None if sizes is None else {n: list(v) for n, v in sorted(sizes.table("low_rank").items())},
            "rows": None
            if sizes is None
            else {n: list(v) for n, v in sorted(sizes.table("sparse_rows").items()) if any(v)},
            "neurons": [of_tensor(n) for n in block.neurons or ()],
        }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def of_tensor(tensor: torch.Tensor | None) -> str | None:
    if tensor is None:
        return None
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def digests(arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        chosen = arguments.seeds, arguments.engines, arguments.models
        for name, checkpoint, method, data in runs(*chosen, folder):
            output = folder / "out"
            compressor = MoECompressor.from_pretrained(
                checkpoint,
                method,
                data,
                seed=data.seed,
                engine=name.split("/")[2],
                output_dir=output,
                overwrite=True,
                progress=False,
            )
            compressor.apply()
            assert compressor.plan is not None
            found[name] = {"tensors": tensors_digest(output), "plan": plan_digest(compressor.plan)}
            print(name, found[name], flush=True)
    return found


def kind_of_machine() -> dict[str, str]:
    """What decides how sums are rounded."""
    return {
        # Matrix products choose their kernels by the vendor as well.
        "processor": f"{_vendor()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _vendor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.is_file() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("vendor_id"))
    return next(names, platform.processor())


def differences(before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What differs among the runs of `now`."""
    changed = []
    for name, found in now.items():
        if name not in before:
            changed.append(f"{name}: new")
        changed += [f"{name}: {part}" for part in found if name in before and before[name].get(part) != found[part]]
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, help="file for the digests")
    what.add_argument("--check", type=Path, help="file of an earlier --write to compare with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--models", nargs="+", choices=("reference", *FAMILIES), default=["reference", *FAMILIES])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    here = kind_of_machine()
    before = None if arguments.write else json.loads(arguments.check.read_text(encoding="utf-8"))
    if before is not None and before["machine"] != here:
        print(f"{arguments.check} was written on {before['machine']}, this is {here}: nothing is compared.")
        return
    found = digests(arguments)
    if before is None:
        record = {"machine": here, "runs": found}
        arguments.write.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return
    changed = differences(before["runs"], found)
    print(f"{len(found)} runs, {len(changed)} differences")
    print("\n".join(changed))
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
