"""Compressed files: each ending with the function that opens it for reading bytes."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_gym.errors import InputError


def open_zst(path: Path, mode: str = "rb") -> BinaryIO:
    """Open a Zstandard file for reading bytes, with pyarrow, which the `datasets` library needs.

    Args:
        path: The file.
        mode: Always "rb".

    Raises:
        InputError: This build of pyarrow has no Zstandard.
    """
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise InputError(
            f"{path}: this pyarrow was built without Zstandard; install the package pyarrow from "
            "PyPI or conda-forge, or decompress the file"
        )
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zst,
}
