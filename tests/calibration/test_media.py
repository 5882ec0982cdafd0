"""Calibration on examples with audio or images, through real processors."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Nemotron3_5TranscribeProcessor,
    NemotronAsrStreamingFeatureExtractor,
)

from optimum_moe import CalibrationConfig, MoECompressor, MSMoE
from optimum_moe.calibration.data import build_batches
from tests.composites_table import build_composite, composite_named
from tests.test_reload import move_out_of_the_file
from tests.tiny_checkpoints import tokenizer as text_tokenizer
from tests.tiny_models import logits_of

RATE = 16000
MELS = 8
needs_images = pytest.mark.skipif(
    not (find_spec("PIL") and find_spec("torchvision")), reason="image processors need Pillow and torchvision"
)

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% elif p['type'] == 'audio' %}<audio>"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endfor %}"
)


def tokenizer_with(*tokens: str) -> Any:
    tokenizer = text_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens]})
    tokenizer.pad_token = "<eos>"
    return tokenizer


@pytest.fixture
def ear() -> Nemotron3_5TranscribeProcessor:
    extractor = NemotronAsrStreamingFeatureExtractor(feature_size=MELS, sampling_rate=RATE)
    tokenizer = tokenizer_with("<audio>")
    return Nemotron3_5TranscribeProcessor(extractor, tokenizer, text_tokenizer(), TEMPLATE, "<audio>")


def sound(seconds: float = 0.2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(int(RATE * seconds)).astype(np.float32)


def question(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part, {"type": "text", "text": "abc def"}]}]


def chat(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [*question(part), {"role": "assistant", "content": "a plain answer"}]


def test_rows_and_chats_with_audio_become_model_inputs(ear: Nemotron3_5TranscribeProcessor) -> None:
    rows = [{"text": f"<audio> abc {i}", "audio": sound(seed=i)} for i in range(3)]
    batches = build_batches(CalibrationConfig(rows), ear)
    assert len(batches) == 3
    for batch in batches:
        # 0.2 s are 20 frames, padded to 24; eight of them make one token.
        assert batch["input_features"].shape == (1, 24, MELS)
        assert int(batch["input_features_mask"].sum()) == 20
        assert int((batch["input_ids"] == ear.audio_token_id).sum()) == 3
    assert batches.num_tokens == sum(batch["input_ids"].numel() for batch in batches)
    assert batches.description["sources"] == [{"name": "list of 3 rows", "examples": 3, "batches": 3}]
    assert batches.description["sequence_length"] is None

    (spoken,) = build_batches(CalibrationConfig([chat({"type": "audio", "audio": sound()})]), ear)
    assert (spoken["input_ids"] == ear.audio_token_id).any()
    assert "a plain answer" in ear.tokenizer.decode(spoken["input_ids"][0])


def test_the_hash_covers_what_placeholders_stand_for(ear: Nemotron3_5TranscribeProcessor) -> None:
    hashes = [
        build_batches(CalibrationConfig([{"text": "<audio> a", "audio": sound(seed=seed)}]), ear).hash
        for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_limits_and_seed(ear: Nemotron3_5TranscribeProcessor) -> None:
    rows = [{"text": f"<audio> abc {i}", "audio": sound(seed=i)} for i in range(6)]
    everything = build_batches(CalibrationConfig(rows, max_tokens=None), ear)
    assert len(everything) == 6
    each = [batch["input_ids"].numel() for batch in everything]
    limit = sum(each[:2]) + 1
    few = build_batches(CalibrationConfig(rows, max_tokens=limit, sequence_length=2), ear)
    assert few.num_tokens == sum(each[:2])
    assert len(build_batches(CalibrationConfig(rows, num_samples=4), ear)) == 4
    assert build_batches(CalibrationConfig(rows, seed=1), ear).hash != everything.hash
    with pytest.raises(ValueError, match=r"max_tokens=3 is less than the \d+ of row \d of list of 6 rows"):
        build_batches(CalibrationConfig(rows, max_tokens=3, sequence_length=2), ear)


def test_a_dataset_with_audio_is_read_lazily_and_one_with_text_between(ear: Nemotron3_5TranscribeProcessor) -> None:
    decoded = {"array": sound().tolist(), "sampling_rate": RATE}
    data = datasets.Dataset.from_dict({"text": ["<audio> a", "no sound"], "audio": [decoded, None]})
    batches = build_batches(CalibrationConfig(data), ear)
    assert sorted("input_features" in batch for batch in batches) == [False, True]
    data = datasets.Dataset.from_dict({"text": ["<audio> a"], "audio": [decoded | {"sampling_rate": 8000}]})
    with pytest.raises(ValueError, match="has a sampling rate of 8000, the model takes 16000"):
        build_batches(CalibrationConfig(data), ear)


def test_a_stream_keeps_its_order(ear: Nemotron3_5TranscribeProcessor) -> None:
    rows = ({"text": f"<audio> {'abc ' * i}", "audio": sound()} for i in range(1, 4))
    lengths = [batch["input_ids"].numel() for batch in build_batches(CalibrationConfig(rows), ear)]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "abc", "audio": np.zeros(3200, np.float32)}],
            r"cannot read row 0 of list of 1 rows: .*Found total 0 <audio> tokens and 1 audio",
        ),
        ([{"text": "<audio>", "images": ["a.png"]}], "There is no file 'a.png', which row 0"),
        (
            [{"text": "<audio>", "images": [np.zeros((8, 8, 3), np.uint8)]}],
            "Nemotron3_5TranscribeProcessor has no image_processor",
        ),
        ([{"audio": np.zeros(9, np.float32)}], "row 0 of list of 1 rows has media but no text"),
        ([{"messages": chat({"type": "audio", "audio": "b.wav"})}], "There is no file 'b.wav', which row 0"),
        ([{"messages": chat({"type": "text", "text": ""}), "audio": np.zeros(9)}], "Put them into the messages"),
    ],
)
def test_examples_that_cannot_be_used(rows: list[Any], message: str, ear: Nemotron3_5TranscribeProcessor) -> None:
    with pytest.raises(ValueError, match=message):
        build_batches(CalibrationConfig(rows), ear)


def test_a_tokenizer_alone_is_not_enough(ear: Nemotron3_5TranscribeProcessor) -> None:
    rows = [{"text": "<audio> a", "audio": sound()}]
    with pytest.raises(ValueError, match=r"takes text only. Pass the model's processor"):
        build_batches(CalibrationConfig(rows), ear.tokenizer)
    with pytest.raises(ValueError, match="no processor was given"):
        build_batches(CalibrationConfig(rows))


def test_media_after_a_first_row_without_are_not_left_out(ear: Nemotron3_5TranscribeProcessor) -> None:
    rows = [{"text": "abc"}, {"text": "<audio> a", "audio": sound()}]
    with pytest.raises(ValueError, match="row 1 of stream of rows has images, audio or video, and the first row has"):
        build_batches(CalibrationConfig(iter(rows), sequence_length=2), ear)
    assert len(build_batches(CalibrationConfig(rows), ear)) == 2
    with pytest.raises(ValueError, match="mixture holds text sources, this one holds images"):
        build_batches(CalibrationConfig([(rows, 1.0)]), ear)


def test_a_missing_image_names_file_and_line(tmp_path: Path, ear: Nemotron3_5TranscribeProcessor) -> None:
    lines = [{"text": "abc"}, {"text": "x", "images": ["pictures/none.png"]}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"There is no file '.*/pictures/none.png', which line 2 of data.jsonl names"):
        build_batches(CalibrationConfig(tmp_path / "data.jsonl"), ear)


def test_a_speech_checkpoint_from_end_to_end(tmp_path: Path, ear: Nemotron3_5TranscribeProcessor) -> None:
    composite = composite_named("nemo_speechlm")
    original = build_composite(composite, vocab_size=400, audio_token_id=ear.audio_token_id)
    original.save_pretrained(tmp_path / "original")
    ear.save_pretrained(tmp_path / "original")
    rows = [{"text": f"<audio> abc {i}", "audio": sound(seed=i)} for i in range(3)]
    compressor = MoECompressor.from_pretrained(
        tmp_path / "original",
        MSMoE(num_experts=4),
        CalibrationConfig(rows, unseen="keep"),
        output_dir=tmp_path / "out",
        progress=False,
    )
    statistics = compressor.calibrate()
    tokens = build_batches(CalibrationConfig(rows), ear).num_tokens
    assert {block.num_tokens for block in statistics.blocks.values()} == {tokens}
    compressor.apply()
    assert {block.num_groups for block in compressor.plan.blocks.values()} == {4}
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    assert_same_answer(loaded, compressor.model, again, ear, question({"type": "audio", "audio": sound(seed=9)}))


def assert_same_answer(loaded: Any, model: Any, again: Any, processor: Any, asked: Any) -> None:
    """The loaded processor makes the same inputs, and the loaded model the same logits of those."""
    assert type(again) is type(processor)
    inputs, others = (
        p.apply_chat_template(asked, tokenize=True, return_dict=True, return_tensors="pt") for p in (processor, again)
    )
    assert inputs.keys() == others.keys()
    assert all(torch.equal(inputs[name], others[name]) for name in inputs)
    move_out_of_the_file(loaded)
    assert torch.equal(logits_of(loaded, others), logits_of(model, inputs))


def eye() -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    tokenizer = tokenizer_with("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes, min_pixels=256, max_pixels=1024),
        tokenizer,
        Qwen3VLVideoProcessor(**sizes),
        chat_template=TEMPLATE,
    )


def picture(seed: int, width: int = 24) -> Any:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, width, 3), dtype=np.uint8))


def vision_checkpoint(folder: Path) -> Any:
    processor = eye()
    ids = {f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in ("image", "video")}
    ids |= {f"vision_{end}_token_id": getattr(processor, f"vision_{end}_token_id") for end in ("start", "end")}
    build_composite(composite_named("qwen3_vl_moe"), vocab_size=400, **ids).save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


@needs_images
def test_paths_in_a_file_start_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    picture(0).save(tmp_path / "pictures" / "a.png")
    lines = [
        {"text": "<|vision_start|><|image_pad|><|vision_end|> abc", "images": ["pictures/a.png"]},
        {"messages": chat({"type": "image", "path": "pictures/a.png"})},
        {"text": "only text"},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    batches = build_batches(CalibrationConfig(tmp_path / "data.jsonl"), eye())
    shown = [batch for batch in batches if "pixel_values" in batch]
    assert len(batches) == 3
    assert len(shown) == 2
    assert torch.equal(shown[0]["pixel_values"], shown[1]["pixel_values"])
    assert shown[0]["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert all(int((batch["input_ids"] == eye().image_token_id).sum()) == 6 for batch in shown)


@needs_images
def test_a_checkpoint_with_processor_from_end_to_end(tmp_path: Path) -> None:
    processor = vision_checkpoint(tmp_path / "original")
    chats = [chat({"type": "image", "image": picture(seed)}) for seed in range(4)]
    compressor = MoECompressor.from_pretrained(
        tmp_path / "original",
        MSMoE(num_experts=4),
        calibration=CalibrationConfig(chats, unseen="keep"),
        output_dir=tmp_path / "out",
        progress=False,
    )
    assert type(compressor.tokenizer) is type(processor)
    compressor.apply()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    assert_same_answer(loaded, compressor.model, again, processor, question({"type": "image", "image": picture(9)}))
    assert {block.num_groups for block in compressor.plan.blocks.values()} == {4}
