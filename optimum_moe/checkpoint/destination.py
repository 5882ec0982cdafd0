"""The folder that a result goes to: one run at a time owns it, and the result takes its place as a whole or not at all.

Beside a destination `out` lie, while a run goes on or after one was killed,

| `.out.lock` | held by the run that owns `out` |
| `.out.writing` | what a run in memory has written so far |
| `.out.streaming` | what a streaming run has finished; it stays when the run is interrupted, to go on from there |
| `.out.replaced` | what was in `out`, while its successor takes its place |
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor, unlock_descriptor

from optimum_moe.checkpoint.system import ended_like_an_interrupt, native_path

PARTS = "checkpoint"
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def check_destination(directory: str | Path, overwrite: bool = False) -> Path:
    """Make sure that a checkpoint can be written to `directory`, before any work is done.

    Raises:
        ValueError: If it holds something and `overwrite` is not set, it cannot be written, or another run writes to it.
    """
    # A link stays, and the checkpoint goes where it points.
    directory = Path(native_path(directory)).expanduser().resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file. Give a folder.")
    for place, what in ((Path.cwd(), "the working directory"), (Path(os.path.expanduser("~")), "the home directory")):
        if place == directory or directory in place.parents:
            raise ValueError(f"{directory} holds {what}, and would be replaced as a whole. Give a folder inside it.")
    if directory.is_mount():
        raise ValueError(f"{directory} is a mount point, which cannot be replaced. Give a folder inside it.")
    parent = _existing_parent(directory)
    if not parent.is_dir():
        raise ValueError(f"{parent} is a file, so {directory} cannot be made. Choose another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"No permission to write in {parent}. Choose another folder, or change its permissions.")
    traces = (_beside(directory, "lock"), _writing(directory), _replaced(directory), working_folder(directory))
    if any(os.path.lexists(trace) for trace in traces):
        # Another run is at work, or one was killed.
        with owned(directory, overwrite):
            pass
    _check_free(directory, overwrite)
    return directory


def check_space(directory: Path, size: int) -> None:
    """Raise a `ValueError` unless the disk of `directory` has `size` bytes left."""
    parent = _existing_parent(directory)
    free = shutil.disk_usage(parent).free
    if free < size:
        raise ValueError(
            f"{parent} has {free:,} bytes left, the checkpoint takes {size:,}. Free some space, or choose another disk."
        )


def working_folder(directory: Path) -> Path:
    """Where a streaming run to `directory` keeps what is finished; its shards are in `PARTS` there until the end."""
    return _beside(directory, "streaming")


@contextmanager
def owned(directory: Path | None, overwrite: bool = False) -> Iterator[None]:
    """Be the only run that writes to `directory`; what a killed run left there is finished or removed first.

    Meanwhile SIGTERM ends the block as Ctrl-C does, so that it can clear up.

    Args:
        directory: What `check_destination` gave; None where nothing is to be written.
        overwrite: It may hold something.

    Raises:
        ValueError: If another run owns it, or it holds something and `overwrite` is not set.
    """
    if directory is None:
        yield
        return
    with ended_like_an_interrupt(), _parents(directory), _locked(directory):
        _settle(directory)
        _check_free(directory, overwrite)
        yield


@contextmanager
def written_beside(directory: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the place of an `owned` one when the block ends and vanishes when it fails.

    Raises:
        ValueError: If the disk is full, or something appeared in `directory` meanwhile.
    """
    beside = _writing(directory)
    try:
        beside.mkdir()
        yield beside
        take_place(beside, directory, overwrite)
        # What a streaming run to this folder has finished can no longer become its content.
        remove(working_folder(directory))
    except Exception as error:
        if disk_is_full(error):
            raise ValueError(
                f"The disk of {directory.parent} is full; nothing was left of the attempt. Free some space, or choose "
                "another disk."
            ) from error
        raise
    finally:
        remove(beside)


def take_place(beside: Path, directory: Path, overwrite: bool = False) -> None:
    """Rename a complete folder to an `owned` one, whose content it replaces only with `overwrite`.

    Raises:
        ValueError: If something appeared there that must not be replaced.
    """
    replaced = _replaced(directory)
    try:
        if overwrite and os.path.lexists(directory):
            directory.rename(replaced)
        _rename_to_free(beside, directory)
    except BaseException:
        # Also on Ctrl-C between the two.
        if os.path.lexists(replaced) and not os.path.lexists(directory):
            replaced.rename(directory)
        raise
    finally:
        if os.path.lexists(directory):
            remove(replaced)


def disk_is_full(error: Exception) -> bool:
    """Whether an error says that there is no space left."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and tokenizers report it as an error of their own, with the cause in its text only.
    return "No space left" in str(error) or f"os error {errno.ENOSPC}" in str(error)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with everything in it, if it is there; what links point to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _beside(directory: Path, what: str) -> Path:
    return directory.parent / f".{directory.name}.{what}"


def _writing(directory: Path) -> Path:
    return _beside(directory, "writing")


def _replaced(directory: Path) -> Path:
    return _beside(directory, "replaced")


def _existing_parent(directory: Path) -> Path:
    parent = directory.parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _check_free(directory: Path, overwrite: bool) -> None:
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty. Choose another folder, or pass overwrite=True (--overwrite).")


def _rename_to_free(beside: Path, directory: Path) -> None:
    if os.name == "nt" and directory.is_dir():
        # Elsewhere renaming replaces an empty folder.
        with suppress(OSError):
            directory.rmdir()
    try:
        beside.rename(directory)
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
        raise ValueError(
            f"{directory} was made by something else while this run went on, and is not replaced without "
            "overwrite=True (--overwrite). Move it away and repeat the same command, or choose another folder."
        ) from error


def _settle(directory: Path) -> None:
    """Finish what a killed run had nearly done, and remove what it left half done."""
    writing, replaced, working = _writing(directory), _replaced(directory), working_folder(directory)
    if os.path.lexists(replaced) and not os.path.lexists(directory):
        # Killed between two renames: what was to come was complete, and of one run only.
        complete = next((path for path in (writing, working / PARTS) if path.is_dir()), replaced)
        complete.rename(directory)
    remove(replaced)
    remove(writing)
    if directory.is_dir() and not (working / PARTS).is_dir():
        # Killed after the last rename.
        remove(working)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Say what an error of the system while the folder is prepared means for the user."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"Nothing can be written beside {directory} ({error}). Free some space, change the permissions, or choose "
            "another folder."
        ) from error


@contextmanager
def _parents(directory: Path) -> Iterator[None]:
    """Make the folders above; those that stay empty go again."""
    top, made = _existing_parent(directory), []
    for folder in directory.parents:
        if folder == top:
            break
        made.append(folder)
    with _explained(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock file of `directory`, and remove it at the end."""
    file = _beside(directory, "lock")
    with _explained(directory):
        descriptor = _lock(file)
    if descriptor is None:
        raise ValueError(f"Another run is writing to {directory}. Wait for it, or end it.")
    try:
        yield
    finally:
        # First the name and then the lock, so that nobody locks a file that is about to lose its name unnoticed.
        with suppress(PermissionError):
            file.unlink(missing_ok=True)
        unlock_descriptor(descriptor)
        os.close(descriptor)
        if os.name == "nt":
            # There no name goes while the file is open, not even by another run.
            with suppress(OSError):
                file.unlink(missing_ok=True)


def _lock(file: Path) -> int | None:
    """The descriptor of a lock file that is locked now, None where another one holds it."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # The run before removed the folder again that it had made for its result.
            file.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            if not lock_descriptor(descriptor, blocking=False):
                os.close(descriptor)
                return None
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            raise ValueError(
                f"The file system of {file.parent} cannot lock files ({error}), so that another run could write to the "
                "same folder unnoticed. Choose a folder elsewhere."
            ) from error
        # The run before removed the file between the opening and the locking: its name is another file's now.
        os.close(descriptor)
