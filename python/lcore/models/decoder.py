"""The decoder of the Llama family, in the parameter names of Hugging Face checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from lcore.cache import PagedCache
from lcore.errors import message, require
from lcore.models.causal_lm import CausalLM
from lcore.models.config import ModelConfig
from lcore.models.tokenizer import Tokenizer
from lcore.nn import Attention, GatedMLP, Linear, RMSNorm
from lcore.nn.attention import next_positions

_KV_FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class DecoderLayer(torch.nn.Module):
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            layer=layer,
            bias=config.attention_bias,
            output_bias=config.output_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None,
            window=config.sliding_window[layer],
            rope=config.layer_rope(layer),
        )
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: PagedCache | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, cache, lengths=lengths)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(torch.nn.Module):
    """Embedding, layers and the last norm: everything but the projection to the vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: PagedCache | None = None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, positions, cache, lengths)
        return self.norm(x)


def kv_options(options: dict[str, Any], attention: list[Any], dtype: torch.dtype) -> dict[str, Any]:
    """Options of a PagedCache of some attention layers, with rope and kv_format as `Decoder.new_cache` has them."""
    rope, kv_format = options.get("rope", getattr(options.get("policy"), "reindex", False)), options.get("kv_format")
    if rope in (True, False):
        rotaries = [layer.rotary for layer in attention] if rope else []
        rule = "be False, as must reindex of a policy, in a model whose attention has no rotary positions"
        require(not rope or any(rotaries), "new_cache", "rope", rule, rope)
        rope = [None if rotary is None else rotary.rotation for rotary in rotaries] or None
    options = {"device": attention[0].o_proj.weight.device} | options
    return options | {"rope": rope, "kv_format": kv_format or _KV_FORMATS.get(dtype, "fp32")}


class Decoder(CausalLM):
    """A causal language model; `load_model` reads one from a folder, `Decoder(config)` starts one at random.

    Args:
        config: its shape.
        dtype, device: of the parameters.
        tokenizer: kept as `model.tokenizer` and saved with the model.
    """

    config: ModelConfig
    embedding_name = "model.embed_tokens.weight"

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        with torch.device(device):
            self.model = Backbone(config)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.to(dtype)
        if torch.device(device).type != "meta":
            self.to(device)
            self._initialize()

    def new_cache(self, batch_size: int = 1, **options: Any) -> PagedCache:
        """An empty PagedCache with this model's layers and heads.

        Options as `lcore.PagedCache`; rope=True holds keys before RoPE, to be read with this model's rotations, and is
        the default for a policy with reindex=True.
        """
        config, layers = self.config, list(self.model.layers)
        options = kv_options(options, [layer.self_attn for layer in layers], self.dtype)
        return PagedCache(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            batch_size=batch_size,
            dtype=self.dtype,
            **options,
        )

    def forward(
        self,
        tokens: torch.Tensor,
        cache: PagedCache | None = None,
        *,
        last_only: bool = False,
        lengths: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the logits of the next token after each token.

        Args:
            tokens: (batch, seq) int64 or int32 on the model's device, ids below config.vocab_size.
            cache: the tokens before these; these are appended to it, and no gradient is kept. Without a cache the
                tokens are the whole text, and the call is differentiable where gradients are enabled.
            last_only: logits of each row's last real token only; nothing of size (seq, vocab) is allocated.
            lengths: (batch,) integers, the real tokens of each row, when rows are padded on the right. What stands
                in the padding is never read, and its logits mean nothing; a row of length 0 has logits 0.
            positions: (seq,) or (batch, seq), to train with chosen positions. Default: 0, 1, ... without a cache, and
                onwards from the tokens seen, row by row, with one.
        Returns: float32 (batch, seq, vocab), or (batch, 1, vocab) with last_only.
        Raises: TypeError for the dtype; ValueError for the shape, for an id outside the vocabulary, and for lengths
            outside 0 .. seq, before any work.
        """
        tokens, lengths = self._checked(tokens, cache, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            x = self._features(tokens, cache, lengths, positions)
            return self._logits(x, lengths, last_only)

    def features(
        self,
        tokens: torch.Tensor,
        cache: PagedCache | None = None,
        *,
        lengths: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `forward`, but returns (batch, seq, hidden_size), the normalised hidden states before the logits."""
        tokens, lengths = self._checked(tokens, cache, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            return self._features(tokens, cache, lengths, positions)

    def _features(
        self,
        tokens: torch.Tensor,
        cache: PagedCache | None,
        lengths: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> torch.Tensor:
        if positions is None:
            positions = next_positions(tokens.shape[1], tokens.device, cache)
        elif cache is not None and any(map(cache.layer_rope, range(self.config.num_layers))):
            rule = "be None with a cache that holds keys before RoPE and reads them at their places in it"
            raise ValueError(message("Decoder", "positions", rule, "a tensor"))
        x: torch.Tensor = self.model(tokens, positions, cache, lengths)
        return x

    def _initialize(self) -> None:
        """Normal weights with the config's spread and zero biases, as transformers starts these families."""
        for module in self.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                torch.nn.init.zeros_(module.bias)
