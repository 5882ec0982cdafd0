"""Who owns a folder: one run at a time, nothing that was not to be replaced is, and what was killed is cleared up."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimum_moe import ExpertPruning, MoECompressor
from optimum_moe.checkpoint import destination
from optimum_moe.checkpoint.destination import check_destination, owned, written_beside
from optimum_moe.engine import working_folder
from optimum_moe.surgeons.generic import GenericSurgeon
from tests.tiny_models import build

METHOD = ExpertPruning(num_experts=4, saliency="random")
ENGINES = ("memory", "streaming")
BUSY = "Another run is writing to .*out. Wait for it, or end it"


@pytest.fixture(autouse=True)
def default_signals() -> Iterator[None]:
    """Processes inherit what is ignored, and under `nohup` that is SIGHUP."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("destination") / "qwen3_moe"
    build("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {engine: contents(compress(checkpoint, folder / engine / "out", engine)) for engine in ENGINES}


def compress(model: Any, out: Path, engine: str = "memory", **settings: Any) -> Path:
    given = {"engine": engine, "output_dir": out, "progress": False} | settings
    return MoECompressor.from_pretrained(model, METHOD, **given).apply()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def at_first_cut(monkeypatch: pytest.MonkeyPatch, do: Callable[[], Any]) -> None:
    """Do something in the middle of the next run, once."""
    real, done = GenericSurgeon.cut, []

    def cut(*arguments: Any) -> None:
        if not done:
            done.append(True)
            do()
        real(*arguments)

    monkeypatch.setattr(GenericSurgeon, "cut", cut)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("second", [*ENGINES, "by hand"])
@pytest.mark.parametrize("first", ENGINES)
def test_a_second_run_is_refused_and_the_first_never_harmed(
    first: str,
    second: str,
    overwrite: bool,
    checkpoint: Path,
    results: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, link = tmp_path / "disk" / "out", tmp_path / "link"
    out.parent.mkdir()
    link.symlink_to(out.parent)
    finished = MoECompressor.from_pretrained(checkpoint, METHOD, progress=False)
    finished.apply()

    # The same folder, spelled otherwise.
    given = link / "out"
    start = (
        partial(finished.save_pretrained, given)
        if second == "by hand"
        else partial(compress, checkpoint, given, second)
    )

    def other() -> None:
        with pytest.raises(ValueError, match=BUSY):
            start(overwrite=overwrite)

    at_first_cut(monkeypatch, other)
    assert contents(compress(checkpoint, out, first)) == results[first]
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("what", ["folder", "file"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_appears_meanwhile_is_not_replaced(
    engine: str,
    what: str,
    checkpoint: Path,
    results: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"

    def appear() -> None:
        if what == "folder":
            out.mkdir()
        (out / "mine.txt" if what == "folder" else out).write_text("mine", encoding="utf-8")

    at_first_cut(monkeypatch, appear)
    with pytest.raises(
        ValueError, match=r"out was created by another program during .* not replaced without overwrite=True"
    ):
        compress(checkpoint, out, engine)
    assert (out / "mine.txt" if what == "folder" else out).read_text(encoding="utf-8") == "mine"
    assert names(tmp_path) == ([".out.streaming", "out"] if engine == "streaming" else ["out"])
    out.rename(tmp_path / "away")
    with monkeypatch.context() as patch:
        if engine == "streaming":
            # Everything is finished.
            patch.setattr(GenericSurgeon, "cut", None)
        assert contents(compress(checkpoint, out, engine)) == results[engine]
    assert names(tmp_path) == ["away", "out"]


@pytest.mark.parametrize("engine", ENGINES)
def test_what_appears_meanwhile_is_replaced_where_that_is_asked_for(
    engine: str,
    checkpoint: Path,
    results: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    at_first_cut(monkeypatch, lambda: shutil.copytree(checkpoint, out))
    assert contents(compress(checkpoint, out, engine, overwrite=True)) == results[engine]
    assert names(tmp_path) == ["out"]


def forked(call: Callable[[], Any]) -> int:
    """How a process ends that calls a function: its status, or minus the signal."""
    process = os.fork()
    if process == 0:
        try:
            call()
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def write(out: Path, overwrite: bool) -> None:
    with owned(out, overwrite), written_beside(out, overwrite) as beside:
        (beside / "new").touch()


@pytest.mark.parametrize("earlier", [True, False])
def test_killed_at_every_step(earlier: bool, tmp_path: Path) -> None:
    """Every step is a call of the system; after the kill there is the old or the new folder, and nothing beside it."""
    steps = ("rename", "mkdir", "unlink", "rmdir", "open")
    seen = set()
    for last in range(1, 40):
        parent = tmp_path / str(last)
        out = parent / "out"
        parent.mkdir()
        if earlier:
            out.mkdir()
            (out / "old").touch()

        def killed(out: Path = out, last: int = last) -> None:
            count = [0]

            def stepped(real: Any) -> Callable[..., Any]:
                def step(*arguments: Any, **settings: Any) -> Any:
                    count[0] += 1
                    if count[0] == last:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **settings)

                return step

            for name in steps:
                setattr(os, name, stepped(getattr(os, name)))
            write(out, overwrite=True)

        status = forked(killed)
        check_destination(out, overwrite=True)
        found = tuple(names(out)) if out.exists() else ()
        seen.add(found)
        assert found in ((("old",), ("new",)) if earlier else ((), ("new",)))
        assert names(parent) == ["out"] * out.exists()
        if status == 0:
            break
    assert status == 0
    assert seen == {("old",) if earlier else (), ("new",)}


def test_killed_between_the_two_renames_of_a_streaming_run(
    checkpoint: Path, results: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()

    def killed() -> None:
        real = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if target == out:
                os._exit(9)
            return real(self, target)

        Path.rename = rename  # type: ignore[method-assign]
        compress(checkpoint, out, "streaming", overwrite=True)

    assert forked(killed) == 9
    assert names(tmp_path) == [".out.lock", ".out.replaced", ".out.streaming"]
    # It had nothing left to do but the second rename.
    with pytest.raises(ValueError, match="out is not empty"):
        compress(checkpoint, out, "streaming")
    assert contents(out) == results["streaming"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_run_in_memory_that_is_ended_leaves_nothing(
    number: signal.Signals, overwrite: bool, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "made" / "out"
    if overwrite:
        out.mkdir(parents=True)
        (out / "old").touch()

    def ended() -> None:
        real = destination.take_place

        def take_place(*arguments: Any) -> None:
            assert names(out.parent)[:2] == [".out.lock", ".out.writing"]
            os.kill(os.getpid(), number)
            real(*arguments)

        destination.take_place = take_place
        compress(checkpoint, out, overwrite=overwrite)

    assert forked(ended) == (1 if number == signal.SIGINT else 128 + number)
    # Not even the folder that it had made for its result.
    assert names(tmp_path) == ["made"] * overwrite
    if overwrite:
        assert names(out.parent) == ["out"]
        assert names(out) == ["old"]


def test_a_streaming_run_that_is_ended_goes_on(
    checkpoint: Path, results: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def ended() -> None:
        real = working_folder.WorkingFolder.add

        def add(self: Any, name: str, **unit: Any) -> None:
            real(self, name, **unit)
            os.kill(os.getpid(), signal.SIGTERM)

        working_folder.WorkingFolder.add = add  # type: ignore[method-assign]
        compress(checkpoint, out, "streaming")

    assert forked(ended) == 128 + signal.SIGTERM
    assert names(tmp_path) == [".out.streaming"]
    # A run in memory to the same folder can be made as well; what was unfinished is of no use then.
    other = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-other")) / "out"
    assert contents(compress(checkpoint, other)) == results["memory"]
    assert names(other.parent) == ["out"]
    assert contents(compress(checkpoint, out, "streaming")) == results["streaming"]
    assert names(tmp_path) == ["out"]


def test_signals_are_what_they_were(tmp_path: Path) -> None:
    def mine(number: int, frame: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with owned(tmp_path / "out"):
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with owned(tmp_path / "out"):
            # A fork has nothing to clear up, and ends as it would.
            assert forked(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def flip(file: Path) -> None:
    """Change the last bit of a file, and nothing that its size or its header tells."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
@pytest.mark.parametrize(
    "what", ["checkpoint/model-00001-of-00004.safetensors", "state/layer-00000/plan/tensors.safetensors"]
)
def test_what_was_damaged_since_is_made_again(
    what: str,
    damage: Callable[[Path], None],
    checkpoint: Path,
    results: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, real = tmp_path / "out", GenericSurgeon.cut
    cuts: list[Any] = []

    def cut(*arguments: Any) -> None:
        cuts.append(arguments)
        if len(cuts) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(GenericSurgeon, "cut", cut)
    with pytest.raises(KeyboardInterrupt):
        compress(checkpoint, out, "streaming")
    damage(tmp_path / ".out.streaming" / what)
    assert contents(compress(checkpoint, out, "streaming")) == results["streaming"]
    # Two of three were finished, one of which had to be cut again.
    assert len(cuts) == 3 + 2


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_what_is_damaged_during_a_run_is_never_put_in_place(
    damage: Callable[[Path], None],
    checkpoint: Path,
    results: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, real = tmp_path / "out", working_folder.WorkingFolder.add

    def add(self: Any, name: str, **unit: Any) -> None:
        real(self, name, **unit)
        if name == "model.layers.2":
            damage(self.checkpoint / "model-00001-of-00004.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(working_folder.WorkingFolder, "add", add)
        with pytest.raises(
            ValueError, match=r"does not contain what was written there: model-00001-of-00004.safetensors"
        ):
            compress(checkpoint, out, "streaming")
    assert not out.exists()
    assert contents(compress(checkpoint, out, "streaming")) == results["streaming"]


@pytest.mark.parametrize("engine", ENGINES)
def test_overwriting_never_reaches_the_original(engine: str, checkpoint: Path, tmp_path: Path) -> None:
    real, source = tmp_path / "real", tmp_path / "source"
    shutil.copytree(checkpoint, real)
    source.mkdir()
    for file in real.iterdir():
        # As in the cache of the Hub.
        (source / file.name).symlink_to(file)
    (source / "original").mkdir()
    (source / "original" / "consolidated.pth").touch()
    (tmp_path / "to source").symlink_to(source)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").symlink_to(real)
    before = contents(real)
    for out in (source, real, tmp_path / "to source", source / "..", real / ".." / "real"):
        with pytest.raises(ValueError, match="holds the original checkpoint, which would be replaced"):
            compress(source, out, engine, overwrite=True)
    with pytest.raises(ValueError, match="is in the folder of the original checkpoint and is not empty"):
        compress(source, source / "original", engine, overwrite=True)
    compress(source, tmp_path / "out", engine, overwrite=True)
    compress(source, source / "smaller", engine)
    assert contents(real) == before
    assert (source / "original" / "consolidated.pth").is_file()
    assert not (tmp_path / "out" / "old").exists()


def test_a_model_in_memory_does_not_replace_where_it_came_from(checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint, tmp_path / "source"))
    model = AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(ValueError, match="holds the original checkpoint"):
        MoECompressor.from_pretrained(model, METHOD, output_dir=source, overwrite=True, progress=False)
    compressor = MoECompressor.from_pretrained(model, METHOD, progress=False)
    compressor.apply()
    with pytest.raises(ValueError, match="holds the original checkpoint"):
        compressor.save_pretrained(source, overwrite=True)
    assert load_file(source / "model.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()


def test_folders_above_are_made_and_go_again_with_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(OSError, match="no"), owned(out), written_beside(out):
        raise OSError(errno.EIO, "no")
    assert names(tmp_path) == []
    with owned(out), written_beside(out) as beside:
        (beside / "new").touch()
    assert names(out.parent) == ["out"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file, so .* cannot be created"):
        check_destination(tmp_path / "file" / "out")


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(destination, "lock_descriptor", refuse)
    message = r"cannot lock files \(.*No locks available\).* Choose a folder elsewhere"
    with pytest.raises(ValueError, match=message), owned(tmp_path / "out"):
        pass
    monkeypatch.undo()
    with owned(tmp_path / "out"):
        assert names(tmp_path) == [".out.lock"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_what_the_system_refuses_at_the_start_is_explained(
    call: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(error, os.strerror(error))

    out = tmp_path / "made" / "out"
    message = rf"Nothing can be written beside .*out \(.*{os.strerror(error)}.*\). Free some space"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(ValueError, match=message), owned(out):
            pass
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match=r"beside .* \(.*File name too long"), owned(tmp_path / ("n" * 250)):
        pass


def test_a_lock_whose_file_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run before removes the file between our opening and our locking it, and a third run makes another."""
    real, calls = destination.lock_descriptor, []
    lock = tmp_path / ".out.lock"

    def late(descriptor: int, **settings: Any) -> bool:
        calls.append(descriptor)
        if len(calls) == 1:
            lock.unlink()
            lock.touch()
        return real(descriptor, **settings)

    monkeypatch.setattr(destination, "lock_descriptor", late)
    with owned(tmp_path / "out"):
        assert len(calls) == 2
        with pytest.raises(ValueError, match=BUSY), owned(tmp_path / "out"):
            pass
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("rounds", "kinds"), [(2, ("both",)), pytest.param(30, ("memory", "streaming", "both"), marks=pytest.mark.full)]
)
def test_runs_that_get_in_each_others_way(
    rounds: int, kinds: tuple[str, ...], checkpoint: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [
        sys.executable,
        "-m",
        "tests.folder_kills",
        str(checkpoint),
        str(tmp_path / "kills"),
        str(rounds),
        *kinds,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [[kind, str(rounds)] for kind in kinds]
