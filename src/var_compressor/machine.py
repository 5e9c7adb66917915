"""What figures were measured on and with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from var_compressor import __version__


def machine_of(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on and with."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": str(device),
        "name": name,
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "version": __version__,
        "commit": commit(),
    }


def device_kind(device: torch.device) -> str:
    """The kind of device, which decides how sums are rounded: a bit may turn over by it."""
    if device.type == "cpu":
        return f"cpu, threads: {torch.get_num_threads()}"
    return torch.cuda.get_device_name(device)


def commit() -> str | None:
    """Of the checkout that this program runs from, "+" behind it when files differ; or None."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        found = _output(*git, "rev-parse", "--short", "HEAD")
        changed = _output(*git, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found}+" if changed else found


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
