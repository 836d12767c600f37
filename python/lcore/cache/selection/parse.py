"""A selection from one line of text: NAME:key=value,key=value."""

from __future__ import annotations

from lcore.cache.selection.base import Selection
from lcore.cache.selection.infllm import InfLLM
from lcore.cache.selection.quest import Quest
from lcore.cache.settings import make_from, parts_of
from lcore.errors import require

_SELECTIONS: dict[str, type[Selection]] = {"infllm": InfLLM, "quest": Quest}


def parse_selection(text: str) -> Selection:
    """The selection that a text names, as `lcore generate --select` takes it.

    Args:
        text: "quest:budget=32" for pages, "quest:budget=0.01" for a mass, "infllm:budget=96,recent=64".

    Raises: ValueError for an unknown name, an unknown setting, or a value that the selection does not take.
    """
    name, settings = parts_of(text)
    require(name in _SELECTIONS, "selection", "select", f"be one of {', '.join(_SELECTIONS)}", repr(name))
    return make_from("selection", "select", name, settings, _SELECTIONS[name], "budget=32")
