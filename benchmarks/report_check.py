"""Open reports in headless Chromium: what they ask the network for, what axe-core finds, whether they fit, how fast.

    python benchmarks/report_check.py [--pictures FOLDER] [REPORT.html ...]

Without a report it makes some: of two runs on the bundled model, and of a model of 94 blocks of 128 experts, and one of
3 blocks of 10,000, that nobody has. Each is opened in light and dark, 1280 and 390 pixels wide, with all tables open.
Needs Chromium and Node.js; playwright-core and axe-core are installed from npm into .cache/report. The exit status is 1
if a report asks the network, scrolls sideways, logs an error, or axe-core finds something serious.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from reference import CALIBRATION, REFERENCES, ROOT

MODULES = ROOT / ".cache" / "report"
PACKAGES = ("playwright-core@1.65.1", "axe-core@4.14.1")
SERIOUS = ("serious", "critical")


def make_reports(place: Path) -> list[Path]:
    """Reports of two runs on the bundled model, and of two models that are only sizes."""
    sys.path.insert(0, str(ROOT))
    from optimum_moe import CalibrationConfig, LowRankSparse, MoECompressor, MSMoE, write_report
    from optimum_moe.reporting.page import write_page
    from tests.synthetic_run import synthetic_run

    reference = REFERENCES["reference"]
    sample = CalibrationConfig(str(CALIBRATION), sequence_length=256, max_tokens=8192)
    methods = {
        "merged": MSMoE(num_experts=reference.num_experts // 2),
        "merged_and_factorized": [MSMoE(num_experts=reference.num_experts // 2), LowRankSparse(rank=16)],
    }
    statistics, files = None, []
    for name, method in methods.items():
        compressor = MoECompressor.from_pretrained(reference.model, method, sample, progress=False)
        statistics = statistics or compressor.calibrate()
        compressor.apply(statistics)
        folder = compressor.save_pretrained(place / name, overwrite=True)
        files.append(write_report(folder, statistics=statistics))
    for blocks, experts in ((94, 128), (3, 10_000)):
        folder = place / f"{blocks}x{experts}"
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / "report.html")
        write_page(synthetic_run(blocks, experts), files[-1])
    return files


def opened(files: list[Path], chromium: str, pictures: Path | None) -> list[dict]:
    """What the browser found, for each report, color scheme and width."""
    if not (MODULES / "node_modules" / "axe-core").is_dir():
        MODULES.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--prefix", MODULES, *PACKAGES], check=True)
    script = Path(__file__).with_suffix(".mjs")
    command = ["node", script, MODULES, chromium, "" if pictures is None else pictures, *files]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="*", type=Path)
    parser.add_argument("--pictures", type=Path, help="Folder of a picture of each.")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None or shutil.which("npm") is None:
        sys.exit("Chromium and Node.js are needed. Install them with: apt-get install chromium nodejs npm")
    if arguments.pictures is not None:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
    files = arguments.reports or make_reports(ROOT / "out" / "reports")
    failed = False
    print(
        "| report | kB | scheme | width | seconds | network | sideways | axe-core |\n|---|---|---|---|---|---|---|---|"
    )
    for found in opened([file.absolute() for file in files], chromium, arguments.pictures):
        serious = [violation for violation in found["violations"] if violation["impact"] in SERIOUS]
        bad = bool(serious or found["network"] or found["errors"] or found["scrolls"] > 0)
        failed |= bad
        file = Path(found["file"])
        said = ", ".join(f"{each['id']} ({each['impact']})" for each in found["violations"]) or "nothing"
        print(
            f"| {file.parent.name} | {file.stat().st_size / 1e3:.0f} | {found['colorScheme']} | {found['width']} "
            f"| {found['seconds']:.2f} | {len(found['network'])} requests | {found['scrolls']} px | {said} |"
        )
        if bad:
            print(json.dumps(found, indent=1), file=sys.stderr)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
