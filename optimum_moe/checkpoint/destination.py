"""The output folder: one run at a time owns it, and a result replaces it as a whole or not at all.

During a run, or after one was killed, these are beside a destination `out`:

| `.out.lock` | held by the run that owns `out` |
| `.out.writing` | the incomplete result of a run in memory |
| `.out.streaming` | the finished layers of a streaming run; kept after an interruption, so that the run can resume |
| `.out.training` | the states of a training, from which it can go on; kept after an interruption |
| `.out.replaced` | the former content of `out`, while the result replaces it |
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
    """Check that a checkpoint can be written to `directory`, before any work is done.

    Raises:
        ValueError: If it is not empty and `overwrite` is not set, it cannot be written, or another run writes to it.
    """
    # A link is kept, and the checkpoint is written to its target.
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
        raise ValueError(f"{parent} is a file, so {directory} cannot be created. Choose another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"No permission to write in {parent}. Choose another folder, or change its permissions.")
    traces = (_beside(directory, "lock"), _writing(directory), _replaced(directory), working_folder(directory))
    if any(os.path.lexists(trace) for trace in traces):
        # Another run is active, or one was killed.
        with owned(directory, overwrite):
            pass
    _check_free(directory, overwrite)
    return directory


def check_space(directory: Path, size: int) -> None:
    """Raise a `ValueError` unless the disk of `directory` has `size` bytes left."""
    free = free_space(directory)
    if free < size:
        raise ValueError(
            f"{_existing_parent(directory)} has {free:,} bytes left, the checkpoint needs {size:,}. Free some space, "
            "or choose another disk."
        )


def free_space(directory: Path) -> int:
    """Bytes that the disk of `directory` has left."""
    return shutil.disk_usage(_existing_parent(directory)).free


def working_folder(directory: Path) -> Path:
    """Folder of the finished parts of a streaming run to `directory`; its shards are in the subfolder `PARTS`."""
    return _beside(directory, "streaming")


def training_folder(directory: Path) -> Path:
    """Folder of the states of a training whose result goes to `directory`."""
    return _beside(directory, "training")


@contextmanager
def owned(directory: Path | None, overwrite: bool = False) -> Iterator[None]:
    """Lock `directory` for one run; a replacement that a killed run had started is first completed or removed.

    In this context SIGTERM raises an exception like Ctrl-C, so that files are cleaned up.

    Args:
        directory: Result of `check_destination`; None if nothing is written.
        overwrite: Whether the folder may have content.

    Raises:
        ValueError: If another run owns it, or it is not empty and `overwrite` is not set.
    """
    if directory is None:
        yield
        return
    with ended_like_an_interrupt(), _parents(directory), _locked(directory):
        _recover(directory)
        _check_free(directory, overwrite)
        yield


@contextmanager
def written_beside(directory: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder that replaces an `owned` one on success, and is removed after an error.

    Raises:
        ValueError: If the disk is full, or something appeared in `directory` in the meantime.
    """
    beside = _writing(directory)
    try:
        beside.mkdir()
        yield beside
        take_place(beside, directory, overwrite)
        # The finished parts of an earlier streaming run to this folder are no longer needed.
        remove(working_folder(directory))
    except Exception as error:
        if disk_is_full(error):
            raise ValueError(
                f"The disk of {directory.parent} is full; the incomplete result was removed. Free some space, or "
                "choose another disk."
            ) from error
        raise
    finally:
        remove(beside)


def take_place(beside: Path, directory: Path, overwrite: bool = False) -> None:
    """Rename a complete folder to an `owned` one, and replace its content only with `overwrite`.

    Raises:
        ValueError: If something appeared there that must not be replaced.
    """
    replaced = _replaced(directory)
    try:
        if overwrite and os.path.lexists(directory):
            directory.rename(replaced)
        _rename_to_free(beside, directory)
    except BaseException:
        # Undo also after Ctrl-C between the two renames.
        if os.path.lexists(replaced) and not os.path.lexists(directory):
            replaced.rename(directory)
        raise
    finally:
        if os.path.lexists(directory):
            remove(replaced)


def disk_is_full(error: Exception) -> bool:
    """Whether an error means that the disk is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and tokenizers raise their own errors, which have the cause only in their text.
    return "No space left" in str(error) or f"os error {errno.ENOSPC}" in str(error)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it exists; targets of links are kept."""
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
        # On other systems, renaming replaces an empty folder.
        with suppress(OSError):
            directory.rmdir()
    try:
        beside.rename(directory)
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
        raise ValueError(
            f"{directory} was created by another program during this run, and is not replaced without "
            "overwrite=True (--overwrite). Move it away and repeat the same command, or choose another folder."
        ) from error


def _recover(directory: Path) -> None:
    """Complete a replacement that a killed run had started, and remove its incomplete files."""
    writing, replaced, working = _writing(directory), _replaced(directory), working_folder(directory)
    if os.path.lexists(replaced) and not os.path.lexists(directory):
        # The run was killed between two renames, so the new folder is complete.
        complete = next((path for path in (writing, working / PARTS) if path.is_dir()), replaced)
        complete.rename(directory)
    remove(replaced)
    remove(writing)
    if directory.is_dir() and not (working / PARTS).is_dir():
        # The run was killed after the last rename.
        remove(working)


@contextmanager
def _explained(directory: Path) -> Iterator[None]:
    """Convert system errors during the preparation of the folder into a `ValueError` with a remedy."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"Nothing can be written beside {directory} ({error}). Free some space, change the permissions, or choose "
            "another folder."
        ) from error


@contextmanager
def _parents(directory: Path) -> Iterator[None]:
    """Create the parent folders; those that are empty on exit are removed again."""
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
    """Lock the lock file of `directory`, and remove it on exit."""
    file = _beside(directory, "lock")
    with _explained(directory):
        descriptor = _lock(file)
    if descriptor is None:
        raise ValueError(f"Another run is writing to {directory}. Wait for it, or end it.")
    try:
        yield
    finally:
        # Remove the name before the lock, so that no other run locks a file that is about to be removed.
        with suppress(PermissionError):
            file.unlink(missing_ok=True)
        unlock_descriptor(descriptor)
        os.close(descriptor)
        if os.name == "nt":
            # On Windows a name cannot be removed while any run has the file open.
            with suppress(OSError):
                file.unlink(missing_ok=True)


def _lock(file: Path) -> int | None:
    """Lock a lock file and return its descriptor, None if another run has it locked."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # Another run removed the parent folder that it had created.
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
                f"The file system of {file.parent} cannot lock files ({error}), so another run could write to the same "
                "folder unnoticed. Choose a folder elsewhere."
            ) from error
        # Another run removed the file between opening and locking, so the name may belong to a new file.
        os.close(descriptor)
