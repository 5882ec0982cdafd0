"""Where a checkpoint loads: what was run, and what is known of each kind of checkpoint.

A row says how it is known. Nothing else is claimed: a runtime that is not in the table and was not run has no row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from optimum_moe.checkpoint.checksums import CHECKSUMS_FILE
from optimum_moe.checkpoint.location import raw_config
from optimum_moe.formats import ExpertsSpec
from optimum_moe.formats.rounded import ROUNDED
from optimum_moe.hf.structure import METHOD
from optimum_moe.settings import choose_one
from optimum_moe.vllm_plugin.blocks import CompressedBlock

Kind = Literal["plain", "structured", "constants"]
FIELD = "loads_in"
"""Key of the rows in the report."""
REPORT_FILE = "compression_report.json"
_TITLE = "## Loads in"
_SPELLED = {"vllm": "vLLM", "mlx": "MLX"}
_CONSTANTS = "approximate_experts"


@dataclass(frozen=True)
class LoadsIn:
    """What a runtime does with a checkpoint.

    Args:
        runtime: Name of the runtime, with the type of quantized values in brackets.
        says: What it does.
        known: "run" if it was run, "table" if it is known of this kind of checkpoint, "code" if it was read in the
            runtime's code and not run.
        version: Version of the runtime that was run.
    """

    runtime: str
    says: str
    known: Literal["run", "table", "code"] = "table"
    version: str = ""

    @property
    def title(self) -> str:
        """Runtime and version, as its makers spell it."""
        name, *rest = self.runtime.split()
        return " ".join([_SPELLED.get(name, name), *rest, self.version]).strip()


HOW_KNOWN = {"run": "run", "table": "known of this kind of checkpoint, not run", "code": "from its code, not run"}
"""What the values of `LoadsIn.known` mean."""

_PACKED = (
    "loads where the original loads, after `optimum-cli moe export --to compressed-tensors` if that takes its sizes"
)
_ANY = "Compress with `--runs-in any` for it."
_TABLE: dict[Kind, tuple[LoadsIn, ...]] = {
    "plain": (
        LoadsIn("transformers", "loads, without this package"),
        LoadsIn("vllm", "loads where the original loads"),
        LoadsIn("llama.cpp", "loads where the original loads, after `optimum-cli moe export --to gguf`"),
        LoadsIn("mlx", "loads where the original loads, after `optimum-cli moe export --to mlx`"),
    ),
    "structured": (
        LoadsIn("transformers", "loads with this package, or with `trust_remote_code=True`"),
        LoadsIn("llama.cpp", f"cannot express it. {_ANY}"),
        LoadsIn("mlx", f"cannot express it. {_ANY}"),
    ),
    "constants": (
        LoadsIn("transformers", "loads with this package"),
        LoadsIn("vllm", "loads from version 0.33 on; 0.32 stops at a name that it does not know", "code"),
        LoadsIn("llama.cpp", f"cannot express it. {_ANY}"),
        LoadsIn("mlx", f"cannot express it. {_ANY}"),
    ),
}


def kind_of(directory: Path) -> Kind:
    """The kind of a checkpoint, by its config."""
    config = raw_config(directory)
    if _CONSTANTS in config:
        return "constants"
    structured = (config.get("quantization_config") or {}).get("quant_method") == METHOD
    return "structured" if structured else "plain"


def known_rows(directory: Path) -> list[LoadsIn]:
    """The rows that its report has; of a checkpoint without a report what is known of its kind."""
    file = directory / REPORT_FILE
    if file.is_file():
        rows = json.loads(file.read_text(encoding="utf-8")).get(FIELD)
        if rows is not None:
            return [LoadsIn(**row) for row in rows]
    kind = kind_of(directory)
    rows = list(_TABLE[kind])
    if kind == "structured":
        config = raw_config(directory)
        objection = objection_of_plugin(config)
        says = "loads with this package installed beside it" if objection is None else f"cannot run it: {objection}"
        rows.insert(1, LoadsIn("vllm", _PACKED if _is_rounded(config) else says))
    return rows


def _is_rounded(config: Mapping[str, Any]) -> bool:
    """Whether all experts of a structured checkpoint are stored in four or eight bits."""
    entries = config["quantization_config"]["blocks"].values()
    specs = [ExpertsSpec.from_dict(entry["factors"]) for entry in entries if "factors" in entry]
    return len(specs) == len(entries) and all(spec.parts and set(spec.parts) <= set(ROUNDED.values()) for spec in specs)


def objection_of_plugin(config: Mapping[str, Any]) -> str | None:
    """Why this package's plugin for vLLM does not run a structured checkpoint; None if it does.

    Args:
        config: The content of `config.json`.
    """
    try:
        for name, entry in config["quantization_config"]["blocks"].items():
            CompressedBlock.of_entry(name, entry)
    except ValueError as error:
        return str(error)
    return None


def to_json(rows: Sequence[LoadsIn]) -> list[dict[str, Any]]:
    """Rows as JSON values, without empty fields."""
    return [{key: value for key, value in asdict(row).items() if value} for row in rows]


def markdown(rows: Sequence[LoadsIn]) -> str:
    """Section of the model card."""
    lines = [_TITLE, "", "| runtime | what it does | how it is known |", "|---|---|---|"]
    lines += [f"| {row.title} | {row.says} | {HOW_KNOWN[row.known]} |" for row in rows]
    return "\n".join(lines)


def record_run(directory: Path, row: LoadsIn) -> None:
    """Write what a runtime did into the report and the card of a checkpoint.

    Raises:
        ValueError: If the folder has no report, as that of an original.
    """
    choose_one("known", row.known, ["run"])
    file = directory / REPORT_FILE
    if not file.is_file():
        raise ValueError(f"{directory} has no {REPORT_FILE}, so the result cannot be recorded in it.")
    # What was run takes the place of what was expected of the same runtime, and of an earlier run.
    rows = [known for known in known_rows(directory) if known.runtime != row.runtime]
    rows.append(row)
    write_report_file(directory, json.loads(file.read_text(encoding="utf-8")) | {FIELD: to_json(rows)})
    card = directory / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="surrogateescape")
        card.write_text(with_section(text, rows), encoding="utf-8", errors="surrogateescape")


def write_report_file(directory: Path, report: Mapping[str, Any]) -> None:
    """Write the report's file of a finished checkpoint again, and its digest."""
    file = directory / REPORT_FILE
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    checksums = directory / CHECKSUMS_FILE
    if checksums.is_file():
        record = json.loads(checksums.read_text(encoding="utf-8"))
        record["files"][REPORT_FILE] = hashlib.sha256(file.read_bytes()).hexdigest()
        checksums.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def with_section(card: str, rows: Sequence[LoadsIn]) -> str:
    """The text of a card with this section, in the place of the one that it has, else at its end."""
    pattern = re.compile(rf"^{_TITLE}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    section = f"{markdown(rows)}\n\n"
    if pattern.search(card) is None:
        return f"{card.rstrip()}\n\n{section.rstrip()}\n"
    return pattern.sub(lambda _: section, card, count=1)
