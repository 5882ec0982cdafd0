"""A guard on the worst domain: what it lets pass, what it refuses, and what a repair calibrates on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimum_moe import ExpertPruning, Guard, compress_guarded
from optimum_moe.calibration import CalibrationConfig
from optimum_moe.checkpoint.source import ModelSource
from optimum_moe.domain_guard import reweighted, weighted
from tests.tiny_models import build

pytestmark = pytest.mark.filterwarnings("ignore:Calibration gave no token")

PRUNED = ExpertPruning(num_experts=4)
EVALUATION = {"max_tokens": 512, "sequence_length": 16, "tasks": ("perplexity", "agreement")}
RANGES = {"code": (3, 40), "chat": (40, 70), "maths": (70, 99)}


def rows(seed: int, domains: tuple[str, ...] = tuple(RANGES), count: int = 40) -> list[dict[str, Any]]:
    """Documents of 16 tokens, each domain with tokens of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(*RANGES[name], (16,), generator=generator).tolist(), "domain": name}
        for _ in range(count)
        for name in domains
    ]


def calibration(*domains: str) -> CalibrationConfig:
    return CalibrationConfig(rows(1, domains or tuple(RANGES)), sequence_length=16, max_tokens=512)


def specialized() -> Any:
    """A model each of whose experts serves the tokens of one domain."""
    model = build("qwen3_moe")
    directions = torch.linalg.qr(torch.randn(model.config.hidden_size, 3, generator=torch.Generator().manual_seed(0)))[
        0
    ]
    with torch.no_grad():
        model.lm_head.weight *= 8
        for (start, end), direction in zip(RANGES.values(), directions.T, strict=True):
            model.model.embed_tokens.weight[start:end] += direction
        for layer in model.model.layers:
            router = layer.mlp.gate.weight
            router += 4 * directions.T[torch.arange(len(router)) % 3]
            layer.mlp.experts.down_proj *= 8
    return model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard") / "original"
    specialized().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(99)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    return folder


def guard(worst: float, **settings: Any) -> Guard:
    return Guard(rows(2), worst, evaluation=EVALUATION, **settings)


def run(original: Path, limit: Guard, **arguments: Any) -> Any:
    given = {"calibration": calibration("code"), "progress": False, **arguments}
    return compress_guarded(original, PRUNED, guard=limit, **given)


def test_a_model_that_passes_is_written_with_its_scores_by_domain(original: Path, tmp_path: Path):
    done = run(original, guard(2.9), output_dir=tmp_path / "out")
    assert done.folder == tmp_path / "out"
    assert len(done.attempts) == 1
    assert done.attempts[0].worst == done.result.worst_domain
    report = json.loads((done.folder / "compression_report.json").read_text(encoding="utf-8"))["evaluation"]
    losses = {name: scores["kl"]["value"] for name, scores in report["domains"].items()}
    assert set(losses) == set(RANGES)
    worst = report["data"]["worst_domain"]
    assert worst["kl"] == max(losses.values()) > 0
    assert worst["over_mean"] == pytest.approx(3 * worst["kl"] / sum(losses.values()))
    assert report["data"]["guard"]["worst"] == 2.9
    card = (done.folder / "README.md").read_text(encoding="utf-8")
    assert f"{worst['name']} lost the most: {worst['kl']:.4f} nats a token" in card


def test_a_model_that_lost_too_much_in_one_domain_is_refused_and_not_written(original: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"lost 1\.\d+ times the mean .* worst=1\.0001 is allowed.*Nothing is written"):
        run(original, guard(1.0001), output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_repair_calibrates_on_the_domains_that_lost_most(original: Path):
    done = run(original, guard(1.5, repair=rows(3)))
    first, second = done.attempts
    assert first.worst.name in ("chat", "maths")
    assert first.worst.over_mean > 1.6
    assert second.worst.over_mean <= 1.5
    assert set(second.weights) == {"chat", "maths"}
    assert done.compressor.plan is not None
    sources = {s["name"]: s for s in done.compressor.plan.calibration["sources"]}
    assert f"list of 120 rows ({first.worst.name})" in sources
    assert done.compressor.plan.calibration["num_tokens"] == 512


def test_a_repair_that_does_not_help_is_refused_in_the_end(original: Path, tmp_path: Path):
    limit = guard(1.0001, repair=rows(3), rounds=1)
    with pytest.raises(ValueError, match=r"lost .* \(1\.\d\d, 1\.\d\d in all attempts\).*Choose a larger size"):
        run(original, limit, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_trained_afterwards_is_measured_after_it(original: Path, tmp_path: Path):
    text = {"source": rows(4), "sequence_length": 16, "batch_size": 4}
    training = {"data": text, "max_tokens": 960, "train": "experts", "learning_rate": 1e-3}
    cut = run(original, guard(2.9)).attempts[0]
    done = run(original, guard(2.9), recover=training, output_dir=tmp_path / "out")
    assert sum(done.attempts[0].losses.values()) < sum(cut.losses.values())
    assert (tmp_path / "out" / "recovery.json").is_file()
    with pytest.raises(ValueError, match=r"of the evaluation text's 13-word sequences occur in the calibration"):
        run(original, guard(2.9), recover={**training, "data": rows(2)})


def test_domains_above_the_mean_get_more_weight_each_time():
    once = reweighted({}, {"code": 0.1, "chat": 0.2, "maths": 0.6})
    assert once == {"maths": pytest.approx(2.0)}
    twice = reweighted(once, {"code": 0.1, "chat": 0.4, "maths": 0.1})
    assert twice == {"chat": pytest.approx(2.0), "maths": pytest.approx(2.0)}


def test_weights_are_shares_of_the_tokens(original: Path):
    data = weighted(calibration("code"), guard(1.5, repair=rows(3)), {"maths": 3.0})
    assert [(part.name, part.weight) for part in data.source] == [
        ("list of 40 rows", 1.0),
        ("list of 120 rows (maths)", 3.0),
    ]
    assert (data.max_tokens, data.sequence_length) == (512, 16)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (lambda: Guard(rows(2), 1.0), r"worst=1\.0 must be more than 1"),
        (lambda: guard(3.0), r"worst=3 can never be exceeded with 3 domains"),
        (lambda: Guard(rows(2, ("code",)), 1.5), r"its text names only 'code'"),
        (lambda: Guard(["w1"], 1.5), r"its text names no domain"),
        (lambda: guard(1.5, repair=rows(3, ("code", "chat"))), r"repair= has no text of maths, but of code, chat\."),
        (lambda: guard(1.5, rounds=0), r"rounds=0"),
    ],
)
def test_guards_that_can_not_work_are_refused(original: Path, limit: Any, message: str):
    with pytest.raises(ValueError, match=message):
        run(original, limit())


def test_what_a_guard_needs_of_the_run(original: Path):
    with pytest.raises(ValueError, match=r"A model in memory is cut in place"):
        compress_guarded(build("qwen3_moe"), PRUNED, calibration(), guard(1.5))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"compressed model in memory, and engine=\"streaming\" holds none\. Leave it"):
        run(original, guard(1.5), engine="streaming")
    with pytest.raises(ValueError, match=r"engine='disk' is unknown"):
        run(original, guard(1.5), engine="disk")
    with pytest.raises(ValueError, match=r"a stream can be read once"):
        run(original, guard(1.5), calibration=CalibrationConfig(iter(rows(1)), sequence_length=16))


def test_a_model_that_would_be_streamed_is_refused_before_any_weight_is_read(
    original: Path, monkeypatch: pytest.MonkeyPatch
):
    free = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=1000))
    monkeypatch.setattr(ModelSource, "load", lambda source: pytest.fail("a weight is read"))
    with pytest.raises(
        ValueError, match=r"this one, of \d[\d,]+ bytes, is streamed because it exceeds the free memory"
    ):
        run(original, guard(1.5))


def test_text_that_is_calibrated_on_is_refused_before_any_weight_is_read(
    original: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ModelSource, "load", lambda source: pytest.fail("a weight is read"))
    with pytest.raises(ValueError, match=r"of the evaluation text's 13-word sequences occur in the calibration"):
        run(original, guard(1.5), calibration=CalibrationConfig(rows(2), sequence_length=16))
    with pytest.raises(ValueError, match=r"of the evaluation text's 13-word sequences occur in the calibration"):
        run(original, guard(1.5, repair=rows(2)))
