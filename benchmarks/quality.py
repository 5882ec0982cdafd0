"""Quality of M-SMoE and its baselines on a bundled reference model, on held-out text.

    python benchmarks/quality.py [--on reference] [--seeds 0 1 2] [--max-tokens 32768]

For 75, 50 and 25% of the experts and every variant of `reference.VARIANTS` that the model's router allows: perplexity
relative to the original, KL and top-1 agreement, multiple choice, generation agreement and loop rate: mean over
calibration seeds and the spread (largest minus smallest). Below it the paired difference of each baseline's KL to
M-SMoE's, with a 95% interval.
All rows of one share store the same number of experts; merged ones activate at most as many as the original.
Results of finished seeds are kept in `.cache/quality`, so that an interrupted run continues.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics as stats
import sys
import warnings
from pathlib import Path

import torch
import transformers
from reference import CALIBRATION, HELD_OUT, REFERENCES, ROOT

from optimum_moe import CalibrationConfig, MoECompressor
from optimum_moe.evaluation import EvaluationResult, evaluate_many, paired_difference

CACHE = ROOT / ".cache" / "quality"
COLUMNS = ("perplexity", "kl", "top1_agreement", "choice_accuracy", "generation_agreement", "loop_rate")
ORIGINAL = "original"


def key_of(arguments: argparse.Namespace) -> str:
    """Distinguishes results of another model, text or amount of evaluation."""
    digest = hashlib.sha256()
    for path in (arguments.model / "model.safetensors", CALIBRATION, HELD_OUT):
        digest.update(path.read_bytes())
    digest.update(f"{arguments.max_tokens} {arguments.calibration_tokens} {arguments.questions}".encode())
    return digest.hexdigest()[:12]


def run_seed(seed: int, share: int, arguments: argparse.Namespace) -> dict[str, EvaluationResult]:
    """All variants for one calibration seed and share of experts, the original among them."""
    folder = CACHE / key_of(arguments) / f"seed{seed}-{share}"
    reference = REFERENCES[arguments.on]
    variants = reference.variants(reference.num_experts * share // 100)
    files = {name: folder / f"{name.replace(' ', '_')}.json" for name in (ORIGINAL, *variants)}
    missing = {name: method for name, method in variants.items() if not files[name].is_file()}
    if not missing and files[ORIGINAL].is_file():
        return {name: EvaluationResult.load(file) for name, file in files.items()}
    calibration = CalibrationConfig(
        str(CALIBRATION), sequence_length=256, max_tokens=arguments.calibration_tokens, seed=seed
    )
    models, statistics = {ORIGINAL: transformers.AutoModelForCausalLM.from_pretrained(arguments.model)}, None
    for name, method in missing.items():
        compressor = MoECompressor.from_pretrained(arguments.model, method, calibration, seed=seed, progress=False)
        statistics = statistics or compressor.calibrate()
        models[name] = compressor.apply(statistics=statistics)
    results = evaluate_many(
        models,
        str(HELD_OUT),
        reference=models[ORIGINAL],
        tokenizer=transformers.AutoTokenizer.from_pretrained(arguments.model),
        calibration=str(CALIBRATION),
        max_tokens=arguments.max_tokens,
        num_questions=arguments.questions,
        num_prompts=32,
        progress=sys.stderr.isatty(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in results.items():
        result.save(files[name])
    return {name: results.get(name) or EvaluationResult.load(file) for name, file in files.items()}


def cell(values: list[float], digits: int, factor: str = "") -> str:
    spread = max(values) - min(values)
    return f"{factor}{stats.mean(values):.{digits}f} ({spread:.{digits}f})"


def table(by_seed: list[dict[str, EvaluationResult]], share: int) -> list[str]:
    """Markdown rows of one share."""
    lines = []
    for name in list(by_seed[0])[1:]:
        cells = []
        for column in COLUMNS:
            values = [results[name].scores[column].value for results in by_seed]
            if column == "perplexity":
                base = by_seed[0][ORIGINAL].scores[column].value
                cells.append(cell([value / base for value in values], 3, "x"))
            else:
                cells.append(cell(values, 4 if column == "kl" else 3))
        lines.append(f"| {share}% | {name} | " + " | ".join(cells) + " |")
    return lines


def differences(by_seed: list[dict[str, EvaluationResult]], share: int) -> list[str]:
    """KL of each baseline minus KL of M-SMoE, paired by window, for each seed."""
    lines = []
    for name in list(by_seed[0])[2:]:
        cells = []
        for results in by_seed:
            mean, low, high = paired_difference(results[name], results["M-SMoE"], "kl")
            cells.append(f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]")
        lines.append(f"| {share}% | {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--on", choices=REFERENCES, default="reference")
    parser.add_argument("--model", type=Path, help="another checkpoint of the same shape")
    parser.add_argument("--shares", type=int, nargs="+", default=[75, 50, 25], help="per cent of the experts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-tokens", type=int, default=32768)
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="Calibration gave no token")
    arguments.model = arguments.model or REFERENCES[arguments.on].model
    lines = [REFERENCES[arguments.on].source_line, ""]
    header = "| experts | variant | perplexity | KL | top-1 | choice | generation | loops |"
    rows, paired, original = [], [], None
    for share in arguments.shares:
        by_seed = [run_seed(seed, share, arguments) for seed in arguments.seeds]
        original = original or by_seed[0][ORIGINAL]
        added = table(by_seed, share)
        rows += added
        paired += differences(by_seed, share)
        print("\n".join(added), flush=True)
    assert original is not None
    scores = {name: original.scores[name] for name in ("perplexity", "choice_accuracy", "loop_rate")}
    lines.append("Original: " + ", ".join(f"{n} {s.value:.3f} [{s.low:.3f}, {s.high:.3f}]" for n, s in scores.items()))
    lines += ["", header, "|---" * 8 + "|", *rows, ""]
    lines.append("KL minus that of M-SMoE on the same windows, 95% interval, one column a seed:")
    lines += ["", "| experts | variant | " + " | ".join(f"seed {s}" for s in arguments.seeds) + " |"]
    lines += ["|---" * (2 + len(arguments.seeds)) + "|", *paired]
    print("\n" + "\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
