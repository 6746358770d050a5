"""Settings of a process that computes on a CPU: how it treats tiny numbers and freed memory."""

import ctypes
import os
import sys

import torch

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1

# Blocks from this size on glibc maps by themselves, and gives back as soon as they are freed. No
# version before 2.35 takes more than the second.
_MAPPED_FROM = (1 << 30, 32 << 20)

# Somebody has thought about the allocator already.
_CHOSEN = tuple(f"MALLOC_{what}_" for what in ("MMAP_THRESHOLD", "MMAP_MAX", "TRIM_THRESHOLD"))


def prepare_process() -> None:
    """Set this process up to compute on a CPU; to be called before any other work.

    Denormal numbers count as 0: gradients that reach far back are such numbers, on which a CPU is
    ten times slower. Worker threads take this setting over when they are made.

    Freed memory stays with the process. Pass after pass allocates the same tensors, several
    hundred MiB of them. By default glibc gives that memory back to the system as soon as the pass
    has freed it, and the system finds, clears and maps all pages anew for the next pass. Other C
    libraries are left as they are, and so are limits that the user has set by environment
    variables (`MALLOC_TRIM_THRESHOLD_` and its kind, `GLIBC_TUNABLES=glibc.malloc…`).
    """
    torch.set_flush_denormal(True)
    chosen = any(name in os.environ for name in _CHOSEN)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
    for size in _MAPPED_FROM:
        if mallopt(_M_MMAP_THRESHOLD, size):
            break
