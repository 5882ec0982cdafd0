"""Calibration sources, sampling and batching, with a tokenizer trained here and numbers computed by hand."""

import hashlib
import json
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from optimum_moe.calibration.data import CalibrationBatches, CalibrationConfig, build_batches, draw_documents
from optimum_moe.calibration.sampling import Draw, document_rows, find_affixes, mix, repeated_share, split_long
from optimum_moe.calibration.sources import TextSource, read_sources

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
WORDS = [f"w{i}" for i in range(100)]
EOS, PAD, BOS, UNK = 100, 101, 102, 103
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]


def make_tokenizer(bos: bool = False, chat: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """One word, one token: token ids can be read off the text."""
    vocab = {word: i for i, word in enumerate([*WORDS, "<eos>", "<pad>", "<bos>", "<unk>"])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>" if eos else None, pad_token="<pad>", bos_token="<bos>"
    )
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"
    return tokenizer


def stream_of(batches: CalibrationBatches) -> list[int]:
    return [token for row in rows_of(batches) for token in row]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def words(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i) % 100] for i in range(count))


def rows_of(batches: CalibrationBatches) -> list[list[int]]:
    rows = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rows.append(ids[mask.bool()].tolist())
    return rows


def test_packing_joins_with_eos_and_cuts_rows(tokenizer):
    batches = build_batches(CalibrationConfig(["w1 w2 w3", "w4 w5"], sequence_length=3), tokenizer)
    # 3 + EOS + 2 + EOS = 7 tokens: two rows and one token over, in either order of the documents.
    stream = stream_of(batches)
    assert stream in ([1, 2, 3, EOS, 4, 5], [4, 5, EOS, 1, 2, 3])
    assert batches.num_tokens == 6
    assert batches.description["sources"][0]["tokens_left_over"] == 1
    assert all(batch["attention_mask"].all() for batch in batches)


def test_a_row_starts_with_bos_where_the_tokenizer_adds_it():
    batches = build_batches(CalibrationConfig([words(7)], sequence_length=4), make_tokenizer(bos=True))
    assert rows_of(batches) == [[BOS, 0, 1, 2], [BOS, 3, 4, 5]]
    unpacked = build_batches(CalibrationConfig([words(7)], sequence_length=4, packing=False), make_tokenizer(bos=True))
    assert rows_of(unpacked) == [[BOS, 0, 1, 2], [BOS, 3, 4, 5], [BOS, 6]]


def test_without_packing_every_token_is_kept(tokenizer):
    config = CalibrationConfig([words(7), words(2, 50)], sequence_length=3, packing=False, batch_size=2)
    batches = build_batches(config, tokenizer)
    assert sorted(rows_of(batches)) == [[0, 1, 2], [3, 4, 5], [6], [50, 51]]
    assert batches.num_tokens == 9
    assert len(batches) == 2
    padded = [batch for batch in batches if not batch["attention_mask"].all()]
    assert padded
    for batch in padded:
        assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()


def test_limits(tokenizer):
    text = [words(20, i) for i in range(10)]
    assert build_batches(CalibrationConfig(text, max_tokens=50, sequence_length=8), tokenizer).num_tokens == 48
    assert build_batches(CalibrationConfig(text, num_samples=3, sequence_length=8), tokenizer).num_tokens == 24
    everything = build_batches(CalibrationConfig(text, max_tokens=None, sequence_length=8), tokenizer)
    assert everything.num_tokens == 21 * 10 // 8 * 8


def test_seed_decides_what_is_drawn(tokenizer):
    text = [words(20, i) for i in range(50)]

    def draw(seed: int) -> CalibrationBatches:
        return build_batches(CalibrationConfig(text, max_tokens=64, sequence_length=16, seed=seed), tokenizer)

    assert draw(0).hash == draw(0).hash
    assert draw(0).hash != draw(1).hash
    assert rows_of(draw(0)) == rows_of(draw(0))


def test_seed_reaches_into_one_long_document(tokenizer):
    text = [words(5000)]
    config = CalibrationConfig(text, max_tokens=64, sequence_length=8)
    drawn = {tuple(stream_of(build_batches(config, tokenizer)))}
    for seed in (1, 2):
        config = CalibrationConfig(text, max_tokens=64, sequence_length=8, seed=seed)
        drawn.add(tuple(stream_of(build_batches(config, tokenizer))))
    assert len(drawn) == 3


def test_hash_is_over_real_tokens_whatever_the_batches(tokenizer):
    text = [words(i + 1) for i in range(6)]
    hashes = {
        build_batches(CalibrationConfig(text, sequence_length=8, packing=False, batch_size=size), tokenizer).hash
        for size in (1, 4)
    }
    expected = hashlib.sha256()
    for row in rows_of(build_batches(CalibrationConfig(text, sequence_length=8, packing=False), tokenizer)):
        expected.update(len(row).to_bytes(8, "little") + torch.tensor(row).numpy().tobytes())
    assert hashes == {expected.hexdigest()}


def test_batches_are_sized_and_read_again(tokenizer):
    batches = build_batches(CalibrationConfig([words(40)], sequence_length=8, batch_size=2), tokenizer)
    assert len(batches) == len(list(batches)) == len(list(batches)) == 3
    assert batches[0]["input_ids"].shape == (2, 8)
    json.dumps(batches.description)


def test_encoder_decoder(tokenizer):
    config = CalibrationConfig(["w1 w2 w3", "w4"], sequence_length=4, packing=False)
    (batch,) = build_batches(config, tokenizer, is_encoder_decoder=True, decoder_start_token_id=PAD)
    assert (batch["decoder_input_ids"][:, 0] == PAD).all()
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
    assert torch.equal(batch["decoder_attention_mask"], batch["attention_mask"])
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        build_batches(config, tokenizer, is_encoder_decoder=True)


def write_sources(folder: Path) -> dict[str, object]:
    texts = [words(9, 10 * i) for i in range(4)]
    (folder / "a.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n", encoding="utf-8")
    pq.write_table(pa.table({"text": texts, "other": [1, 2, 3, 4]}), folder / "a.parquet")
    dataset = datasets.Dataset.from_dict({"text": texts})
    return {
        "txt": str(folder / "a.txt"),
        "jsonl": folder / "a.jsonl",
        "parquet": str(folder / "a.parquet"),
        "list": texts,
        "rows": [{"text": text} for text in texts],
        "generator": (text for text in texts),
        "dataset": dataset,
        "streaming dataset": dataset.to_iterable_dataset(),
    }


def test_every_source_gives_the_same_tokens(tokenizer, tmp_path):
    counts = {}
    for name, source in write_sources(tmp_path).items():
        batches = build_batches(CalibrationConfig(source, sequence_length=16, packing=False), tokenizer)
        assert sorted(rows_of(batches)) == [list(range(10 * i, 10 * i + 9)) for i in range(4)], name
        counts[name] = batches.description["sources"][0]
    assert counts["txt"]["name"] == "a.txt"
    assert counts["txt"]["documents"] == 4
    assert counts["generator"]["documents"] is None


def test_text_file_without_blank_lines_is_one_document(tmp_path):
    (tmp_path / "one.txt").write_text("w1\nw2\nw3\n", encoding="utf-8")
    (source,) = read_sources(tmp_path / "one.txt")
    assert list(source.documents) == ["w1\nw2\nw3"]


def test_chats_are_rendered_with_the_template(tmp_path):
    tokenizer = make_tokenizer(chat=True)
    expected = [[1, 2, EOS, 3, EOS]]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}), encoding="utf-8")
    dataset = datasets.Dataset.from_dict({"messages": [CHAT]})
    for source in ([CHAT], tmp_path / "chats.jsonl", dataset):
        batches = build_batches(CalibrationConfig(source, sequence_length=8, packing=False), tokenizer)
        assert rows_of(batches) == expected
    packed = build_batches(CalibrationConfig([CHAT], sequence_length=5), tokenizer)
    assert rows_of(packed) == expected


def test_mixture_follows_the_weights(tokenizer):
    source = {"a": [words(30)] * 40, "b": [words(5, 50)] * 400}
    pairs = [(source["a"], 3), (source["b"], 1)]
    batches = build_batches(CalibrationConfig(pairs, max_tokens=800, sequence_length=8), tokenizer)
    taken = [part["tokens"] for part in batches.description["sources"]]
    assert taken == [600, 200]
    unpacked = build_batches(CalibrationConfig(pairs, max_tokens=800, sequence_length=32, packing=False), tokenizer)
    taken = [part["tokens"] for part in unpacked.description["sources"]]
    assert abs(taken[0] - 3 * taken[1]) <= 3 * 32


def test_mixture_ends_with_its_first_source(tokenizer, tmp_path, caplog):
    (tmp_path / "a.txt").write_text(words(33), encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n\n".join([words(30)] * 40), encoding="utf-8")
    mixture = {str(tmp_path / "a.txt"): 0.5, str(tmp_path / "b.txt"): 0.5}
    batches = build_batches(CalibrationConfig(mixture, sequence_length=8), tokenizer)
    assert [part["tokens"] for part in batches.description["sources"]] == [32, 32]
    assert "a.txt is exhausted" in caplog.text


def test_ready_inputs_pass_untouched():
    ready = [{"input_ids": torch.tensor([[1, 2, 3]])}, {"input_ids": torch.tensor([[4, 5]]), "extra": torch.ones(1)}]
    batches = build_batches(CalibrationConfig(ready))
    assert all(given is kept for given, kept in zip(ready, batches, strict=True))
    assert batches.num_tokens == 5
    assert build_batches(CalibrationConfig(iter(ready))).hash == batches.hash
    assert len(build_batches(CalibrationConfig(ready, num_samples=1))) == 1
    masked = [{"input_ids": torch.tensor([[1, 2, 9]]), "attention_mask": torch.tensor([[1, 1, 0]])}]
    assert build_batches(CalibrationConfig(masked)).num_tokens == 2
    loader = DataLoader([{"input_ids": torch.tensor([1, 2])}] * 4, batch_size=2)
    assert [batch["input_ids"].shape for batch in build_batches(CalibrationConfig(loader))] == [(2, 2), (2, 2)]
    images = [{"pixel_values": torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)}]
    assert build_batches(CalibrationConfig(images)).num_tokens == 0


def test_empty_documents_are_counted(tokenizer):
    batches = build_batches(CalibrationConfig(["", "w1 w2", " "], sequence_length=2), tokenizer)
    assert batches.description["sources"][0]["empty_texts"] == 2


def test_draw_documents_keeps_documents_whole(tokenizer):
    config = CalibrationConfig([words(9), words(3, 20)], sequence_length=4)
    assert sorted(draw_documents(config, tokenizer)) == [list(range(9)), [20, 21, 22]]
    with pytest.raises(ValueError, match="no documents"):
        draw_documents(CalibrationConfig([{"input_ids": torch.ones(1, 2)}]), tokenizer)


def test_coerce():
    config = CalibrationConfig(["text"])
    assert CalibrationConfig.coerce(config) is config
    assert CalibrationConfig.coerce("corpus.txt") == CalibrationConfig(source="corpus.txt")
    assert CalibrationConfig.coerce({"source": "corpus.txt", "seed": 3}).seed == 3
    assert CalibrationConfig.coerce({"a.txt": 1, "b.txt": 2}).source == {"a.txt": 1, "b.txt": 2}
    with pytest.raises(ValueError, match="Unknown field 'sead'; did you mean 'seed'"):
        CalibrationConfig.coerce({"source": "corpus.txt", "sead": 3})
    with pytest.raises(ValueError, match="source is None"):
        CalibrationConfig.coerce(None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_samples", 0),
        ("max_tokens", -1),
        ("max_tokens", 100),
        ("sequence_length", 1),
        ("batch_size", 0),
        ("batch_size", 2.0),
        ("seed", -1),
        ("reservoir_tokens", True),
        ("unseen", "warm"),
    ],
)
def test_config_checks_its_values(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}"):
        CalibrationConfig(["text"], **{field: value})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "empty"),
        (iter([]), "empty"),
        (7, "Unknown calibration source int 7"),
        ("corpus.json", "Unknown file type '.json' of 'corpus.json'; did you mean '.jsonl'"),
        ("some text", "pass text itself as a list"),
        ("missing.txt", "no file 'missing.txt'"),
        ({"a.txt": "b"}, "no weights"),
        ([(["text"], 0), (["text"], 1)], "positive"),
        ([([{"input_ids": torch.ones(1, 2)}], 1.0)], "model inputs"),
        (CHAT, "list of chats"),
        (["text", 3], "item 1 of list of 2 texts is int 3"),
        ([{"texts": "w1"}], r"which has \['texts'\]; did you mean 'texts'"),
        (datasets.Dataset.from_dict({"body": ["w1"]}), r"which has \['body'\]"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["w1"]})}), "one split of a DatasetDict"),
    ],
)
def test_unreadable_sources(source, message):
    with pytest.raises(ValueError, match=message):
        build_batches(CalibrationConfig(source), make_tokenizer())


def test_unreadable_files(tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"text": \n', encoding="utf-8")
    (tmp_path / "list.jsonl").write_text("[1]", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text("\n\n \n", encoding="utf-8")
    for name, message in {
        "bad.jsonl": "line 2 of bad.jsonl",
        "list.jsonl": "one JSON object",
        "latin.txt": "not UTF-8",
        "blank.txt": "holds no text",
    }.items():
        with pytest.raises(ValueError, match=message):
            build_batches(CalibrationConfig(tmp_path / name), tokenizer)


def test_what_text_needs(tokenizer):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        build_batches(CalibrationConfig(["w1"]))
    with pytest.raises(ValueError, match="has 3 tokens, fewer than one packed row of sequence_length=512"):
        build_batches(CalibrationConfig(["w1 w2"]), tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        build_batches(CalibrationConfig([CHAT]), tokenizer)
    with pytest.raises(ValueError, match=r"has none\. Pass packing=False"):
        build_batches(CalibrationConfig(["w1 w2"]), make_tokenizer(eos=False))
    with pytest.raises(ValueError, match="input_ids are a tensor"):
        build_batches(CalibrationConfig([{"input_ids": [[1, 2]]}]))


def test_affixes_and_long_documents():
    assert find_affixes(make_tokenizer(bos=True)).prefix == (BOS,)
    assert find_affixes(make_tokenizer()).prefix == ()
    text = words(500)
    parts = split_long(text, 100)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 100
    assert all(part.endswith(" ") for part in parts[:-1])
    assert "".join(split_long("x" * 900, 100)) == "x" * 900
    assert split_long(text, 1000) == [text]


def test_mix_stops_before_the_limit():
    draws = [Draw(TextSource("a", [])), Draw(TextSource("b", [], weight=2.0))]
    taken = mix(draws, lambda draw: iter([[1] * 4] * 10), None, 30)
    assert len(taken) == 7
    assert [draw.tokens for draw in draws] == [12, 16] or [draw.tokens for draw in draws] == [8, 20]


def test_document_rows_keep_the_suffix():
    affixes = find_affixes(make_tokenizer(bos=True))
    closing = type(affixes)(affixes.prefix, (EOS,))
    assert list(document_rows([[1, 2, 3]], 3, closing)) == [[BOS, 1, 2], [BOS, 3, EOS]]


def test_sequences_that_were_there_before_are_counted() -> None:
    row = list(range(100))
    assert repeated_share([row, list(range(100, 200))], 10**6) == 0.0
    # 85 sequences of 16 tokens, all of them twice.
    assert repeated_share([row, row], 10**6) == 0.5
    # The last 50 tokens of one row begin the other: 35 of 170 sequences.
    assert repeated_share([row, list(range(50, 150))], 10**6) == pytest.approx(35 / 170)
    assert repeated_share([row, row], max_tokens=85) == 0.0
    assert repeated_share([[1] * 15], 10**6) == 0.0


def test_copies_are_warned_of_and_text_is_not() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(REFERENCE / "model")
    license_text = (REFERENCE.parents[2] / "LICENSE").read_text(encoding="utf-8")
    with pytest.warns(UserWarning, match=r"^\d\d% of the calibration text was there before, in sequences of 16 tokens"):
        build_batches(CalibrationConfig([license_text] * 6), tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_batches(CalibrationConfig(str(REFERENCE / "calibration.jsonl"), max_tokens=None), tokenizer)
        build_batches(CalibrationConfig(str(REFERENCE / "held_out.jsonl"), max_tokens=None), tokenizer)
        # A trial on a few copies.
        build_batches(CalibrationConfig([license_text] * 6, max_tokens=8191), tokenizer)
