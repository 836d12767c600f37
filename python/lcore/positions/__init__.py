"""Position encodings: the RoPE settings of a checkpoint, the frequencies they stand for, a rotation by them."""

from lcore.positions.frequencies import rope_frequencies
from lcore.positions.rope_config import ROPE_TYPES, RopeConfig
from lcore.positions.rotation import Rotation

__all__ = ["ROPE_TYPES", "RopeConfig", "Rotation", "rope_frequencies"]
