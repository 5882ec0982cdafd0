"""Upload of a finished checkpoint to the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` if a name cannot be that of a Hub repository, before any work is done."""
    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a repository name. Use 'name' or 'user/name'.") from error


def push(directory: Path, repo_id: str | None, token: str | None, name_card: Callable[[str], None]) -> str:
    """Upload a folder to a repository, which is created if it does not exist.

    Args:
        directory: The checkpoint.
        repo_id: The repository; by default one of the user with the name of the folder.
        token: Token of the Hub; by default that of `hf auth login`.
        name_card: Function that writes the model card for a repository name into the folder.

    Returns:
        The repository's full name.

    Raises:
        ValueError: If the Hub cannot be reached or refuses; the local checkpoint remains complete.
    """
    wanted = repo_id or directory.name
    try:
        api = huggingface_hub.HfApi(token=token)
        wanted = api.create_repo(wanted, exist_ok=True).repo_id
        name_card(wanted)
        api.upload_folder(repo_id=wanted, folder_path=directory)
    # Exceptions of the HTTP client differ between versions; for any of them, say that the checkpoint is complete.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The checkpoint is complete in {directory}, but was not uploaded to {wanted} ({type(error).__name__}: "
            f"{reason:.300}). Check the network and your token (hf auth login), then upload it with: "
            f"hf upload {wanted} {directory}"
        ) from error
    return wanted
