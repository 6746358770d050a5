"""Rows of one local file, each with a name for error messages; its ending says how to read it."""

import csv
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_gym.data.compressed import COMPRESSED
from rlhf_gym.errors import InputError

TABLES = {".csv": ",", ".tsv": "\t"}
BINARY = (".parquet", ".arrow")
ENDINGS = (".json", ".jsonl", ".ndjson", *TABLES, ".txt", *BINARY)
TEXT_COLUMNS = {"prompt", "text", "messages", "question", "instruction", "response", "chosen"}
"""Columns by which the header of a table is known in a file that claims to be plain text."""


def read_rows(path: str | Path, *, skipped: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Rows of a local file, each with a name for error messages ("FILE, row 3").

    By the file's ending, in any case: ``.json`` one list; ``.jsonl`` and ``.ndjson`` one JSON value
    per line; ``.csv`` and ``.tsv`` a header and one object per row; ``.txt`` one text per line;
    ``.parquet`` and ``.arrow`` by the `datasets` library. The first six may be compressed:
    ``.gz``, ``.bz2``, ``.xz``, ``.zst``. A byte-order mark and Windows' line ends are no part of a
    text.

    Args:
        path: The file.
        skipped: If given, lines that cannot be read are left out and their problems appended here.

    Raises:
        InputError: The file is missing, has another ending, is not UTF-8, or a row is broken.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    kind = ending(path)
    if kind == ".json":
        yield from _json_list(path)
    elif kind in TABLES:
        yield from _table(path, TABLES[kind], skipped)
    elif kind in BINARY:
        yield from _library_rows(path, kind)
    else:
        yield from _line_rows(path, kind != ".txt", skipped)


def ending(path: Path) -> str:
    """The ending that says how a file is read, in lower case and without the compression's.

    Raises:
        InputError: It is none of those that are known.
    """
    endings = [suffix.lower() for suffix in path.suffixes]
    packed = bool(endings) and endings[-1] in COMPRESSED
    kind = "".join(endings[-2:-1] if packed else endings[-1:])
    if kind not in ENDINGS or (packed and kind in BINARY):
        raise InputError(
            f"{path}: files end in {', '.join(ENDINGS)}, the first six also with "
            f"{', '.join(COMPRESSED)}; rename or convert it"
        )
    return kind


def _line_rows(path: Path, is_json: bool, skipped: list[str] | None) -> Iterator[tuple[str, Any]]:
    for i, line in enumerate(_lines(path, skipped), 1):
        where = f"{path}, line {i}"
        try:
            text = line.decode("utf-8-sig" if i == 1 else "utf-8")
            if i == 1 and not is_json:
                _check_plain(path, text)
            if text.strip():
                yield where, json.loads(text) if is_json else text.rstrip("\r\n")
            continue
        except UnicodeDecodeError as error:
            problem = f"{where} is not UTF-8 text ({error}); convert the file first"
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            problem = f"{where}: not valid JSON: {error}"
        if skipped is None:
            raise InputError(problem)
        skipped.append(problem)


def _check_plain(path: Path, first: str) -> None:
    """Check that a text file is not data of another form, whose markup would be learned.

    Raises:
        InputError: Its first line is JSON, or the header of a table.
    """
    line = first.strip()
    if line[:1] in ("{", "["):
        try:
            json.loads(line)
        except ValueError:
            if line not in ("{", "["):
                return
        raise InputError(f"{path} holds JSON, not texts; rename it to .jsonl or .json")
    for mark, kind in ((",", ".csv"), ("\t", ".tsv")):
        names = [name.strip(' "') for name in line.split(mark)]
        if len(names) > 1 and TEXT_COLUMNS & set(names) and all(n.isidentifier() for n in names):
            raise InputError(f"{path} holds a table with a header, not texts; rename it to {kind}")


def _table(
    path: Path, delimiter: str, skipped: list[str] | None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a table with a header, as objects of texts."""
    csv.field_size_limit(1 << 30)

    def texts() -> Iterator[str]:
        for i, line in enumerate(_lines(path, skipped), 1):
            try:
                yield line.decode("utf-8-sig" if i == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}, line {i} is not UTF-8 text ({error}); convert the file first"
                ) from error

    reader = csv.DictReader(texts(), delimiter=delimiter, strict=True)
    for i in itertools.count(1):
        where = f"{path}, row {i}"
        try:
            names = reader.fieldnames or []
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{where}: not valid CSV: {error}") from error
        if len({*names}) < len(names):
            raise InputError(f"{path}: the header {names} names a column twice; rename one of them")
        if None in row or None in row.values():
            problem = f"{where} has not as many fields as the header {names}"
            if skipped is None:
                raise InputError(problem)
            skipped.append(problem)
            continue
        yield where, row


def _library_rows(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    from datasets import Dataset

    try:
        data = (
            Dataset.from_parquet(str(path)) if kind == ".parquet" else Dataset.from_file(str(path))
        )
    except Exception as error:  # pyarrow's own types
        raise InputError(f"{path} cannot be read: {error}") from error
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(data, 1))


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    data = b"".join(_lines(path, None))
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    except (ValueError, RecursionError) as error:
        hint = "; if each line is a JSON value, rename it to .jsonl" if b"\n{" in data else ""
        raise InputError(f"{path}: not valid JSON: {error}{hint}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} contains a JSON {type(rows).__name__}; a list is needed")
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, 1))


def _lines(path: Path, skipped: list[str] | None) -> Iterator[bytes]:
    read = 0
    try:
        with COMPRESSED.get(path.suffix.lower(), open)(path, "rb") as file:
            for line in file:
                read += 1
                yield line
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        problem = f"{path} cannot be read after line {read}: {error}"
        if skipped is None:
            raise InputError(problem) from error
        # What came before a damaged end is kept.
        skipped.append(problem)
