"""The report of a run: one file that asks for nothing, says what it lacks, and shows what plan and statistics say."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData

from optimum_moe import (
    ByteBudget,
    CalibrationConfig,
    CompressionPlan,
    ExpertPruning,
    LowRankSparse,
    MoECompressor,
    MSMoE,
    Rounding,
    Stage,
    Statistics,
    verify,
    write_report,
)
from optimum_moe.checkpoint.training_record import TrainingRecord
from optimum_moe.evaluation import EvaluationResult
from optimum_moe.evaluation.scores import UnitScores
from optimum_moe.recipe import Recipe
from optimum_moe.reporting.loads_in import LoadsIn, record_run
from optimum_moe.reporting.page import RunRecord, refresh_page
from optimum_moe.reporting.page.drawing import Axis, Cell, index_ticks, line_path, row_paths, thinned, tree_path
from optimum_moe.reporting.page.elements import Table
from optimum_moe.reporting.page.fates import REMOVED, UNCHANGED, fates, stored_experts
from optimum_moe.reporting.page.words import nats, quantity
from optimum_moe.reporting.page.write import page
from optimum_moe.reporting.papers import papers
from optimum_moe.sweep import ORIGINAL, Outcome, Sweep, Trial
from tests.synthetic_run import synthetic_run
from tests.tiny_checkpoints import documents, save_checkpoint

SAMPLE = CalibrationConfig(documents(), max_tokens=1024, sequence_length=64)
METHODS = {
    "merged": MSMoE(num_experts=4),
    "pruned": ExpertPruning(num_experts=5),
    "factorized": LowRankSparse(rank=8, density=0.1),
    "free": ExpertPruning(num_experts=4, saliency="aimer"),
}


class Page(HTMLParser):
    """What a page consists of: elements with their attributes, and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes another element"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("report") / "model")


@pytest.fixture(scope="module")
def statistics(original: Path) -> Statistics:
    return MoECompressor.from_pretrained(original, METHODS["merged"], SAMPLE, progress=False).calibrate()


@pytest.fixture(scope="module")
def runs(original: Path, statistics: Statistics, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    folders = {}
    for name, method in METHODS.items():
        data = None if name == "free" else SAMPLE
        compressor = MoECompressor.from_pretrained(original, method, data, progress=False)
        compressor.apply(None if name == "free" else statistics)
        folders[name] = compressor.save_pretrained(place / name)
    return folders


def read(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", METHODS)
def test_a_page_is_whole_and_asks_for_nothing(name: str, runs: dict[str, Path]) -> None:
    text = read(runs[name])
    found = Page(text)
    assert found.open == []
    identifiers = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in found.elements:
        assert tag not in ("script", "img", "iframe", "object", "embed"), tag
        assert not [key for key in attributes if key.startswith("on")], attributes
        for key in ("src", "href", "xlink:href", "srcset", "poster", "action"):
            target = attributes.get(key)
            assert target is None or target == "data:," or target[1:] in identifiers, (tag, target)
        for named in (attributes.get("aria-labelledby") or "").split():
            assert named in identifiers, named
    # The only addresses in styles and paths are those of textures in the page.
    assert all(target.strip("#") in identifiers for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text
    assert "http" not in text
    assert len(found.all("h1")) == 1
    assert found.all("html") == [{"lang": "en"}]
    pictures = [svg for svg in found.all("svg") if svg.get("role") == "img"]
    assert len(pictures) == len(found.all("desc")) == text.count("figcaption id=")
    assert all(svg.get("aria-hidden") == "true" for svg in found.all("svg") if svg not in pictures)
    assert len(found.all("table")) == len(found.all("caption"))
    assert all(cell.get("scope") in ("col", "row") for cell in found.all("th"))


@pytest.mark.parametrize("name", METHODS)
def test_the_page_is_what_the_folder_says(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    folder = runs[name]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert write_report(folder, tmp_path / "elsewhere.html").read_bytes() == before[folder / "report.html"]
    assert write_report(folder) == folder / "report.html"
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    report = json.loads((folder / "compression_report.json").read_text(encoding="utf-8"))
    text = Page(read(folder)).text
    for number in (report["before"]["bytes"], report["after"]["bytes"], report["after"]["parameters"]):
        assert f"{number:,}" in text
    plan = CompressionPlan.from_pretrained(folder)
    assert json.loads((folder / "plan.json").read_text(encoding="utf-8"))["digest"] in text
    assert (plan.calibration is None) == ("nobody observed which experts are used" in text)
    for row in report["loads_in"]:
        assert row["says"].replace("`", "") in text


@pytest.mark.parametrize("engine", ["memory", "streaming"])
def test_every_engine_writes_it(engine: str, original: Path, tmp_path: Path) -> None:
    def compress(name: str, **settings: bool) -> Path:
        given = {"engine": engine, "output_dir": tmp_path / name / "out", "progress": False, **settings}
        return MoECompressor.from_pretrained(original, METHODS["merged"], SAMPLE, **given).apply()

    folder = compress("first")
    routed = {name: facts.routed for name, facts in RunRecord.read(folder, "out").blocks.items()}
    assert all(counts is not None and sum(counts) == 1024 * 2 for counts in routed.values())
    assert "Routed tokens of every expert" in read(folder)
    assert read(compress("again")) == read(folder)
    assert verify(folder).passed
    assert not (compress("without", report=False) / "report.html").exists()


def test_what_became_of_experts(runs: dict[str, Path]) -> None:
    merged = RunRecord.read(runs["merged"], "merged")
    for name, plan in merged.plan.blocks.items():
        found, facts = fates(plan, merged.blocks[name]), merged.blocks[name]
        assert sum(fate.bytes for fate in found) == pytest.approx(4 * facts.expert_bytes)
        alone = Counter(plan.labels_E)
        assert [fate.form for fate in found] == ["merged" if alone[label] > 1 else UNCHANGED for label in plan.labels_E]
    pruned = RunRecord.read(runs["pruned"], "pruned")
    for name, plan in pruned.plan.blocks.items():
        assert Counter(fate.form for fate in fates(plan, pruned.blocks[name])) == {UNCHANGED: 5, REMOVED: 3}
    factorized = RunRecord.read(runs["factorized"], "factorized")
    report = factorized.report
    stored = sum(
        fate.bytes for name, plan in factorized.plan.blocks.items() for fate in fates(plan, factorized.blocks[name])
    )
    whole = sum(
        plan.num_experts * factorized.blocks[name].expert_bytes for name, plan in factorized.plan.blocks.items()
    )
    assert whole - stored == report["before"]["bytes"] - report["after"]["bytes"]
    assert "low rank + sparse rows (24)" in Page(read(runs["factorized"])).text


def test_removed_experts_are_not_counted_as_stored(original: Path, tmp_path: Path) -> None:
    budget = ByteBudget(share=0.1, runs_in="transformers", formats=["low_rank"])
    compressor = MoECompressor.from_pretrained(original, budget, SAMPLE, progress=False)
    compressor.apply()
    folder = compressor.save_pretrained(tmp_path / "out")
    run = RunRecord.read(folder, "out")
    found = {name: fates(plan, run.blocks[name]) for name, plan in run.plan.blocks.items()}
    stored = [stored_experts(plan, found[name]) for name, plan in run.plan.blocks.items()]
    assert stored == [sum(fate.form != REMOVED for fate in experts) for experts in found.values()]
    assert max(stored) < 8
    shown = str(stored[0]) if len(set(stored)) == 1 else f"{min(stored)} to {max(stored)}"
    assert f"Experts of a block{shown}of 8, in 3 blocks" in Page(read(folder)).text


def test_only_columns_of_numbers_are_aligned_to_the_right() -> None:
    digests = ("0.1.0", "5e" + 62 * "0", "353949d174f179d8")
    numbers = ("1,024", "-0.25", "3e-7", "x1.03", "5.54 MB", "12.3 of 32", "0.1 to 0.2", "50%", "–", "")
    rows = tuple(zip((*digests, *digests, *digests, "0"), numbers, strict=True))
    assert Table("", ("digest", "number"), rows).numeric == (False, True)


def test_text_in_backticks_is_code_and_commands_break_between_words_only() -> None:
    run = synthetic_run(1, 4, name="a <b>")
    text = page(replace(run, loads_in=[LoadsIn("mlx", "after `export --to mlx` & <more>", "run", "1.2")]))
    assert "after <code><span>export</span> <span>--to</span> <span>mlx</span></code> &amp; &lt;more&gt;" in text
    assert "<span>--recipe</span> <span>&#39;a</span> <span>&lt;b&gt;/recipe.yaml&#39;</span>" in text
    assert ">MLX 1.2<" in text


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.0, "0.0000"), (0.21435, "0.2144"), (0.001, "0.0010"), (2.34e-6, "2.3e-6"), (0.00052, "0.00052")],
)
def test_small_losses_keep_two_digits(value: float, words: str) -> None:
    assert nats(value) == words


def test_statistics_are_added(runs: dict[str, Path], statistics: Statistics, tmp_path: Path) -> None:
    folder = runs["merged"]
    assert "is not recorded with the checkpoint" in read(folder)
    statistics.save_pretrained(tmp_path / "statistics")
    with_trees = write_report(folder, tmp_path / "a.html", statistics=tmp_path / "statistics").read_text(
        encoding="utf-8"
    )
    assert with_trees.count('class="branch"') == 3
    assert "is not recorded" not in Page(with_trees).text
    assert "branch" not in Page(read(folder)).text
    free = write_report(runs["free"], tmp_path / "b.html", statistics=statistics).read_text(encoding="utf-8")
    assert "Routed tokens of every expert" in free
    assert "nobody observed" not in free
    other = replace(statistics, source={**statistics.source, "values": ["of another model"]})
    with pytest.raises(ValueError, match="The statistics are of another model than the original of this checkpoint"):
        write_report(folder, statistics=other)
    fewer = replace(statistics, blocks=dict(list(statistics.blocks.items())[:2]))
    with pytest.raises(ValueError, match="The statistics have 2 MoE blocks, and the plan has 3"):
        write_report(folder, statistics=fewer)


def scores(perplexity: float) -> EvaluationResult:
    total = torch.full((8,), perplexity).log() + torch.linspace(-0.1, 0.1, 8)
    units = {"perplexity": UnitScores.of(total, exponential=True), "kl": UnitScores.of(torch.linspace(0.1, 0.3, 8))}
    domains = {name: {"kl": UnitScores.of(torch.full((4,), lost))} for name, lost in (("code", 0.1), ("novels", 0.3))}
    return EvaluationResult.of(units, {"sources": [{"name": "held.txt"}], "hash": "0123456789abcdef"}, 0, domains)


def test_scores_and_a_sweep_are_kept(original: Path, statistics: Statistics, tmp_path: Path) -> None:
    compressor = MoECompressor.from_pretrained(original, METHODS["pruned"], SAMPLE, progress=False)
    compressor.apply(statistics)
    folder = compressor.save_pretrained(tmp_path / "out")
    assert "not evaluated yet" in read(folder)
    scores(20.0).save(tmp_path / "scores.json")
    write_report(folder, evaluation=tmp_path / "scores.json", reference=scores(10.0))
    trials = [
        Outcome(Trial("reap", size), number, True, 1.0, scores(20.0)) for size, number in (("50%", 500), ("25%", 300))
    ]
    refused = Outcome(Trial("m-smoe", "10%"), 0, False, 0.0, None, "it keeps 1 of 8 experts")
    first = Outcome(Trial(ORIGINAL, "100%"), 1000, True, 0.0, scores(10.0))
    write_report(folder, sweep=Sweep(first, (*trials, refused)))
    text = Page(read(folder)).text
    assert "not evaluated yet" not in text
    for said in ("20", "10", "held.txt", "0123456789ab", "refused: it keeps 1 of 8 experts", "best of all", "500 B"):
        assert said in text
    for said in ("Scores by domain", "novels lost the most: 0.3000 nats a token, 1.50 times the mean"):
        assert said in text
    # What a runtime did later is in the report too, and all that was added before.
    record_run(folder, LoadsIn("vllm", "same greedy tokens: 64 of 64", "run", "0.33.0"))
    refresh_page(folder)
    again = Page(read(folder)).text
    assert "vLLM 0.33.0" in again
    assert "held.txt" in again
    assert verify(folder).passed


def test_wrong_input(runs: dict[str, Path], original: Path, tmp_path: Path) -> None:
    command = "optimum-cli moe compress MODEL"
    with pytest.raises(
        ValueError, match=rf"model holds a checkpoint that was not compressed.*no plan\.json.*{command}"
    ):
        write_report(original)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"empty holds no checkpoint.*{command}"):
        write_report(tmp_path / "empty")
    with pytest.raises(ValueError, match="gone is no folder"):
        write_report(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"There is no file .*gone\.json"):
        write_report(runs["merged"], evaluation=tmp_path / "gone.json")
    with pytest.raises(ValueError, match="is shown beside the scores of the checkpoint"):
        write_report(runs["merged"], reference=scores(10.0))
    with pytest.raises(ValueError, match="holds no sweep"):
        write_report(runs["merged"], sweep=tmp_path)
    with pytest.raises(ValueError, match="No statistics"):
        write_report(runs["merged"], statistics=tmp_path)
    with pytest.raises(ValueError, match=r"is a folder\. Give a file"):
        write_report(runs["merged"], tmp_path)
    with pytest.raises(ValueError, match="There is no folder"):
        write_report(runs["merged"], tmp_path / "gone" / "report.html")


@pytest.mark.parametrize(("blocks", "experts"), [(94, 128), (3, 10_000), (300, 16)])
def test_large_models_fit_in_a_page(blocks: int, experts: int) -> None:
    text = page(synthetic_run(blocks, experts))
    assert len(text.encode()) < 5_000_000
    assert ("thinned out" in text) == (experts > 512 or blocks > 256)
    assert f"removed ({blocks * experts // 2:,})" in text
    wide = max(int(columns) for columns in re.findall(r'viewBox="0 0 (\d+) \d+" preserveAspectRatio="none" role', text))
    assert wide <= 512


def test_names_are_text() -> None:
    bad = "<script>alert(1)</script>\"'&"
    text = page(synthetic_run(2, 4, name=bad, block_name=bad + "{}"))
    assert "<script" not in text
    found = Page(text)
    assert found.open == []
    assert found.all("script") == []
    assert bad in found.text


def filled(paths: Mapping[str, str]) -> dict[str, set[int]]:
    """The columns that each style fills."""
    cells: dict[str, set[int]] = {}
    for style, path in paths.items():
        for at, length in re.findall(r"M(\d+) [\d.]+h(\d+)v", path):
            cells.setdefault(style, set()).update(range(int(at), int(at) + int(length)))
    return cells


def test_rows_of_cells() -> None:
    cells = [Cell("a"), Cell("a"), Cell(""), Cell("b"), Cell("a", 0.5), Cell("a", 0.0)]
    assert filled(dict(row_paths(cells, 3))) == {"a": {0, 1, 4}, "b": {3}}
    assert dict(row_paths([Cell("a", 0.5)], 1)) == {"a": "M0 1.44h1v0.44h-1z"}


def test_thinning_leaves_nothing_out() -> None:
    for number, most in ((10_000, 512), (512, 512), (513, 512), (1, 512)):
        parts = thinned(number, most)
        assert [index for part in parts for index in part] == list(range(number))
        assert len(parts) <= most


def test_axes() -> None:
    axis = Axis.of([0.01, 10.0], is_log=True)
    assert [f"{value:g}" for value in axis.ticks()] == ["0.01", "0.1", "1", "10"]
    assert axis.at(axis.low) == pytest.approx(0)
    assert axis.at(axis.high) == pytest.approx(100)
    assert Axis.of([2.0, 12.0]).ticks(5) == [2.5, 5.0, 7.5, 10.0, 12.5] or Axis.of([2.0, 12.0]).ticks(5)[0] >= 1.5
    assert Axis.of([]).ticks()
    assert line_path([(0.0, 0.0), (1.0, 1.0)], Axis(0, 1), Axis(0, 1)) == "M0 100L100 0"
    assert line_path([(0.0, 0.0), (1.0, 1.0)], Axis(0, 1), Axis(0, 1), steps=True) == "M0 100H100L100 0"
    assert [tick.text for tick in index_ticks(128)] == ["0", "20", "40", "60", "80", "100", "120"]
    assert [(tick.at, tick.text) for tick in index_ticks(2)] == [(25.0, "0"), (75.0, "1")]


def test_trees() -> None:
    path, order = tree_path([[0, 2, 1.0], [1, 3, 2.0]], 3)
    assert order == [1, 0, 2]
    assert path.count("M") == 2
    assert tree_path([], 1) == ("", [0])


def of_the_hub(original: Path, place: Path) -> Path:
    """A folder of the Hub's cache with the original."""
    folder = place / "hub" / "models--org--name" / "snapshots" / "0a1b"
    folder.parent.mkdir(parents=True)
    folder.symlink_to(original)
    return folder


@pytest.mark.filterwarnings("ignore:No gradient of the loss")
@pytest.mark.parametrize("runs_in", ["any", "transformers"])
def test_damage_against_bytes(runs_in: str, original: Path, tmp_path: Path) -> None:
    """The curve ends at unchanged experts, and what was chosen is on or above it, with all bytes of the budget."""
    method = ByteBudget(share=0.5, runs_in=runs_in, curvature=False)
    compressor = MoECompressor.from_pretrained(original, method, SAMPLE, progress=False)
    compressor.apply()
    folder = compressor.save_pretrained(tmp_path / "out")
    run = RunRecord.read(folder, "out")
    found = run.plan.evidence["damage"]
    sizes, losses = zip(*found["curve"], strict=True)
    whole = sum(plan.num_experts * run.blocks[name].expert_bytes for name, plan in run.plan.blocks.items())
    assert sizes[-1] == whole
    assert losses[-1] == pytest.approx(0, abs=1e-6)
    assert list(sizes) == sorted(sizes)
    assert list(losses) == sorted(losses, reverse=True)
    size, lost = found["chosen"]
    stored = sum(fate.bytes for name, plan in run.plan.blocks.items() for fate in fates(plan, run.blocks[name]))
    assert size <= whole / 2
    if runs_in == "any":
        assert size == pytest.approx(stored)
    assert sum(found["blocks"].values()) == pytest.approx(lost, rel=1e-4)
    at = next(number for number, there in enumerate(sizes) if there >= size)
    below = losses[at - 1] + (losses[at] - losses[at - 1]) * (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
    assert lost >= below - 1e-5
    text = read(folder)
    assert "Expected damage by layer" in text
    assert f"cut at {quantity(size, 'B')}" in text


def test_training_after_the_cut(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    shutil.copytree(runs["merged"], folder)
    record = TrainingRecord(
        train="router",
        names=("a", "b"),
        teacher="org/name",
        settings={},
        data={},
        held_out={},
        kl_before=0.5,
        kl_after=0.125,
        best_step=10,
        steps=20,
        tokens=4096,
        curve=((0, 0.5), (10, 0.125), (20, 0.25)),
        losses=((10, 0.75), (20, 0.5)),
    )
    record.save(folder)
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "in nats a token: 0.5000 before, 0.1250 after, from step 10 of 20. Training ended at its last step." in text
    assert "Held-out KL and training loss by step" in text


def test_the_card_has_what_the_hub_reads(original: Path, statistics: Statistics, tmp_path: Path) -> None:
    folder = of_the_hub(original, tmp_path)
    recorded = {**statistics.calibration, "sources": [{"name": "org/texts:train", "weight": 1.0}, {"name": "mine.txt"}]}
    compressor = MoECompressor.from_pretrained(folder, METHODS["merged"], SAMPLE, progress=False)
    compressor.apply(replace(statistics, calibration=recorded))
    out = compressor.save_pretrained(tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "org/name"
    assert data["datasets"] == ["org/texts"]
    assert "base_model_relation" not in data
    assert "model-index" not in data
    assert "https://arxiv.org/abs/2310.01334" in card.text
    assert "makes no claim about quality" in card.text
    write_report(out, evaluation=scores(20.0))
    card = ModelCard.load(out / "README.md")
    assert isinstance(card.data, ModelCardData)
    assert card.data.model_name == "out"
    found = {result.metric_type: result.metric_value for result in card.data.eval_results or ()}
    assert found == {"perplexity": pytest.approx(20.0, rel=1e-2), "kl": pytest.approx(0.2)}
    assert "makes no claim" not in card.text
    assert card.text.count("## Quality") == 1
    assert card.data.to_dict()["base_model"] == "org/name"
    before = (out / "README.md").read_bytes()
    write_report(out, evaluation=scores(20.0))
    assert (out / "README.md").read_bytes() == before


def test_the_card_of_rounded_experts(original: Path, tmp_path: Path) -> None:
    compressor = MoECompressor.from_pretrained(of_the_hub(original, tmp_path), Rounding(bits=8), progress=False)
    compressor.apply()
    data = ModelCard.load(compressor.save_pretrained(tmp_path / "out") / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("org/name", "quantized")


@pytest.mark.parametrize(
    ("stages", "numbers"),
    [
        ([MSMoE(num_experts=4), LowRankSparse(rank=8)], ("2310.01334",)),
        ([ExpertPruning(num_experts=4)], ("2510.13999",)),
        ([ExpertPruning(num_experts=4, saliency="frequency")], ()),
    ],
)
def test_papers_of_a_recipe(stages: list[Stage], numbers: tuple[str, ...]) -> None:
    assert papers(Recipe(tuple(stages)).settings()) == numbers


@pytest.mark.parametrize(
    ("name", "runtimes"), [("merged", ["vllm"]), ("pruned", ["vllm", "llama.cpp"]), ("factorized", ["vllm"])]
)
def test_the_code_of_a_card_runs(
    name: str, runtimes: list[str], runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (runs[name] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(runs[name].parent)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["model"].config.num_hidden_layers == 3
    commands = {"vllm": f"vllm serve {name}\n", "llama.cpp": f"optimum-cli moe export {name} --to gguf "}
    assert [runtime for runtime, command in commands.items() if command in card] == runtimes


SAMPLES = [
    {"prompt": "Once <b>upon</b>", "original": " a time there was", "model": " a day there were <i>two</i>"},
    {"prompt": "The end", "original": " of it", "model": " of it"},
]


def test_a_run_beside_its_original_shows_errors_and_marked_continuations() -> None:
    run = synthetic_run(3, 8)
    names = list(run.plan.blocks)
    found = {
        "block_errors": {names[0]: 0.25, names[2]: 0.5},
        "layer_errors": dict(zip(names, (0.25, 0.125, 0.375), strict=True)),
        "samples": SAMPLES,
        "data": {"sources": [{"name": "held_out.jsonl"}], "num_tokens": 2048},
    }
    html = page(replace(run, report={**run.report, "side_by_side": found}))
    assert " a<del> time</del> there<del> was</del>" in html
    assert " a<ins> day</ins> there<ins> were &lt;i&gt;two&lt;/i&gt;</ins>" in html
    assert "Once &lt;b&gt;upon&lt;/b&gt;" in html
    text = Page(html).text
    assert "The same up to word 1; 2 of the original's 4 words are in both, in their order." in text
    assert "Both wrote the same." in text
    assert "Measured on held_out.jsonl, 2,048 tokens." in text
    rows = re.findall(
        r'<tr><th scope="row">(model\.layers\.\d\.mlp)</th><td class="n">(.*?)</td><td class="n">(.*?)</td>', html
    )
    assert {(names[0], "0.25", "0.25"), (names[1], "–", "0.125"), (names[2], "0.5", "0.375")} <= set(rows)


def test_a_run_that_was_not_put_beside_its_original_says_how() -> None:
    text = Page(page(synthetic_run(3, 8))).text
    assert "This checkpoint was not run beside its original" in text
    assert "optimum-cli moe report large --original large --text HELD_OUT" in text
