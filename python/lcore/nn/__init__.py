"""The building blocks of a decoder as plain modules; each works alone."""

from lcore.nn.attention import Attention
from lcore.nn.linear import Linear
from lcore.nn.mlp import GatedMLP, silu
from lcore.nn.norm import RMSNorm
from lcore.nn.rotary import Rotary

__all__ = ["Attention", "GatedMLP", "Linear", "RMSNorm", "Rotary", "silu"]
