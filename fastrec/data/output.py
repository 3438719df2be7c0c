# SPDX-License-Identifier: Apache-2.0
"""An output, a file or a folder: claimed by one process, complete or not there, replaced in one
step."""

import ctypes
import fcntl
import json
import math
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Only one process is inside for an output; the lock ends with its process.

    What a killed one left beside the output is taken away, or back where it was replacing it.
    Raises FileExistsError that names the other process.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = output.with_name(f".{output.name}.lock")
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that ended just now has removed the file: then a third may hold another.
            mine = os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise FileExistsError(f"{output} is being written by {owner}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            tidy(output)
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def locked_file(output: Path, overwrite: bool) -> Iterator[None]:
    """`locked` for a file that must not be there yet. Raises FileExistsError where it is, but for
    `overwrite`."""
    if output.is_dir():
        raise FileExistsError(f"{output} is a folder")
    with locked(output):
        check_absent(output, overwrite)
        yield


def check_absent(output: Path, overwrite: bool) -> None:
    """Raise FileExistsError for a file that must not be replaced."""
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} is there already; --overwrite true replaces it")


@contextmanager
def new_file(output: Path) -> Iterator[Path]:
    """The name under which the file `output` is written beside it, with the same ending. When that
    is done it is `output`, on disk; otherwise it goes. Raises OSError that names `output`, whatever
    the library that writes says."""
    output = output.resolve()  # through a link, the file is replaced and not the link
    work = _beside(output, "new")
    try:
        yield work
        _sync(work)
        os.replace(work, output)
        _sync(output.parent)
    except BaseException as error:
        work.unlink(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        # torch says that its archive is not finished, and why in the error before.
        why = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{output} cannot be written: {why}") from error


def write_text(output: Path, text: str) -> None:
    """`Path.write_text` as `new_file` does it."""
    with new_file(output) as work:
        work.write_text(text, encoding="utf-8")


def write_json(output: Path, values: dict) -> None:
    """An object as text that people read, as `new_file` writes it. JSON has no word for a number
    that is not finite, such as a mean over nobody: null."""
    write_text(output, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def replaced_folder(output: Path) -> Iterator[Path]:
    """The empty folder in which the folder `output` is built beside it. When that is done it is
    `output`, on disk; otherwise it goes."""
    work = new_folder(output)
    try:
        yield work
        put(work, output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def check_only(folder: Path, is_part: Callable[[str], bool]) -> None:
    """Raise FileExistsError for a file or folder in `folder` that is no part of what is written
    there: with the folder it would be replaced."""
    for file in sorted(folder.iterdir()):
        if not is_part(file.name):
            raise FileExistsError(f"{folder} will not be replaced: {file.name!r} would be lost")


def new_folder(output: Path) -> Path:
    """The empty folder beside `output` in which it is built, for `put`."""
    work = _beside(output, "new")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


@contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output`, on the same disk, for what is too large for memory."""
    folder = _beside(output, "scratch")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put(work: Path, output: Path) -> None:
    """Make the finished folder `work` be `output`, on disk; one that is there goes."""
    output = output.resolve()  # through a link, the folder is replaced and not the link
    for file in work.iterdir():
        _sync(file)
    _sync(work)
    if not output.exists():
        os.rename(work, output)
    elif _exchange(work, output):
        shutil.rmtree(work, ignore_errors=True)
    else:
        old = _beside(output, "old")
        os.rename(output, old)
        try:
            os.rename(work, output)
        except BaseException:
            os.rename(old, output)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync(output.parent)


def remove_folder(folder: Path) -> None:
    """Take a folder away in one step."""
    gone = new_folder(folder)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def tidy(output: Path) -> None:
    """Take away what a killed process left beside `output`, or back where it was replacing it."""
    old = _beside(output, "old")
    if old.exists() and not output.exists():
        os.rename(old, output)
    for kind in ("new", "old", "scratch"):
        left = _beside(output, kind)
        if left.is_file():
            left.unlink()
        shutil.rmtree(left, ignore_errors=True)


def _beside(output: Path, kind: str) -> Path:
    output = output.resolve()
    return output.with_name(f".{kind}.{output.name}")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_table(frame, path: Path | str, overwrite: bool = False) -> None:
    """Write a frame as .csv or .parquet, by the ending; the file is complete or not there.

    Raises ValueError for another ending, FileExistsError for a file that is there, but for
    `overwrite`.
    """
    write_parts([frame], path, overwrite)


def write_parts(frames: Iterable, path: Path | str, overwrite: bool = False) -> None:
    """`write_table` of at least one frame, one below the other. One is in memory at a time: row
    groups of a Parquet file. An error of `frames` is raised as it is."""
    path = Path(path)
    check_table_path(path)
    check_absent(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    failed: list[Exception] = []
    try:
        with new_file(path) as work:
            _written(_watched(frames, failed), work)
    except OSError:
        if failed:
            raise failed[0] from None
        raise


def _watched(frames: Iterable, failed: list[Exception]) -> Iterator:
    try:
        yield from frames
    except Exception as error:
        failed.append(error)
        raise


def _written(frames: Iterator, work: Path) -> None:
    first = next(frames)
    if work.suffix == ".csv":
        with work.open("wb") as file:
            first.write_csv(file)
            for frame in frames:
                frame.write_csv(file, include_header=False)
        return
    from pyarrow.parquet import ParquetWriter

    table = first.to_arrow()
    with ParquetWriter(work, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        for frame in frames:
            writer.write_table(frame.to_arrow())


def check_table_path(path: Path) -> None:
    """Raise ValueError for a file that `write_table` cannot write."""
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"{path}: expected a name that ends in .csv or .parquet")
