"""Eviction policies: which tokens a cache keeps. `lcore.policies.Policy` is the interface."""

from lcore.cache.policies.base import Policy
from lcore.cache.policies.cam import CaM
from lcore.cache.policies.heads import AdaKV, DuoAttention
from lcore.cache.policies.keys import KeyDiff, KeyNorm
from lcore.cache.policies.mass import H2O, TOVA, VATP, StreamingLLM
from lcore.cache.policies.parse import parse_policy
from lcore.cache.policies.snapkv import PyramidKV, SnapKV
from lcore.cache.policies.view import LayerView

__all__ = [
    "H2O",
    "TOVA",
    "VATP",
    "AdaKV",
    "CaM",
    "DuoAttention",
    "KeyDiff",
    "KeyNorm",
    "LayerView",
    "Policy",
    "PyramidKV",
    "SnapKV",
    "StreamingLLM",
    "parse_policy",
]
