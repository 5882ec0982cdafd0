"""Text of several domains: read from rows and files, measured one by one, and the worst of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from optimum_moe.calibration.data import CalibrationConfig, build_batches
from optimum_moe.calibration.sources import by_domain, read_sources
from optimum_moe.evaluation import EvaluationResult, evaluate
from optimum_moe.evaluation.domains import WorstDomain
from optimum_moe.evaluation.scores import Score
from optimum_moe.reporting.card_quality import quality_section
from optimum_moe.reporting.scores import domain_rows, worst_domain

SMALL = {"max_tokens": 512, "sequence_length": 64, "num_prompts": 3, "new_tokens": 8, "progress": False}
TASKS = {"tasks": ("perplexity", "agreement", "generation")}


def rows_of(text: list[str]) -> list[dict[str, str]]:
    return [{"text": own, "domain": "even" if index % 2 == 0 else "odd"} for index, own in enumerate(text)]


@pytest.fixture(scope="module")
def result(model, text, tokenizer, make_model) -> EvaluationResult:
    return evaluate(make_model(seed=1), rows_of(text), model, tokenizer, **SMALL, **TASKS)


def test_each_domain_is_scored_as_its_text_alone(result, model, text, tokenizer, make_model):
    alone = evaluate(make_model(seed=1), text[::2], model, tokenizer, **SMALL, **TASKS)
    assert list(result.domains) == ["even", "odd"]
    assert result.domains["even"] == alone.scores
    assert alone.domains == {}
    assert "worst_domain" not in alone.data


def test_all_domains_together_are_the_scores_of_the_model(result):
    for name, score in result.scores.items():
        assert score.count == sum(own[name].count for own in result.domains.values())
    # Windows of equally many tokens, so that the mean over all is that of the domains.
    kl = [own["kl"].value for own in result.domains.values()]
    assert result.scores["kl"].value == pytest.approx(sum(kl) / 2, rel=1e-12)
    assert result.data["num_tokens"] == 1024
    assert [source["name"] for source in result.data["sources"]] == ["list of 20 rows (even)", "list of 20 rows (odd)"]


def test_the_ratio_of_perplexities_is_paired(result, model, text, tokenizer):
    original = evaluate(model, rows_of(text), model, tokenizer, **SMALL, **TASKS)
    assert original.scores["perplexity_ratio"] == Score(1.0, 1.0, 1.0, 16)
    for name, own in result.domains.items():
        expected = own["perplexity"].value / original.domains[name]["perplexity"].value
        assert own["perplexity_ratio"].value == pytest.approx(expected, rel=1e-9)
        assert own["perplexity_ratio"].low < own["perplexity_ratio"].value < own["perplexity_ratio"].high


def test_the_worst_domain(result, tmp_path: Path):
    kl = {name: own["kl"].value for name, own in result.domains.items()}
    worst = result.worst_domain
    assert worst is not None
    assert (worst.name, worst.kl) == max(kl.items(), key=lambda item: item[1])
    assert worst.over_mean == pytest.approx(2 * worst.kl / sum(kl.values()))
    assert result.data["worst_domain"]["over_mean"] == worst.over_mean
    result.save(tmp_path / "result.json")
    assert EvaluationResult.load(tmp_path / "result.json").domains == result.domains
    assert WorstDomain("code", 0.0, 0.0).over_mean == 1


def test_tables_show_the_worst_domain_first(result):
    scores = {name: value for name, value in result.to_dict().items() if name != "units"}
    header, rows = domain_rows(scores)
    assert header[:3] == ("domain", "KL to the original (nats a token)", "perplexity over the original's")
    worst = result.worst_domain
    assert worst is not None
    assert rows[0][:2] == (worst.name, f"{worst.kl:.4f} ({rows[0][1].partition('(')[2]}")
    assert worst_domain(scores).startswith(f"{worst.name} lost the most: {worst.kl:.4f} nats a token, 1.")
    card = quality_section({"evaluation": scores})
    assert f"| {worst.name} | {worst.kl:.4f} (" in card
    assert worst_domain(scores) in card
    assert worst_domain({"scores": {}, "data": {}, "domains": {}}) == ""


def files_of(folder: Path) -> dict[str, Any]:
    rows = [{"text": "w1", "domain": "code"}, {"text": "w2", "domain": "chat"}, {"text": "w3", "domain": "code"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "chat.txt").write_text("w2", encoding="utf-8")
    (folder / "code.txt").write_text("w1\n\nw3", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return {
        "jsonl": folder / "rows.jsonl",
        "parquet": folder / "rows.parquet",
        "list": rows,
        "dataset": Dataset.from_list(rows),
        "paths": {"code": folder / "code.txt", "chat": str(folder / "chat.txt")},
        "weighted": [({"code": folder / "code.txt"}, 2.0), ({"chat": folder / "chat.txt"}, 1.0)],
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "list", "dataset", "paths", "weighted"])
def test_domains_are_read_from_rows_and_names(tmp_path: Path, kind: str):
    source = files_of(tmp_path)[kind]
    found = by_domain(source)
    read = {name: [text for part in parts for text in part.documents] for name, parts in found.items()}
    assert read == {"code": ["w1", "w3"], "chat": ["w2"]}
    assert [part.weight for part in found["code"]] == [2.0 if kind == "weighted" else 1.0]
    assert by_domain([part for parts in found.values() for part in parts]).keys() == found.keys()


def test_a_domain_changes_nothing_about_calibration(tokenizer, text):
    plain = build_batches(CalibrationConfig(text, max_tokens=512, sequence_length=64), tokenizer)
    named = build_batches(CalibrationConfig(rows_of(text), max_tokens=512, sequence_length=64), tokenizer)
    assert plain.hash == named.hash


def test_text_without_domains_has_none(tmp_path: Path):
    assert by_domain(["w1", "w2"]) == {}
    assert by_domain([{"text": "w1"}, {"text": "w2", "domain": None}]) == {}
    assert by_domain(iter([{"text": "w1", "domain": "code"}])) == {}


def test_domains_of_only_a_part_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"Row 1 of list of 2 rows has no domain, and other text has one\. Give every"):
        by_domain([{"text": "w1", "domain": "code"}, {"text": "w2"}])
    source = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"Row 0 of chat\.txt has no domain"):
        by_domain([({"code": source["paths"]["code"]}, 1), (source["paths"]["chat"], 1)])
    with pytest.raises(ValueError, match=r"mixture of \{source: weight\}, or has the file of each domain"):
        read_sources({"text": ["w1"]})
