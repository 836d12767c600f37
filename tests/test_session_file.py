"""Session files that are damaged, foreign, half written, or in use: refused by name, and nothing is lost."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress

import pytest
import torch
from cache_cases import assert_same_contents
from safetensors import safe_open
from safetensors.torch import save_file
from session_cases import filled_cache, header_of, with_header

import lcore
from lcore.cache.session_lock import SessionLock


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.session"


@pytest.fixture
def saved(path):
    """A small file with everything in it: full and shared pages, tails, tokens, metadata."""
    cache = filled_cache(19, 33, page_size=4, layers=1, kv_heads=1)
    cache.save(path, tokens=[torch.arange(19), torch.arange(33)], metadata={"model": "m"})
    return cache


def python(code: str, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", **options)


def test_the_file_is_a_safetensors_container_whose_pages_can_be_mapped(path, saved):
    header, begin = header_of(path)
    assert begin % 4096 == 0 and header["pages"]["data_offsets"][0] == 0
    with safe_open(path, "pt") as file:
        pages = file.get_tensor("pages")
        assert pages.shape == (4 + 8, saved.stats()["page_bytes"])
        assert torch.equal(pages, saved._slots.pool.data[:12])
        assert file.get_tensor("tokens.1").tolist() == list(range(33))
        assert file.metadata()["format"] == "lcore.session"


def test_every_flipped_bit_is_refused(path, saved):
    """A prime stride meets every part of the file; each bit of a byte comes up."""
    whole = path.read_bytes()
    assert len(whole) > 8000
    for count, place in enumerate(range(0, len(whole), 7)):
        broken = bytearray(whole)
        broken[place] ^= 1 << count % 8
        path.write_bytes(broken)
        with pytest.raises(
            ValueError, match=r"^lcore\.PagedCache\.load: path must be a session file and .*a\.session: "
        ):
            lcore.PagedCache.load(path)
    path.write_bytes(whole)
    assert_same_contents(lcore.PagedCache.load(path), saved)


def test_a_damaged_page_is_told_by_its_number(path, saved):
    data = bytearray(path.read_bytes())
    data[header_of(path)[1] + 7 * saved.stats()["page_bytes"] + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"be as it was written, got .*: page 7 of 12 is damaged"):
        lcore.PagedCache.load(path)


@pytest.mark.parametrize("name", ["table", "lengths", "tail_v", "tokens.1", "page_crc32"])
def test_a_damaged_tensor_is_told_by_its_name(path, saved, name):
    header, begin = header_of(path)
    data = bytearray(path.read_bytes())
    data[begin + header[name]["data_offsets"][1] - 1] ^= 0x80
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"be as it was written, got .*: tensor '{name}' damaged"):
        lcore.PagedCache.load(path)


def test_damaged_checksums_and_a_changed_header_are_told(path, saved):
    header, begin = header_of(path)
    whole = path.read_bytes()
    data = bytearray(whole)
    data[begin + header["crc32"]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="the checksums are damaged"):
        lcore.PagedCache.load(path)
    path.write_bytes(whole)
    header["__metadata__"]["metadata"] = json_metadata = '{"model": "x"}'
    assert len(json_metadata) == len('{"model": "m"}')
    with_header(path, header)
    with pytest.raises(ValueError, match="the header damaged"):
        lcore.PagedCache.load(path)


def test_a_file_that_is_cut_short_or_too_long_is_refused(path, saved):
    whole = path.read_bytes()
    begin = header_of(path)[1]
    for size in (0, 1, 7, 8, 100, begin - 1, begin, begin + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut short"):
            lcore.PagedCache.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="be a whole safetensors file"):
        lcore.PagedCache.load(path)


def test_other_files_are_refused(path, saved, tmp_path):
    header = header_of(path)[0]
    header["__metadata__"]["version"] = "2"
    with_header(path, header)
    with pytest.raises(ValueError, match=r"be a session file and have version 1, got .*: version 2"):
        lcore.PagedCache.load(path)
    save_file({"pages": torch.zeros(2, 64, dtype=torch.uint8)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"say so, format 'lcore.session', got .*: format 'pt'"):
        lcore.PagedCache.load(path)
    path.write_text("a text that is no container at all")
    with pytest.raises(ValueError, match="another kind of file"):
        lcore.PagedCache.load(path)
    path.write_bytes((4).to_bytes(8, "little") + b"[[[[")
    with pytest.raises(ValueError, match="be a whole safetensors file"):
        lcore.PagedCache.load(path)
    with pytest.raises(FileNotFoundError, match="none"):
        lcore.PagedCache.load(tmp_path / "none")
    assert os.listdir(tmp_path) == ["a.session"]
    with pytest.raises(IsADirectoryError):
        lcore.PagedCache.load(tmp_path)


def test_a_new_file_takes_the_place_of_the_old_and_keeps_its_permissions(path, saved, tmp_path):
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    cache = filled_cache(5)
    cache.save(link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert_same_contents(lcore.PagedCache.load(path), cache)
    assert sorted(os.listdir(tmp_path)) == ["a.session", "link"]


def test_what_a_killed_writer_left_is_no_hindrance(path, saved, tmp_path):
    for rest in (".part", ".lock"):
        path.with_name(path.name + rest).write_bytes(b"rest")
    saved.save(path)
    assert_same_contents(lcore.PagedCache.load(path), saved)
    assert os.listdir(tmp_path) == ["a.session"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(path, saved, tmp_path, monkeypatch, error, call):
    def fail(*_):
        raise error(errno.ENOSPC, "No space left on device")

    class Full(io.BufferedWriter):
        def write(self, data):
            return super().write(data) if self.tell() < 10_000 else fail()

    if call == "write":  # half way
        monkeypatch.setattr("lcore.cache.replace_file.open", lambda *file: Full(io.FileIO(*file)), raising=False)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(error) as caught:
        filled_cache(100).save(path)
    monkeypatch.undo()
    if error is OSError:
        assert re.search(r"lcore.PagedCache.save needs [\d,]+ bytes, [\d,]+ are free", str(caught.value))
        assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["a.session"]
    assert_same_contents(lcore.PagedCache.load(path), saved)


def test_a_full_disk(path, saved, tmp_path):
    """The system itself refuses to let the file grow."""
    child = python(
        """
        import resource, sys, torch, lcore
        cache = lcore.PagedCache(1, 1, 64, dtype=torch.float32, kv_format="fp32")
        cache.append(0, *torch.zeros(2, 1, 4096, 1, 64))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        cache.save(sys.argv[1])
        """,
        path,
    )
    error = child.communicate()[1]
    assert child.returncode == 1 and re.search(r"OSError: .*lcore.PagedCache.save needs 2,\d+,\d+ bytes", error), error
    assert os.listdir(tmp_path) == ["a.session"]
    assert_same_contents(lcore.PagedCache.load(path), saved)


def test_a_writer_that_is_killed_leaves_the_old_file(path, saved, tmp_path):
    child = python(
        """
        import os, sys, torch, lcore
        cache = lcore.PagedCache(1, 1, 64, dtype=torch.float32, kv_format="fp32")
        cache.append(0, *torch.zeros(2, 1, 4096, 1, 64))
        def wait(_):
            print("written", flush=True)
            sys.stdin.read()
        os.fsync = wait
        cache.save(sys.argv[1])
        """,
        path,
    )
    assert child.stdout.readline() == "written\n"
    with pytest.raises(BlockingIOError, match="no other process or thread is using"):
        saved.save(path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert sorted(os.listdir(tmp_path)) == ["a.session", "a.session.lock", "a.session.part"]
    assert_same_contents(lcore.PagedCache.load(path), saved)
    saved.save(path)  # no lock is left over
    assert os.listdir(tmp_path) == ["a.session"]


def test_a_writer_excludes_all_and_readers_only_writers(path, saved, tmp_path):
    refused = pytest.raises(BlockingIOError, match=f"path must be a session file that no other .* got {path}")
    with SessionLock("f", path):
        for action in (lambda: saved.save(path), lambda: lcore.PagedCache.load(path)):
            with refused:
                action()
    with lcore.cache.StoredSession(path), lcore.cache.StoredSession(path) as stored:
        assert_same_contents(stored.load(), saved)
        with refused:
            saved.save(path)
    saved.save(path)
    assert os.listdir(tmp_path) == ["a.session"]


def test_two_processes(path, saved):
    child = python(
        """
        import sys
        from lcore.cache.session_lock import SessionLock
        lock = SessionLock("f", sys.argv[1])
        print("held", flush=True)
        sys.stdin.read()
        """,
        path,
    )
    assert child.stdout.readline() == "held\n"
    for action in (lambda: saved.save(path), lambda: lcore.PagedCache.load(path)):
        with pytest.raises(BlockingIOError, match="no other process or thread"):
            action()
    child.communicate()  # ends without a release
    saved.save(path)


def test_many_threads_in_turn(path, tmp_path):
    """Locks come and go under contention, side files with them: one holder at a time, and every save is whole."""
    caches = [filled_cache(40 + i) for i in range(4)]
    held, alone, done = threading.Lock(), [], []

    def work(cache):
        while len(done) < 60:
            with suppress(BlockingIOError), SessionLock("f", path) as lock:
                alone.append(held.acquire(blocking=False))
                lcore.cache.sessions.save(cache, path, lock=lock)
                with lcore.cache.StoredSession(path, lock=lock) as stored:
                    assert_same_contents(stored.load(), cache)
                held.release()
                done.append(cache)

    threads = [threading.Thread(target=work, args=[cache]) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(alone) and len(done) >= 60 and os.listdir(tmp_path) == ["a.session"]


def test_a_folder_that_cannot_be_written_to_can_be_read(path, saved, monkeypatch):
    """As root is not refused by permissions, the refusal is made up here."""
    opened = os.open

    def refuse(name, flags, *rest):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", name)
        return opened(name, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert_same_contents(lcore.PagedCache.load(path), saved)
    with pytest.raises(OSError, match="Read-only file system"):
        saved.save(path)
