"""Description of the machine that ran a benchmark, and a runner for scripts of other systems."""

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import rlhf_gym  # noqa: F401 (registers the environments)
from rlhf_gym.errors import InputError


def run_beside(python: Path, script: str, folder: Path) -> dict[str, Any]:
    """Run a script of this folder with another Python; return the JSON of its last output line.

    Args:
        python: The interpreter.
        script: File name of the script, which is in the same folder as this module.
        folder: Folder that the script gets as its argument.

    Raises:
        InputError: The script failed, or its last line is not JSON.
    """
    file = Path(__file__).with_name(script)
    done = subprocess.run([str(python), str(file), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{script} failed in {python}:\n{done.stderr[-2000:]}")
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise InputError(
            f"the last line that {script} printed in {python} is not JSON; it printed:\n"
            f"{done.stdout[-1000:]}{done.stderr[-1000:]}"
        ) from error
    return found


def measured_on(where: str) -> dict[str, Any]:
    """Return what a speed depends on in addition to the versions: machine and commit.

    Args:
        where: The device of the benchmark.
    """
    name = platform.processor() or platform.machine()
    known = Path("/proc/cpuinfo")
    if known.exists():
        names = [x for x in known.read_text().splitlines() if x.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # git is missing, or this is not a repository
        commit = None
    return {
        "processor": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if where.startswith("cuda") else None,
        "commit": commit,
    }
