"""The building blocks of decoders as plain modules; each works alone."""

from lcore.nn.attention import Attention
from lcore.nn.gated_delta_net import GatedDeltaNet
from lcore.nn.gla import GatedLinearAttention
from lcore.nn.linear import Linear
from lcore.nn.mamba import Mamba
from lcore.nn.mamba2 import Mamba2
from lcore.nn.mlp import GatedMLP, silu
from lcore.nn.norm import GroupedRMSNorm, RMSNorm, ZeroCentredRMSNorm
from lcore.nn.rotary import Rotary
from lcore.nn.rwkv6 import RWKV6ChannelMix, RWKV6TimeMix
from lcore.nn.sparse_mlp import SparseMLP

__all__ = [
    "Attention",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedMLP",
    "GroupedRMSNorm",
    "Linear",
    "Mamba",
    "Mamba2",
    "RMSNorm",
    "RWKV6ChannelMix",
    "RWKV6TimeMix",
    "Rotary",
    "SparseMLP",
    "ZeroCentredRMSNorm",
    "silu",
]
