"""A session file: a safetensors container with a checksum over every byte, written whole or not at all.

    8 bytes   length of the header, little-endian; the header is padded with spaces, so that data begins at a multiple
              of 4096 bytes
    header    JSON: "__metadata__" with "format", "version" and the writer's strings, and the place of each tensor
    data      "pages" uint8 (pages, page_bytes) first, which can be mapped as they are; then the other tensors, those
              of wider items first, so that each is aligned

Checksums are CRC-32 (ISO-HDLC, as in zlib). Tensor "page_crc32" int64 (pages,) has one for each page. Tensor "crc32"
int64 has that of all bytes before the data, then one for each tensor behind the pages but itself, in the file's order,
and last one of its own bytes up to there.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lcore.cache.replace_file import replace_file
from lcore.errors import message

FORMAT, VERSION = "lcore.session", "1"
_ALIGNMENT = 4096  # of the pages in the file, for who maps them
_CHUNK_BYTES = 4 << 20  # that a thread handles at a time: long against a call, and little memory
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
Bytes = NDArray[np.uint8]
Using = Callable[[NDArray[np.int32]], AbstractContextManager[Any]]


def write_session(
    function: str,
    path: str,
    strings: Mapping[str, str],
    pool: Bytes,
    ids: NDArray[np.int32],
    tensors: dict[str, Tensor],
    using: Using = nullcontext,
) -> None:
    """Writes the rows `ids` of pool (pages, page_bytes), and the tensors; the caller holds the lock of path.

    using: as `PagePool.using`, for some of these rows at a time.

    Written beside its place, synced to the disk and renamed: whatever happens, path is the old file or the new one.

    Raises: OSError with the bytes needed and free when the disk is full.
    """
    page_crcs = np.zeros(len(ids), dtype=np.int64)

    def check_pages(first: int, last: int) -> None:
        with using(ids[first:last]):
            page_crcs[first:last] = [zlib.crc32(pool[i]) for i in ids[first:last]]

    _in_threads(check_pages, len(ids), pool.shape[1])
    tensors = tensors | {"page_crc32": torch.from_numpy(page_crcs)}
    crcs = torch.zeros(len(tensors) + 2, dtype=torch.int64)
    order = _in_order(tensors | {"crc32": crcs})
    start = _header(strings, (len(ids), pool.shape[1]), order)
    _fill_crcs(crcs, start, order)

    def write(file: IO[bytes]) -> None:
        file.write(start)
        for first, last in _chunks(len(ids), pool.shape[1]):
            with using(ids[first:last]):
                file.write(pool[ids[first:last]].data)
        for tensor in order.values():
            file.write(_bytes(tensor).data)

    size = len(start) + len(ids) * pool.shape[1] + sum(tensor.nbytes for tensor in order.values())
    replace_file(function, path, size, write)


class SessionFile:
    """A session file open for reading, whose header and tensors have been read and checked, but for the pages.

    strings:  the writer's. tensors: all but "pages" and the checksums. page_shape: (pages, page_bytes).

    Raises: ValueError: another kind of file or version, or one that is cut short or damaged. OSError: it cannot be
    read.
    """

    def __init__(self, function: str, path: str) -> None:
        self.path = path
        self._function = function
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            start = self._start()
            self.strings, self.tensors, self.page_shape = self._contents()
            crcs = self.tensors.pop("crc32", torch.empty(0))
            self._check(start, crcs)
            self._page_crcs = self.tensors.pop("page_crc32").numpy()
            self._begin = len(start)
        except BaseException:
            self.close()
            raise

    def read_pages(self, pool: Bytes, ids: NDArray[np.int32], using: Using = nullcontext) -> None:
        """All pages into the rows `ids`, which rise, of pool (rows, page_bytes); each page is checked.

        using: as `PagePool.using`, for some of these rows at a time.
        """

        def read(first: int, last: int) -> None:
            rows = ids[first:last]
            with using(rows):
                read_into(rows, first, last)

        def read_into(rows: NDArray[np.int32], first: int, last: int) -> None:
            in_place = rows[-1] - rows[0] == last - 1 - first
            out = pool[rows[0] : rows[-1] + 1] if in_place else np.empty((last - first, pool.shape[1]), dtype=np.uint8)
            self._read(out.reshape(-1), self._begin + first * pool.shape[1])
            for page, crc, want in zip(
                range(first, last), map(zlib.crc32, cast(Any, out)), self._page_crcs[first:], strict=False
            ):
                if crc != want:
                    raise self.refusal("be as it was written", f"page {page} of {len(ids)} is damaged")
            if not in_place:
                pool[rows] = out

        _in_threads(read, len(ids), pool.shape[1])

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def refusal(self, rule: str, got: object) -> ValueError:
        """The error for a file that breaks a rule."""
        return ValueError(message(self._function, "path", f"be a session file and {rule}", f"{self.path}: {got}"))

    def _read(self, out: Bytes, at: int) -> None:
        while len(out):
            got = os.preadv(self._descriptor, [out.data], at)
            if got == 0:
                raise self.refusal("hold all its pages", f"cut short at byte {at:,}")
            out, at = out[got:], at + got

    def _start(self) -> bytes:
        """All bytes before the data."""
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise self.refusal("begin with a whole header", f"{size:,} bytes, cut short or another kind of file")
        return os.pread(self._descriptor, 8 + length, 0)

    def _contents(self) -> tuple[dict[str, str], dict[str, Tensor], tuple[int, int]]:
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                strings = file.metadata() or {}
                if strings.get("format") != FORMAT:
                    raise self.refusal(f"say so, format {FORMAT!r}", f"format {strings.get('format')!r}")
                if strings.get("version") != VERSION:
                    raise self.refusal(f"have version {VERSION}", f"version {strings.get('version')}")
                # A copy, so that nothing refers to the mapping any more.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys() if name != "pages"}  # noqa: SIM118
                pages = file.get_slice("pages")
                shape = tuple(pages.get_shape())
                if pages.get_dtype() != "U8" or len(shape) != 2:
                    raise self.refusal("have pages of bytes", f"{pages.get_dtype()} {shape}")
        except SafetensorError as error:
            raise self.refusal("be a whole safetensors file", f"cut short or damaged: {error}") from error
        return strings, tensors, shape

    def _check(self, start: bytes, crcs: Tensor) -> None:
        """ValueError unless `crcs` and all other tensors, and the start of the file, are as they were written."""
        rule = "be as it was written"
        order = _in_order(self.tensors | {"crc32": crcs})
        want = torch.zeros(len(order) + 1, dtype=torch.int64)
        if crcs.dtype != want.dtype or crcs.shape != want.shape:
            raise self.refusal("have checksums", f"{crcs.dtype} {tuple(crcs.shape)}")
        if int(crcs[-1]) != zlib.crc32(_bytes(crcs[:-1])):
            raise self.refusal(rule, "the checksums are damaged")
        _fill_crcs(want, start, order)
        names = ["the header", *(f"tensor {name!r}" for name in order if name != "crc32")]
        damaged = [name for name, same in zip(names, (crcs == want)[:-1], strict=True) if not same]
        if damaged:
            raise self.refusal(rule, f"{' and '.join(damaged)} damaged")
        page_crcs = self.tensors.get("page_crc32", torch.empty(0))
        if page_crcs.dtype != torch.int64 or tuple(page_crcs.shape) != self.page_shape[:1]:
            raise self.refusal("have a checksum for each page", f"{page_crcs.dtype} {tuple(page_crcs.shape)}")


def _header(strings: Mapping[str, str], page_shape: tuple[int, int], order: Mapping[str, Tensor]) -> bytes:
    """All bytes before the data."""
    end = page_shape[0] * page_shape[1]
    header: dict[str, object] = {
        "__metadata__": {"format": FORMAT, "version": VERSION, **strings},
        "pages": {"dtype": "U8", "shape": page_shape, "data_offsets": [0, end]},
    }
    for name, tensor in order.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": tuple(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they stand in the file."""
    return {name: tensors[name] for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))}


def _fill_crcs(crcs: Tensor, start: bytes, order: Mapping[str, Tensor]) -> None:
    parts = [_bytes(tensor) for name, tensor in order.items() if name != "crc32"]
    crcs[:-1] = torch.tensor([zlib.crc32(part) for part in (start, *parts)], dtype=torch.int64)
    crcs[-1] = zlib.crc32(_bytes(crcs[:-1]))


def _bytes(tensor: Tensor) -> Any:
    # A copy: a view of one item may have stride 0, which cannot be seen as bytes.
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten()).view(torch.uint8).numpy()


def _chunks(pages: int, page_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_BYTES // max(1, page_bytes))
    return ((first, min(first + step, pages)) for first in range(0, pages, step))


def _in_threads(work: Callable[[int, int], None], pages: int, page_bytes: int) -> None:
    """work(first, last) over all pages; of several errors, that of the first pages. zlib and reads hold no GIL."""
    with ThreadPoolExecutor(torch.get_num_threads()) as executor:
        for _ in executor.map(lambda chunk: work(*chunk), _chunks(pages, page_bytes)):
            pass
