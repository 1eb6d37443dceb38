"""A kernel cache on disk: entries named by the hash of all that made them, verified on every read.

An entry is an artefact (`KEY.so`, `KEY.py`) and a manifest (`KEY.json`) that carries the artefact's sha256. An artefact without
a matching manifest does not exist: whatever was interrupted, truncated, altered or put there by somebody else is built again.
Loading a shared object runs it, so the folder must be ours and writable by nobody else.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .. import __version__
from ..compiler import log
from ..compiler.errors import CacheError

_log = log.get("runtime")

_SCRATCH = ".scratch-"
_STALE_SECONDS = 3600  # no build takes an hour (build.py stops one after ten minutes): an older scratch folder was abandoned


def root() -> Path:
    """The cache folder: TILEWELD_CACHE_DIR, else XDG_CACHE_HOME/tileweld, else ~/.cache/tileweld; made with mode 0700.

    A folder that cannot be trusted or written is not used: one warning, and a private temporary folder for this process.
    """
    chosen = os.environ.get("TILEWELD_CACHE_DIR")
    if not chosen:
        chosen = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tileweld")
    path = Path(chosen).expanduser().resolve()
    try:
        check_folder(path)
    except CacheError as error:
        return _private_folder(str(path), str(error))
    _sweep(path)
    return path


def check_folder(path: Path) -> None:
    """Make `path` (mode 0700) where it is missing. Raises CacheError unless it is ours, and writable by us alone."""
    cure = "remove it, or set TILEWELD_CACHE_DIR to a folder of your own"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise CacheError(f"the cache folder cannot be made: {error.strerror}", where=str(path), cure=cure) from error
    if status.st_uid != os.geteuid():
        raise CacheError(f"the cache folder belongs to user {status.st_uid}", where=str(path), cure=cure)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise CacheError(f"others may write to the cache folder (mode {mode:04o})", where=str(path),
                         cure="chmod 700 it once you trust what it holds, or set TILEWELD_CACHE_DIR to another folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise CacheError("the cache folder is read-only", where=str(path), cure=cure)


@functools.cache
def _private_folder(refused: str, reason: str) -> Path:
    path = Path(tempfile.mkdtemp(prefix="tileweld-"))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child that exits must not take its parent's kernels along
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    warnings.warn(f"{reason}. Kernels are built into a temporary folder and not kept.", stacklevel=4)
    return path


@functools.cache
def _sweep(path: Path) -> None:
    """Remove what killed builds left behind; once a process."""
    horizon = time.time() - _STALE_SECONDS
    for scratch in path.glob(_SCRATCH + "*"):
        with contextlib.suppress(OSError):
            if scratch.stat().st_mtime < horizon:
                shutil.rmtree(scratch) if scratch.is_dir() else scratch.unlink()


@functools.cache
def machine() -> dict[str, str]:
    """What a binary depends on besides its source: CPU (a shared home may serve several), torch, Python, tileweld."""
    cpu = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if not value:
                break  # the first core's block has ended; the others repeat it
            if name.strip() in ("model name", "flags", "CPU implementer", "CPU part", "Features", "isa", "cpu"):
                cpu[name.strip()] = value.strip()
    return {
        "cpu": json.dumps(cpu, sort_keys=True) if cpu else platform.processor(),
        "architecture": platform.machine(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": str(torch.__version__),
        "tileweld": __version__,
    }


def entry_key(kind: str, source: str, **parts: object) -> str:
    """sha256 in hex of the kind, the source, `parts` (JSON values: compiler, flags, ...) and the machine."""
    text = json.dumps({"kind": kind, "source": source, "parts": parts, "machine": machine()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fetch(key: str, suffix: str, produce: Callable[[Path], Path], **about: object) -> Path:
    """The path of entry `key`'s artefact; `produce` makes it if there is no valid one.

    produce: is given an empty scratch folder, returns the file it made there. It runs under a lock, so that of several processes
        that want one entry a single one builds it. Whatever it raises passes through and leaves no entry.
    about: JSON values for a person who reads the manifest.
    Raises CacheError where the file system fails (a full disk).
    """
    folder = root()
    artefact = folder / f"{key}{suffix}"
    if is_valid(artefact):
        _log.debug("hit %s", artefact)
        return artefact
    with _locked(folder / f"{key}.lock"):
        if is_valid(artefact):  # somebody else built it while we waited
            return artefact
        _log.info("miss %s", artefact)
        scratch = Path(_filesystem(tempfile.mkdtemp, prefix=_SCRATCH, dir=folder))
        try:
            made = produce(scratch)
            _filesystem(_publish, made, artefact, scratch, about)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return artefact


def read(key: str, suffix: str) -> bytes | None:
    """The content of entry `key`'s artefact; None if there is no valid one."""
    verified = _verified(root() / f"{key}{suffix}")
    return verified[0] if verified is not None else None


def forget(key: str, suffix: str) -> None:
    """Remove an entry. A process that is reading it finds it whole or not at all."""
    artefact = root() / f"{key}{suffix}"
    for path in (artefact.with_suffix(".json"), artefact):  # an artefact without a manifest does not exist
        with contextlib.suppress(FileNotFoundError):
            _filesystem(path.unlink)


def digest(artefact: Path) -> str | None:
    """sha256 in hex of an artefact; None if there is no valid one."""
    verified = _verified(artefact)
    return verified[1] if verified is not None else None


def is_valid(artefact: Path) -> bool:
    """Whether both files are there, regular, ours, and the artefact is what the manifest says it is."""
    return _verified(artefact) is not None


def _verified(artefact: Path) -> tuple[bytes, str] | None:
    try:
        manifest, content = json.loads(_read_own(artefact.with_suffix(".json"))), _read_own(artefact)
        found = hashlib.sha256(content).hexdigest()
        return (content, found) if manifest["artefact"] == artefact.name and manifest["sha256"] == found else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def put_text(path: Path, text: str) -> None:
    """Write a file of the cache (mode 0600) so that a reader sees the old content or the new, never a part."""
    handle, temporary = _filesystem(tempfile.mkstemp, prefix=_SCRATCH, dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            _filesystem(file.write, text)
        _filesystem(os.replace, temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _read_own(path: Path) -> bytes:
    """The content of a regular file that belongs to us; OSError for a symlink, a device, somebody else's file."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(f"{path} is no regular file of ours")
        return file.read()


def _publish(made: Path, artefact: Path, scratch: Path, about: dict[str, object]) -> None:
    os.chmod(made, 0o600)
    manifest = {
        "artefact": artefact.name,
        "sha256": hashlib.sha256(made.read_bytes()).hexdigest(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        **about,
    }
    note = scratch / "manifest.json"
    note.write_text(json.dumps(manifest, indent=1, sort_keys=True))
    os.chmod(note, 0o600)
    # Artefact first: killed between the two, the entry has a new artefact and no or an old manifest, and is built again.
    os.replace(made, artefact)
    os.replace(note, artefact.with_suffix(".json"))


def _filesystem(call: Callable, *args, **kwargs):
    """`call(...)`, with an OSError told as a CacheError."""
    try:
        return call(*args, **kwargs)
    except OSError as error:
        raise CacheError(f"the kernel cache cannot be written: {error.strerror or error}", where=str(error.filename or ""),
                         cure="free some space, or set TILEWELD_CACHE_DIR to another folder") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, between processes and between threads. The kernel drops it when a process dies."""
    handle = _acquire(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while we hold it: whoever waits sees in _acquire that the name has gone
        os.close(handle)


def _acquire(path: Path) -> int:
    while True:
        handle = _filesystem(os.open, path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                return handle
        except FileNotFoundError:
            pass  # the holder before us unlinked the file: lock the one that takes its name
        except OSError as error:
            # Some network file systems have no locks. Two processes may then build the same entry at once; the last one's
            # stays, and a reader between its two renames finds a mismatch and builds once more.
            _log.warning("no lock on %s (%s): building without", path, error.strerror)
            return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
