"""Mamba, Falcon Mamba and Mamba-2 models, in the parameter names of Hugging Face checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore.cache import LayerState, StateCache
from lcore.models.causal_lm import CausalLM
from lcore.models.mamba_config import MambaConfig
from lcore.models.tokenizer import Tokenizer
from lcore.nn import Linear, Mamba, Mamba2, RMSNorm


class MambaLayer(torch.nn.Module):
    """One pre-norm block: x + mixer(norm(x)), where the sum may run in float32 through all layers."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.mixer = _mixer(config)
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.residual_in_fp32 = config.residual_in_fp32

    def forward(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None, each: bool
    ) -> tuple[Tensor, LayerState]:
        mixed, state = self.mixer(self.norm(x.to(self.norm.weight.dtype)), state, cu_seqlens=cu_seqlens,
                                  return_final_state=True, each=each)  # fmt: skip
        wide = torch.promote_types(x.dtype, torch.float32) if self.residual_in_fp32 else x.dtype
        return x.to(wide) + mixed, state


class MambaBackbone(torch.nn.Module):
    """Embedding, layers and the last norm: everything but the projection to the vocabulary."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(MambaLayer(config) for _ in range(config.num_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(
        self, x: Tensor, cache: StateCache | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, list[LayerState]]:
        """x: (batch, seq, hidden_size), the embeddings; returns the features and the state of every layer after x."""
        states: list[LayerState] = []
        for index, layer in enumerate(self.layers):
            each = cache is not None and cache.every_token
            x, state = layer(x, None if cache is None else cache.layer(index), cu_seqlens, each)
            if cache is not None:
                states.append(state)
        return self.norm_f(x.to(self.norm_f.weight.dtype)), states


class MambaDecoder(CausalLM):
    """A causal language model of recurrent layers; `load_model` reads one, `MambaDecoder(config)` starts one at random.

    Args:
        config: its shape.
        dtype, device: of the parameters.
        tokenizer: kept as `model.tokenizer` and saved with the model.
    """

    config: MambaConfig
    embedding_name = "backbone.embeddings.weight"
    cache_kind = "StateCache"

    def __init__(
        self,
        config: MambaConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        with torch.device(device):
            self.backbone = MambaBackbone(config)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.to(dtype)
        if torch.device(device).type != "meta":
            self._initialize()

    def new_cache(self, batch_size: int = 1, **options: Any) -> StateCache:
        """A StateCache with this model's layers that has read nothing; options as there."""
        layers: Any = self.backbone.layers
        return StateCache([layer.mixer.new_state(batch_size) for layer in layers], **options)

    def forward(
        self,
        tokens: Tensor,
        cache: StateCache | None = None,
        *,
        last_only: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Computes the logits of the next token after each token.

        Args:
            tokens: (batch, seq) int64 or int32 on the model's device, ids below config.vocab_size.
            cache: the tokens before these, any number at once; it steps on by these when all layers have read them, and
                no gradient is kept. Without a cache the tokens are the whole text, and the call is differentiable.
            last_only: logits of each row's last real token only; nothing of size (seq, vocab) is allocated.
            lengths: (batch,) integers, the real tokens of each row, when rows are padded on the right. The padding is
                neither read nor computed, and its logits mean nothing; a row of length 0 has logits 0.
        Returns: float32 (batch, seq, vocab), or (batch, 1, vocab) with last_only.
        Raises: TypeError for the dtype and for another kind of cache; ValueError for the shape, for an id outside the
            vocabulary, and for lengths outside 0 .. seq, before any work.
        """
        tokens, lengths = self._checked(tokens, cache, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            return self._logits(self._features(tokens, cache, lengths), lengths, last_only)

    def features(self, tokens: Tensor, cache: StateCache | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """As `forward`, but returns (batch, seq, hidden_size), the normalised hidden states before the logits."""
        tokens, lengths = self._checked(tokens, cache, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            return self._features(tokens, cache, lengths)

    def _features(self, tokens: Tensor, cache: StateCache | None, lengths: Tensor | None) -> Tensor:
        x = self.backbone.embeddings(tokens)
        if lengths is None or (cache is not None and cache.every_token):
            x, states = self.backbone(x, cache, None)
        else:
            real = torch.arange(tokens.shape[1], device=x.device) < lengths.to(x.device)[:, None]
            cu_seqlens = torch.nn.functional.pad(lengths.to(x.device).cumsum(0), (1, 0)).to(torch.int32)
            packed, states = self.backbone(x[real][None], cache, cu_seqlens)
            x = torch.zeros_like(x).index_put((real,), packed[0])
        if cache is not None:
            cache.advance(states, tokens.shape[1] if lengths is None else lengths)
        return x

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal embeddings and input projections with the config's spread; mixers start themselves."""
        for name, parameter in self.named_parameters():
            if name.endswith(("embeddings.weight", "lm_head.weight", "in_proj.weight", "x_proj.weight")):
                parameter.normal_(std=self.config.initializer_range)


def _mixer(config: MambaConfig) -> Mamba | Mamba2:
    shared: dict[str, Any] = {
        "conv_width": config.conv_kernel,
        "bias": config.use_bias,
        "conv_bias": config.use_conv_bias,
    }
    if config.model_type == "mamba2":
        return Mamba2(
            config.hidden_size,
            config.num_heads,
            config.head_dim,
            config.state_size,
            num_groups=config.n_groups,
            norm_eps=config.layer_norm_epsilon,
            dt_limit=config.time_step_limit,
            **shared,
        )
    return Mamba(
        config.hidden_size,
        config.intermediate_size,
        config.state_size,
        dt_rank=config.time_step_rank,
        norm_eps=config.mixer_rms_eps if config.model_type == "falcon_mamba" else None,
        **shared,
    )
