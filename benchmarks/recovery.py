"""What training afterwards wins back: KL, perplexity, choice and loops before and after, of three compressed models.

    python benchmarks/recovery.py [--on reference] [--train router experts] [--tokens 300000]
    python benchmarks/recovery.py --on reference_deepseek
    python benchmarks/recovery.py --on reference_deepseek --train experts --reconstruct 0.5 --only REAP --seed 1

REAP pruning to half of the experts, the byte budget for any runtime at half, and the byte budget for transformers at a
quarter of the experts' bytes, each one-shot and trained on the original's predictions: routers and norms alone, and
everything that is stored of the experts. With `--reconstruct` each block is first fitted to the original's on that
share of the tokens. The text is that of the reference model's training, without its calibration documents and without
the held-out ones (`reference_text.py` downloads it). Measured on the bundled held-out documents, which neither
calibration nor training sees; settings were chosen on another held-out document, which is not shipped.
Results are kept in `.cache/recovery`, and an interrupted training goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from reference import CALIBRATION, HELD_OUT, REFERENCES, ROOT, Reference
from reference_text import CACHE, load_documents
from reference_text import CALIBRATION as CALIBRATION_TITLES
from reference_text import HELD_OUT as HELD_OUT_TITLES

from optimum_moe import ByteBudget, CalibrationConfig, ExpertPruning, MoECompressor, recover
from optimum_moe.evaluation import EvaluationResult, evaluate
from optimum_moe.stages import Stage

ORIGINAL = "original"
BEFORE = "one-shot"
LENGTH, ROWS = 256, 4
_EVALUATION: dict[str, Any] = {"max_tokens": 8192, "num_questions": 100, "num_prompts": 16}


@dataclass(frozen=True)
class Job:
    """One compressed model, before or after a training.

    Args:
        name: What the table calls it.
        stage: How it is compressed.
        train: What trains, `BEFORE` for nothing.
        reconstruct: Share of the tokens on which blocks are fitted first.
    """

    name: str
    stage: Stage
    train: str
    reconstruct: float = 0.0

    @property
    def trained(self) -> str:
        """What the table calls the training."""
        return f"{self.train}, {self.reconstruct:.0%} by block" if self.reconstruct else self.train


def jobs(reference: Reference, trains: list[str], reconstruct: float = 0.0) -> list[Job]:
    count = reference.experts_at(0.5)
    assert count is not None
    stages = {
        "REAP pruning, 50%": ExpertPruning(num_experts=count, saliency="reap"),
        "byte budget, any runtime, 50%": ByteBudget(share=0.5, runs_in="any"),
        "byte budget, transformers, 25%": ByteBudget(share=0.25, runs_in="transformers"),
    }
    trainings = [(BEFORE, 0.0), *((train, reconstruct) for train in trains)]
    return [Job(name, stage, *training) for name, stage in stages.items() for training in trainings]


def training_text(cache: Path) -> list[tuple[list[str], float]]:
    """The sources of the original's training, each with as many tokens."""
    left_out = {*HELD_OUT_TITLES, *CALIBRATION_TITLES}
    by_source: dict[str, list[str]] = {}
    for document in load_documents(cache):
        if document.title not in left_out:
            by_source.setdefault(document.title.partition("/")[0], []).append(document.text)
    return [(texts, 1.0) for texts in by_source.values()]


def key_of(reference: Reference, tokens: int, seed: int) -> str:
    """Distinguishes results of another model, text or amount."""
    digest = hashlib.sha256()
    for path in (*sorted(reference.model.glob("*.safetensors")), CALIBRATION, HELD_OUT):
        digest.update(path.read_bytes())
    digest.update(f"{_EVALUATION} {tokens} {LENGTH} {ROWS} {seed} by source".encode())
    return digest.hexdigest()[:12]


def file_of(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}-{job.trained}.json".replace(" ", "_").replace(",", "").replace("%", "")


def compressed(reference: Reference, job: Job, folder: Path, seed: int = 0) -> Path:
    """The one-shot checkpoint, made once."""
    out = folder / file_of(folder, replace(job, train="checkpoint", reconstruct=0.0)).stem
    if not out.is_dir():
        calibration = CalibrationConfig(str(CALIBRATION), sequence_length=LENGTH, max_tokens=32768, seed=seed)
        compressor = MoECompressor.from_pretrained(reference.model, job.stage, calibration, progress=False)
        compressor.apply()
        compressor.save_pretrained(out)
    return out


def run(reference: Reference, job: Job, folder: Path, arguments: argparse.Namespace) -> EvaluationResult:
    """The scores of a job, measured unless they were."""
    file = file_of(folder, job)
    if file.is_file():
        return EvaluationResult.load(file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference.model)
    told: dict[str, Any] = {}
    path = reference.model if job.name == ORIGINAL else compressed(reference, job, folder, arguments.seed)
    if job.train != BEFORE:
        started = time.perf_counter()
        done = recover(
            path,
            teacher=reference.model,
            data=CalibrationConfig(training_text(arguments.text), sequence_length=LENGTH, batch_size=ROWS),
            train=job.train,
            max_tokens=arguments.tokens,
            reconstruct=job.reconstruct,
            seed=arguments.seed,
            output_dir=folder / file.stem,
            overwrite=(folder / file.stem).is_dir(),
            progress=sys.stderr.isatty(),
        )
        told = {"seconds": time.perf_counter() - started, "tokens": done.record.tokens, "best": done.record.best_step}
        path = folder / file.stem
    result = evaluate(
        transformers.AutoModelForCausalLM.from_pretrained(path),
        str(HELD_OUT),
        transformers.AutoModelForCausalLM.from_pretrained(reference.model),
        tokenizer,
        progress=sys.stderr.isatty(),
        **_EVALUATION,
    )
    replace(result, data={**result.data, **told}).save(file)
    return EvaluationResult.load(file)


def row(job: Job, result: EvaluationResult, original: EvaluationResult, before: EvaluationResult) -> str:
    scores, base = result.scores, original.scores["perplexity"].value
    kl, lost = scores["kl"].value, before.scores["kl"].value
    cells = [f"x{scores['perplexity'].value / base:.3f}", f"{kl:.4f}"]
    cells += ["" if job.train == BEFORE else f"{1 - kl / lost:.0%}"]
    cells += [f"{scores[name].value:.3f}" for name in ("top1_agreement", "choice_accuracy", "loop_rate")]
    cells += [f"{result.data['tokens']:,}" if "tokens" in result.data else ""]
    cells += [f"{result.data['seconds']:.0f}" if "seconds" in result.data else ""]
    return f"| {job.name} | {job.trained} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, default="reference")
    parser.add_argument("--train", nargs="*", default=["router", "experts"])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--reconstruct", type=float, default=0.0, help="fit blocks first, on this share of the tokens")
    parser.add_argument("--seed", type=int, default=0, help="of calibration and training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="compressed models whose name contains this")
    parser.add_argument("--text", type=Path, default=CACHE, help="where the training text is, or is downloaded to")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "recovery")
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    reference = REFERENCES[arguments.on]
    folder = arguments.cache / key_of(reference, arguments.tokens, arguments.seed)
    folder.mkdir(parents=True, exist_ok=True)
    original = run(reference, Job(ORIGINAL, ExpertPruning(keep_ratio=1.0), BEFORE), folder, arguments)
    names = ("perplexity", "choice_accuracy", "loop_rate")
    scores = ", ".join(f"{n} {original.scores[n].value:.3f}" for n in names)
    lines = [reference.source_line, "", f"Original: {scores}. {arguments.threads} threads of a CPU.", ""]
    lines += ["| compressed | trained | perplexity | KL | won back | top-1 | choice | loops | tokens | seconds |"]
    lines += ["|---" * 10 + "|"]
    before = original
    for job in jobs(reference, arguments.train, arguments.reconstruct):
        if arguments.only and arguments.only not in job.name:
            continue
        result = run(reference, job, folder, arguments)
        before = result if job.train == BEFORE else before
        lines.append(row(job, result, original, before))
        print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
