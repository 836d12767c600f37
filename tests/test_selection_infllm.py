"""lcore.selection.InfLLM: pages by the keys that the text looked at; and a selection of one's own."""

import pytest
import selection_oracles as oracle
import torch
from tolerance import assert_close

import lcore
from lcore import reference
from lcore.cache.selection import InfLLM, Selection

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, KV_HEADS, DIM, SIZE, LOCAL = 6, 2, 32, 16, 64


def new_cache(select, batch=1):
    return lcore.PagedCache(
        1, KV_HEADS, DIM, batch_size=batch, dtype=torch.float32, kv_format="fp32", page_size=SIZE, select=select
    )


class Text:
    """Tokens fed to a cache in steps, and the attention that the oracle sees each key receive."""

    def __init__(self, tokens, select):
        self.q = torch.randn(tokens, HEADS, DIM)
        self.k, self.v = torch.randn(tokens, KV_HEADS, DIM), torch.randn(tokens, KV_HEADS, DIM)
        self.mass = torch.zeros(KV_HEADS, tokens, dtype=torch.float64)
        self.cache, self.select, self.fed = new_cache(select), select, 0

    def feed(self, new):
        """The next tokens; checks the output of each against attention over the oracle's pages."""
        group, end = HEADS // KV_HEADS, self.fed + new
        q, k, v = (x[self.fed : end][None] for x in (self.q, self.k, self.v))
        self.cache.append(0, k, v)
        out = self.cache.attend(0, q)
        keys = self.k[:end].double()
        for h in range(KV_HEADS):
            own = self.q[self.fed : end, h * group : (h + 1) * group].double()
            select = self.select
            scores = oracle.infllm_scores(own, keys[:, h], self.known[h], SIZE, select.representatives)
            pages = oracle.best_pages(scores, end, new, SIZE, select.budget, select.sinks, select.recent)
            read = oracle.tokens_of(pages, end, SIZE)
            part = [x[read, h : h + 1][None] for x in (keys, self.v[:end].double())]
            want = reference.attention(own[None], *part, causal=True)[0]
            low = reference.attention(own[None].float(), *(x.float() for x in part), causal=True)[0]
            heads = slice(h * group, (h + 1) * group)
            assert_close(out[:, :, heads], want, low, f"token {end}", slack_ulp=32)
            weights = oracle.weights(own, part[0][0, :, 0])
            seen = torch.zeros(new, end, dtype=torch.float64)
            seen[:, read] = weights.sum(1)
            distance = torch.arange(self.fed, end)[:, None] - torch.arange(end)
            self.mass[h, :end] += seen.masked_fill(distance > LOCAL, 0).sum(0)
        self.fed = end

    def follow(self, steps):
        """Feeds them. A page keeps the masses that it has at the first call that leaves a page unread behind it."""
        known = torch.zeros_like(self.mass)
        frozen = [0] * KV_HEADS
        for new in steps:
            end = self.fed + new
            ranked = max(0, min(end // SIZE - self.select.recent, self.fed // SIZE))
            room = self.select.budget - (end // SIZE - ranked)
            if min(max(room, self.select.sinks), ranked) < ranked:
                for h in range(KV_HEADS):
                    known[h, frozen[h] * SIZE : ranked * SIZE] = self.mass[h, frozen[h] * SIZE : ranked * SIZE]
                    frozen[h] = max(frozen[h], ranked)
            self.known = known
            self.feed(new)


def test_chunks_then_decoding():
    text = Text(500, InfLLM(12, representatives=3, local_tokens=LOCAL, sinks=1, recent=4))
    text.follow([100, 90, 64, 33, *([1] * 40), 50, *([1] * 20)])


def test_representatives_are_the_keys_that_were_looked_at():
    """A page of noise with one key that every query seeks: it stands for the page."""
    select = InfLLM(6, representatives=1, local_tokens=LOCAL, sinks=1, recent=2)
    cache = new_cache(select)
    k, v = torch.randn(1, 400, KV_HEADS, DIM) * 0.1, torch.randn(1, 400, KV_HEADS, DIM)
    sought = torch.randn(KV_HEADS, DIM) * 3
    k[0, 5 * SIZE + 7] = sought
    q = sought.repeat_interleave(HEADS // KV_HEADS, 0).expand(1, 400, HEADS, DIM).contiguous()
    for begin in range(0, 400, 40):
        part = slice(begin, begin + 40)
        cache.append(0, k[:, part], v[:, part])
        cache.attend(0, q[:, part])
    summaries = cache._slots.index.summaries[0]
    assert torch.equal(summaries[0, :, 5, 0], sought.bfloat16())
    assert torch.equal(summaries[:, :, :, 0], summaries[:, :, :, 1])
    want = lcore.attention(q[:, -1:], k, v, causal=True)
    torch.testing.assert_close(cache.attend(0, q[:, -1:]), want, rtol=0.02, atol=0.02)


def test_without_observed_attention_the_mean_stands_for_a_page():
    cache = new_cache(InfLLM(6, representatives=2, local_tokens=LOCAL, sinks=1, recent=2))
    k, v = torch.randn(1, 400, KV_HEADS, DIM), torch.randn(1, 400, KV_HEADS, DIM)
    cache.append(0, k, v)
    cache.attend(0, torch.randn(1, 1, HEADS, DIM))
    mean = k[0, : 16 * 20].unflatten(0, (20, 16)).mean(1) * 2
    found = cache._slots.index.summaries[0][0, :, :20, 0].transpose(0, 1)
    torch.testing.assert_close(found.float(), mean, rtol=0.01, atol=0.01)


def test_crop_forgets_what_the_taken_tokens_are():
    select = InfLLM(8, representatives=2, local_tokens=LOCAL, sinks=1, recent=2)
    cache, again = new_cache(select), new_cache(select)
    k, v, q = torch.randn(1, 300, KV_HEADS, DIM), torch.randn(1, 300, KV_HEADS, DIM), torch.randn(1, 300, HEADS, DIM)
    for c, n in ((cache, 300), (again, 200)):
        for begin in range(0, n, 100):
            part = slice(begin, begin + 100)
            c.append(0, k[:, part], v[:, part])
            c.attend(0, q[:, part])
    cache.crop(200)
    mass = cache._slots.index.mass[0]
    assert not mass[..., 200:].any() and mass[..., :200].any()
    assert (cache._slots.index.known <= 200 // SIZE).all()


class Newest(Selection):
    """Pages by their number."""

    def summarize(self, pages, first, last):
        return torch.zeros_like(pages.bounds(first, last))

    def scores(self, q, summaries, page_counts, lengths, softmax_scale):
        numbers = torch.arange(summaries.shape[2], dtype=torch.float32)
        return numbers.expand(*summaries.shape[:2], -1).contiguous()


def test_a_selection_of_ones_own():
    cache = new_cache(Newest(5, sinks=1, recent=1, dense_layers=0))
    k, v, q = torch.randn(1, 400, KV_HEADS, DIM), torch.randn(1, 400, KV_HEADS, DIM), torch.randn(1, 1, HEADS, DIM)
    cache.append(0, k, v)
    read = [*range(16), *range(400 - 4 * 16, 400)]
    want = lcore.attention(q, k[:, read], v[:, read], causal=True)
    torch.testing.assert_close(cache.attend(0, q), want)
    with pytest.raises(NotImplementedError, match="must define summarize"):
        new_cache(Selection(2)).select.summarize(None, 0, 1)
