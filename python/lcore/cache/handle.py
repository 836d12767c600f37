"""A cache's hold on its slots, until it is closed by hand or by the garbage collector."""

from __future__ import annotations

import sys
from typing import NoReturn

from lcore.cache.checks import check_int
from lcore.cache.slots import Slots


class Handle:
    """Names slots while it is open."""

    num_layers: int
    _slots: Slots | None

    def close(self) -> None:
        """Gives pages and memory back; the cache cannot be used afterwards. Closing twice does nothing."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.release()

    def __del__(self) -> None:
        # Nothing to close after an __init__ that refused; no one to give pages to when the interpreter ends.
        if getattr(self, "_slots", None) is not None and not sys.is_finalizing():
            self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("lcore.PagedCache: a cache cannot be copied or pickled; use fork()")

    def _open(self, function: str) -> Slots:
        if self._slots is None:
            raise ValueError(f"lcore.{function}: the cache must be open, got a closed one")
        return self._slots

    def _layer(self, function: str, layer: int) -> Slots:
        """The slots, once layer is known to exist."""
        slots = self._open(function)
        check_int(function, "layer", layer, 0, self.num_layers - 1)
        return slots
