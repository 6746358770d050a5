"""A stopped run goes on with the data that it began with, or not at all."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_gym.errors import InputError
from rlhf_gym.utils.files import read_json, write_json

FILE = "data.json"


def digest(rows: Iterable[Any]) -> str:
    """A hash of rows of token ids, or of other values of JSON, in their order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row).encode() + b"\n")
    return found.hexdigest()[:16]


def check_same_data(run_dir: Path, *, goes_on: bool, **digests: str) -> None:
    """Record what a run's data are, or check that they are those of the run that goes on.

    Options name files; the files themselves may have changed since.

    Args:
        run_dir: The run folder.
        goes_on: Whether there is a checkpoint from which the run goes on.
        **digests: The hash of each kind of data.

    Raises:
        InputError: The run goes on, and some of its data are others.
    """
    file = run_dir / FILE
    before = read_json(file) if goes_on and file.exists() else {}
    changed = [name for name, value in digests.items() if before.get(name, value) != value]
    if changed:
        raise InputError(
            f"{run_dir} has a stopped run, and its {' and '.join(changed)} have changed since; "
            "restore them, or give another --run-dir"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(file, {**before, **digests})
