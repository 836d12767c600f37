"""Decoders loaded from Hugging Face checkpoint folders."""

from lcore.models.config import ModelConfig
from lcore.models.decoder import Decoder
from lcore.models.loading import load_model
from lcore.models.mamba import MambaDecoder
from lcore.models.mamba_config import MambaConfig
from lcore.models.tokenizer import Tokenizer

__all__ = ["Decoder", "MambaConfig", "MambaDecoder", "ModelConfig", "Tokenizer", "load_model"]
