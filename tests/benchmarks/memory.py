"""Memory as the system, or the GPU, counts it.

Not ``getrusage``: its peak is inherited from the process that started this one.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def _status(name: str) -> int | None:
    if not STATUS.is_file():
        return None
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def resident_bytes() -> int:
    """What this process holds now."""
    found = _status("VmRSS")
    return process_peak_bytes() if found is None else found


def process_peak_bytes() -> int:
    """The most that this process ever held."""
    found = _status("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
