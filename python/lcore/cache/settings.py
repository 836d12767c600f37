"""Objects from one line of text: NAME:key=value,key=value."""

from __future__ import annotations

import inspect
import json
from typing import TypeVar

from lcore.errors import require

_Made = TypeVar("_Made")


def make_from(
    function: str, argument: str, name: str, settings: dict[str, object], kind: type[_Made], example: str
) -> _Made:
    """kind(**settings), once they are known to be settings of it with a budget among them."""
    known = _settings_of(kind)
    for key in settings:
        require(key in known, function, f"a setting of {name}", f"be one of {', '.join(known)}", repr(key))
    require("budget" in settings, function, argument, f"be given a budget, as in {name}:{example}", repr(name))
    return kind(**settings)


def parts_of(text: str) -> tuple[str, dict[str, object]]:
    """The name in lower case and the settings of NAME:key=value,key=value."""
    name, _, rest = text.partition(":")
    return name.strip().lower(), dict(_setting(part) for part in rest.split(",") if part)


def _settings_of(policy: type) -> list[str]:
    """Keyword names of the constructor and of those that it passes the rest to."""
    names: list[str] = []
    for base in policy.__mro__[:-1]:
        parameters = inspect.signature(base).parameters
        names += [p.name for p in parameters.values() if p.kind is not p.VAR_KEYWORD and p.name not in names]
    return names


def _setting(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    require(equals == "=" and key.strip() != "", "policies", "a setting", "have the form key=value", repr(text))
    return key.strip(), _value(value.strip())


def _value(text: str) -> object:
    """A number, true, false or null as JSON has them; else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
