"""Decoders of attention and recurrent layers in turns, with mixtures of experts: what Jamba and Qwen3-Next share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lcore.cache import HybridCache, LayerState, StateCache
from lcore.models.causal_lm import CausalLM
from lcore.models.decoder import kv_options
from lcore.models.hybrid_config import HybridConfig
from lcore.models.tokenizer import Tokenizer
from lcore.nn import Attention, Linear
from lcore.nn.attention import next_positions


class Parts(NamedTuple):
    """Of a layer: what mixes tokens, the norm before the feed-forward block, and that block."""

    mixer: torch.nn.Module
    norm: torch.nn.Module
    mlp: torch.nn.Module


class Packing(NamedTuple):
    """Rows of different lengths, right-padded: which tokens are real, and where each row of them begins."""

    real: Tensor  # (batch, seq) bool
    cu_seqlens: Tensor

    @classmethod
    def of(cls, seq: int, lengths: Tensor) -> Packing:
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        return cls(torch.arange(seq, device=lengths.device) < lengths[:, None], cu_seqlens)


class HybridLayer(torch.nn.Module):
    """One pre-norm block: x + mixer(norm(x)), then x + mlp(norm(x)). Subclasses name the modules as checkpoints do."""

    attends: bool
    input_layernorm: torch.nn.Module

    @property
    def parts(self) -> Parts:
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: HybridCache | None,
        state: LayerState | None,
        lengths: Tensor | None,
        packing: Packing | None,
    ) -> tuple[Tensor, LayerState | None]:
        """x after the block, and the state after x of a recurrent layer."""
        mixer, norm, mlp = self.parts
        mixed = self.input_layernorm(x)
        if isinstance(mixer, Attention):
            mixed, state = mixer(mixed, positions, cache, lengths=lengths), None
        elif packing is None:
            each = cache is not None and cache.states.every_token
            mixed, state = mixer(mixed, state, return_final_state=True, each=each)
        else:
            out, state = mixer(mixed[packing.real][None], state, cu_seqlens=packing.cu_seqlens, return_final_state=True)
            mixed = torch.zeros_like(mixed).index_put((packing.real,), out[0])
        x = x + mixed
        return x + mlp(norm(x)), state


class HybridBackbone(torch.nn.Module):
    """Embedding, layers and the last norm, under the name that the family gives it."""

    def __init__(self, config: HybridConfig, layers: list[HybridLayer], norm: Callable[[], torch.nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = torch.nn.ModuleList(layers)
        self.last_norm = config.last_norm
        self.add_module(self.last_norm, norm())

    def forward(
        self, tokens: Tensor, positions: Tensor, cache: HybridCache | None, lengths: Tensor | None
    ) -> tuple[Tensor, list[LayerState]]:
        """The features, and the states of the recurrent layers after them."""
        states: list[LayerState] = []
        each = cache is not None and cache.states.every_token
        packing = None if lengths is None or each else Packing.of(tokens.shape[1], lengths.to(tokens.device))
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            before = None if cache is None or layer.attends else cache.states.layer(len(states))
            x, state = layer(x, positions, cache, before, lengths, packing)
            if not layer.attends:
                states.append(state)
        return self.get_submodule(self.last_norm)(x), states


class HybridDecoder(CausalLM):
    """A causal language model of attention and recurrent layers; `load_model` reads one, `HybridDecoder(config)` starts
    one at random.

    Args:
        config: its shape.
        dtype, device: of the parameters.
        tokenizer: kept as `model.tokenizer` and saved with the model.
    """

    config: HybridConfig
    embedding_name = "model.embed_tokens.weight"
    cache_kind = "HybridCache"

    def __init__(
        self,
        config: HybridConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        with torch.device(device):
            self.model = HybridBackbone(config, *config.modules())
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.to(dtype)
        if torch.device(device).type != "meta":
            self._initialize()

    def new_cache(self, batch_size: int = 1, *, checkpoint_every: int | None = None, **options: Any) -> HybridCache:
        """An empty HybridCache with this model's layers and heads; checkpoint_every as `lcore.StateCache`, other
        options as `Decoder.new_cache`."""
        config, layers = self.config, cast("list[HybridLayer]", list(self.model.layers))
        mixers: list[Any] = [layer.parts.mixer for layer in layers]
        states = [mixer.new_state(batch_size) for mixer in mixers if not isinstance(mixer, Attention)]
        attention = [mixer for mixer in mixers if isinstance(mixer, Attention)]
        return HybridCache(
            StateCache(states, checkpoint_every=checkpoint_every),
            len(attention),
            config.num_kv_heads,
            config.head_dim,
            dtype=self.dtype,
            **kv_options(options, attention, self.dtype),
        )

    def forward(
        self,
        tokens: Tensor,
        cache: HybridCache | None = None,
        *,
        last_only: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Computes the logits of the next token after each token.

        Args:
            tokens: (batch, seq) int64 or int32 on the model's device, ids below config.vocab_size.
            cache: the tokens before these; keys and values of these are appended to its pages layer by layer, its
                states step on when all layers have read them, and no gradient is kept. Without a cache the tokens are
                the whole text, and the call is differentiable.
            last_only: logits of each row's last real token only; nothing of size (seq, vocab) is allocated.
            lengths: (batch,) integers, the real tokens of each row, when rows are padded on the right. The padding is
                never read, and its logits mean nothing; a row of length 0 has logits 0.
        Returns: float32 (batch, seq, vocab), or (batch, 1, vocab) with last_only.
        Raises: TypeError for the dtype and for another kind of cache; ValueError for the shape, for an id outside the
            vocabulary, and for lengths outside 0 .. seq, before any work.
        """
        tokens, lengths = self._checked(tokens, cache, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            return self._logits(self._features(tokens, cache, lengths), lengths, last_only)

    def features(self, tokens: Tensor, cache: HybridCache | None = None, *, lengths: Tensor | None = None) -> Tensor:
        """As `forward`, but returns (batch, seq, hidden_size), the normalised hidden states before the logits."""
        tokens, lengths = self._checked(tokens, cache, lengths)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            return self._features(tokens, cache, lengths)

    def _features(self, tokens: Tensor, cache: HybridCache | None, lengths: Tensor | None) -> Tensor:
        positions = next_positions(tokens.shape[1], tokens.device, cache)
        x, states = self.model(tokens, positions, cache, lengths)
        if cache is not None:
            cache.states.advance(states, tokens.shape[1] if lengths is None else lengths)
        return x

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal projections and embeddings with the config's spread; what a recurrence starts with starts itself."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.endswith(("A_log", "dt_proj.weight")):
                parameter.normal_(std=self.config.initializer_range)
