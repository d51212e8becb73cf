"""One run at a time in a folder, on whatever machine: claims that no crash and no reboot leaves behind."""

import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from discriminative.errors import UsageError, WriteError
from discriminative.records.files import told_what_cannot_be_written

HEARTBEAT = 15.0  # seconds between two signs of life
LEASE = 120.0  # seconds without one after which a run on another machine counts as gone
LOOK_EVERY = 1.0  # seconds, where somebody waits for a sign of life
TRIES = 5  # folders come and go with their claims


class ClaimLost(WriteError):
    """Another run took the folder over, as this one showed no sign of life for too long."""


class Claim:
    """A run's claim to a folder: a file beside it that names host and process.

    The process touches it every ``HEARTBEAT`` seconds. A claim is taken over at once where its process was
    of this machine and is gone; else after ``LEASE`` seconds in which this object saw no sign of life. No
    clock of another machine is asked.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder.with_name(f".{folder.name}.claim")
        self.lease = SoftFileLease(
            self.path, timeout=0, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, thread_local=False
        )
        self.made: list[Path] = []  # folders that were not there
        self.mark: tuple | None = None  # what changes with every sign of life
        self.marked = 0.0

    def take(self) -> bool:
        """Take the claim where it is free or stale; whether it is held now.

        Raises:
            WorkError: the folder cannot be written.
        """
        with told_what_cannot_be_written(self.folder):
            for _ in range(TRIES):
                self.made = [place for place in self.path.parents if not place.exists()]
                self.path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self.lease.acquire()
                    return True
                except FileNotFoundError:  # another run removed the folder, which was empty
                    continue
                except (Timeout, LeaseSettingsMismatch):
                    if not self.remove_silent():
                        return False
                except PermissionError:
                    if not self.path.exists():
                        raise
                    return False  # another user's
        return False

    def remove_silent(self) -> bool:
        """Remove a claim without a sign of life; whether there is none any more.

        filelock leaves two kinds: an empty file, which a power failure makes of a claim, and any on a file
        system that cannot exchange two names (NFS, Lustre).
        """
        try:
            if self.silence() < LEASE:
                return False
            aside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
            self.path.rename(aside)
            found = aside.stat()
            if (found.st_ino, found.st_mtime_ns) != self.mark[:2]:
                with suppress(FileExistsError):  # somebody was quicker, and has it now
                    os.link(aside, self.path)
            aside.unlink()
        except FileNotFoundError:
            return True
        except OSError:  # not this user's, or open on Windows
            return False
        return not self.path.exists()

    def silence(self) -> float:
        """Seconds for which this object saw no sign of life, by this machine's clock.

        Raises:
            FileNotFoundError: there is no claim.
        """
        found = self.path.stat()
        mark = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
        if mark != self.mark:
            self.mark = mark
            self.marked = time.monotonic()
        return time.monotonic() - self.marked

    @property
    def holder(self) -> str:
        """Who holds it: "node7, process 4711"."""
        owner = self.lease.owner
        return f"{host_of(owner)}, process {owner.pid}" if owner else "of an unknown process"

    def is_held_here(self) -> bool:
        """Whether a process of this machine holds it that lives."""
        owner = self.lease.owner
        return bool(owner) and host_of(owner) == socket.gethostname() and psutil.pid_exists(owner.pid)

    def take_after_watching(self) -> bool:
        """Like :meth:`take`; a claim of another machine is watched until its holder shows a sign of life."""
        if self.take():
            return True
        if self.is_held_here():
            return False
        told = f"{self.folder}: claimed by {self.holder}; waiting at most {LEASE:g} s for a sign of life"
        print(told, file=sys.stderr, flush=True)
        with suppress(FileNotFoundError):
            self.silence()
            first = self.mark
            while not self.take():
                self.silence()
                if self.mark != first:
                    return False
                time.sleep(LOOK_EVERY)
            return True
        return self.take()

    def is_ours(self) -> bool:
        """Whether the file is still this object's."""
        owner = self.lease.owner
        return self.lease.compromise is None and owner is not None and owner.token == self.lease.token

    def check(self) -> None:
        """Check that the claim still holds: call it before files are replaced.

        Raises:
            ClaimLost: it does not, as after a suspension.
        """
        if self.is_ours():
            return
        time.sleep(min(LOOK_EVERY, HEARTBEAT))  # a look at the claim may move it for a moment
        if not self.is_ours():
            now = f"now {self.holder}" if self.path.exists() else "it was removed"
            raise ClaimLost(f"{self.folder}: this run's claim was lost, {now}; nothing more is written there")

    def release(self) -> None:
        """Let it go, with the folders that were made for it and are empty; does nothing where it is not
        held."""
        self.lease.release()
        remove_empty(self.made)


def host_of(owner) -> str:
    """The machine of a claim's owner; a container's number, which filelock adds, is left out."""
    return owner.hostname.partition("?")[0]


@contextmanager
def alone_in(folder: Path) -> Iterator[Claim]:
    """Around a run's work in a folder: two at once would take each other's files away.

    Raises:
        UsageError: another run is at work there.
        WorkError: the folder cannot be written.
    """
    claim = Claim(folder)
    if not claim.take_after_watching():
        advice = "wait until it is done, or give another --output_path"
        raise UsageError(f"{folder}: another run is at work there ({claim.holder}); {advice}")
    try:
        yield claim
    finally:
        claim.release()


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as nothing is in them."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def check_free(folder: Path) -> None:
    """Check that no other run is at work in a folder.

    Raises:
        UsageError: one is.
    """
    with alone_in(folder):
        pass


def disk_time(folder: Path) -> float:
    """Now by the clock that dates the files of a folder, which may be a server's; seconds."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    path = folder / f".{secrets.token_hex(8)}.now"
    with told_what_cannot_be_written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            path.touch()
            return path.stat().st_mtime
        finally:
            path.unlink(missing_ok=True)
            remove_empty(made)
