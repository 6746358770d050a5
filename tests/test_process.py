"""What a process is set up with, looked at in processes of their own."""

import json
import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, json, resource, torch
from rlhf_gym.utils.process import prepare_process
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size
torch.set_num_threads(1)
prepare_process()

def work():
    kept = [torch.ones(n << 18) for n in [4] * 20 + [40] * 2]  # 160 MiB, all freed at the end

for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([faults, 5 * (160 << 20) // resource.getpagesize()]))
"""

DENORMALS = """
import torch
from rlhf_gym.utils.process import prepare_process
tiny = torch.full((8,), 1e-38)
before = bool((tiny * 1e-3).any())
prepare_process()
print([before, bool((tiny * 1e-3).any())])
"""


def say(code: str, **variables: str) -> str:
    ours = ("MALLOC_", "GLIBC_", "LD_PRELOAD")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean | variables, capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
@pytest.mark.parametrize(
    ("variables", "kept"),
    [
        ({}, True),
        ({"MALLOC_ARENA_MAX": "2"}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, False),
    ],
    ids=["plain", "another variable", "limit", "tunable"],
)
def test_freed_memory_is_used_again(variables, kept):
    """Five rounds of 160 MiB map no page again, unless the user has set limits."""
    faults, pages = json.loads(say(FAULTS, **variables))
    if kept:
        assert faults < pages / 100
    else:
        assert faults > pages / 2


def test_denormals_count_as_zero():
    assert say(DENORMALS) == "[True, False]"
