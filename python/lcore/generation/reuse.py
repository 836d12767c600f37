"""What a generator's prompts have in common with what it read before: pages taken from and left to a PrefixCache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lcore.cache import PrefixCache, states_of

if TYPE_CHECKING:
    from lcore.generation.row import Row
    from lcore.models import Decoder

# Formats that hold every value of a dtype: a key is the same in the tail and in its page.
_EXACT = {torch.float32: {"fp32"}, torch.float16: {"fp16", "fp32"}, torch.bfloat16: {"bf16", "fp32"}}
_SAMPLES = 16  # values of a parameter that its fingerprint holds


class Reuse:
    """One call's part in a PrefixCache: `tokens[row]` tokens of each prompt are in the cache from the start.

    The logits are the bits that they are without it. In a format that rounds, a token reads its own page from the tail,
    unrounded, as long as the page is not full: its keys depend on where chunks ended. Then written tokens, which came
    one by one, are not kept, and where chunks do not end with pages, only prompts cut alike share them. Nor are tokens
    kept that were written under a selection. Recurrent states round with every chunk: of their models, too, only
    prompts that are cut alike share states, which stand where chunks end, and none of what was written.
    """

    def __init__(
        self,
        prefixes: PrefixCache,
        model: Decoder,
        cache: Any,
        prompts: Sequence[torch.Tensor],
        prefill_chunk: int,
    ) -> None:
        self._prefixes, self._model, self._cache = prefixes, model, cache
        self._exact, aligned = False, False
        if states_of(cache) is None:
            self._exact = set(cache.kv_format) <= _EXACT[cache.dtype]
            aligned = self._exact or prefill_chunk % cache.page_size == 0
        self._state = _state(model)
        self._namespace = fingerprint(model) + (b"" if aligned else b"%d" % prefill_chunk)
        self.tokens = prefixes.start(cache, prompts, self._namespace)

    def keep(self, row: Row) -> None:
        """Leaves what a row has read, and written, for later prompts; nothing after the weights have changed."""
        as_prompt = self._exact and self._cache.select is None  # written tokens as a prompt would leave them
        if (row.written and not as_prompt) or _state(self._model) != self._state:
            return
        tokens = torch.cat([row.prompt, torch.tensor(row.written, dtype=torch.int64)])
        self._prefixes.insert(self._cache, row.index, tokens, self._namespace)


def fingerprint(model: Decoder) -> bytes:
    """32 bytes that change when the config, a parameter or a buffer does.

    Two models share it only when they share their tensors. torch counts writes to a tensor; what is written through
    `.data` it does not count, so a few values along the diagonal are looked at too. Finer changes made that way, and
    hooks, are not seen: `PrefixCache.clear` after them.
    """
    digest = hashlib.sha256(repr(_state(model)).encode())
    samples = [_sample(tensor.detach()) for tensor in _tensors(model) if tensor.numel() > 0]
    if samples:
        digest.update(torch.cat(samples).double().cpu().numpy().tobytes())
    return digest.digest()


def _tensors(model: Decoder) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _state(model: Decoder) -> tuple[object, ...]:
    """The config, and where each tensor is and how often torch has counted a write to it."""
    places = [
        (t.data_ptr(), 0 if t.is_inference() else t._version, tuple(t.shape), t.stride(), t.dtype)
        for t in _tensors(model)
    ]
    return model.config, model.dtype, places


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A view of some values along the diagonal."""
    length = min(tensor.shape, default=1)
    step = max(1, length // _SAMPLES)
    return tensor.as_strided((-(-length // step),), (step * sum(tensor.stride()),), tensor.storage_offset())
