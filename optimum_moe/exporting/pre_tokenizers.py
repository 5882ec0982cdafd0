"""Pre-tokenizers of llama.cpp, by their definition in `tokenizer.json`.

llama.cpp's converter recognizes a tokenizer by a hash of the ids that it gives, so one with another vocabulary is
unknown to it even if it splits text in the same way. A definition in this table splits text as the named one does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTE_PAIRS = {
    "type": "BPE",
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "byte_fallback": False,
    "ignore_merges": False,
    "dropout": None,
}
_KNOWN: dict[str, tuple[Any, Any]] = {"gpt-2": (None, _GPT2)}
"""(normalizer, pre_tokenizer) by llama.cpp's name."""


def known_pre_tokenizer(checkpoint: Path) -> str | None:
    """llama.cpp's name of a tokenizer's pre-tokenizer; None if its definition is not in the table."""
    try:
        tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
        model = tokenizer["model"]
        if any(model.get(key) not in (value, *([""] if value is None else [])) for key, value in _BYTE_PAIRS.items()):
            return None
        found = (tokenizer.get("normalizer"), tokenizer["pre_tokenizer"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return next((name for name, definition in _KNOWN.items() if definition == found), None)
