"""Process settings for CPU work: denormal numbers and freed memory."""

import ctypes
import os
import sys

import torch

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1

# glibc maps each block of at least this size separately, and returns it to the system as soon as it
# is freed. Versions before 2.35 reject a threshold above the second value.
_MAPPED_FROM = (1 << 30, 32 << 20)

# If one of these is set, the user has configured the allocator already.
_CHOSEN = tuple(f"MALLOC_{what}_" for what in ("MMAP_THRESHOLD", "MMAP_MAX", "TRIM_THRESHOLD"))


def prepare_process() -> None:
    """Prepare this process to compute on a CPU. Call it before any other work.

    Denormal numbers become 0. Gradients that reach far back are often denormal, and a CPU computes
    with such numbers ten times more slowly. Worker threads inherit this setting when they start,
    which is why the call must come first.

    The process keeps freed memory. Every pass allocates the same tensors, several hundred MiB of
    them. By default glibc returns that memory to the system as soon as it is freed, and the system
    must find, clear and map all its pages again for the next pass. Other C libraries are not
    changed. Limits that the user has set by environment variables (`MALLOC_TRIM_THRESHOLD_` and the
    like, `GLIBC_TUNABLES=glibc.malloc…`) are respected.
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
