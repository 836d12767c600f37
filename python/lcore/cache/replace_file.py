"""A file that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import IO


def replace_file(function: str, path: str, size: int, write: Callable[[IO[bytes]], None]) -> None:
    """Makes `write` write a file of `size` bytes that then takes the place of path, with the same permissions.

    Raises: OSError, and whatever `write` raises: path is as it was. Two calls must not work on one path at once.
    """
    # One name for all writers: what one that was killed has left is gone with the next.
    part = path + ".part"
    with suppress(FileNotFoundError):
        os.unlink(part)
    try:
        with open(part, "xb") as file:
            if os.path.exists(path):
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(path).st_mode))
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(os.path.dirname(path)).free
            text = f"{error.strerror}: lcore.{function} needs {size:,} bytes, {free:,} are free"
            raise OSError(error.errno, text, path) from error
        raise
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
