"""Uploads to a Hub on this machine: what is sent, what is sent again, and what is refused before any work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from optimum_moe.checkpoint.push import check_target, push
from tests.fake_hub import FakeHub, fake_hub

__all__ = ["fake_hub"]

FILES = {
    "README.md": b"a card",
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
    "plan.json": b"{}",
    "plan/tensors.safetensors": b"three",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        file = tmp_path / "small" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tmp_path / "small"


def upload(folder: Path, repo_id: str | None = "me/small", private: bool = False) -> str:
    return push(folder, repo_id, None, lambda name: None, private)


@pytest.mark.parametrize("private", [False, True])
def test_a_repository_is_created_as_asked(private: bool, folder: Path, fake_hub: FakeHub) -> None:
    check_target("small", private)
    assert fake_hub.files == {}
    assert upload(folder, None, private) == "me/small"
    assert fake_hub.files == {"me/small": FILES}
    assert fake_hub.private == ({"me/small"} if private else set())


def test_what_arrived_is_not_sent_again(folder: Path, fake_hub: FakeHub) -> None:
    arrived = ["model-00001-of-00002.safetensors", "README.md"]
    fake_hub.files["me/small"] = {name: FILES[name] for name in arrived}
    check_target("me/small")
    upload(folder)
    assert fake_hub.files == {"me/small": FILES}
    assert fake_hub.sent == [FILES.keys() - set(arrived)]


def test_an_earlier_checkpoint_is_replaced(folder: Path, fake_hub: FakeHub) -> None:
    fake_hub.files["me/small"] = {**FILES, "config.json": b"{'an': 'earlier one'}", ".gitattributes": b""}
    check_target("me/small")
    upload(folder)
    assert fake_hub.files == {"me/small": {**FILES, ".gitattributes": b""}}
    assert fake_hub.sent == [{"config.json"}]


OTHER = {"config.json": b"of another model", "model.safetensors": b"its weights"}


def test_a_repository_with_another_model_is_refused(folder: Path, fake_hub: FakeHub) -> None:
    fake_hub.files["me/small"] = dict(OTHER)
    reason = (
        "that repository has other content, with which the checkpoint would be mixed (config.json, model.safetensors). "
        "Give the name of another repository, or delete these files."
    )
    with pytest.raises(ValueError, match=re.escape(f"The result cannot be uploaded to me/small: {reason}")):
        check_target("me/small")
    with pytest.raises(
        ValueError, match=re.escape(f"but was not uploaded to me/small: {reason} Then upload it with: ")
    ):
        upload(folder)
    assert fake_hub.files == {"me/small": OTHER}


def test_weights_of_another_size_would_be_mixed(folder: Path, fake_hub: FakeHub) -> None:
    more = {f"model-0000{number}-of-00003.safetensors": b"old" for number in (1, 2, 3)}
    fake_hub.files["me/small"] = {**more, "plan.json": b"{}"}
    with pytest.raises(ValueError, match=r"mixed \(model-00001-of-00003.safetensors, model-00002-of-00003.safetensors"):
        upload(folder)


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("read", "small: the token can only read. Create a token with the right to write there at https://"),
        (None, "small: Invalid user token"),
    ],
)
def test_a_token_without_rights_is_refused_before_any_work(
    role: str | None,
    message: str,
    fake_hub: FakeHub,
) -> None:
    fake_hub.role = role
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        check_target("small")
    assert "hf auth login --force" in str(refused.value)
    assert "\n" not in str(refused.value)


READ = ["repo.content.read", "repo.access.read"]


@pytest.mark.parametrize(
    ("scopes", "repo_id", "where"),
    [
        ({}, "small", "to no repository"),
        ({"me": READ, "ours": [*READ, "discussion.write"]}, "small", "to no repository"),
        ({"me": [*READ, "repo.write"]}, "ours/small", "only to me"),
        ({"me": READ, "me/other": [*READ, "repo.write"], "ours": ["repo.write"]}, "small", "only to me/other, ours"),
    ],
)
def test_a_fine_grained_token_without_rights_is_refused_before_any_work(
    scopes: dict[str, list[str]], repo_id: str, where: str, fake_hub: FakeHub
) -> None:
    fake_hub.role, fake_hub.scopes = "fineGrained", scopes
    said = f"uploaded to {repo_id}: the fine-grained token may write {where}. Create a token with the right to write"
    with pytest.raises(ValueError, match=re.escape(said)):
        check_target(repo_id)
    assert fake_hub.calls == ["/api/whoami-v2"]


@pytest.mark.parametrize("scopes", [{"me": ["repo.write"]}, {"me": READ, "me/small": ["repo.write"]}, None])
def test_a_fine_grained_token_that_may_write_or_does_not_say_is_let_through(
    scopes: dict[str, list[str]] | None, fake_hub: FakeHub
) -> None:
    fake_hub.role, fake_hub.scopes = "fineGrained", scopes
    check_target("small")


def test_the_namespace_of_somebody_else_is_refused(folder: Path, fake_hub: FakeHub) -> None:
    with pytest.raises(ValueError, match="You don't have the rights to create a model under the namespace") as refused:
        upload(folder, "theirs/small", private=True)
    said = str(refused.value)
    assert said.startswith(f"The checkpoint is complete in {folder}, but was not uploaded to theirs/small: ")
    assert "Create a token with the right to write there at https://huggingface.co/settings/tokens" in said
    assert said.endswith(f"Then upload it with: hf upload --private theirs/small {folder}")


def test_a_private_checkpoint_is_not_put_into_a_public_repository(
    folder: Path,
    fake_hub: FakeHub,
) -> None:
    upload(folder)
    for call in (lambda: check_target("me/small", private=True), lambda: upload(folder, private=True)):
        with pytest.raises(ValueError, match="that repository is public, and --private asks for a private one"):
            call()


def test_a_hub_that_cannot_be_reached_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    with pytest.raises(ValueError, match=r"uploaded to me/small: .*ConnectError\). Check the network and your token"):
        check_target("me/small")
