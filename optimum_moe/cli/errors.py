"""Error handling of the commands: one line on standard error, with flags instead of API arguments."""

from __future__ import annotations

import re
import sys
from argparse import Action, ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

ParseArgs: TypeAlias = Callable[[ArgumentParser], None]
"""Function that adds the arguments of a command to a parser."""

SYSTEM_ERROR = 1
USER_ERROR = 2
INTERRUPTED = 130

_PACKAGE = str(Path(__file__).parents[1])
_UNEXPECTED = "Repeat the command with --debug for the traceback, and report it if it is a bug in optimum_moe."
_ALIASES = {"output_dir": "output", "repo_id": "push_to_hub", "repair": "guard_repair"}
"""Arguments of the API that have another name on the command line."""
_ENGINES = {'engine="streaming"': "--streaming", 'engine="memory"': "a run without --streaming"}
_VALUE = r"""True|False|None|"[^"]*"|'[^']*'|\[[^\]]*\]|\.{3}|(?:[\w%/-]+(?:[.:]+[\w%/-]+)*)?"""

_LONGEST = 400
_WORD = re.compile(r"[\w.:/-]+")


@contextmanager
def ending_in_one_line(parse_args: ParseArgs, debug: bool) -> Iterator[None]:
    """Exit with 2 on a user error, 1 on any other, 130 on Ctrl-C; with `debug` errors are raised unchanged.

    A `ValueError` of this package states a rule, the actual values and a remedy, and an `OSError` the refusal of the
    system, so neither needs a traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        _exit("interrupted", INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        status = USER_ERROR if isinstance(error, ValueError) else SYSTEM_ERROR
        _exit(f"error: {in_one_line(error, parse_args)}", status)


def in_one_line(error: Exception, parse_args: ParseArgs) -> str:
    """An error and its remedy as one line, with flags instead of API arguments."""
    said = " ".join(str(error).split())
    notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, ValueError) and _is_ours(error.__traceback__):
        return name_flags(said + notes, parse_args)
    if isinstance(error, OSError):
        return f"{said.removesuffix('.')}.{notes} {_UNEXPECTED}"
    # Some libraries list all their models in one message.
    short = said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."
    return f"{type(error).__name__}: {short.removesuffix('.')}.{notes} {_UNEXPECTED}"


class _Recorder(ArgumentParser):
    """Records the arguments that are added, since argparse has no public list of them."""

    def __init__(self) -> None:
        self.arguments: list[Action] = []
        super().__init__()

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        """See `ArgumentParser`."""
        self.arguments.append(super().add_argument(*args, **kwargs))
        return self.arguments[-1]


def flags_of(parse_args: ParseArgs) -> dict[str, Action]:
    """The flags of a command, by their names in Python."""
    recorder = _Recorder()
    parse_args(recorder)
    return {action.dest: action for action in recorder.arguments if action.option_strings}


def name_flags(message: str, parse_args: ParseArgs) -> str:
    """A message with flags instead of API arguments: `max_tokens=5` becomes `--max-tokens 5`.

    Settings of a stage without a flag are written with --set.
    """
    flags = flags_of(parse_args)
    flags |= {name: flags[dest] for name, dest in _ALIASES.items() if dest in flags}
    for spelled, flag in _ENGINES.items() if "streaming" in flags else ():
        message = message.replace(spelled, flag)
    names = "|".join([*flags, *(_settings() if "set" in flags else ())])
    message = re.sub(rf"(?<![\w/.\"'-])({names})=({_VALUE})", lambda found: _flag(found[1], found[2], flags), message)
    long = "|".join(name for name in flags if "_" in name)
    if long:
        message = re.sub(
            rf"(?<![\w/.\"'-])({long})(?![\w=/\"']|\.\w)", lambda found: _spelled(flags[found[1]]), message
        )
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", message)


def _flag(name: str, value: str, flags: Mapping[str, Action]) -> str:
    action = flags.get(name)
    if action is None or (action.type is not None and value[:1] in ("'", '"', "[")):
        return f"--set {name}={value}"
    if action.nargs == 0 or not value:
        return _spelled(action)
    plain = value.strip("'\"")
    return f"{_spelled(action)} {plain if _WORD.fullmatch(plain) else value}"


def _spelled(action: Action) -> str:
    return action.option_strings[-1]


def _settings() -> set[str]:
    """Settings of all stages; an error about one is raised after the stages are imported."""
    if "optimum_moe.stages" not in sys.modules:
        return set()
    from dataclasses import fields

    from optimum_moe.stages import registered_stages

    return {field.name for stage in registered_stages().values() for field in fields(stage) if field.init}


def _is_ours(trace: TracebackType | None) -> bool:
    """Whether an error was raised by this package, whose messages are written for users."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PACKAGE)


def _exit(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(status)
