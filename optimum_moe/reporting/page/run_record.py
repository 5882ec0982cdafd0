"""What a compressed folder records of its run: all that a report is made from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_moe.checkpoint.training_record import TrainingRecord
from optimum_moe.model_info import BlockInfo
from optimum_moe.plan import PLAN_NAME, CompressionPlan
from optimum_moe.records import read_digest
from optimum_moe.reporting.loads_in import FIELD, REPORT_FILE, LoadsIn
from optimum_moe.statistics import BlockStatistics

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class BlockFacts:
    """Sizes and use of one MoE block of the original, as the report's file records them.

    Args:
        top_k: Experts that its router selects for a token.
        hidden_size: Width of the residual stream.
        intermediate_size: Neurons of an expert.
        expert_bytes: Stored bytes of an expert.
        itemsize: Stored bytes of a weight of an expert.
        tokens: Calibration tokens that reached it; None if none were observed.
        routed: Calibration tokens that were routed to each expert; None if they were not observed.
    """

    top_k: int
    hidden_size: int
    intermediate_size: int
    expert_bytes: float
    itemsize: float
    tokens: int | None = None
    routed: tuple[int, ...] | None = None

    @classmethod
    def of(cls, info: BlockInfo, observed: BlockStatistics | None) -> BlockFacts:
        """From a block's sizes, and what was observed of it."""
        return cls(
            top_k=info.top_k,
            hidden_size=info.hidden_size,
            intermediate_size=info.intermediate_size,
            expert_bytes=info.bytes_of_experts(1, info.expert_parameters),
            itemsize=info.expert_itemsize,
            tokens=None if observed is None else observed.num_tokens,
            routed=None if observed is None else tuple(int(count) for count in observed.token_count_E.tolist()),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the counts of all experts are one text, which is one line of the file."""
        record = {name: value for name, value in vars(self).items() if value is not None}
        return record if self.routed is None else record | {"routed": " ".join(map(str, self.routed))}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> BlockFacts:
        """Read `to_dict` back."""
        routed = record.get("routed")
        return cls(**{**record, "routed": None if routed is None else tuple(int(count) for count in routed.split())})


@dataclass(frozen=True)
class RunRecord:
    """The files of a compressed folder that say what was done.

    Args:
        name: What the checkpoint is called.
        plan: What was decided.
        blocks: Facts of each of its blocks.
        report: The content of the report's file.
        recipe: The recipe as YAML.
        loads_in: Where it loads.
        plan_digest: SHA-256 of the plan.
        training: Record of the training after the cut; None if there was none.
    """

    name: str
    plan: CompressionPlan
    blocks: Mapping[str, BlockFacts]
    report: Mapping[str, Any]
    recipe: str
    loads_in: Sequence[LoadsIn]
    plan_digest: str
    training: TrainingRecord | None = None

    @classmethod
    def read(cls, directory: Path, name: str, report: Mapping[str, Any] | None = None) -> RunRecord:
        """Read the files of a folder.

        Args:
            directory: The folder.
            name: What the checkpoint is called.
            report: What to take in the place of the report's file; None for the file.

        Raises:
            ValueError: If the folder is not one that `compress` wrote, or a file of it is broken.
        """
        check_is_run(directory)
        plan = CompressionPlan.from_pretrained(directory)
        report = read_report(directory) if report is None else report
        recipe, training = directory / RECIPE_FILE, TrainingRecord.load(directory)
        try:
            blocks = {block: BlockFacts.from_dict(report["blocks"][block]) for block in plan.blocks}
            return cls(
                name=name,
                plan=plan,
                blocks=blocks,
                report=report,
                recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
                loads_in=[LoadsIn(**row) for row in report[FIELD]],
                plan_digest=read_digest(directory, PLAN_NAME),
                training=training,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{directory / REPORT_FILE} lacks what a report is made from ({error!r}). Compress again with this "
                "version of optimum_moe."
            ) from error

    @property
    def original(self) -> str:
        """Name of the original: its Hub id, or that of its folder."""
        return str(self.plan.source.get("name", "the original"))

    def command(self, arguments: str) -> str:
        """The command that makes this report with further arguments."""
        return f"optimum-cli moe report {shlex.quote(self.name)} {arguments}"


def check_is_run(directory: Path) -> None:
    """Raise a `ValueError` unless `compress` wrote a folder, with what it is instead and the command that makes one."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no folder. Give one that `optimum-cli moe compress` wrote.")
    lacking = [name for name in (f"{PLAN_NAME}.json", REPORT_FILE) if not (directory / name).is_file()]
    if not lacking:
        return
    if (directory / "config.json").is_file():
        what = "a checkpoint that was not compressed, or was saved again since"
    else:
        what = "no checkpoint"
    raise ValueError(
        f"{directory} holds {what}: it has no {' and no '.join(lacking)}. Give a folder that was written by: "
        "optimum-cli moe compress MODEL --share 0.5 --calibration corpus.txt --output FOLDER"
    )


def read_report(directory: Path) -> dict[str, Any]:
    """The content of the report's file.

    Raises:
        ValueError: If it is broken.
    """
    file = directory / REPORT_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is broken ({error}). Copy the checkpoint again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is broken: it holds no mapping. Copy the checkpoint again.")
    return found
