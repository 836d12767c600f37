"""Who may use a session file: any number of readers, or one writer, over all processes and threads."""

from __future__ import annotations

import errno
import fcntl
import os

from lcore.errors import message

# What a folder that may not be written to answers: nobody can save there, and a reader needs no lock.
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class SessionLock:
    """Holds the session file `path` until `release`, or until the process ends, however it ends.

    The lock is a flock on the side file `path`.lock, because a save renames another file to `path`. The last holder
    removes the side file while it still holds it; who locked a side file that has been removed tries again. What a
    killed process leaves behind is not locked. Symbolic links are followed, so that two names of a file exclude
    each other.

    Args:
        shared: for a reader. In a folder that may not be written to it holds nothing.

    Raises:
        BlockingIOError: a writer holds the file, or a reader does and shared is False. OSError: no lock can be taken.
    """

    def __init__(self, function: str, path: str | os.PathLike[str], *, shared: bool = False) -> None:
        self.path = os.path.realpath(path)
        self._side = self.path + ".lock"
        self._descriptor = -1
        while self._descriptor < 0:
            try:
                descriptor = os.open(self._side, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                if shared and error.errno in _NOT_WRITABLE:
                    return
                raise
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                if self._is_side_file(descriptor):
                    self._descriptor, descriptor = descriptor, -1
            except BlockingIOError:
                rule = "be a session file that no other process or thread is using"
                raise BlockingIOError(message(function, "path", rule, self.path)) from None
            finally:
                if descriptor >= 0:
                    os.close(descriptor)

    def release(self) -> None:
        """Lets the next one in. Releasing twice does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        try:
            # Fails while other readers hold the file: the last of them removes it.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_side_file(descriptor):
                os.unlink(self._side)
        except OSError:
            pass
        finally:
            os.close(descriptor)

    def _is_side_file(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._side))
        except FileNotFoundError:
            return False

    def __enter__(self) -> SessionLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.release()
