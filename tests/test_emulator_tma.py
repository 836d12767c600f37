"""Tensor copies of the emulator: boxes, swizzles, what lies outside, and the mistakes that hardware mostly forgives."""

import ctypes

import pytest
import torch
from emulated import emulator, raise_if

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int32: 4, torch.int64: 5}
SPANS = {0: 16, 1: 32, 2: 64, 3: 128}  # bytes of a row by swizzle code
READ, WRITE, ADD = range(3)


class Tensor(ctypes.Structure):
    """tests/emulator/kernels/tma.cu"""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("type", "rank")),
        *(("sizes", ctypes.c_int64 * 5), ("strides", ctypes.c_int64 * 4)),
        *((name, ctypes.c_int * 5) for name in ("box", "at")),
        ("swizzle", ctypes.c_int),
        ("content", ctypes.c_void_p),
        ("action", ctypes.c_int),
    )


def move(tensor, at, content, swizzle, action):
    """Moves between `tensor` and `content`, the box whose first element is tensor[at]."""
    assert tensor.stride(-1) == 1
    sizes, strides, box, corner = (
        tuple(reversed(x)) for x in (tensor.shape, tensor.stride()[:-1], content.shape, at)
    )  # fmt: skip
    given = Tensor(
        tensor.data_ptr(), DTYPES[tensor.dtype], tensor.dim(), sizes, strides, box, corner, swizzle,
        content.data_ptr(), action,
    )  # fmt: skip
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    with emulator(tensor=whole, content=content) as emulated:
        raise_if(emulated.lcore_emulator_move_box(ctypes.byref(given)))


def numbers(shape, dtype):
    return torch.randint(-99, 100, shape).to(dtype)


def inside(tensor, at, box):
    """For each element of the box whether it lies in the tensor, and the tensor padded so that the box does."""
    padded = torch.zeros([n + 2 * b for n, b in zip(tensor.shape, box, strict=True)], dtype=tensor.dtype)
    padded[tuple(slice(b, b + n) for n, b in zip(tensor.shape, box, strict=True))] = tensor
    where = tuple(slice(a + b, a + 2 * b) for a, b in zip(at, box, strict=True))
    return padded, where


@pytest.mark.parametrize("swizzle", SPANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_boxes_are_read(dtype, swizzle):
    tensor = numbers((20, 128), dtype)
    box = (12, SPANS[swizzle] // tensor.element_size())
    for at in ((0, 0), (3, 16), (10, 8), (-2, -3), (19, 126), (-12, 0), (20, 0), (5, 128)):
        content = numbers(box, dtype)
        move(tensor, at, content, swizzle, READ)
        padded, where = inside(tensor, [max(x, -b) for x, b in zip(at, box, strict=True)], box)
        assert torch.equal(content, padded[where]), at


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
@pytest.mark.parametrize("action", [READ, WRITE, ADD])
def test_every_rank(rank, action):
    shape, box, at = (3, 4, 5, 6, 24)[-rank:], (2, 3, 1, 4, 32)[-rank:], (2, -1, 3, 4, -6)[-rank:]
    tensor = torch.empty(*shape[:-1], 32, dtype=torch.bfloat16)[..., : shape[-1]]  # rows of 24 in steps of 32
    tensor.copy_(numbers(shape, torch.bfloat16))
    content = numbers(box, torch.bfloat16)
    want, where = inside(tensor, at, box)
    given = content.clone()
    move(tensor, at, content, 2, action)
    if action == READ:
        assert torch.equal(content, want[where])
        return
    want[where] = given if action == WRITE else want[where] + given
    assert torch.equal(tensor, want[tuple(slice(b, b + n) for n, b in zip(shape, box, strict=True))])
    assert torch.equal(content, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_sums(dtype):
    tensor, content = numbers((9, 64), dtype), numbers((8, 128 // dtype.itemsize), dtype)
    want = tensor.clone()
    want[1:, : content.shape[1]] += content
    move(tensor, (1, 0), content, 3, ADD)
    assert torch.equal(tensor, want)


def test_strides_in_any_order():
    tensor = numbers((6, 4, 2, 16), torch.float16).permute(1, 0, 2, 3)  # (batch, seq, heads, dim) by head
    content = torch.zeros(1, 5, 1, 16, dtype=torch.float16)
    move(tensor, (2, 1, 1, 0), content, 1, READ)
    assert torch.equal(content, tensor[2:3, 1:6, 1:2])


@pytest.mark.parametrize(
    ("shape", "box", "swizzle"),
    [
        ((4, 12), (4, 12), 0),  # rows of the box of 24 bytes
        ((4, 20), (4, 16), 0),  # rows of the tensor of 40 bytes
        ((300, 64), (257, 64), 3),
        ((8, 64), (8, 32), 3),  # half a row of the pattern
    ],
)
def test_a_wrong_map_is_refused(shape, box, swizzle):
    with pytest.raises(RuntimeError, match=r"driver refuses a tensor map \(error 1\) of sizes, strides, box: \d+/1/"):
        move(numbers(shape, torch.float16), (0, 0), numbers(box, torch.float16), swizzle, READ)


def test_contiguous_bytes():
    given, stored, summed = torch.randn(64), torch.zeros(64), torch.ones(64)
    with emulator(given=given, stored=stored, summed=summed) as emulated:
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (given, stored, summed))
        raise_if(emulated.lcore_emulator_move_bytes(*pointers, 64))
    assert torch.equal(stored, given) and torch.equal(summed, given + 1)


DYNAMIC = r"dynamic shared memory \+ \d+"
BROKEN = {
    "reads_early": rf"reads 4 bytes at 0x\w+ .*: the bulk load that fills {DYNAMIC} was not waited for",
    "reads_unordered": rf"the bulk load that f\w+ {DYNAMIC}",
    "barrier_unfenced": r"tma_load uses 8 bytes: no fence\.proxy\.async after warp 0 wrote static shared memory",
    "too_few_bytes": r"waits for ever at an mbarrier, phase of parity 0, 0 arrivals and 512 bytes short",
    "too_many_bytes": r"waits for ever at an mbarrier, phase of parity 0, 0 arrivals and 2048 bytes short",
    "misaligned": r"tma_load: a box in shared memory is not aligned to 128",
    "wrong_rank": r"tma_load: 3 indices for a tensor of 2 dimensions",
    "no_map": r"tma_load: this is no tensor map",
    "reloads": rf"tma_load writes 1024 bytes: the bulk load that fills {DYNAMIC} was not waited for",
    "store_unfenced": rf"tma_store reads 1024 bytes: no fence\.proxy\.async after warp [01] wrote {DYNAMIC}",
    "fenced_by_one_lane": rf"tma_store reads 1024 bytes: no fence\.proxy\.async after warp [01] wrote {DYNAMIC}",
    "store_unordered": rf"no barrier between warp [01]'s access of {DYNAMIC} and this of warp [01]",
    "overwrites": rf"writes 1 bytes at .*: an asynchronous operation that reads {DYNAMIC} was not waited for",
    "leaves_store": r"an asynchronous operation that reads|returned while its bulk stores still read shared memory",
    "leaves_uncommitted": r"writes 1 bytes at .*: an asynchronous op|returned before it committed its bulk stores",
    "leaves_load": r"the block returned while 1 bulk loads into its shared memory were on their way",
    "registers": r"setmaxnreg waits for ever: with 256 the warps ask for 73728 registers, and there are 65536",
    "odd_bytes": r"bulk_load: both addresses and the 24 bytes must be multiples of 16",
}  # fmt: skip


def exchange(name, rows=64):
    data = torch.randn(64, 64)
    before = data.clone()
    with emulator(data=data) as emulated:
        raise_if(
            emulated.lcore_emulator_exchange(name.encode(), ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(rows))
        )
    before[:8, :32] *= 2
    assert torch.equal(data, before)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_caught(name):
    with pytest.raises(RuntimeError, match=BROKEN[name]):
        exchange(name)


def test_a_correct_kernel_is_not():
    exchange("none")


def test_a_map_beyond_its_tensor():
    data = torch.randn(64)
    given = Tensor(data.data_ptr(), 0, 2, (32, 4), (32,), (32, 4), (0, 0), 0, torch.zeros(4, 32).data_ptr(), READ)
    with (
        emulator(data=data) as emulated,
        pytest.raises(RuntimeError, match=r"reads 128 bytes at .*: 256 bytes into data, which has 256"),
    ):
        raise_if(emulated.lcore_emulator_move_box(ctypes.byref(given)))
