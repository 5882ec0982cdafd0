"""What a training is told by: the record, the report, the model card, and a picture of its curve."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from optimum_moe.checkpoint.checksums import CHECKSUMS_FILE, write_checksums
from optimum_moe.checkpoint.training_record import TrainingRecord
from optimum_moe.records import share_as_new
from optimum_moe.reporting.card import NOT_TRAINED, describe_calibration
from optimum_moe.reporting.card_quality import update_card
from optimum_moe.reporting.loads_in import FIELD as LOADS_IN
from optimum_moe.reporting.loads_in import REPORT_FILE, known_rows, to_json, with_section
from optimum_moe.reporting.page import PAGE_FILE, RunRecord, write_page
from optimum_moe.reporting.page.run_record import read_report
from optimum_moe.reporting.page.words import nats
from optimum_moe.reporting.pictures import write_picture
from optimum_moe.reporting.scores import EVALUATION, REFERENCE, SWEEP

_OF_THE_STUDENT = (EVALUATION, REFERENCE, SWEEP, LOADS_IN)
FIELD = "recovery"
"""Key of the training in the report."""
PICTURE = "recovery"
_TITLE = "## Trained afterwards"


def describe_recovery(directory: Path, name: str, record: TrainingRecord) -> None:
    """Write record, report, card and picture of a trained checkpoint called `name`, and the digests of its files.

    Scores, and runs in other runtimes, that were recorded of the student before are left out.
    """
    record.save(directory)
    if find_spec("matplotlib") is not None and len(record.curve) > 1:
        draw_recovery(record, directory / PICTURE)
    report = directory / REPORT_FILE
    if report.is_file():
        told = {key: value for key, value in read_report(directory).items() if key not in _OF_THE_STUDENT}
        report.write_text(json.dumps(told), encoding="utf-8")
        told |= {LOADS_IN: to_json(known_rows(directory)), FIELD: summary(record)}
        report.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        add_to_card(directory, name, record)
        if (directory / PAGE_FILE).is_file():
            write_page(RunRecord.read(directory, name), directory / PAGE_FILE)
    if (directory / CHECKSUMS_FILE).is_file():
        write_checksums(directory)
    share_as_new(directory)


def add_to_card(directory: Path, name: str, record: TrainingRecord) -> None:
    """Tell of the training in the card of a checkpoint called `name`, if it has one."""
    card = directory / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="surrogateescape")
        text = with_section(trained_card(text, name, record), known_rows(directory))
        card.write_text(text, encoding="utf-8", errors="surrogateescape")
        update_card(card, name, read_report(directory))


def summary(record: TrainingRecord) -> dict[str, object]:
    """What the report says of a training."""
    return {
        "says": sentence(record),
        "train": record.train,
        "trained_parameters": len(record.names),
        "teacher": record.teacher,
        "data_hash": record.data.get("hash"),
        "tokens": record.tokens,
        "kl_before": record.kl_before,
        "kl_after": record.kl_after,
        "best_step": record.best_step,
        "stopped": record.stopped,
    }


def trained_card(card: str, name: str, record: TrainingRecord) -> str:
    """The text of a card with the name of the trained checkpoint and a section on its training."""
    title = re.search(r"^# (.+)$", card, re.MULTILINE)
    if title is not None:
        places = re.compile(rf"^(# |vllm serve |optimum-cli moe export ){re.escape(title[1])}\b", re.MULTILINE)
        card = places.sub(lambda found: f"{found[1]}{name}", card)
        card = card.replace(f'("{title[1]}")', f'("{name}")')
    card = card.replace(f"- {NOT_TRAINED}\n", "")
    section = (
        f"{_TITLE}\n\n{sentence(record)} Data: {describe_calibration(record.data)}. `recovery.json` lists the "
        "parameters that were trained, and every measurement.\n\n"
    )
    pattern = re.compile(rf"^{_TITLE}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(card) is not None:
        return pattern.sub(lambda _: section, card, count=1)
    before, found, after = card.partition("## How it was made")
    return f"{before}{section}{found}{after}" if found else f"{card.rstrip()}\n\n{section.rstrip()}\n"


def sentence(record: TrainingRecord) -> str:
    """What trained, on how many tokens, and what it won back."""
    what = {
        "router": "Routers and norms",
        "experts": "Experts, routers and norms",
        "lora": "All matrices",
        "full": "All parameters",
    }[record.train]
    return (
        f"{what} were trained on {record.tokens:,} tokens to predict what {record.teacher} predicts: the KL to it on "
        f"held-out documents of the same text went from {nats(record.kl_before)} to {nats(record.kl_after)} nats a "
        "token."
    )


def draw_recovery(record: TrainingRecord, path: Path) -> list[Path]:
    """Draw the held-out KL and the training loss against steps.

    Args:
        record: The training.
        path: Of the pictures, without suffix.

    Returns:
        The files: PNG and SVG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.plot(*zip(*record.curve, strict=True), marker="o", label="held-out KL to the original")
    if record.losses:
        axis.plot(*zip(*record.losses, strict=True), linewidth=1, label="training loss")
    axis.axvline(record.best_step, color="black", linewidth=1, alpha=0.3, label="state that was kept")
    axis.set(xlabel="step", ylabel="nats a token")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return write_picture(figure, path)
