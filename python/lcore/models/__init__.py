"""Decoders loaded from Hugging Face checkpoint folders."""

from lcore.models.config import ModelConfig
from lcore.models.decoder import Decoder
from lcore.models.hybrid import HybridDecoder
from lcore.models.hybrid_config import HybridConfig
from lcore.models.jamba import JambaConfig
from lcore.models.loading import load_model
from lcore.models.mamba import MambaDecoder
from lcore.models.mamba_config import MambaConfig
from lcore.models.qwen3_next import Qwen3NextConfig
from lcore.models.tokenizer import Tokenizer

__all__ = [
    "Decoder",
    "HybridConfig",
    "HybridDecoder",
    "JambaConfig",
    "MambaConfig",
    "MambaDecoder",
    "ModelConfig",
    "Qwen3NextConfig",
    "Tokenizer",
    "load_model",
]
