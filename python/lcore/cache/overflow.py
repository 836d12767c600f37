"""The file in which a pool keeps its pages when not all of them are to be in memory."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from lcore.errors import message, require, require_type

# What `PagedCache(overflow=...)` takes: a folder, or True for the system's.
Folder: TypeAlias = str | os.PathLike[str] | bool | None


class Overflow:
    """A file without a name in a folder, mapped: a pool's tensor is its memory, of which a part is resident.

    It is gone with the last who refers to it or to a tensor of it, also after a kill. What moves its pages is
    `csrc/runtime/page_file`.
    """

    def __init__(self, function: str, folder: str, page_bytes: int) -> None:
        if sys.platform != "linux":
            raise NotImplementedError(
                f"lcore.{function}: overflow needs Linux, for what it asks of the system's memory; use a smaller "
                "kv_format, or a policy"
            )
        from lcore._runtime import PageFile

        self.folder = folder
        try:
            with tempfile.TemporaryFile(dir=folder, prefix="lcore-") as file:
                self._file = PageFile(file.fileno(), page_bytes)
        except OSError as error:
            text = f"{error.strerror}: lcore.{function}: overflow must be a folder to write to"
            raise OSError(error.errno, text, folder) from error
        rule = "be a folder on a disk, such as /var/tmp"
        require(not self._file.in_memory, function, "overflow", rule, f"{folder}, which is in memory")

    @staticmethod
    def of(function: str, folder: str | None, page_bytes: int) -> Overflow | None:
        """One in this folder; None without a folder."""
        return None if folder is None else Overflow(function, folder, page_bytes)

    @property
    def resident_bytes(self) -> int:
        """Of the pages that are in memory."""
        return self._file.resident_bytes

    @property
    def file_bytes(self) -> int:
        """That the file takes of the disk."""
        return self._file.file_bytes

    def tensor(self, function: str, pages: int) -> torch.Tensor:
        """(pages, page_bytes): the memory of the first pages. Tensors made before stay valid, with the same bytes."""
        try:
            memory = self._file.map(pages)
        except OSError as error:
            needed = pages * self._file.page_bytes
            text = f"lcore.{function}: the system has no {needed:,} addresses for the file of overflow; raise ulimit -v"
            raise MemoryError(text) from error
        with torch.inference_mode(False):
            return torch.from_numpy(memory)

    def back(self, function: str, ids: NDArray[np.int32]) -> None:
        """Disk space under pages: all of it or OSError, so that writing them cannot fail."""
        try:
            self._file.back(ids)
        except OSError as error:
            free, needed = shutil.disk_usage(self.folder).free, len(ids) * self._file.page_bytes
            text = (
                f"{error.strerror}: lcore.{function} needs up to {needed:,} bytes on the disk of overflow, {free:,} "
                "are free; use another folder, fewer tokens or a smaller kv_format"
            )
            raise OSError(error.errno, text, self.folder) from error

    def discard(self, ids: NDArray[np.int32]) -> None:
        """Gives disk space and memory of pages back."""
        self._file.discard(ids)

    @contextmanager
    def using(
        self, ids: NDArray[np.int32], ahead: NDArray[np.int32], most_bytes: int, *, writes: bool
    ) -> Iterator[None]:
        """Pages are read, or written, inside, those of `ahead` soon after; afterwards most_bytes are in memory."""
        drops = self._file.touch(ids, ahead, most_bytes, writes)
        try:
            yield
        finally:
            # What another thread has dropped meanwhile came back where it was still needed.
            self._file.recount(ids if self._file.drops != drops else ids[:0], most_bytes)


def overflow_folder(function: str, overflow: Folder, max_bytes: int | None) -> str | None:
    """The folder that `overflow` names, checked as far as it can be without a file; None for none."""
    if overflow is None or overflow is False:
        return None
    known = overflow is True or isinstance(overflow, (str, os.PathLike))
    require_type(known, function, "overflow", "be a folder, a bool or None", repr(overflow))
    if max_bytes is None:
        raise ValueError(message(function, "max_bytes", "be given with overflow, for what may be in memory", None))
    # /var/tmp is for large files and on a disk; /tmp is memory in many systems.
    return os.environ.get("TMPDIR", "/var/tmp") if overflow is True else os.fspath(overflow)
