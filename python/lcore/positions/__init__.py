"""Position encodings: the RoPE settings of a checkpoint and the frequencies they stand for."""

from lcore.positions.frequencies import rope_frequencies
from lcore.positions.rope_config import ROPE_TYPES, RopeConfig

__all__ = ["ROPE_TYPES", "RopeConfig", "rope_frequencies"]
