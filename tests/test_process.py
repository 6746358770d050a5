"""What a process is set up with."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from rlhf_gym.process import prepare_process

FAULTS = """
import resource, torch
from rlhf_gym.process import prepare_process
torch.set_num_threads(1)
prepare_process()

def work():
    kept = [torch.ones(1 << 20) for _ in range(20)]  # 80 MiB, all freed at the end

for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**variables: str) -> int:
    """Pages that the system had to map anew."""
    command = [sys.executable, "-c", FAULTS]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    return int(
        subprocess.run(command, env=clean | variables, capture_output=True, check=True).stdout
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_used_again() -> None:
    """In five rounds of 80 MiB no page is mapped anew, unless the user has said otherwise."""
    pages = 5 * 80 * 256
    assert faults() < pages / 100
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > pages / 2


def test_denormals_count_as_zero() -> None:
    tiny = torch.full((8,), 1e-38)
    try:
        assert (tiny * 1e-3).any()
        prepare_process()
        assert not (tiny * 1e-3).any()
    finally:
        torch.set_flush_denormal(False)
