"""Settings of a process that computes on a CPU: how it treats tiny numbers and freed memory."""

import ctypes
import os
import sys

import torch

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

LARGEST_HEAP_BLOCK = 32 << 20
"""Bytes: the most that glibc lets a block of its heap have."""


def prepare_process() -> None:
    """Set the process up to compute on a CPU; before any other work. Every script does this first.

    Denormal numbers count as 0: gradients that reach far back are such numbers, on which a CPU is
    ten times slower. Worker threads take this setting over when they are made.

    Freed memory stays with the process. A pass allocates the same tensors again and again; by
    default glibc gives large ones back to the system when they are freed, and the system then
    finds, clears and maps every page of the next pass anew: a twelfth of a PPO iteration. Other
    C libraries are left as they are, and so is an allocator that the user has set by environment
    variables (`MALLOC_…`, `GLIBC_TUNABLES`).
    """
    torch.set_flush_denormal(True)
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
