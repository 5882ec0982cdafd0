"""Run llama.cpp's converter; started with the request and the answer as files, see `environment.run_script`.

A tokenizer whose pre-tokenizer llama.cpp does not recognize gets the one that the request names.
"""

import importlib.util
import json
import logging
import runpy
import sys
import types
from pathlib import Path
from typing import Any


def main() -> None:
    """Convert the checkpoint that the request describes."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    script = Path(request["converter"])
    # As if the converter had been started by itself.
    sys.path[0] = str(script.parent)
    if (script.parent / "gguf-py").is_dir():
        sys.path.insert(1, str(script.parent / "gguf-py"))
    found: dict[str, Any] = {"pre_tokenizer": "recognized"}
    # Older versions have no such package, and recognize what they recognize.
    if request["pre_tokenizer"] is not None and (script.parent / "conversion").is_dir():
        found = _name_pre_tokenizer(request["pre_tokenizer"])
    if (
        importlib.util.find_spec("sentencepiece") is None
        and not (Path(request["checkpoint"]) / "tokenizer.model").exists()
    ):
        # The converter imports it for such a file before it sees that there is none.
        absent: Any = types.ModuleType("sentencepiece")
        absent.SentencePieceProcessor = None
        sys.modules["sentencepiece"] = absent
    answer = sys.argv[2]
    sys.argv = [str(script), request["checkpoint"], "--outfile", request["output"], "--outtype", request["type"]]
    sys.argv += ["--model-name", request["name"]]
    logging.basicConfig(level=logging.INFO)
    runpy.run_path(str(script), run_name="__main__")
    Path(answer).write_text(json.dumps(found), encoding="utf-8")


def _name_pre_tokenizer(name: str) -> dict[str, Any]:
    """Use the pre-tokenizer of that name where the converter recognizes none; returns what was used."""
    from conversion.base import TextModel

    recognize = TextModel.get_vocab_base_pre
    found = {"pre_tokenizer": "recognized"}

    def recognize_or_named(self: Any, tokenizer: Any) -> str:
        try:
            return str(recognize(self, tokenizer))
        except NotImplementedError:
            found["pre_tokenizer"] = name
            return name

    TextModel.get_vocab_base_pre = recognize_or_named
    return found


if __name__ == "__main__":
    main()
