"""Decoders loaded from Hugging Face checkpoint folders."""

from lcore.models.config import ModelConfig
from lcore.models.decoder import Decoder
from lcore.models.loading import load_model
from lcore.models.tokenizer import Tokenizer

__all__ = ["Decoder", "ModelConfig", "Tokenizer", "load_model"]
