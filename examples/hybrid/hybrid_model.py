"""A small decoder whose layers are a list of names: attention, the gated delta rule or Mamba-2, and all else alike.

No layer has positions. Every mixer passes its queries, keys and values through a short causal convolution, attention
too, and so knows what stands right before a token. What is compared is then only how a layer remembers: all keys and
values, or a state of fixed size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcore import PagedCache, StateCache, attention, causal_conv1d
from lcore.cache import LayerState
from lcore.nn import GatedDeltaNet, GatedMLP, Linear, Mamba2, RMSNorm

MODELS = {
    "attention": ("attention", "attention", "attention"),
    "delta": ("delta", "delta", "delta"),
    "mamba2": ("mamba2", "mamba2", "mamba2"),
    "hybrid": ("delta", "attention", "delta"),
}
CONV_WIDTH = 4
CHUNK = 2048  # tokens that are read at once into a cache


@dataclass(frozen=True)
class Sizes:
    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 256
    num_heads: int = 2
    head_dim: int = 64


class ConvAttention(torch.nn.Module):
    """Attention without positions over conv(q), conv(k) and conv(v)."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        self.layer, self.shape = layer, (3, sizes.num_heads, sizes.head_dim)
        inner = sizes.num_heads * sizes.head_dim
        self.in_proj = Linear(sizes.hidden_size, 3 * inner, bias=False)
        self.conv1d = torch.nn.Conv1d(3 * inner, 3 * inner, CONV_WIDTH, groups=3 * inner, bias=False)
        self.out_proj = Linear(inner, sizes.hidden_size, bias=False)

    def new_state(self, batch_size: int = 1) -> LayerState:
        """The convolution's; keys and values are in the pages."""
        weight = self.conv1d.weight
        conv = weight.new_zeros(batch_size, weight.shape[0], CONV_WIDTH - 1)
        return LayerState(conv, weight.new_zeros(batch_size, 0))

    def forward(self, x: Tensor, state: LayerState | None, pages: PagedCache | None) -> tuple[Tensor, LayerState]:
        conv, nothing = self.new_state(len(x)) if state is None else state
        mixed, conv = causal_conv1d(
            self.in_proj(x).transpose(1, 2), self.conv1d.weight.squeeze(1), initial_state=conv, return_final_state=True
        )
        q, k, v = mixed.transpose(1, 2).unflatten(-1, self.shape).unbind(2)
        if pages is None:
            out = attention(q, k, v, causal=True)
        else:
            pages.append(self.layer, k, v)
            out = pages.attend(self.layer, q)
        return self.out_proj(out.flatten(2)), LayerState(conv, nothing)


class Layer(torch.nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, mixer: ConvAttention | GatedDeltaNet | Mamba2, sizes: Sizes) -> None:
        super().__init__()
        self.mixer = mixer
        self.mlp = GatedMLP(sizes.hidden_size, sizes.intermediate_size)
        self.mixer_norm, self.mlp_norm = RMSNorm(sizes.hidden_size), RMSNorm(sizes.hidden_size)

    def forward(self, x: Tensor, state: LayerState | None, pages: PagedCache | None) -> tuple[Tensor, LayerState]:
        inputs = self.mixer_norm(x)
        if isinstance(self.mixer, ConvAttention):
            mixed, state = self.mixer(inputs, state, pages)
        else:
            mixed, state = self.mixer(inputs, state, return_final_state=True)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state


@dataclass
class HybridCache:
    """Pages of the attention layers, if there are any, and the state of every layer."""

    pages: PagedCache | None
    states: StateCache

    def fork(self) -> HybridCache:
        return HybridCache(None if self.pages is None else self.pages.fork(), self.states.fork())

    def bytes(self) -> tuple[int, int]:
        """Of pages and of states, as torch holds them."""
        return 0 if self.pages is None else int(self.pages.stats()["bytes"]), self.states.stats()["bytes"]

    def close(self) -> None:
        if self.pages is not None:
            self.pages.close()


class HybridDecoder(torch.nn.Module):
    """A causal language model; `mixers` names the mixer of each layer. The embedding is the output projection."""

    def __init__(self, mixers: Sequence[str], sizes: Sizes | None = None) -> None:
        super().__init__()
        self.mixers, self.sizes = tuple(mixers), sizes or Sizes()
        attention = [index for index, kind in enumerate(mixers) if kind == "attention"]
        self.num_attention = len(attention)
        built = (
            new_mixer(kind, self.sizes, attention.index(index) if index in attention else 0)
            for index, kind in enumerate(mixers)
        )
        self.layers = torch.nn.ModuleList(Layer(mixer, self.sizes) for mixer in built)
        self.norm = RMSNorm(self.sizes.hidden_size)
        self.lm_head = Linear(self.sizes.hidden_size, self.sizes.vocab_size, bias=False)

    def new_cache(self, batch_size: int = 1) -> HybridCache:
        """A cache that has read nothing."""
        sizes, pages = self.sizes, None
        if self.num_attention:
            pages = PagedCache(self.num_attention, sizes.num_heads, sizes.head_dim, batch_size=batch_size,
                               dtype=torch.float32, kv_format="fp32")  # fmt: skip
        return HybridCache(pages, StateCache([layer.mixer.new_state(batch_size) for layer in self.layers]))

    def features(self, tokens: Tensor, cache: HybridCache | None = None, *, positions: object = None) -> Tensor:
        """(batch, seq, hidden_size): the normalised hidden states. positions are not read: no layer has any."""
        x, states = torch.nn.functional.embedding(tokens, self.lm_head.weight), []
        for index, layer in enumerate(self.layers):
            before = None if cache is None else cache.states.layer(index)
            x, after = layer(x, before, None if cache is None else cache.pages)
            states.append(after)
        if cache is not None:
            cache.states.advance(states, tokens.shape[1])
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: HybridCache | None = None, *, last_only: bool = False) -> Tensor:
        """(batch, seq, vocab): logits of the next token after each token, or (batch, 1, vocab) after the last one."""
        x = self.features(tokens, cache)
        return self.lm_head(x[:, -1:] if last_only else x)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.detach().to(torch.bfloat16) for name, weight in self.named_parameters()}
        save_file(weights, path, metadata={"mixers": ",".join(self.mixers)})

    @classmethod
    def load(cls, path: Path) -> HybridDecoder:
        with safe_open(path, "pt") as file:
            model = cls(file.metadata()["mixers"].split(","))
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return model


def new_mixer(kind: str, sizes: Sizes, layer: int) -> ConvAttention | GatedDeltaNet | Mamba2:
    heads, dim = sizes.num_heads, sizes.head_dim
    if kind == "attention":
        return ConvAttention(sizes, layer)
    if kind == "delta":
        return GatedDeltaNet(sizes.hidden_size, heads, heads, dim, dim, conv_width=CONV_WIDTH)
    if kind == "mamba2":
        return Mamba2(sizes.hidden_size, 2 * heads, dim, dim, conv_width=CONV_WIDTH)
    raise ValueError(f"new_mixer: kind must be attention, delta or mamba2, got {kind!r}")


@torch.no_grad()
def read(model: HybridDecoder, cache: HybridCache, tokens: Tensor) -> Tensor:
    """Reads (batch, seq) tokens in chunks; returns the logits after the last one, (batch, vocab)."""
    for part in tokens.split(CHUNK, dim=1):
        logits = model(part, cache, last_only=True)
    return logits[:, 0]


def generate(model: HybridDecoder, cache: HybridCache, tokens: Tensor, count: int) -> Iterator[Tensor]:
    """The `count` likeliest tokens after `tokens`, one at a time, each (batch,)."""
    for _ in range(count):
        token = read(model, cache, tokens).argmax(-1)
        yield token
        tokens = token[:, None]
