"""A model and cache with the protocol that the generation loop uses, and no arithmetic: every difference is exact.

The cache stores token ids, layer by layer. The logits are a hash of the whole history of the row in the last layer, so
a token that is lost, repeated, reordered or read from padding changes all that follows.
"""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import torch
from cache_cases import contents

import lcore
from lcore.generation.rows import ActiveRows

VOCAB = 64


class ByteTokenizer:
    """Token id = byte, for ASCII below VOCAB shifted by 64: "@ABC..." has the ids 0, 1, 2, ..."""

    chat_template = "yes"
    eos_token_ids = ()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [(ord(c) - 64) % VOCAB for c in text]
        return [1, *ids] if add_special_tokens else ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(i + 64) for i in ids)

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        turns = "".join(f"[{m['role']}]{m['content']}" for m in messages)
        return turns + ("[assistant]" if add_generation_prompt else "")


def digest(history: list[int]) -> int:
    return zlib.crc32(str(history).encode())


class HistoryCache:
    """Refuses to cut a full page open, which costs a real cache its exact values, unless a step was interrupted."""

    num_kv_heads = head_dim = head_dim_v = 1
    kv_format = "fp32"
    policy = select = None
    overflow = None

    def __init__(self, batch_size: int, num_layers: int = 3, page_size: int = 1) -> None:
        self.batch_size = batch_size
        self.num_layers = num_layers
        self.page_size = page_size
        self.layers: list[list[list[int]]] = [[[] for _ in range(batch_size)] for _ in range(num_layers)]

    def seen(self, layer: int = 0) -> torch.Tensor:
        return torch.tensor([len(row) for row in self.layers[layer]])

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, *, lengths: torch.Tensor | None = None) -> None:
        for row, ids, count in zip(self.layers[layer], k.tolist(), self._counts(k, lengths), strict=True):
            row.extend(ids[:count])

    def attend(self, layer: int, q: torch.Tensor, *, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, new): for each query of a row the hash of its history, elsewhere 0."""
        out = torch.zeros_like(q)
        for row, count in enumerate(self._counts(q, lengths)):
            history = self.layers[layer][row]
            for i in range(count):
                out[row, i] = digest(history[: len(history) - count + 1 + i])
        return out

    @staticmethod
    def _counts(x: torch.Tensor, lengths: torch.Tensor | None) -> list[int]:
        return [x.shape[1]] * x.shape[0] if lengths is None else lengths.tolist()

    def crop(self, lengths: int | torch.Tensor) -> None:
        limits = torch.as_tensor(lengths).expand(self.batch_size).tolist()
        whole = self.layers[0] == self.layers[-1]
        for layer in self.layers:
            for row, limit in zip(layer, limits, strict=True):
                assert not whole or limit >= len(row) // self.page_size * self.page_size, "a full page is cut open"
                del row[limit:]

    def fork(self) -> HistoryCache:
        other = HistoryCache(self.batch_size, self.num_layers, self.page_size)
        other.layers = [[list(row) for row in layer] for layer in self.layers]
        return other

    def reserve(self, tokens: int) -> None:
        pass

    def bytes_per_token(self, layers: int, *_, **__) -> int:
        return 8 * layers

    def pages_for(self, tokens: list[int]) -> int:
        return len(self.layers) * sum(n // self.page_size for n in tokens)

    def stats(self) -> dict[str, int]:
        pages = sum(len(row) for layer in self.layers for row in layer)
        return {"bytes": 8 * pages, "pool_bytes": 8 * pages, "pages": pages, "free_pages": 0, "page_bytes": 8}


class HistoryModel:
    """`script` maps a position to the token that must come there; other positions follow the hash."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(
        self, script: dict[int, int] | None = None, eos: tuple[int, ...] = (), limit: int = 0, page_size: int = 1
    ) -> None:
        self.config = SimpleNamespace(
            vocab_size=VOCAB,
            eos_token_ids=eos,
            max_position_embeddings=limit,
            num_layers=3,
            num_heads=1,
            num_kv_heads=1,
            head_dim=1,
            hidden_size=1,
            intermediate_size=1,
        )
        self.tokenizer: ByteTokenizer | None = ByteTokenizer()
        self.script = script or {}
        self.page_size = page_size
        self.steps: list[list[int]] = []  # real tokens of each row, step by step
        self.interrupt_at: tuple[int, int] | None = None  # (step, layer) that raises KeyboardInterrupt

    def new_cache(self, batch_size: int = 1, kv_format: str | None = None, policy: None = None) -> HistoryCache:
        return HistoryCache(batch_size, page_size=self.page_size)

    def __call__(self, tokens, cache, *, last_only, lengths=None):
        assert not torch.is_grad_enabled()
        counts = [tokens.shape[1]] * tokens.shape[0] if lengths is None else lengths.tolist()
        assert max(counts) == tokens.shape[1] and min(counts) > 0
        for layer in range(self.config.num_layers):
            if self.interrupt_at == (len(self.steps), layer):
                self.interrupt_at = None
                raise KeyboardInterrupt
            self._append(cache, layer, tokens, lengths)
        self.steps.append(counts)
        digests = self._digests(cache, layer, tokens, lengths)
        logits = torch.full((*tokens.shape, VOCAB), float("nan"))  # of padding they must not be read
        for row, (seen, count) in enumerate(zip(cache.seen().tolist(), counts, strict=True)):
            for i in range(count - 1 if last_only else 0, count):
                logits[row, i] = self._logits(digests[row][i], seen - count + 1 + i)
        last = torch.tensor(counts) - 1
        return logits[torch.arange(len(counts)), last][:, None] if last_only else logits

    def _append(self, cache, layer, tokens, lengths):
        cache.append(layer, tokens, tokens, lengths=lengths)

    def _digests(self, cache, layer, tokens, lengths) -> list[list[int]]:
        """Of each row, for each of its tokens, the hash of the history up to it."""
        return cache.attend(layer, tokens, lengths=lengths).tolist()

    def _logits(self, seed: int, position: int) -> torch.Tensor:
        if position in self.script:
            return torch.nn.functional.one_hot(torch.tensor(self.script[position]), VOCAB).float() * 50
        return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


class PagedHistoryModel(HistoryModel):
    """The same over a real PagedCache, where a token is its own key: the history is read back from pages and tails."""

    page_size = 8

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, page_size=self.page_size, **options)

    def new_cache(self, batch_size: int = 1, kv_format: str | None = None, policy: None = None) -> lcore.PagedCache:
        shape = (self.config.num_layers, 1, 1)
        return lcore.PagedCache(
            *shape, batch_size=batch_size, dtype=torch.float32, kv_format="fp32", page_size=self.page_size
        )

    def parameters(self):
        return iter(())

    buffers = parameters

    def _append(self, cache, layer, tokens, lengths):
        states = tokens[..., None, None].float()
        cache.append(layer, states, states, lengths=lengths)

    def _digests(self, cache, layer, tokens, lengths) -> list[list[int]]:
        whole, rows = (
            (cache._cache, cache._index) if isinstance(cache, ActiveRows) else (cache, range(cache.batch_size))
        )
        histories = stored_tokens(whole, layer)
        counts = HistoryCache._counts(tokens, lengths)
        return [
            [digest(histories[row][: len(histories[row]) - count + 1 + i]) for i in range(count)]
            for row, count in zip(rows, counts, strict=True)
        ]


def stored_tokens(cache: lcore.PagedCache, layer: int) -> list[list[int]]:
    """What each row of a layer holds, as its keys say."""
    found = contents(cache, layer)
    keys = [(found[at].flatten(), found[at + 2].flatten()) for at in range(0, len(found), 4)]
    return [torch.cat(parts).view(torch.float32).int().tolist() for parts in keys]
