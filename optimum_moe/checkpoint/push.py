"""Upload of a finished checkpoint to the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from optimum_moe.plan import PLAN_NAME

_OF_A_NEW_REPOSITORY = {".gitattributes", "README.md"}
_SHOWN = 3


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` if a name cannot be that of a Hub repository, before any work is done."""
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"repo_id={repo_id!r} is not a repository name. Use 'name' or 'user/name'.") from error


def check_target(repo_id: str, private: bool = False, token: str | None = None) -> None:
    """Ask the Hub whether a checkpoint can be uploaded, before hours of work; nothing is created.

    Args:
        repo_id: The repository, with or without the name of its owner.
        private: Whether it has to be private.
        token: Token of the Hub; by default that of `hf auth login`.

    Raises:
        ValueError: If the Hub cannot be reached or does not accept the token, or the repository has other content.
    """
    check_repo_id(repo_id)
    try:
        api = HfApi(token=token)
        user = api.whoami()
        full_name = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
        _check_rights(user.get("auth", {}).get("accessToken", {}), full_name)
        _check_existing(api, full_name, private)
    except Exception as error:
        refusal = _refusal(error)
        raise ValueError(f"The result cannot be uploaded to {repo_id}: {refusal}. {refusal.remedy}.") from error


def push(
    directory: Path,
    repo_id: str | None,
    token: str | None,
    name_card: Callable[[str], None],
    private: bool = False,
) -> str:
    """Upload a folder to a repository, which is created if it does not exist.

    An interrupted upload goes on when it is started again: what arrived is not sent a second time.

    Args:
        directory: The checkpoint.
        repo_id: The repository; by default one of the user with the name of the folder.
        token: Token of the Hub; by default that of `hf auth login`.
        name_card: Function that writes the model card for a repository name into the folder.
        private: Whether a new repository is private; an existing one has to be.

    Returns:
        The repository's full name.

    Raises:
        ValueError: If the Hub cannot be reached or refuses, or the repository has other content, which would mix with
            the checkpoint; the local checkpoint remains complete.
    """
    wanted = repo_id or directory.name
    try:
        api = HfApi(token=token)
        wanted = api.create_repo(wanted, private=private or None, exist_ok=True).repo_id
        _check_existing(api, wanted, private, directory)
        name_card(wanted)
        api.upload_folder(repo_id=wanted, folder_path=directory)
    # Exceptions of the HTTP client differ between versions; for any of them, say that the checkpoint is complete.
    except Exception as error:
        refusal = _refusal(error)
        raise ValueError(
            f"The checkpoint is complete in {directory}, but was not uploaded to {wanted}: {refusal}. "
            f"{refusal.remedy}. Then upload it with: hf upload {'--private ' * private}{wanted} {directory}"
        ) from error
    return wanted


class _Refusal(Exception):
    """Why something was not uploaded, and what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


_WRITABLE = (
    "Create a token with the right to write there at https://huggingface.co/settings/tokens, and give it to "
    "`hf auth login --force`"
)


def _refusal(error: Exception) -> _Refusal:
    """An error as a refusal with its remedy."""
    if isinstance(error, _Refusal):
        return error
    if isinstance(error, LocalTokenNotFoundError):
        return _Refusal("there is no token", "Log in with `hf auth login`")
    said = getattr(error, "server_message", None) or str(error)
    reason = f"{' '.join(said.split()):.300} ({type(error).__name__})"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return _Refusal(reason, "Log in with a token that is valid: `hf auth login --force`")
    return _Refusal(reason, _WRITABLE if status == 403 else "Check the network and your token (`hf auth login`)")


def _check_rights(token: Mapping[str, Any], repo_id: str) -> None:
    """Raise a refusal if a token, as the Hub describes it, cannot write to a repository.

    A fine-grained token lists what it may do with which users, organizations and repositories.
    """
    if token.get("role") == "read":
        raise _Refusal("the token can only read", _WRITABLE)
    scopes = token.get("fineGrained", {}).get("scoped")
    if token.get("role") != "fineGrained" or scopes is None:
        return
    writable = [scope["entity"].get("name") for scope in scopes if "repo.write" in scope["permissions"]]
    if not {repo_id, repo_id.partition("/")[0]} & set(writable):
        where = f"only to {', '.join(map(str, writable))}" if writable else "to no repository"
        raise _Refusal(f"the fine-grained token may write {where}", _WRITABLE)


def _check_existing(api: HfApi, repo_id: str, private: bool, directory: Path | None = None) -> None:
    """Raise a refusal if a repository is public and should not be, or has other content.

    An earlier checkpoint of this package may be replaced, and an interrupted upload may go on.

    Args:
        api: The Hub.
        repo_id: Full name of the repository, which need not exist.
        private: Whether it has to be private.
        directory: The checkpoint; None if there is none yet, so that only another model is refused.
    """
    try:
        found = api.model_info(repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        return
    if private and found.private is False:
        raise _Refusal(
            "that repository is public, and --private asks for a private one",
            f"Change it at https://huggingface.co/{repo_id}/settings, or give another name",
        )
    other = _other_content(found, directory)
    if other:
        shown = ", ".join(other[:_SHOWN]) + ", ..." * (len(other) > _SHOWN)
        raise _Refusal(
            f"that repository has other content, with which the checkpoint would be mixed ({shown})",
            "Give the name of another repository, or delete these files",
        )


def _other_content(found: ModelInfo, directory: Path | None) -> list[str]:
    """The files of a repository that neither belong to a checkpoint nor to an earlier one of this package."""
    there = {file.rfilename: file.size for file in found.siblings or () if file.rfilename not in _OF_A_NEW_REPOSITORY}
    is_ours = f"{PLAN_NAME}.json" in there
    if directory is None:
        return [] if is_ours or "config.json" not in there else sorted(there)
    own = {
        file.relative_to(directory).as_posix(): file.stat().st_size for file in directory.rglob("*") if file.is_file()
    }
    return sorted(name for name, size in there.items() if name not in own or (not is_ours and own[name] != size))
