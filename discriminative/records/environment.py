"""Where and when something was made: date, command line, commit, device, versions. A paper needs them."""

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from discriminative import VERSION

PACKAGES = ("torch", "diffusers", "transformers", "timm")
ROOT = Path(__file__).parents[2]


def timestamp() -> str:
    """Now, in UTC, as ISO 8601: "2026-11-25T14:03:07+00:00"."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment(device: torch.device) -> dict[str, Any]:
    """What a record says of the machine, the program and the moment."""
    return {
        "date": timestamp(),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """The card's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def versions() -> dict[str, str | None]:
    """Of this program, of Python and of the libraries that decide a result; None: not installed."""
    found = {"discriminative": VERSION, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


@cache
def commit() -> str | None:
    """The commit of this program, with "-dirty" where files were changed since; None without git."""
    if not (ROOT / ".git").exists():  # a repository around an installed copy is another one
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
