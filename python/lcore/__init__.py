"""lcore: the long-context core for PyTorch."""

from lcore.cache import PagedCache, PrefixCache, policies
from lcore.generation import Generator
from lcore.info import build_info, explain
from lcore.models import load_model
from lcore.ops import attention, hadamard, key_mass, merge_states, page_bounds, page_scores, rope, selective_scan

__all__ = [
    "Generator",
    "PagedCache",
    "PrefixCache",
    "attention",
    "build_info",
    "explain",
    "hadamard",
    "key_mass",
    "load_model",
    "merge_states",
    "page_bounds",
    "page_scores",
    "policies",
    "rope",
    "selective_scan",
]
__version__ = build_info()["version"]
