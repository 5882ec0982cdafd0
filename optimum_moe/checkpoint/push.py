"""Uploading a finished checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` where the Hub has no repository of such a name, before any work is done."""
    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id={repo_id!r} names no repository. Write it as 'name' or 'user/name'.") from error


def push(directory: Path, repo_id: str | None, token: str | None, name_card: Callable[[str], None]) -> str:
    """Upload a folder to a repository, which is made where there is none.

    Args:
        directory: The checkpoint.
        repo_id: The repository; by default one of the user's with the name of the folder.
        token: Of the Hub; by default that of `hf auth login`.
        name_card: Writes the card of a checkpoint of that name into the folder.

    Returns:
        The repository's full name.

    Raises:
        ValueError: If the Hub cannot be reached or refuses; the checkpoint is left complete where it is.
    """
    wanted = repo_id or directory.name
    try:
        api = huggingface_hub.HfApi(token=token)
        wanted = api.create_repo(wanted, exist_ok=True).repo_id
        name_card(wanted)
        api.upload_folder(repo_id=wanted, folder_path=directory)
    # What the HTTP client raises differs by version: whatever it is, hours of work must not seem lost.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The checkpoint is complete in {directory}, but was not uploaded to {wanted} ({type(error).__name__}: "
            f"{reason:.300}). Check the network and your token (hf auth login), then upload it with: "
            f"hf upload {wanted} {directory}"
        ) from error
    return wanted
