"""A policy from one line of text: NAME:key=value,key=value."""

from __future__ import annotations

import inspect
import json

from lcore.cache.policies.base import Policy
from lcore.cache.policies.cam import CaM
from lcore.cache.policies.heads import AdaKV
from lcore.cache.policies.keys import KeyDiff, KeyNorm
from lcore.cache.policies.mass import H2O, TOVA, VATP, StreamingLLM
from lcore.cache.policies.snapkv import PyramidKV, SnapKV
from lcore.errors import require

_POLICIES = {
    policy.__name__.lower(): policy
    for policy in (CaM, H2O, KeyDiff, KeyNorm, PyramidKV, SnapKV, StreamingLLM, TOVA, VATP)
}


def parse_policy(text: str) -> Policy:
    """The policy that a text names, as `lcore generate --policy` takes it.

    Args:
        text: "snapkv:budget=2048,kernel=7". "adakv:alpha=0.2,policy=snapkv,budget=2048" gives all but alpha to the
            policy within. Upper and lower case are the same in names of policies.

    Raises: ValueError for an unknown name, an unknown setting, or a value that the policy does not take.
    """
    name, _, rest = text.partition(":")
    settings = dict(_setting(part) for part in rest.split(",") if part)
    name = name.strip().lower()
    if name != "adakv":
        return _make(name, settings)
    alpha = settings.pop("alpha", 0.2)
    inner = str(settings.pop("policy", "snapkv")).lower()
    return AdaKV(_make(inner, settings), alpha=alpha)  # type: ignore[arg-type]


def _make(name: str, settings: dict[str, object]) -> Policy:
    require(
        name in _POLICIES, "policies", "policy", f"be one of {', '.join(sorted([*_POLICIES, 'adakv']))}", repr(name)
    )
    known = _settings_of(_POLICIES[name])
    for key in settings:
        require(key in known, "policies", f"a setting of {name}", f"be one of {', '.join(known)}", repr(key))
    require("budget" in settings, "policies", "policy", f"be given a budget, as in {name}:budget=2048", repr(name))
    return _POLICIES[name](**settings)  # type: ignore[arg-type]


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
