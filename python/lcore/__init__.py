"""lcore: the long-context core for PyTorch."""

from lcore.cache import PagedCache, PrefixCache
from lcore.generation import Generator
from lcore.info import build_info, explain
from lcore.models import load_model
from lcore.ops import attention, merge_states, rope

__all__ = [
    "Generator",
    "PagedCache",
    "PrefixCache",
    "attention",
    "build_info",
    "explain",
    "load_model",
    "merge_states",
    "rope",
]
__version__ = build_info()["version"]
