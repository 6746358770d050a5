"""Rows of a local file or of a dataset, each with a name for error messages."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_gym.errors import InputError, UnreachableError

HUB = "hf://datasets/"


def read_rows(path: str | Path, *, skipped: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Rows of a local file, each with a name for error messages ("FILE, row 3").

    ``.json`` contains one list; ``.jsonl`` one JSON value per line; ``.jsonl.gz`` the same,
    compressed; any other file one text per line.

    Args:
        path: The file.
        skipped: If given, lines that cannot be read are left out and their problems appended here.

    Raises:
        InputError: The file is missing, is not UTF-8, or a line is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    if path.suffix == ".json":
        yield from _json_list(path)
        return
    is_json = path.name.endswith((".jsonl", ".jsonl.gz"))
    for i, line in enumerate(_lines(path, skipped), 1):
        where = f"{path}, line {i}"
        try:
            text = line.decode("utf-8")
            if text.strip():
                yield where, json.loads(text) if is_json else text.rstrip("\r\n")
            continue
        except UnicodeDecodeError as error:
            problem = f"{where} is not UTF-8 text ({error}); convert the file first"
        except (ValueError, RecursionError) as error:
            problem = f"{where}: not valid JSON: {error}"
        if skipped is None:
            raise InputError(problem)
        skipped.append(problem)


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} contains a JSON {type(rows).__name__}; a list is needed")
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, 1))


def _lines(path: Path, skipped: list[str] | None) -> Iterator[bytes]:
    read = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                read += 1
                yield line
    except (EOFError, OSError, zlib.error) as error:
        problem = f"{path} cannot be read after line {read}: {error}"
        if skipped is None:
            raise InputError(problem) from error
        # What came before a damaged end is kept.
        skipped.append(problem)


def load_rows(
    source: str,
    *,
    split: str = "train",
    revision: str | None = None,
    skipped: list[str] | None = None,
) -> list[tuple[str, Any]]:
    """Rows of a local file or of a dataset, each with a name for error messages.

    Raises:
        InputError: The source is missing or empty.
    """
    suffixes = {".json", ".jsonl", ".gz", ".txt"}
    if not source.startswith(HUB) and (Path(source).suffix in suffixes or Path(source).is_file()):
        rows = list(read_rows(source, skipped=skipped))
    else:
        rows = _dataset_rows(source, split, revision)
    if not rows:
        raise InputError(f"{source} has no rows; at least one is needed")
    return rows


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
