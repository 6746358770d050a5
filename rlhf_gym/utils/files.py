"""Atomic writes of files and folders: after an interruption they are complete or absent."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_gym.errors import InputError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; it is renamed to `folder` at the end if nothing was raised.

    An existing `folder` is replaced only at the end, and restored if anything fails.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and old.exists():
        old.rename(folder)  # an earlier process stopped between the two renames below
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        # A rename may reach the disk before the data, so the data is synced first.
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def folder_or_temporary(folder: str | Path | None) -> Iterator[Path]:
    """The folder, made if it is not there; for None a temporary one, removed at the end."""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def check_folder(folder: Path) -> None:
    """Check that a folder is there or can be made.

    Raises:
        InputError: It, or a folder that it would be in, is a file.
    """
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        raise InputError(f"{there} is a file, but a folder is needed; give another name")


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def write_json(file: Path, values: Any) -> None:
    """Write JSON atomically; paths become strings."""
    write_text(file, json.dumps(values, indent=2, default=str, ensure_ascii=False) + "\n")


def read_json(file: Path) -> Any:
    """Read JSON.

    Raises:
        InputError: The file is missing or not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file} is not valid JSON ({error}); delete it to create it again"
        ) from error


def whole_lines(file: Path) -> list[str]:
    """Return the complete lines of a file that is appended to; remove an incomplete last line."""
    if not file.exists():
        return []
    written = file.read_bytes()  # bytes, because the end may be in the middle of a character
    whole = written[: written.rfind(b"\n") + 1].decode("utf-8")
    if not written.endswith(b"\n") and written:
        write_text(file, whole)
    return whole.split("\n")[:-1]  # `splitlines` also cuts at U+2028, which JSON may contain


def last_checkpoint(folder: Path) -> Path | None:
    """Return the last complete checkpoint of a `transformers.Trainer`, or None."""
    # The trainer writes trainer_state.json last.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.split("-")[-1]), default=None)


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU; safetensors refuses tied weights, which share memory."""
    return {name: tensor.detach().clone().contiguous().cpu() for name, tensor in tensors.items()}


def hash_files(path: Path) -> str:
    """Return the SHA-256 of a file, or of the weights (safetensors) in a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
