"""The kernel cache: what is verified, what is rebuilt, whom it trusts, and several processes at once."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tileweld.compiler.errors import CacheError
from tileweld.runtime import cache

KEY = "0" * 64


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWELD_CACHE_DIR", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


class Producer:
    """Writes `content` into the scratch folder and counts how often it was asked."""

    def __init__(self, content=b"kernel"):
        self.content, self.calls = content, 0

    def __call__(self, scratch):
        self.calls += 1
        made = scratch / "made"
        made.write_bytes(self.content)
        return made


def test_second_fetch_is_a_hit(folder):
    produce = Producer()
    path = cache.fetch(KEY, ".so", produce)
    assert cache.fetch(KEY, ".so", produce) == path
    assert produce.calls == 1
    assert path.read_bytes() == b"kernel"


def test_modes_are_private_and_nothing_is_left_over(folder):
    usual = os.umask(0)  # the modes may not depend on it
    try:
        path = cache.fetch(KEY, ".so", Producer())
    finally:
        os.umask(usual)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    assert {file.name for file in folder.iterdir()} == {path.name, f"{KEY}.json"}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def tamper_manifest(path):
    manifest = path.with_suffix(".json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sha256": "0" * 64}))


def foreign_manifest(path):
    """A valid pair of files that somebody moved here from another entry."""
    manifest = path.with_suffix(".json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"artefact": "1" * 64 + ".so"}))


def symlink(path):
    """The right bytes, but in a file outside the folder, which others may change later."""
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text('{"artefact": "'),
        lambda path: path.with_suffix(".json").write_text("[]"),
        tamper_manifest,
        foreign_manifest,
        symlink,
    ],
    ids=["flipped", "truncated", "emptied", "gone", "no manifest", "half a manifest", "no dict", "other hash", "other entry",
         "symlink"],
)
def test_a_damaged_entry_is_rebuilt(folder, damage):
    produce = Producer()
    path = cache.fetch(KEY, ".so", produce)
    damage(path)
    assert not cache.is_valid(path)
    assert cache.fetch(KEY, ".so", produce) == path
    assert produce.calls == 2
    assert path.read_bytes() == b"kernel" and not path.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_an_entry_of_another_user_is_rebuilt(folder):
    produce = Producer()
    path = cache.fetch(KEY, ".so", produce)
    os.chown(path, 12345, 12345)
    cache.fetch(KEY, ".so", produce)
    assert produce.calls == 2
    assert path.stat().st_uid == 0


def test_a_failing_producer_leaves_nothing(folder):
    def produce(scratch):
        (scratch / "half").write_bytes(b"ker")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fetch(KEY, ".so", produce)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_may_write_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(CacheError, match=f"others may write to the cache folder .mode 0{mode:o}.*chmod 700"):
        cache.check_folder(folder)
    with pytest.warns(UserWarning, match="temporary folder"):
        used = cache.root()
    assert used != folder and stat.S_IMODE(used.stat().st_mode) == 0o700
    assert cache.fetch(KEY, ".so", Producer()).parent == used
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(folder):
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(CacheError, match="belongs to user 12345"):
        cache.check_folder(folder)


def test_a_file_in_place_of_the_folder_is_refused(folder):
    folder.write_text("")
    with pytest.raises(CacheError, match="cannot be made"):
        cache.check_folder(folder)


def test_the_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("TILEWELD_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.root() == tmp_path / "xdg" / "tileweld"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.root() == tmp_path / "home" / ".cache" / "tileweld"


def test_a_full_disk_is_told_as_one_clear_error(folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.raises(CacheError, match="No space left.*free some space"):
        cache.fetch(KEY, ".so", Producer())


def test_stale_scratch_is_swept_and_fresh_scratch_is_not(folder):
    folder.mkdir(mode=0o700)
    stale, stale_file, fresh = (folder / f"{cache._SCRATCH}{name}" for name in ("stale", "file", "fresh"))
    stale.mkdir()
    (stale / "half.o").write_bytes(b"x")
    stale_file.write_bytes(b"x")
    fresh.mkdir()
    old = time.time() - cache._STALE_SECONDS - 60
    for path in (stale, stale_file):
        os.utime(path, (old, old))
    cache.root()
    assert list(folder.iterdir()) == [fresh]


def test_keys_differ_in_every_part(monkeypatch):
    keys = {
        cache.entry_key("cpp", "int x;", flags=["-O3"]),
        cache.entry_key("cpp", "int y;", flags=["-O3"]),
        cache.entry_key("cpp", "int x;", flags=["-O2"]),
        cache.entry_key("cpp", "int x;", flags=["-O3"], name="x"),
        cache.entry_key("python", "int x;", flags=["-O3"]),
    }
    here = cache.machine()
    for name in ("cpu", "torch", "python", "tileweld"):
        monkeypatch.setattr(cache, "machine", lambda name=name: here | {name: "another"})
        keys.add(cache.entry_key("cpp", "int x;", flags=["-O3"]))
    assert len(keys) == 9
    monkeypatch.undo()
    assert cache.entry_key("cpp", "int x;", flags=["-O3"]) in keys


SLOW_FETCH = """
import sys, time
from pathlib import Path
from tileweld.runtime import cache

def produce(scratch):
    with open(sys.argv[1], "a") as file:
        file.write("built\\n")
    (scratch / "made").write_bytes(b"kernel" * 1000)
    time.sleep(float(sys.argv[2]))
    return scratch / "made"

print(cache.fetch("0" * 64, ".so", produce).read_bytes() == b"kernel" * 1000)
"""


def start(counter: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SLOW_FETCH, str(counter), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_of_four_processes_one_builds(folder, tmp_path):
    counter = tmp_path / "counter"
    processes = [start(counter, 1.0) for _ in range(4)]
    assert [process.communicate(timeout=120)[0].strip() for process in processes] == ["True"] * 4
    assert [process.returncode for process in processes] == [0] * 4
    assert counter.read_text() == "built\n"
    assert {file.suffix for file in folder.iterdir()} == {".so", ".json"}


def test_a_killed_process_holds_nobody_up_and_leaves_nothing_loadable(folder, tmp_path):
    counter = tmp_path / "counter"
    process = start(counter, 600)
    deadline = time.monotonic() + 60
    while not counter.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert counter.exists() and not list(folder.glob("*.so"))
    produce = Producer()
    path = cache.fetch(KEY, ".so", produce)  # would wait for ever if the lock had outlived its process
    assert produce.calls == 1 and path.read_bytes() == b"kernel"
