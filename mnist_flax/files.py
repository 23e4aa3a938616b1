"""Writing a file as a whole, and what outlasts a power cut."""

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from mnist_flax.errors import UserError


def local(path: str | os.PathLike) -> Path:
    """The path, with a home folder's ~ expanded.

    Raises:
        UserError: it is a URL, of which `Path` would make a folder here.
    """
    if "://" in (text := os.fspath(path)):
        raise UserError(
            f"{text} is a URL: name a folder of this machine, or mount it and name that"
        )
    # Unlike `Path.expanduser`, it leaves the ~ of an unknown user.
    return Path(os.path.expanduser(text))


def replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Has `write` write a file, of which a reader sees what was there before or all of the new.

    Raises:
        OSError: it cannot be written; what was there before remains.
    """
    # A name of its own, as another process may be writing the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remedy(reason: str) -> str:
    """What to do where something could not be written, by the system's reason."""
    return "make room there" if is_full(reason) else "see to that"


def is_full(reason: str) -> bool:
    """Whether the reason for which something could not be written is a full disk."""
    # Of errors of other libraries there is a text alone.
    full = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "RESOURCE_EXHAUSTED")
    return any(text in reason for text in full)


def exists(path: Path) -> bool:
    """`path.exists()`, which from Python 3.14 on also says no where the system cannot tell.

    Raises:
        OSError: the system cannot tell.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def sync(folder: Path) -> None:
    """Has the system write to the disk what it still holds of a folder and all that is in it.

    Raises:
        OSError: it cannot be written.
    """

    def refuse(error: OSError) -> None:
        # `walk` would go on, and `rglob` does from Python 3.13 on.
        raise error

    for path, _, names in os.walk(folder, onerror=refuse):
        sync_names(Path(path))
        for name in names:
            sync_one(Path(path, name))


def sync_one(path: Path) -> None:
    """`sync` of a file, or of the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(folder: Path) -> None:
    """`sync` of the names in a folder, if it may be read and its file system can do that."""
    try:
        sync_one(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP):
            raise


def replace_text(path: Path, text: str) -> None:
    """`replace` by a text, in UTF-8."""
    replace(path, lambda file: file.write(text.encode()))
