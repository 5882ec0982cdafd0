"""The tables of MC-SMoE on real tasks: how much of a task each method keeps, one-shot and trained afterwards.

    python benchmarks/tasks.py [--tasks "movie snippets" ...] [--models switch qwen3_moe] [--seeds 0 1 2]

For every task of `task_data.py` and every model of `task_models.py`: the model is trained from scratch on the task,
compressed by M-SMoE, MC-SMoE, the byte budget and the baselines, and each is trained afterwards on the labels and the
original's predictions with the loss of the paper (cross-entropy and 0.2 T^2 KL at T = 2), all parameters, for a
`--share` of the epochs of the original. Merges and pruning leave a quarter of the experts; MC-SMoE of these rank 16
and a tenth of the rows, the trained one by the paper's schedule. Pruning is calibrated on the task: by frequency it is
what the paper compares with as task-specific pruning. A dense model with as many neurons as a token meets is trained as
the original was. The first seed has all methods, the others the ones of `ALL_SEEDS`; the seed is that of the model, its
training, the calibration and the training afterwards.

Scored by greedy generation: a text counts if the model writes exactly its label. The best epoch, and the best state of
a training afterwards, are chosen on a dev split. A task counts if the original beats the most frequent class by five
points and three standard errors. kept = (score - most frequent class) / (original - most frequent class). FLOPs are
those that torch counts for a batch of test texts and their labels. Results are kept in `.cache/tasks`, and an
interrupted run goes on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from task_data import CACHE, TASKS, Task, majority, train_tokenizer
from task_models import ARCHITECTURES, NUM_EXPERTS
from transformers import AutoTokenizer, PreTrainedModel

from optimum_moe import (
    ByteBudget,
    CalibrationConfig,
    ExpertPruning,
    LowRankSparse,
    MoECompressor,
    MSMoE,
    recover,
)
from optimum_moe.evaluation import EvaluationResult, LabeledExamples, mcnemar, score_examples
from optimum_moe.stages import Stage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from msmoe_on_a_task import DISTILLATION, SCORE, Training, finetune, flops_of, load

ORIGINAL, DENSE = "original", "dense, what a token meets"
ONE_SHOT, TRAINED = "one-shot", "trained"
ADAPTIVE = MSMoE(keep_ratio=0.25, allocation="adaptive")
COMPARED: dict[str, list[Stage]] = {
    "M-SMoE, 25%": [ADAPTIVE],
    "MC-SMoE, 25%": [ADAPTIVE, LowRankSparse(rank=16, density=0.1, whiten=False)],
    "byte budget, 50%": [ByteBudget(share=0.5, runs_in="transformers")],
    "byte budget, 25%": [ByteBudget(share=0.25, runs_in="transformers")],
    "byte budget, 10%": [ByteBudget(share=0.1, runs_in="transformers")],
    "plain average, 25%": [MSMoE(keep_ratio=0.25, weighting="uniform")],
    "HC-SMoE, 25%": [MSMoE(keep_ratio=0.25, similarity="expert_outputs", grouping="average_linkage", align=False)],
    "REAP pruning, 25%": [ExpertPruning(keep_ratio=0.25, saliency="reap")],
    "frequency pruning, 25%": [ExpertPruning(keep_ratio=0.25, saliency="frequency")],
    "random pruning, 25%": [ExpertPruning(keep_ratio=0.25, saliency="random")],
}
ALL_SEEDS = ("M-SMoE, 25%", "MC-SMoE, 25%", "byte budget, 10%")
UNPRUNED = [ADAPTIVE, LowRankSparse(rank=16, density=1.0, whiten=False)]
"""What the trained MC-SMoE starts from: all rows, which are pruned while it trains."""
TRAININGS = {
    "movie snippets": Training(epochs=2, learning_rate=1e-3, batch_size=32, embedding_factor=10),
    "BBC topics": Training(epochs=2, learning_rate=1e-3, batch_size=16, embedding_factor=10),
    "spam": Training(epochs=2, learning_rate=1e-3, batch_size=32, embedding_factor=10),
}
CALIBRATION_EXAMPLES = 512
POINTS, ERRORS = 0.05, 3


@dataclass(frozen=True)
class Bench:
    """A task, a model and a seed, with the folder of their results."""

    task: Task
    model: str
    seed: int
    splits: Mapping[str, LabeledExamples]
    folder: Path

    @property
    def original(self) -> Path:
        """The folder of the original."""
        return self.folder / ORIGINAL

    @property
    def tokenizer(self) -> Any:
        """That of the original."""
        return AutoTokenizer.from_pretrained(self.original)

    def file(self, name: str, state: str) -> Path:
        """Where a result is kept."""
        return self.folder / f"{name}-{state}.json".replace(" ", "_").replace(",", "").replace("%", "")

    def batches(self, split: str, count: int | None = None) -> list[dict[str, torch.Tensor]]:
        """Batches of a split, the examples of which are in random order."""
        examples = self.splits[split]
        chosen = replace(examples, inputs=examples.inputs[:count], targets=examples.targets[:count])
        model, size = load(self.original), TRAININGS[self.task.name].batch_size
        return chosen.batches(model, self.tokenizer, size)


def stored_bytes(folder: Path) -> int:
    """Bytes of the weights, without the plan, which no model needs to run."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors") if not f.name.startswith("plan"))


def expert_bytes(model: PreTrainedModel) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)


def measured(bench: Bench, folder: Path, seconds: float, **told: Any) -> EvaluationResult:
    """The score of a checkpoint, with its sizes."""
    model = load(folder)
    result = score_examples(model, bench.tokenizer, bench.splits["test"], progress=False)
    sizes = {"bytes": stored_bytes(folder), "flops": flops_of(model, bench.batches("test", 64)[0]), "seconds": seconds}
    return replace(result, data={**result.data, **sizes, **told})


def from_scratch(bench: Bench, name: str, num_experts: int) -> EvaluationResult:
    """The score of a model that was trained on the labels alone, once."""
    file = bench.file(name, ONE_SHOT)
    if file.is_file():
        return EvaluationResult.load(file)
    started = time.process_time()
    torch.manual_seed(bench.seed)
    architecture, folder = ARCHITECTURES[bench.model], bench.original if name == ORIGINAL else file.with_suffix("")
    model, tokenizer = architecture.make(num_experts), train_tokenizer(bench.splits["train"])
    training = TRAININGS[bench.task.name]
    finetune(model, tokenizer, bench.splits["train"], bench.splits["dev"], training, architecture.balance, bench.seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = measured(bench, folder, time.process_time() - started, experts=expert_bytes(model))
    result.save(file)
    return result


def compress(bench: Bench, stages: list[Stage], folder: Path) -> Path:
    """A one-shot checkpoint, made once."""
    if not folder.is_dir():
        data = CalibrationConfig(bench.batches("train", CALIBRATION_EXAMPLES), seed=bench.seed)
        compressor = MoECompressor.from_pretrained(bench.original, stages, data, seed=bench.seed, progress=False)
        compressor.apply()
        compressor.save_pretrained(folder)
    return folder


def one_shot(bench: Bench, name: str) -> EvaluationResult:
    file = bench.file(name, ONE_SHOT)
    if file.is_file():
        return EvaluationResult.load(file)
    started = time.process_time()
    folder = compress(bench, COMPARED[name], file.with_suffix(""))
    result = measured(bench, folder, time.process_time() - started)
    result.save(file)
    return result


def trained(bench: Bench, name: str, epochs: float, train: str = "full", rate: float | None = None) -> EvaluationResult:
    """The score after a training with the original as teacher."""
    file = bench.file(name, TRAINED)
    if file.is_file():
        return EvaluationResult.load(file)
    started = time.process_time()
    settings: dict[str, Any] = dict(DISTILLATION)
    folder = bench.file(name, ONE_SHOT).with_suffix("")
    if name.startswith("MC-SMoE"):
        folder = compress(bench, UNPRUNED, bench.folder / "unpruned")
        settings["final_density"] = 0.1
    data = bench.batches("train")
    done = recover(
        folder,
        teacher=load(bench.original),
        data=data,
        held_out=bench.batches("dev"),
        train=train,
        learning_rate=rate,
        max_tokens=round(epochs * sum(int(batch["attention_mask"].sum()) for batch in data)),
        output_dir=file.with_suffix(""),
        overwrite=file.with_suffix("").is_dir(),
        seed=bench.seed,
        progress=False,
        **settings,
    )
    told = {"kl_before": done.record.kl_before, "kl_after": done.record.kl_after, "best_step": done.record.best_step}
    result = measured(bench, file.with_suffix(""), time.process_time() - started, **told)
    result.save(file)
    return result


Results = dict[tuple[str, str], list[EvaluationResult]]
"""Results of the seeds by method and state."""


def run(task: Task, model: str, arguments: argparse.Namespace) -> tuple[Results, float]:
    """All results of a task and a model, and the share of the most frequent class."""
    found: Results = {}
    splits = task.splits(arguments.cache)
    for seed in arguments.seeds:
        folder = arguments.cache / "runs" / model / task.name.replace(" ", "_") / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(task, model, seed, splits, folder)
        results = {(ORIGINAL, ONE_SHOT): from_scratch(bench, ORIGINAL, NUM_EXPERTS)}
        if seed == arguments.seeds[0]:
            results[DENSE, ONE_SHOT] = from_scratch(bench, DENSE, 1)
        print(f"{task.name}, {model}, seed {seed}: {results[ORIGINAL, ONE_SHOT].scores[SCORE]}", flush=True)
        for name in COMPARED if seed == arguments.seeds[0] else ALL_SEEDS:
            if arguments.only and not any(part in name for part in arguments.only):
                continue
            results[name, ONE_SHOT] = one_shot(bench, name)
            if not arguments.one_shot or bench.file(name, TRAINED).is_file():
                epochs = arguments.share * TRAININGS[task.name].epochs
                results[name, TRAINED] = trained(bench, name, epochs)
            values = {s: f"{r.scores[SCORE].value:.3f}" for (n, s), r in results.items() if n == name}
            print(f"    {name}: {values}", flush=True)
        for key, result in results.items():
            found.setdefault(key, []).append(result)
    return found, majority(splits["test"])


def kept(results: Results, key: tuple[str, str], frequent: float) -> list[float]:
    """What each seed keeps of its original."""
    pairs = zip(results[key], results[ORIGINAL, ONE_SHOT], strict=False)
    return [(r.scores[SCORE].value - frequent) / (o.scores[SCORE].value - frequent) for r, o in pairs]


def counts(original: EvaluationResult, frequent: float) -> bool:
    """Whether a task says something about a model."""
    score = original.scores[SCORE]
    error = math.sqrt(score.value * (1 - score.value) / score.count)
    return score.value - frequent >= max(POINTS, ERRORS * error)


def spread(values: list[float], digits: str) -> str:
    mean = format(statistics.mean(values), digits)
    return mean if len(values) == 1 else f"{mean} ({format(min(values), digits)} to {format(max(values), digits)})"


def table(results: Results, frequent: float) -> list[str]:
    """A row for each method and state."""
    original = results[ORIGINAL, ONE_SHOT]
    base = original[0].data
    lines = [
        "| method | state | exact match | kept | expert bytes | FLOPs | only original / only this right, p | CPU s |"
    ]
    lines += ["|---" * 8 + "|"]
    for (name, state), found in results.items():
        values, first = [r.scores[SCORE].value for r in found], found[0]
        share = (first.data["bytes"] - base["bytes"] + base["experts"]) / base["experts"]
        only_original, only_this, p = mcnemar(original[0], first, SCORE)
        cells = [name, "" if name in (ORIGINAL, DENSE) else state, spread(values, ".3f")]
        cells += ["" if name == ORIGINAL else spread(kept(results, (name, state), frequent), ".0%")]
        cells += [f"{share:.1%}", f"{first.data['flops'] / base['flops']:.1%}"]
        cells += ["" if name == ORIGINAL else f"{only_original} / {only_this}, {p:.2g}"]
        cells += [f"{statistics.mean(r.data['seconds'] for r in found):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=["switch"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="methods whose name contains one of these")
    parser.add_argument("--one-shot", action="store_true", help="train nothing afterwards that was not yet")
    parser.add_argument("--share", type=float, default=0.5, help="epochs of a training afterwards, of the original's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Calibration gave no token|Training never lowered|'pin_memory'")
    lines: list[str] = []
    for model in arguments.models:
        for name in arguments.tasks:
            results, frequent = run(TASKS[name], model, arguments)
            lines += [f"## {name}, {ARCHITECTURES[model].description}", ""]
            seeds = results[ORIGINAL, ONE_SHOT]
            known = all(counts(result, frequent) for result in seeds)
            lines += [
                f"{TASKS[name].source}. {seeds[0].scores[SCORE].count} test texts, most frequent class {frequent:.3f}: "
                + ("counts." if known else "does not count, the original is too near to that class."),
                "",
            ]
            lines += [*table(results, frequent), ""]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
