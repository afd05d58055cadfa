"""The most memory that this process held while something ran: on the GPU where it uses one, else resident.

The models that a process already had loaded are part of it, whether they are used or not.
"""

from __future__ import annotations

import sys
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def begin_peak() -> bool:
    """Forget earlier peaks. Returns whether the system can: without it, `peak_bytes` would say what came before."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5")  # Linux: resets VmHWM
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """Bytes at the most since `begin_peak`, summed over GPUs; None where the system doesn't say."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
