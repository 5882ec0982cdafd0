"""The main job on the bundled reference model, in minutes: compress, save, reload in a fresh process, compare.

    python benchmarks/demo.py [--output out/demo]

Prints one table: bytes on disk, parameters, FLOPs per token and the scores of `optimum_moe.evaluate` for the original,
the byte budget for any runtime and for transformers, M-SMoE and baselines at 50% and 25% of the experts, and a few
generated words.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

from reference import CALIBRATION, HELD_OUT, REFERENCES, ROOT, VARIANTS

REFERENCE = REFERENCES["reference"]
PLAIN, BUDGET = "byte budget, any runtime", "byte budget, transformers"
BUDGETS = {PLAIN: "any", BUDGET: "transformers"}
PRUNED = ("frequency pruning", "random pruning")
# The byte budget first, because it wants gradients beside what the others observe.
SHOWN = {
    50: (
        BUDGET,
        PLAIN,
        "M-SMoE",
        "M-SMoE, plain checkpoint",
        "no alignment",
        "random groups",
        "plain average",
        *PRUNED,
    ),
    25: (BUDGET, PLAIN, "M-SMoE", *PRUNED),
}
PROMPT = "And it came to pass, that the President"


def compress_all(output: Path) -> dict[str, Path]:
    """Compress the reference model with every variant; one calibration serves all."""
    from optimum_moe import ByteBudget, CalibrationConfig, MoECompressor

    calibration = CalibrationConfig(str(CALIBRATION), sequence_length=256, max_tokens=32768)
    statistics, folders = None, {}
    for share, names in SHOWN.items():
        for name in names:
            method = (
                ByteBudget(share=share / 100, runs_in=BUDGETS[name])
                if name in BUDGETS
                else VARIANTS[name](REFERENCE.num_experts * share // 100)
            )
            compressor = MoECompressor.from_pretrained(REFERENCE.model, method, calibration, progress=False)
            statistics = statistics or compressor.calibrate()
            compressor.apply(statistics=statistics)
            label = f"{name}, {share}%"
            folders[label] = compressor.save_pretrained(
                output / label.replace(", ", "-").replace(" ", "_"), overwrite=True
            )
    return folders


def report(folders: dict[str, Path]) -> None:
    """Load every checkpoint with AutoModel and print the table; runs in a process of its own."""
    import torch
    import transformers

    from optimum_moe.evaluation import evaluate_many

    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE.model)
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = {"original": load(REFERENCE.model)} | {name: load(folder) for name, folder in folders.items()}
    results = evaluate_many(
        models,
        str(HELD_OUT),
        reference=models["original"],
        tokenizer=tokenizer,
        calibration=str(CALIBRATION),
        max_tokens=16384,
        num_questions=100,
        num_prompts=16,
        progress=sys.stderr.isatty(),
    )
    costs = {
        "original": json.loads((next(iter(folders.values())) / "compression_report.json").read_text(encoding="utf-8"))[
            "before"
        ]
    }
    costs |= {
        n: json.loads((f / "compression_report.json").read_text(encoding="utf-8"))["after"] for n, f in folders.items()
    }
    header = ("", "disk MB", "params M", "MFLOPs", "ppl", "KL", "top-1", "choice", "generation", "loops")
    rows = [header]
    for name, result in results.items():
        folder = folders.get(name, REFERENCE.model)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors") if not file.name.startswith("plan"))
        score = {key: value.value for key, value in result.scores.items()}
        rows.append(
            (
                name,
                f"{size / 1e6:.2f}",
                f"{costs[name]['parameters'] / 1e6:.2f}",
                f"{costs[name]['flops_per_token'] / 1e6:.2f}",
                f"{score['perplexity']:.1f}",
                f"{score['kl']:.3f}",
                f"{score['top1_agreement']:.3f}",
                f"{score['choice_accuracy']:.2f}",
                f"{score['generation_agreement']:.2f}",
                f"{score['loop_rate']:.2f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        print("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))
    print("\nMFLOPs per token; KL and top-1 against the original; choice: the true continuation among four;")
    print("generation: agreement with the original's greedy continuation; loops: share of looping continuations.")
    print(f'\nGreedy continuations of "{PROMPT}":')
    prompt = tokenizer(PROMPT, return_tensors="pt")
    for name in ("original", f"{BUDGET}, 25%", f"{PLAIN}, 25%", "M-SMoE, 50%", "random pruning, 50%"):
        out = models[name].generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        print(f"  {name}: {tokenizer.decode(out[0, prompt['input_ids'].shape[1] :])!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "demo")
    parser.add_argument("--report", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.report:
        report({name: Path(folder) for name, folder in json.loads(arguments.report).items()})
        return
    import torch
    import transformers

    started = time.perf_counter()
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Calibration gave no token")
        folders = compress_all(arguments.output)
    print(REFERENCE.source_line)
    print(
        f"Compressed {len(folders)} times into {arguments.output} in {time.perf_counter() - started:.0f} s.\n",
        flush=True,
    )
    listing = json.dumps({name: str(folder) for name, folder in folders.items()})
    subprocess.run([sys.executable, __file__, "--report", listing], check=True)
    print(f"\n{time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
