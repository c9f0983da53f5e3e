"""Claiming a cluster's run directory, alone, and removing it whole; and the state directory of one run."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from epdctl.control.paths import ClusterDir, Holder, Record, RunState, process_start, runs_of, runtime_base
from epdctl.errors import AlreadyRunning, EpdError, UserError
from epdctl.ids import RankName, RunId
from epdctl.topology.names import check_name

__all__ = ["KEPT_RUNS", "LONGEST_SOCKET_PATH", "RunDir", "claim", "prune"]

log = logging.getLogger(__name__)

LONGEST_SOCKET_PATH = 107  # bytes: sun_path less its terminating zero
_LONGEST_ENDING = ".99999." + "purpose-16-bytes"  # incarnation and purpose of an endpoint
_CLAIM_TRIES = 100  # a daemon that leaves removes the directory under our hands
KEPT_RUNS = 5


@dataclass(frozen=True, slots=True)
class RunDir:
    """A claimed run directory. The lock ends with the process, however it ends."""

    directory: ClusterDir
    state: RunState
    run: RunId
    lock: int  # the locked file descriptor

    def write_record(self, record: Record) -> None:
        """Whole or not at all: readers never see half a file."""
        fresh = self.directory.path / "daemon.json.new"
        fresh.write_bytes(msgspec.json.encode(record))
        fresh.replace(self.directory.record)

    def release(self) -> None:
        """Remove the whole directory, the lock last of all."""
        _empty(self.directory)
        shutil.rmtree(self.directory.path, ignore_errors=True)
        os.close(self.lock)


def claim(
    state: RunState, cluster: str, environ: Mapping[str, str], sweep: Callable[[RunId], None], ranks: Iterable[RankName]
) -> RunDir:
    """Take the cluster's run directory for the run of ``state``, after ``sweep`` of the run that died holding it.

    Raises AlreadyRunning, and UserError when the directory is not ours alone or its sockets' paths would be too long.
    """
    base = runtime_base(environ)
    directory = ClusterDir(base / check_name(cluster))
    _check_lengths(directory, ranks)
    _private(base)
    lock = _lock(directory)
    former = directory.holder()
    if former is not None:
        log.warning("sweeping after run %s, whose daemon (pid %d) died", former.run, former.pid)
        sweep(former.run)
    _empty(directory)
    directory.sockets.mkdir(mode=0o700)
    _sign(lock, state.run)
    for folder in (state.logs, state.captures):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return RunDir(directory, state, state.run, lock)


def prune(cluster: str, environ: Mapping[str, str]) -> None:
    """Keep the state of the newest runs, the present one included."""
    for old in runs_of(cluster, environ)[KEPT_RUNS:]:
        shutil.rmtree(old.path, ignore_errors=True)


def _check_lengths(directory: ClusterDir, ranks: Iterable[RankName]) -> None:
    longest = max((len(rank.file_stem) for rank in ranks), default=0)
    length = len(os.fsencode(directory.sockets)) + 1 + longest + len(_LONGEST_ENDING)
    if length > LONGEST_SOCKET_PATH:
        raise UserError(
            f"unix sockets under {directory.sockets} would have paths of up to {length} bytes; "
            f"the system allows {LONGEST_SOCKET_PATH}",
            hint="set EPDCTL_RUNTIME_DIR to a short directory, or give the cluster a shorter name",
        )


def _private(base: Path) -> None:
    """Make ``base`` if need be; refuse one that somebody else could write, list or have put there."""
    try:
        base.mkdir(parents=True, mode=0o700, exist_ok=True)
        found = base.lstat()
    except OSError as error:
        raise UserError(
            f"cannot make {base}, where the sockets of a running cluster are: {error.strerror}",
            hint="set EPDCTL_RUNTIME_DIR to a short path of a directory that you can write to",
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(
            f"{base} must be a directory of your own that nobody else can enter (mode 0700)",
            hint=f"chmod 700 {base}, or set EPDCTL_RUNTIME_DIR to another directory",
        )


def _lock(directory: ClusterDir) -> int:
    for _ in range(_CLAIM_TRIES):
        directory.path.mkdir(mode=0o700, exist_ok=True)
        try:
            lock = os.open(directory.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # the directory went away in between
            continue
        if _locked(lock, directory):
            return lock
        os.close(lock)
    raise EpdError(f"{directory.path} keeps disappearing; is something else cleaning it?")


def _locked(lock: int, directory: ClusterDir) -> bool:
    """False when the file we locked is no longer the one at that path. Raises AlreadyRunning."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        holder = directory.holder()
        whose = f" (pid {holder.pid})" if holder else ""
        raise AlreadyRunning(
            f"the cluster {directory.name!r} is already up{whose}",
            hint=f"stop it with: epdctl --cluster {directory.name} down; or choose another --name",
        ) from None
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock), directory.lock.stat())
    return False


def _sign(lock: int, run: RunId) -> None:
    pid = os.getpid()
    data = msgspec.json.encode(Holder(pid=pid, start_time=process_start(pid) or 0, run=run))
    os.ftruncate(lock, 0)
    os.pwrite(lock, data, 0)


def _empty(directory: ClusterDir) -> None:
    """Remove everything but the lock."""
    for entry in list(os.scandir(directory.path)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != directory.lock.name:
            os.unlink(entry.path)
