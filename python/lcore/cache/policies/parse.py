"""A policy from one line of text: NAME:key=value,key=value."""

from __future__ import annotations

from lcore.cache.policies.base import Policy
from lcore.cache.policies.cam import CaM
from lcore.cache.policies.heads import AdaKV
from lcore.cache.policies.keys import KeyDiff, KeyNorm
from lcore.cache.policies.mass import H2O, TOVA, VATP, StreamingLLM
from lcore.cache.policies.snapkv import PyramidKV, SnapKV
from lcore.cache.settings import make_from, parts_of
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
    name, settings = parts_of(text)
    if name != "adakv":
        return _make(name, settings)
    alpha = settings.pop("alpha", 0.2)
    inner = str(settings.pop("policy", "snapkv")).lower()
    return AdaKV(_make(inner, settings), alpha=alpha)  # type: ignore[arg-type]


def _make(name: str, settings: dict[str, object]) -> Policy:
    require(
        name in _POLICIES, "policies", "policy", f"be one of {', '.join(sorted([*_POLICIES, 'adakv']))}", repr(name)
    )
    return make_from("policies", "policy", name, settings, _POLICIES[name], "budget=2048")
