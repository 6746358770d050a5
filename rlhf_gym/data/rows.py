"""Rows of local files, folders and datasets, each with a name for error messages."""

import glob
from pathlib import Path
from typing import Any

from rlhf_gym.data.row_files import ending, read_rows
from rlhf_gym.errors import InputError, UnreachableError

HUB = "hf://datasets/"


def load_rows(
    source: str,
    *,
    split: str = "train",
    revision: str | None = None,
    skipped: list[str] | None = None,
) -> list[tuple[str, Any]]:
    """Rows of local files or of a dataset, each with a name for error messages.

    Args:
        source: A file (see `read_rows`), a pattern of files, a folder as the `datasets` library
            reads it (its files, by split, or what `Dataset.save_to_disk` wrote), or a dataset's
            name.
        split: Split of a dataset.
        revision: Commit or tag of a hub dataset.
        skipped: As in `read_rows`.

    Raises:
        InputError: The source is missing or empty, or a file cannot be read.
    """
    files = None if source.startswith(HUB) else local_files(source)
    if files is None:
        rows = _dataset_rows(source, split, revision)
    elif not files:
        rows = _saved_rows(Path(source), split)
    else:
        rows = [row for file in files for row in read_rows(file, skipped=skipped)]
    if not rows:
        raise InputError(f"{source} has no rows; at least one is needed")
    return rows


def local_files(source: str) -> list[Path] | None:
    """The files that a source names; none for what `Dataset.save_to_disk` wrote.

    Returns:
        None if the `datasets` library has to find them: a folder, or a name.

    Raises:
        InputError: There is no such file, or a pattern matches nothing.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if any(mark in source for mark in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        if not found:
            raise InputError(f"no file matches {source}")
        return found
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return []
    # The `datasets` library reads other folders: it knows which of their files are which split.
    if not path.is_dir() and _is_known(path):
        raise InputError(f"no such file: {source}")
    return None


def _is_known(path: Path) -> bool:
    try:
        return bool(ending(path))
    except InputError:
        return False


def _saved_rows(folder: Path, split: str) -> list[tuple[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(folder))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise InputError(f"{folder} has the splits {', '.join(data)}, not {split!r}")
        data = data[split]
    return [(f"{folder}, row {i}", row) for i, row in enumerate(data, 1)]


def _dataset_rows(name: str, split: str, revision: str | None) -> list[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        if name.startswith(HUB):
            data = load_dataset("json", data_files=_pinned(name, revision), split="train")
        else:
            data = load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the library raises a dozen types; all mean the same to a user
        raise UnreachableError(
            f"cannot load the dataset {name!r} (split {split!r}): {error}\n"
            "Give an existing file, or a dataset that this machine can reach."
        ) from error
    return [(f"{name}, row {i}", row) for i, row in enumerate(data, 1)]


def _pinned(file: str, revision: str | None) -> str:
    """Name of a hub dataset's file at a revision: hf://datasets/OWNER/NAME@REVISION/FILE."""
    parts = file.removeprefix(HUB).split("/", 2)
    if len(parts) < 3:
        raise InputError(f"{file!r} names no file; a file on the hub is {HUB}OWNER/NAME/FILE")
    owner, name, rest = parts
    return f"{HUB}{owner}/{name}{f'@{revision}' if revision else ''}/{rest}"
