"""One run at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from discriminative.errors import UsageError
from discriminative.records.files import told_what_cannot_be_written


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Around a run's work in a folder: two at once would take each other's files away.

    Raises:
        UsageError: another run is at work there.
    """
    from filelock import FileLock, Timeout

    path = folder.with_name(f".{folder.name}.lock")
    new = [place for place in path.parents if not place.exists()]
    with told_what_cannot_be_written(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = FileLock(path, timeout=0).acquire()
        except Timeout as error:
            advice = "wait until it is done, or give another --output_path"
            raise UsageError(f"{folder}: another run is at work there; {advice}") from error
    with held:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # still held: whoever waits for it takes a new one
            remove_empty(new)


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
