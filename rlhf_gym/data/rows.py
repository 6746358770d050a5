"""Rows of local files, folders and datasets, each with a name for error messages."""

import glob
from pathlib import Path
from typing import Any

from rlhf_gym.data.row_files import TABLES, ending, read_rows
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
    files = _tables(Path(source).expanduser(), split) if files is None else files
    if files is None:
        rows = _dataset_rows(source, split, revision)
    elif not files:
        rows = _saved_rows(Path(source), split)
    else:
        rows = [row for file in files for row in read_rows(file, skipped=skipped)]
    if not rows:
        raise InputError(f"{source} has no rows; at least one is needed")
    return rows


def check_split(source: str, split: str) -> None:
    """Refuse a split of a file, which has none: reading all of it would be no split.

    Raises:
        InputError: The source is a file or a pattern of files, and the split is not "train".
    """
    if split != "train" and (source.startswith(HUB) or local_files(source)):
        raise InputError(
            f"{source} is a file, which has no split {split!r}; leave the split out, or name the "
            "file of that split"
        )


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


def _tables(folder: Path, split: str) -> list[Path] | None:
    """The CSV or TSV files of a split of a folder; None if it has other data.

    The `datasets` library finds them, but does not read them: it would turn the text 007 into the
    number 7, and the text NA into nothing.
    """
    if not folder.is_dir():
        return None
    from datasets import load_dataset_builder

    try:
        found = load_dataset_builder(str(folder)).config.data_files or {}
    except Exception:  # a dozen types; loading the folder raises the same, with a message
        return None
    files = [Path(str(name)) for name in found.get(split, ())]
    are_tables = all(_is_known(file) and ending(file) in TABLES for file in files)
    return files if files and are_tables else None


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
