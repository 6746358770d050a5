"""What a figure of speed is measured on, and programs run in turn."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import rlhf_gym  # noqa: F401 (registers the environments)
from rlhf_gym.errors import InputError


def run_beside(python: Path, script: str, folder: Path) -> dict[str, Any]:
    """Run a script beside this one on a folder, by some Python; the JSON that it prints last.

    Raises:
        InputError: It failed there.
    """
    file = Path(__file__).with_name(script)
    done = subprocess.run([str(python), str(file), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{script} failed in {python}:\n{done.stderr[-2000:]}")
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise InputError(
            f"{script} did not end with a line of JSON in {python}; it printed:\n"
            f"{done.stdout[-1000:]}{done.stderr[-1000:]}"
        ) from error
    return found


def measured_on(where: str) -> dict[str, Any]:
    """What a figure of speed depends on beside the versions: the machine and the commit.

    Args:
        where: The device.
    """
    name = platform.processor() or platform.machine()
    known = Path("/proc/cpuinfo")
    if known.exists():
        names = [x for x in known.read_text().splitlines() if x.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = None
    return {
        "processor": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if where.startswith("cuda") else None,
        "commit": commit,
    }
