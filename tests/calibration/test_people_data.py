"""Calibration data as people have them: tokenized data sets, chats of all kinds, files of all encodings, loaders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from optimum_moe import CalibrationConfig, ExpertPruning, MoECompressor, Statistics
from optimum_moe.calibration import CalibrationBatches, build_batches
from optimum_moe.calibration.chats import chat_text, read_chat, render_chat
from optimum_moe.evaluation.heldout import prepare, texts_of
from tests.calibration.test_data import PAD, make_tokenizer, rows_of, words
from tests.tiny_checkpoints import save_checkpoint
from tests.tiny_models import build, inputs_for

IDS = [[1, 2, 3], [4, 5], [6]]
TEXT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
PARTS_TEMPLATE = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] + ' ' }}{% endfor %}{% endfor %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def batches_of(source: Any, tokenizer: Any = None, **settings: Any) -> CalibrationBatches:
    return build_batches(CalibrationConfig(source, **{"sequence_length": 4, **settings}), tokenizer)


def unpacked(source: Any, tokenizer: Any, **settings: Any) -> list[list[int]]:
    return sorted(rows_of(batches_of(source, tokenizer, packing=False, **settings)))


def padded_rows() -> list[dict[str, list[int]]]:
    return [
        {"input_ids": ids + [PAD] * (5 - len(ids)), "attention_mask": [1] * len(ids) + [0] * (5 - len(ids))}
        for ids in IDS
    ]


def written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


# Token ids


@pytest.mark.parametrize(
    "source",
    [
        IDS,
        [{"input_ids": ids} for ids in IDS],
        [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in IDS],
        [np.array(ids) for ids in IDS],
        iter(IDS),
        datasets.Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in IDS]),
        datasets.Dataset.from_list([{"input_ids": ids} for ids in IDS]).with_format("torch"),
        datasets.Dataset.from_list(padded_rows()),
        datasets.Dataset.from_list(padded_rows()).with_format("numpy"),
        datasets.Dataset.from_list(padded_rows()).to_iterable_dataset(),
        padded_rows(),
    ],
    ids=lambda source: type(source).__name__,
)
def test_rows_of_token_ids_are_rows_and_need_no_tokenizer(source: Any) -> None:
    batches = batches_of(source)
    assert sorted(rows_of(batches)) == IDS
    assert batches.num_tokens == 6
    assert batches.description["sources"][0]["texts_read"] == 3


def test_rows_of_token_ids_in_files(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in padded_rows())
    assert sorted(rows_of(batches_of(written(tmp_path, "ids.jsonl", lines.encode())))) == IDS
    pq.write_table(pa.Table.from_pylist(padded_rows()), tmp_path / "ids.parquet")
    assert sorted(rows_of(batches_of(tmp_path / "ids.parquet"))) == IDS


def test_limits_and_order_hold_for_token_ids() -> None:
    rows = [[i % 90] * 10 for i in range(50)]
    drawn = batches_of(rows, max_tokens=40, sequence_length=8)
    assert drawn.num_tokens <= 40
    assert max(len(row) for row in rows_of(drawn)) == 8
    assert drawn.hash == batches_of(rows, max_tokens=40, sequence_length=8).hash
    assert drawn.hash != batches_of(rows, max_tokens=40, sequence_length=8, seed=1).hash
    assert batches_of(rows, max_tokens=None, sequence_length=8).num_tokens == 500


def test_text_goes_before_ids_and_both_mix_as_two_sources(tokenizer: PreTrainedTokenizerFast) -> None:
    both = [{"text": "w7 w8", "input_ids": [1]}]
    assert unpacked(both, tokenizer) == [[7, 8]]
    # Equal weights: one row each, the next text would be ahead.
    assert unpacked([([[1, 2]], 1), (["w3 w4"], 1)], tokenizer) == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match=r"holds both texts and rows of token ids\. Give them as two sources"):
        batches_of([{"input_ids": [1]}, {"text": "w1"}], tokenizer)


def test_evaluation_reads_rows_of_token_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    held = prepare(IDS, None, max_tokens=64, sequence_length=4, batch_size=2, seed=0)
    assert sorted(held.documents) == [(1, 2, 3), (4, 5), (6,)]
    assert sorted(texts_of(IDS, tokenizer)) == ["w1 w2 w3", "w4 w5", "w6"]


def test_a_table_is_no_list_of_texts() -> None:
    class Frame(dict):  # type: ignore[type-arg]
        columns = ("text",)

    for table in (pa.table({"text": ["w1"]}), iter(()), Frame(text=["w1"])):
        with pytest.raises(ValueError, match=r"Unknown calibration source Table|source is empty|A dict as a source"):
            batches_of(table)

    class Columns(list):  # type: ignore[type-arg]
        columns = ("text",)

    with pytest.raises(ValueError, match=r"A Columns is read by column, and calibration data by row\. Pass datasets"):
        batches_of(Columns(["text"]))


# Columns


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"content": "w1"}, r"did you mean text_column='content'\?"),
        ({"conversations": [{"from": "human", "value": "w1"}]}, r"did you mean text_column='conversations'\?"),
        ({"prompt": "w1", "response": "w2"}, r"one of 'prompt' and 'response' in every row: \"messages\""),
        ({"instruction": "w1", "input": "", "output": "w2"}, r"one of 'instruction' and 'output' in every row"),
        ({"txt": "w1"}, r"which has \['txt'\]; did you mean 'txt'\? Set text_column"),
    ],
)
def test_other_columns_are_named(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str) -> None:
    for source in ([row], datasets.Dataset.from_list([row]), datasets.Dataset.from_list([row]).to_iterable_dataset()):
        with pytest.raises(ValueError, match=rf"No column 'text', 'messages' or 'input_ids' in .*{message}"):
            batches_of(source, tokenizer)


# Chats


@pytest.mark.parametrize(
    "chat",
    [
        [{"from": "system", "value": "w1"}, {"from": "human", "value": "w2"}, {"from": "gpt", "value": "w3"}],
        [
            {"role": "system", "content": "w1"},
            {"role": "user", "content": "w2"},
            {"role": "assistant", "content": "w3"},
        ],
        [
            {"role": "system", "content": ["w1"]},
            {"role": "user", "content": [{"type": "text", "text": "w2", "image": None}]},
            {"role": "assistant", "content": "w3", "tool_calls": None, "name": None},
        ],
    ],
)
def test_chats_of_all_kinds_are_one(chat: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = "system w1 user w2 assistant w3 "
    assert render_chat(read_chat(chat, "here"), with_template(TEXT_TEMPLATE)) == expected
    assert chat_text(read_chat(chat, "here")) == "w1\nw2\nw3"
    line = json.dumps({"conversations": chat}).encode()
    source = CalibrationConfig(written(tmp_path, "c.jsonl", line), text_column="conversations")
    assert list(texts_of(source)) == ["w1\nw2\nw3"]


def test_nested_chats_in_parquet_and_data_sets(tmp_path: Path) -> None:
    call = {"function": {"name": "w9", "arguments": "{}"}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "w1", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ]
        },
        {"messages": [{"role": "user", "content": "w2", "tool_calls": None}]},
        {"messages": []},
        {"messages": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    template = (
        "{% for m in messages %}{% if 'tool_calls' in m %}{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    )
    data = datasets.Dataset.from_list(rows)
    for source in (tmp_path / "c.parquet", data, data.to_iterable_dataset(), rows):
        batches = batches_of(source, with_template(template), packing=False)
        assert sorted(rows_of(batches)) == [[1, 9], [2]]
        assert batches.description["sources"][0]["empty_texts"] == 2


def test_content_that_is_missing_is_empty_and_never_the_word_none() -> None:
    for message in ({"role": "assistant", "content": None, "tool_calls": []}, {"role": "assistant"}):
        chat = read_chat([{"role": "user", "content": "w1"}, message], "here")
        for template in (
            TEXT_TEMPLATE,
            "{% for m in messages %}{{ m['role'] ~ ' ' ~ m['content'] ~ ' ' }}{% endfor %}",
        ):
            assert render_chat(chat, with_template(template)) == "user w1 assistant  "
        assert "None" not in chat_text(chat)


def test_a_template_of_parts_is_given_parts() -> None:
    chat = read_chat([{"role": "user", "content": "w1 w2"}], "here")
    assert render_chat(chat, with_template(PARTS_TEMPLATE)) == "w1 w2 "


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_arguments_of_tool_calls_are_given_as_the_template_wants_them(arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    chat = read_chat([{"role": "user", "content": "w1"}, {"role": "assistant", "tool_calls": [call]}], "here")
    head = "{% for m in messages %}{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
    for body, expected in (
        ("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}", "w1a=1"),
        ("{{ c.function.arguments | tojson }}", 'w1{"a": 1}'),
        ("{{ '<' + c.function.arguments + '>' }}", 'w1<{"a": 1}>'),
    ):
        assert render_chat(chat, with_template(head + body + "{% endfor %}{% endfor %}")) == expected


def test_a_tool_message_keeps_its_role_and_name() -> None:
    chat = read_chat([{"role": "user", "content": "w1"}, {"role": "tool", "name": "f", "content": "w2"}], "here")
    template = "{% for m in messages %}{{ m.role }}:{{ m.name }}:{{ m.content }} {% endfor %}"
    assert render_chat(chat, with_template(template)) == "user::w1 tool:f:w2 "


def test_a_template_that_refuses_says_which_chat_and_what_to_do() -> None:
    refusal = "{% if m.role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    template = "{% for m in messages %}" + refusal + "{{ m.content }}{% endfor %}"
    chat = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    with pytest.raises(ValueError, match=r"refuses a chat \(TemplateError: No system\).*'w1'.* the first user"):
        batches_of([chat], with_template(template))
    with pytest.raises(ValueError, match=r"refuses a chat \(TemplateSyntaxError.* Correct the chat, or pass the"):
        batches_of([chat[1:]], with_template("{% for %}"))


def test_a_template_that_leaves_the_user_out_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="leaves out the user.s text"):
        batches_of([[{"role": "user", "content": "w1"}]], with_template("w5 w6 w7 w8 w9"))


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([{"from": "alien", "value": "w1"}], r"turn from 'alien', known are human, user, gpt"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            r"part of type 'image_url'",
        ),
        ([{"role": "user", "content": 3}], r"part of type 'int'"),
        ([{"role": "user", "content": "w1"}, {"text": "w2"}], r"Text, a chat or token ids are expected"),
    ],
)
def test_what_is_no_chat_is_named(chat: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches_of([chat], with_template(TEXT_TEMPLATE))


# Files


LINES = [json.dumps({"text": text}, ensure_ascii=False) for text in ("w1 w2", "", "w3 é")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, encoding: str, end: str) -> None:
    lines = written(tmp_path, "a.jsonl", (end + end.join(LINES) + end * 3).encode(encoding))
    assert list(texts_of(lines)) == ["w1 w2", "", "w3 é"]
    text = written(tmp_path, "a.txt", (end * 2).join(["w1 w2", f"w3{end}é"]).encode(encoding))
    assert list(texts_of(text)) == ["w1 w2", "w3\né"]
    assert unpacked(text, tokenizer)[0] == [1, 2]


def test_files_that_were_joined_have_marks_inside(tmp_path: Path) -> None:
    part = (LINES[0] + "\n").encode("utf-8-sig")
    assert list(texts_of(written(tmp_path, "a.jsonl", part + part))) == ["w1 w2"] * 2


def test_broken_files_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, data, message in (
        ("a.txt", "w1 w2".encode("utf-16-le"), r"a\.txt holds NUL characters: .* UTF-16 without a byte order mark"),
        ("a.jsonl", b'{"text": "w1 \\ud83d"}', r"line 1 of a\.jsonl is not valid Unicode text \(surrogates"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is not a valid Parquet file"),
    ):
        with pytest.raises(ValueError, match=message):
            batches_of(written(tmp_path, name, data), tokenizer)


def test_one_very_long_document(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = written(tmp_path, "long.txt", words(20_000).encode())
    assert batches_of(path, tokenizer, max_tokens=64, sequence_length=16).num_tokens == 64
    assert batches_of([list(range(90)) * 100], max_tokens=64, sequence_length=16).num_tokens == 64


# What a model takes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("people") / "qwen3_moe", max_position_embeddings=64)


def observed(model: Any, source: Any, **settings: Any) -> Statistics:
    config = CalibrationConfig(source, unseen="keep")
    return MoECompressor.from_pretrained(
        model, ExpertPruning(num_experts=4), config, progress=False, **settings
    ).calibrate()


def assert_same_counts(one: Statistics, other: Statistics) -> None:
    for name, block in one.blocks.items():
        assert torch.equal(block.token_count_E, other.blocks[name].token_count_E)
        assert torch.equal(block.gate_sum_E, other.blocks[name].gate_sum_E)


def test_a_loader_with_labels_gives_what_the_data_set_gives(checkpoint: Path) -> None:
    tokenizer = make_tokenizer()
    data = datasets.Dataset.from_list([{"input_ids": list(range(i, i + 12))} for i in range(8)])
    loader = DataLoader(data, batch_size=8, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    with_labels = observed(checkpoint, loader)
    assert next(iter(with_labels.blocks.values())).num_tokens == 96
    without = [{k: v for k, v in batch.items() if k != "labels"} for batch in loader]
    assert_same_counts(with_labels, observed(checkpoint, without))


def test_masks_are_numbers_or_booleans_and_batches_of_any_length(checkpoint: Path) -> None:
    ids, mask = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, 12:] = 0
    found = [
        observed(checkpoint, [{"input_ids": ids, "attention_mask": mask.to(dtype)}, {"input_ids": ids[:1, :7]}])
        for dtype in (torch.int64, torch.bool, torch.float32)
    ]
    assert next(iter(found[0].blocks.values())).num_tokens == 32 + 7
    for other in found[1:]:
        assert_same_counts(found[0], other)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"input_ids": torch.tensor([[1, 300]])},
            r"token id 300, and the vocabulary of \w+ has the ids 0 to 299",
        ),
        ({"input_ids": torch.tensor([[1, -100]])}, r"token id -100, and the vocabulary"),
        (
            {"input_ids": torch.tensor([[1]]), "atention_mask": torch.ones(1, 1)},
            r"no input 'atention_mask'; did you mean",
        ),
        (
            {"input_ids": torch.tensor([[1]]), "attention_mask": [[1]]},
            r"attention_mask of item 0 is a list\. Pass a tensor",
        ),
        ({"input_ids": [torch.tensor([1])]}, r"input_ids of list\. Pass batches: .* collate_fn=default_data_collator"),
        ({"input_ids": torch.tensor([[1.0]])}, r"input_ids are a tensor of shape \(batch, tokens\)"),
    ],
)
def test_what_a_model_cannot_take_is_refused(checkpoint: Path, batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        observed(checkpoint, [batch])


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused_where_they_occur(checkpoint: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(300)])
    assert observed(checkpoint, [words(600)], tokenizer=tokenizer).blocks
    with pytest.raises(ValueError, match=r"token id 403, .* ids 0 to 299\. The tokenizer knows 404 tokens\. Pass the"):
        observed(checkpoint, ["extra299 " + words(600)], tokenizer=tokenizer)


def test_rows_longer_than_the_positions_are_warned_about(checkpoint: Path) -> None:
    ids = torch.arange(100)[None]
    with pytest.warns(UserWarning, match=r"Rows of 100 tokens are longer than max_position_embeddings=64 of Qwen3Moe"):
        observed(checkpoint, [{"input_ids": ids}])
    joined = {"input_ids": ids, "position_ids": (torch.arange(100) % 50)[None]}
    observed(checkpoint, [joined])


def test_a_tokenizer_may_be_named(checkpoint: Path, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    assert observed(build("qwen3_moe", vocab_size=300), [words(600)], tokenizer=tmp_path).blocks
    assert observed(checkpoint, [words(600)], tokenizer=str(tmp_path)).blocks
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer=.*empty' has no tokenizer files"):
        observed(checkpoint, [words(600)], tokenizer=str(tmp_path / "empty"))


def test_labels_become_the_input_of_a_decoder() -> None:
    inputs = inputs_for("switch_transformers")
    labels = inputs["decoder_input_ids"].clone()
    labels[0, 10:] = -100
    start = 0
    shifted = torch.cat([torch.full((2, 1), start), labels[:, :-1]], dim=1)
    by_hand = {"input_ids": inputs["input_ids"], "decoder_input_ids": shifted.clamp(min=0)}
    by_hand["decoder_attention_mask"] = (shifted != -100).long()
    model = build("switch_transformers")
    made = observed(model, [{"input_ids": inputs["input_ids"], "labels": labels}])
    assert_same_counts(made, observed(model, [by_hand]))
    for source, message in (
        ([{"input_ids": inputs["input_ids"]}], r"Item 0 has no decoder_input_ids, and the model has a decoder"),
        ([{"input_ids": [1, 2], "labels": [3]}], r"Pass a DataLoader with DataCollatorForSeq2Seq"),
    ):
        with pytest.raises(ValueError, match=message):
            observed(model, source)
