"""Where results go, tried before any work: files that can be written, folders that one process owns
at a time, and files that are asked for and have to be there."""
from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import stat
import weakref
from pathlib import Path
from typing import Callable

from lib.cli import InputError, require, running
from lib.files import check_tensors, new_file, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NO_FILES = (stat.S_IFDIR, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFBLK)


# ------------------------------------------------------------------ folders
class Owned:
    """A folder that no other process can own, until this object goes or the process ends, however
    it ends. Of folders that were made for it those go too in which nothing was written."""

    def __init__(self, lock: int, made: list[Path]):
        weakref.finalize(self, _release, lock, made)


# A lock is the process's: who asks for a folder again in the same process is given the same one.
_owned: weakref.WeakValueDictionary[tuple[int, int], Owned] = weakref.WeakValueDictionary()


def own(folder: str | Path) -> Owned:
    """Make a folder where there is none, see that it can be written to, and own it; what processes
    killed earlier had begun to write there is removed. Raises `InputError`."""
    path = _path(folder)
    made = [p for p in (path, *path.parents) if not os.path.lexists(p)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        found = path.stat()
        if owner := _owned.get((found.st_dev, found.st_ino)):
            return owner
        owner = _owned[found.st_dev, found.st_ino] = Owned(lock(path), made)
        remove_leftovers(path)
        _try_to_write(path)
        for file in path.iterdir():
            if file.suffix in (".safetensors", ".json", ".jsonl", ".txt"):
                kind = _kind(file)  # None is a link to nothing, and what it names would be made
                require(kind is not None and kind not in NO_FILES, f"cannot write to {path}: "
                        f"{file.name} is there, and no file: move it away")
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"cannot write to the folder {folder}: {error.strerror or error}"
                         ) from error
    return owner


def lock(folder: str | Path) -> int:
    """A descriptor that owns a folder, or a file, as long as it is open: the system closes those of
    a process that is killed, so no lock is ever left behind. Raises `InputError` where another has
    it."""
    taken = f"another process writes to {folder}: wait for it, or pass another"
    if fcntl is None:  # Windows has no lock of folders, but files that go with their descriptor
        if not hasattr(os, "O_TEMPORARY"):  # neither the one nor the other
            return os.open(os.devnull, os.O_RDONLY)
        try:
            return os.open(Path(folder) / ".lock" if Path(folder).is_dir() else f"{folder}.lock",
                           os.O_CREAT | os.O_EXCL | os.O_TEMPORARY)
        except (FileExistsError, PermissionError) as error:
            raise InputError(taken) from error
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise InputError(taken) from error
    except OSError:  # a file system that knows no locks: better to work there than not at all
        pass
    return lock


def _release(lock: int, made: list[Path]) -> None:
    os.close(lock)
    _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders that are empty, the deepest first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_disk(folder: Path, size: int) -> None:
    """Refuse to begin what needs so many bytes on a disk that has less."""
    free = shutil.disk_usage(folder).free
    require(size <= free, f"a checkpoint takes {size / 1e6:.1f} MB, and the disk of {folder} has "
            f"{free / 1e6:.1f} MB left")


def _kind(path: Path) -> int | None:
    """What stands at a path (S_IFREG, ...), links followed, or None where nothing does. Raises
    `OSError` for a path that cannot be."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        return None


def _try_to_write(folder: Path) -> None:
    """Raise the `OSError` that writing to a folder would."""
    path = new_file(folder)
    try:
        path.write_text(" " * 4096)  # a disk that is full has room for names
    finally:
        path.unlink()


def _path(text: str | Path) -> Path:
    """An absolute path, which stays the same when the working folder changes."""
    require(str(text) != "" and "\0" not in str(text), f"{str(text)!r} is no path")
    require(not re.search("[\ud800-\udfff]", str(text)), f"{str(text)!r} is no path in UTF-8, "
            "which is all that safetensors can open")
    return Path(text).absolute()


# ------------------------------------------------------------------ types of options
class Folder(str):
    """The path of a folder on the command line that is owned as long as this text is there."""

    owner: Owned | None = None


def output_folder(text: str) -> Folder:
    """The type of a folder on the command line that the command writes to."""
    folder = Folder(text)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first writes
        folder.owner = tried(own, text)
    return folder


def output_file(text: str) -> str:
    """The type of a file on the command line that the command writes: it can be, as far as can be
    seen without writing it."""
    tried(_try_file, text)
    return text


def input_file(text: str) -> str:
    """The type of a file on the command line that the command reads."""
    tried(_try_to_read, text)
    return text


def input_stream(text: str) -> str:
    """The type of a file on the command line that is read once: a pipe or a terminal will do, and
    "-" is what is typed or piped in."""
    text = "/dev/stdin" if text == "-" else text
    tried(_try_to_stream, text)
    return text


def tensors_file(text: str) -> str:
    """The type of a safetensors file on the command line that the command reads."""
    tried(check_tensors, input_file(text))
    return text


def tried(check: Callable, text: str):
    """check(text) where a command runs, its error as argparse wants it."""
    try:
        return check(text) if running.get() else None
    except (InputError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _try_file(text: str) -> None:
    path = _path(text)
    made = [p for p in path.parents if not os.path.lexists(p)]
    try:
        require(_kind(path) in (None, stat.S_IFREG) and not text.endswith(("/", os.sep)),
                f"cannot write {text}: that is no file")
        path.parent.mkdir(parents=True, exist_ok=True)
        _try_to_write(path.parent)
        if os.path.lexists(path):
            _try_to_replace(path)
    except OSError as error:
        raise InputError(f"cannot write {text}: {error.strerror or error}") from error
    finally:
        _remove_empty(made)


def _try_to_replace(path: Path) -> None:
    """Raise an `OSError` where another file could not take the place of this one: nobody may write
    it, it is another user's in a folder where that counts, or something is mounted on it."""
    if path.is_file():
        open(path, "rb+").close()
    folder, owner = path.parent.stat(), path.lstat().st_uid
    if folder.st_mode & stat.S_ISVTX and os.name == "posix" \
            and os.geteuid() not in (0, owner, folder.st_uid):
        raise PermissionError("it is another user's, in a folder where nobody else may replace it")
    with contextlib.suppress(FileNotFoundError):  # Linux
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            if str(path) in {line.split()[4] for line in mounts}:
                raise OSError("something is mounted there: mount its folder")


def _try_to_stream(text: str) -> None:
    kind = _kind(_path(text))
    if kind == stat.S_IFCHR:  # /dev/zero has no end
        with open(text, "rb") as file:
            require(file.isatty(), f"cannot read {text}: that is no file")
    elif kind != stat.S_IFIFO:
        _try_to_read(text)


def _try_to_read(text: str) -> None:
    path = _path(text)
    try:
        require(_kind(path) in (None, stat.S_IFREG), f"cannot read {text}: that is no file")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise InputError(f"cannot read {text}: {error.strerror or error}") from error
