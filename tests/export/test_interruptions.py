"""Bad moments: death, a full disk, two exports at once. A bundle is whole, nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.export.children import (
    Child,
    leave_room,
    mount_read_only,
    mount_small_disk,
    run_command,
)

from echoatt_exporter import ExportError, OutputExistsError, export_bundle, rewrite_bundle
from echoatt_exporter.bundle import open_stage, sweep
from echoatt_exporter.bundle.lock import Lock
from echoatt_runtime import BundleError, BundleNotFoundError
from echoatt_runtime.bundle import Bundle

OLD, NEW = "2:1", "2:1,3:1"
SOURCES = {OLD: (0, 1, 1, 3), NEW: (0, 1, 1, 1)}
FILES = ["config.json", "generation_config.json", "out.onnx", "out.onnx.data"]


@pytest.fixture
def out(unshared_bundle: Path, tmp_path: Path) -> Path:
    """Where a bundle with the old plan is, alone in its directory."""
    path = tmp_path / "place" / "out.onnx"
    rewrite_bundle(unshared_bundle, path, OLD)
    return path


def _sources(path: Path) -> tuple[int, ...]:
    return Bundle.open(path, verify=True).specification.plan.sources


def _names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_export_that_is_killed_leaves_a_whole_bundle_and_the_next_one_cleans_up(
    short_checkpoint: Callable[[str], Path], unshared_bundle: Path, out: Path
) -> None:
    """An export spends its time with nothing on the disk but companions, a rewrite writing."""
    checkpoint = short_checkpoint("llama")
    generator = random.Random(9)  # noqa: S311 - the same moments every time
    killed = 0
    for work, kills in (
        (lambda: export_bundle(checkpoint, out, OLD, verify=False, force=True), 3),
        (lambda: rewrite_bundle(unshared_bundle, out, NEW, force=True), 17),
    ):
        start = time.monotonic()
        assert Child(work).wait() == 0
        duration = time.monotonic() - start
        for _ in range(kills):
            child = Child(work)
            time.sleep(generator.uniform(0, duration))
            child.kill()
            killed += child.wait() == -signal.SIGKILL
            with contextlib.suppress(BundleNotFoundError):  # in the midst of publishing
                assert _sources(out) in SOURCES.values()
            sweep(out.parent)
            assert _sources(out) in SOURCES.values()
    assert killed >= 10
    rewrite_bundle(unshared_bundle, out, NEW, force=True)
    assert _names(out) == FILES


def test_publication_that_is_killed_is_completed_by_the_next_export(
    unshared_bundle: Path, out: Path, tmp_path: Path
) -> None:
    """Before each of its steps in turn: the old model goes, files arrive, the lock goes."""

    def publish(step: int) -> None:
        steps = 0

        def die_in_time(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal steps
            removed = Path(str(arguments[0])) if event == "os.remove" else None
            arrives = event == "os.rename" and Path(str(arguments[1])).parent == out.parent
            if arrives or removed in (out, out.with_name(".echoatt-lock")):
                if steps == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                steps += 1

        sys.addaudithook(die_in_time)
        rewrite_bundle(unshared_bundle, out, NEW, force=True)

    steps_of_death = []
    for step in range(20):
        rewrite_bundle(unshared_bundle, out, OLD, force=True)
        assert _names(out) == FILES
        if Child(lambda step=step: publish(step)).wait() == 0:  # type: ignore[misc]
            break
        assert len(_names(out)) > 3
        try:
            steps_of_death.append({v: k for k, v in SOURCES.items()}[_sources(out)])
        except BundleNotFoundError:
            steps_of_death.append("none")
            # Into another file of the same directory
            rewrite_bundle(unshared_bundle, out.with_name("other.onnx"), OLD)
            assert _sources(out) == SOURCES[NEW]
            for name in ("other.onnx", "other.onnx.data"):
                out.with_name(name).unlink()
    assert steps_of_death == [OLD, *["none"] * 4, NEW]


def test_bundle_put_where_a_publication_was_cut_off_stays(
    unshared_bundle: Path, out: Path, tmp_path: Path
) -> None:
    shutil.copytree(out.parent, tmp_path / "saved")

    def die() -> None:
        with open_stage(out.parent) as stage:
            shutil.copyfile(out, stage.bundle / "out.onnx")
            stage.begin_publication("out.onnx")
            out.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    assert Child(die).wait() == -signal.SIGKILL
    rewrite_bundle(unshared_bundle, tmp_path / "mine" / "out.onnx", NEW)
    shutil.copytree(tmp_path / "mine", out.parent, dirs_exist_ok=True)
    sweep(out.parent)
    assert _sources(out) == SOURCES[NEW]
    assert _names(out) == FILES


def test_only_what_nobody_needs_is_swept(tmp_path: Path) -> None:
    dead, bare = tmp_path / ".echoatt-dead0000", tmp_path / ".echoatt-bare0000"
    for directory in (dead, bare, tmp_path / ".echoatt-mine", tmp_path / "elsewhere"):
        directory.mkdir()
        (directory / "weights").write_bytes(b"gigabytes")
    (dead / "lock").touch()
    (tmp_path / ".echoatt-link0000").symlink_to(tmp_path / "elsewhere")
    with open_stage(tmp_path) as live:
        sweep(tmp_path)
        assert live.bundle.is_dir()
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {live.root.name, ".echoatt-mine", ".echoatt-link0000", "elsewhere"}
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["weights"]


@pytest.mark.parametrize("force", [False, True])
def test_of_two_exports_to_one_place_the_later_wins_or_is_refused(
    unshared_bundle: Path, tmp_path: Path, force: bool
) -> None:
    """The second begins and ends while the first writes; it leaves the first one's files alone."""
    out = tmp_path / "out.onnx"
    begun = False

    def on_step(step: str, done: int, total: int) -> None:
        nonlocal begun
        if step == "write" and not begun:
            begun = True
            rewrite_bundle(unshared_bundle, out, OLD, force=force)
            assert _sources(out) == SOURCES[OLD]

    if force:
        rewrite_bundle(unshared_bundle, out, NEW, force=True, on_step=on_step)
    else:
        with pytest.raises(OutputExistsError, match=r"exists; choose another name"):
            rewrite_bundle(unshared_bundle, out, NEW, on_step=on_step)
    assert begun
    assert _sources(out) == SOURCES[NEW if force else OLD]
    assert _names(out) == FILES


def test_exports_to_one_place_at_once_leave_one_whole_bundle(
    unshared_bundle: Path, out: Path
) -> None:
    """A reader meanwhile finds a whole bundle or is told that there is none."""
    for _ in range(3):
        children = [
            Child(lambda plan=plan: rewrite_bundle(unshared_bundle, out, plan, force=True))  # type: ignore[misc]
            for plan in (OLD, NEW, OLD, NEW)
        ]
        waiting = threading.Thread(
            target=lambda children=children: [child.wait() for child in children]
        )
        waiting.start()
        while waiting.is_alive():
            with contextlib.suppress(BundleError):
                assert _sources(out) in SOURCES.values()
        waiting.join()
        assert _sources(out) in SOURCES.values()
        assert _names(out) == FILES


def test_a_publication_waits_for_another_one(unshared_bundle: Path, out: Path) -> None:
    lock_file = out.parent / ".echoatt-lock"
    lock = Lock.take(lock_file)
    assert lock is not None
    child = Child(lambda: rewrite_bundle(unshared_bundle, out, NEW, force=True))
    end = time.monotonic() + 60
    while not list(out.parent.glob(".echoatt-*/bundle/out.onnx.data")):
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(1)
    assert _sources(out) == SOURCES[OLD]
    lock_file.unlink()
    lock.release()
    assert child.wait() == 0
    assert _sources(out) == SOURCES[NEW]
    assert _names(out) == FILES


def test_disk_that_fills_up_while_writing_loses_nothing(
    unshared_bundle: Path, tmp_path: Path
) -> None:
    """Room for the weights, which is checked, and not for the graph."""
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    out = place / "out.onnx"

    def export() -> None:
        mount_small_disk(place)
        rewrite_bundle(unshared_bundle, out, OLD)
        leave_room(place, out.with_name("out.onnx.data").stat().st_size + 5 * 4096)
        before = _contents(place)
        assert run_command(log, "rewrite", unshared_bundle, out, "--share", OLD, "--force") == 2
        assert _contents(place) == before

    assert Child(export).wait() == 0
    told = log.read_text()
    assert told.startswith("echoatt: ")
    assert told.count("\n") == 1
    assert "no room left on the disk" in told


def test_place_that_cannot_be_written_to_is_told(unshared_bundle: Path, out: Path) -> None:
    before, log = _contents(out.parent), out.parents[1] / "log"

    def export() -> int:
        mount_read_only(out.parent)
        return run_command(log, "rewrite", unshared_bundle, out, "--share", NEW, "--force")

    assert Child(export).wait() == 2
    told = log.read_text()
    assert told.count("\n") == 1
    assert "Read-only file system" in told
    assert _contents(out.parent) == before


def test_place_that_cannot_be_made_is_told_and_what_was_made_for_nothing_goes(
    unshared_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot make the directory"):
        rewrite_bundle(unshared_bundle, tmp_path / "file" / "out.onnx", NEW)
    with pytest.raises(RuntimeError), open_stage(tmp_path / "new" / "place"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
