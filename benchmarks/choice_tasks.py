"""WinoGrande, MultiRC and SQuAD by lm-eval, without a hub, on real weights before and after compression.

    python benchmarks/choice_tasks.py [--documents 200] [--shares 75 50]

Needs `pip install '.[eval]'`, and `smollm2.py` first, whose Mixtral of SmolLM2-135M-Instruct is the original. Texts are
from files of the Python package bigbench 1.0.0 (358 MB, fetched into `.cache/bigbench`), which ask not to be trained
on: they are only evaluated, and neither shipped nor calibrated on. All is scored by likelihood:

    winogrande   the two sentences of a twin, each with its blank filled by either answer: which makes the rest of the
                 sentence likelier (subtasks 029 and 030 of natural_instructions)
    multirc      every option of a question about a paragraph: is it correct, yes or no (subtask 058)
    squad        which of four answers that people gave to questions about the same paragraph is that to this question,
                 by likelihood a character (squad_shifts, new_wiki)

Scores are reported with their errors beside the most frequent class; no threshold stands on them. Calibration is on the
bundled text. Writes benchmarks/results/choice_tasks.md.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tarfile
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from reference import CALIBRATION, ROOT
from smollm2 import CHECKPOINT, SOURCE

from optimum_moe import ByteBudget, CalibrationConfig, LowRankSparse, MoECompressor, MSMoE
from optimum_moe.evaluation import evaluate_tasks, mcnemar
from optimum_moe.stages import Stage

URL = (
    "https://files.pythonhosted.org/packages/95/f8/c019b3579df548a04cac12342cfcb878e50ddf6cfcd7fddba8cfc721c157/"
    "bigbench-1.0.0.tar.gz"
)
CACHE = ROOT / ".cache" / "bigbench"
RESULTS = ROOT / "benchmarks" / "results" / "choice_tasks.md"
INSTRUCTIONS = "bigbench-1.0.0/bigbench/benchmark_tasks/natural_instructions"
SQUAD = "bigbench-1.0.0/bigbench/benchmark_tasks/squad_shifts/new_wiki_v1.0.json"
WINOGRANDE = ("subtask029_winogrande_full_object", "subtask030_winogrande_full_person")
MULTIRC = "subtask058_multirc_question_answering"
SEED = 0
ORIGINAL = "original"
MEAN = {"aggregation": "mean", "higher_is_better": True}
Document = dict[str, Any]


def fetched(members: Iterable[str]) -> dict[str, Any]:
    """The JSON files of these names, from the package."""
    archive = CACHE / URL.rpartition("/")[2]
    if not archive.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = archive.with_suffix(".part")
        urllib.request.urlretrieve(URL, part)
        part.rename(archive)
    found = {}
    for member in members:
        kept = CACHE / member.replace("/", "_")
        if not kept.is_file():
            with tarfile.open(archive) as opened:
                extracted = opened.extractfile(member)
                assert extracted is not None
                kept.write_bytes(extracted.read())
        found[member] = json.loads(kept.read_text(encoding="utf-8"))
    return found


TWINS = re.compile(
    r"Sentence 1: (.*?)\s*\nAnswer1: (.*?)\.?\s*\nSentence 2: (.*?)\s*\nAnswer2: (.*?)\.?\s*$", re.DOTALL
)


def winogrande(files: Mapping[str, Any]) -> Iterator[Document]:
    """Both sentences of each twin: what stands before the blank with either answer in it, and what follows."""
    for name in WINOGRANDE:
        for example in files[f"{INSTRUCTIONS}/{name}/task.json"]["examples"]:
            match = TWINS.match(example["target"][0])
            if match is None:
                continue
            first, one, second, other = match.groups()
            for sentence, right in ((first, 0), (second, 1)):
                before, blank, after = sentence.partition("_")
                if blank and after.strip(" ."):
                    yield {"right": right, "contexts": [before + one, before + other], "rest": " " + after.strip()}


OPTIONS = re.compile(r"\(([A-Z])\) (.*?)(?=\s*\([A-Z]\) |\.?$)", re.DOTALL)


def multirc(files: Mapping[str, Any]) -> Iterator[Document]:
    """Each option of each question, and whether it is among the correct ones."""
    for example in files[f"{INSTRUCTIONS}/{MULTIRC}/task.json"]["examples"]:
        paragraph, found, question = example["input"].partition("\nQuestion: ")
        asked, _, _ = question.partition(" (A) ")
        correct = set(re.findall(r"[A-Z]", example["target"][0]))
        text = re.sub(r"Sent \d+: ", " ", paragraph.removeprefix("Paragraph- ")).strip()
        for letter, option in OPTIONS.findall(question) if found else ():
            yield {
                "question": f"{text}\n\nQuestion: {asked}\nAnswer: {option}\nIs this answer correct, yes or no?",
                "right": int(letter in correct),
            }


def squad(files: Mapping[str, Any]) -> Iterator[Document]:
    """Paragraph and question, the first answer to it, and those to three other questions about the paragraph."""
    rng = random.Random(SEED)
    for article in files[SQUAD]["data"]:
        for paragraph in article["paragraphs"]:
            answers = {asked["question"].strip(): asked["answers"][0]["text"].strip() for asked in paragraph["qas"]}
            for question, answer in answers.items():
                others = sorted({other for other in answers.values() if other != answer})
                if len(others) < 3:
                    continue
                choices = rng.sample(others, 3)
                right = rng.randrange(4)
                choices.insert(right, answer)
                context = paragraph["context"].strip()
                yield {"question": f"{context}\n\nQuestion: {question}\nAnswer:", "choices": choices, "right": right}


TASKS: dict[str, Any] = {
    "winogrande": (
        winogrande,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "right",
            "doc_to_choice": "contexts",
            "doc_to_target": "rest",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", **MEAN}],
        },
    ),
    "multirc": (
        multirc,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": ["no", "yes"],
            "doc_to_target": "right",
            "metric_list": [{"metric": "acc", **MEAN}],
        },
    ),
    "squad": (
        squad,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "right",
            "metric_list": [{"metric": "acc_norm", **MEAN}],
        },
    ),
}


def write_tasks(folder: Path, documents: int) -> dict[str, list[Document]]:
    """Write task files for lm-eval and the documents that they read, drawn at random; returns the documents."""
    members = [f"{INSTRUCTIONS}/{name}/task.json" for name in (*WINOGRANDE, MULTIRC)]
    files = fetched([*members, SQUAD])
    drawn = {}
    for name, (read, fields) in TASKS.items():
        drawn[name] = random.Random(SEED).sample(list(read(files)), documents)
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in drawn[name]), encoding="utf-8")
        record = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **fields,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(record), encoding="utf-8")
    return drawn


def recipes(shares: Iterable[float]) -> dict[str, list[Stage]]:
    """Stages by what the table calls them."""
    found: dict[str, list[Stage]] = {}
    for share in shares:
        part = share / 100
        found[f"byte budget, {share:g}%"] = [ByteBudget(share=part, runs_in="transformers")]
        found[f"byte budget, loads anywhere, {share:g}%"] = [ByteBudget(share=part)]
        found[f"M-SMoE, {share:g}%"] = [MSMoE(keep_ratio=part)]
    found["MC-SMoE"] = [MSMoE(keep_ratio=0.5), LowRankSparse(rank=32)]
    return found


def most_frequent(documents: list[Document]) -> str:
    """What always giving the most frequent answer scores."""
    given = Counter(document["right"] for document in documents)
    return f"{max(given.values()) / len(documents):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200, help="of each task")
    parser.add_argument("--shares", type=float, nargs="+", default=[50])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.process_time()
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
    calibration = CalibrationConfig(str(CALIBRATION), max_tokens=4096, sequence_length=256)
    with TemporaryDirectory() as place:
        folder = Path(place)
        drawn = write_tasks(folder, args.documents)

        def scored(model: Any) -> Any:
            return evaluate_tasks({"model": model}, list(TASKS), folder, tokenizer)["model"]

        original = scored(transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32))
        lines = [f"| | {' | '.join(original.scores)} |", "|---" * (1 + len(original.scores)) + "|"]
        frequent = [most_frequent(drawn[metric.partition("/")[0]]) for metric in original.scores]
        lines.append(f"| most frequent class | {' | '.join(frequent)} |")
        cells = [f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" for score in original.scores.values()]
        lines.append(f"| {ORIGINAL} | {' | '.join(cells)} |")
        print(*lines, sep="\n", flush=True)
        for name, stages in recipes(args.shares).items():
            try:
                compressor = MoECompressor.from_pretrained(CHECKPOINT, stages, calibration, progress=False)
            except ValueError as refusal:
                lines.append(f"| {name} | {refusal} |" + " |" * (len(original.scores) - 1))
                continue
            result = scored(compressor.apply().eval())
            cells = []
            for metric, score in result.scores.items():
                _, _, p = mcnemar(original, result, metric)
                cells.append(f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}], p {p:.2g}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    title = f"# WinoGrande, MultiRC and SQuAD\n\n{SOURCE}\n\n"
    said = (
        f"{args.documents} documents of each, seed {SEED}; 95% intervals; p of McNemar's test against the original. "
        f"{(time.process_time() - start) / 3600:.2f} CPU hours, torch {torch.__version__}.\n\n"
    )
    RESULTS.write_text(title + said + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
