"""Memory of this process that is resident, as Linux counts it."""

from __future__ import annotations

import resource
from pathlib import Path


def resident_bytes() -> int:
    """Now; 0 where there is no /proc."""
    return _status_bytes("VmRSS")


def resident_peak() -> int:
    """The most bytes since `reset_resident_peak`, or since the process began."""
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_resident_peak() -> None:
    """Where the kernel allows it; otherwise the peak is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _status_bytes(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else 0
