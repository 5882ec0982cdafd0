"""The report as HTML: sections in their order, filled into the template."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from optimum_moe.reporting.page.beside import beside
from optimum_moe.reporting.page.damage import damage
from optimum_moe.reporting.page.elements import Section
from optimum_moe.reporting.page.expert_map import expert_map
from optimum_moe.reporting.page.merges import merges
from optimum_moe.reporting.page.overview import overview
from optimum_moe.reporting.page.quality import quality, sweep
from optimum_moe.reporting.page.reproduction import loads_in, reproduction
from optimum_moe.reporting.page.run_record import RunRecord
from optimum_moe.reporting.page.training import training
from optimum_moe.reporting.page.usage import usage

PAGE_FILE = "report.html"
_SECTIONS = (overview, quality, beside, training, damage, expert_map, usage, merges, sweep, loads_in, reproduction)
"""Functions from a run to a section, or to None where it would have nothing to show."""


def page(run: RunRecord) -> str:
    """The HTML of a run's report; it asks for nothing from elsewhere, and equal runs give equal text."""
    sections: list[Section] = [section for make in _SECTIONS if (section := make(run)) is not None]
    return _environment().get_template("report.html").render(name=run.name, original=run.original, sections=sections)


def write_page(run: RunRecord, file: Path) -> None:
    """Write the report of a run; a file that is there is replaced as a whole."""
    beside = file.with_name(f".{file.name}.writing")
    try:
        beside.write_text(page(run), encoding="utf-8", errors="surrogateescape")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def refresh_page(directory: Path) -> None:
    """Write the report of a folder that has one again, after its numbers changed."""
    file = directory / PAGE_FILE
    if file.is_file():
        write_page(RunRecord.read(directory, directory.resolve().name), file)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("optimum_moe.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
