"""lcore.policies: what their settings may be, policies of one's own, and hard tokens."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from cache_cases import random_kv
from policy_cases import CASES, Pair
from tiny_model import tiny_folder

import lcore
from lcore import policies

EXAMPLES = Path(__file__).parent.parent / "examples"
BUDGET = "budget must be an integer >= 1, a fraction in (0, 1] or math.inf"

pytestmark = pytest.mark.usefixtures("one_thread")


def small_cache(policy, batch=1, **options):
    options = {"dtype": torch.float32, "kv_format": "fp32", "page_size": 16, **options}
    return lcore.PagedCache(1, 2, 16, batch_size=batch, policy=policy, **options)


def feed(cache, new, k=None):
    keys, values = random_kv(cache.batch_size, new, 2, 16, dtype=cache.dtype)
    cache.append(0, keys if k is None else k, values)
    return cache.attend(0, torch.randn(cache.batch_size, new, 4, 16).to(cache.dtype))


SETTINGS = [
    (lambda: policies.H2O(0), ValueError, f"H2O: {BUDGET}, got 0"),
    (lambda: policies.H2O(1.5), ValueError, f"H2O: {BUDGET}, got 1.5"),
    (lambda: policies.H2O(math.nan), ValueError, f"H2O: {BUDGET}, got nan"),
    (lambda: policies.H2O("9"), TypeError, f"H2O: {BUDGET}, got 9"),
    (lambda: policies.H2O(True), TypeError, f"H2O: {BUDGET}, got True"),
    (lambda: policies.TOVA(9, sinks=-1), ValueError, "TOVA: sinks must be an integer >= 0, got -1"),
    (lambda: policies.TOVA(9, slack=-1), ValueError, "TOVA: slack must be an integer >= 0, got -1"),
    (lambda: policies.KeyNorm(60), ValueError,
     "KeyNorm: budget must be >= sinks + window = 68, which are never dropped, got 60"),
    (lambda: policies.SnapKV(99, kernel=4), ValueError, "SnapKV: kernel must be odd, got 4"),
    (lambda: policies.SnapKV(99, window=0), ValueError, "SnapKV: window must be an integer >= 1, got 0"),
    (lambda: policies.SnapKV(99, pooling="sum"), ValueError, "SnapKV: pooling must be 'avg' or 'max', got 'sum'"),
    (lambda: policies.PyramidKV(99, beta=0), ValueError, "PyramidKV: beta must be an integer >= 1, got 0"),
    (lambda: policies.AdaKV(policies.H2O(9), alpha=2.0), ValueError, "AdaKV: alpha must be <= 1, got 2.0"),
    (lambda: policies.AdaKV(3), TypeError,
     "AdaKV: policy must be an lcore.policies.Policy that gives each head the same budget, got 3"),
    (lambda: policies.CaM(99, merge=0), ValueError, "CaM: merge must be an integer >= 1, got 0"),
    (lambda: policies.CaM(99, seed=-1), ValueError, "CaM: seed must be an integer >= 0, got -1"),
    (lambda: policies.DuoAttention([[True]]), TypeError,
     "DuoAttention: full must be a bool tensor (layers, kv_heads), got [[True]]"),
    (lambda: small_cache(policies.DuoAttention(torch.ones(3, 2).bool())), ValueError,
     "PagedCache: policy.full must have shape (layers, kv_heads) = (1, 2), got (3, 2)"),
    (lambda: small_cache(policies.H2O(99, unit=8)), ValueError,
     "PagedCache: policy.unit must be 1 or page_size = 16, got 8"),
    (lambda: small_cache(policies.CaM(99, unit=16)), NotImplementedError,
     "PagedCache: CaM writes values, which coded pages and pages dropped as a whole do not allow; "
     "use H2O, or kv_format 'bf16' and unit=1"),
    (lambda: policies.parse_policy("lru:budget=3"), ValueError,
     "policies: policy must be one of adakv, cam, h2o, keydiff, keynorm, pyramidkv, snapkv, streamingllm, tova, vatp, "
     "got 'lru'"),
    (lambda: policies.parse_policy("h2o:size=3"), ValueError,
     "policies: a setting of h2o must be one of budget, sinks, window, slack, unit, reindex, got 'size'"),
    (lambda: policies.parse_policy("h2o"), ValueError,
     "policies: policy must be given a budget, as in h2o:budget=2048, got 'h2o'"),
    (lambda: policies.parse_policy("h2o:budget"), ValueError,
     "policies: a setting must have the form key=value, got 'budget'"),
    (lambda: policies.parse_policy("snapkv:budget=many"), TypeError, f"SnapKV: {BUDGET}, got many"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), [pytest.param(*case, id=case[2][:60]) for case in SETTINGS])
def test_bad_settings(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == f"lcore.{message}"


def test_policies_from_text():
    policy = policies.parse_policy("SnapKV:budget=2048,kernel=7,pooling=max,sinks=4")
    assert type(policy) is policies.SnapKV
    assert (policy.budget, policy.kernel, policy.pooling, policy.sinks, policy.window) == (2048, 7, "max", 4, 64)
    ada = policies.parse_policy("adakv:alpha=0.5,policy=pyramidkv,budget=0.25,beta=10")
    assert type(ada) is policies.AdaKV and type(ada.policy) is policies.PyramidKV
    assert (ada.alpha, ada.budget, ada.policy.beta) == (0.5, 0.25, 10)
    assert type(policies.parse_policy("adakv:budget=300").policy) is policies.SnapKV
    assert repr(policies.parse_policy("tova:budget=9")) == (
        "TOVA(budget=9, sinks=0, window=0, slack=None, unit=None, reindex=False)"
    )


class Newest(policies.Policy):
    def scores(self, layer):
        return torch.arange(layer.keys).expand(layer.valid.shape)


def test_a_policy_of_ones_own():
    cache = small_cache(Newest(20, sinks=2, window=3, slack=0))
    k, v = random_kv(1, 50, 2, 16)
    cache.append(0, k, v)
    cache.attend(0, torch.randn(1, 50, 4, 16))
    kept = [0, 1, *range(32, 50)]
    torch.testing.assert_close(cache._slots.layers[0].tail_k[0, :, :4], k[0, kept[16:]].transpose(0, 1))
    for _ in range(3):
        feed(cache, 1)
        assert cache.lengths(0).tolist() == [[20, 20]]


def test_a_policy_without_scores_and_scores_of_a_wrong_shape():
    with pytest.raises(NotImplementedError, match=r"lcore\.Policy: a policy must define scores"):
        feed(small_cache(policies.Policy(70)), 100)

    class Flat(policies.Policy):
        def scores(self, layer):
            return torch.zeros(layer.keys)

    with pytest.raises(ValueError, match=r"lcore\.Flat\.scores: scores must have shape \(1, 2, 100\), got \(100,\)"):
        feed(small_cache(Flat(70)), 100)


def test_equal_scores_keep_the_older_and_nan_goes_first():
    class Given(policies.Policy):
        def scores(self, layer):
            scores = torch.zeros(layer.valid.shape)
            scores[..., 5:9], scores[..., 20], scores[..., 30] = torch.nan, torch.inf, -torch.inf
            return scores

    cache = small_cache(Given(10, sinks=1, window=1))
    k = torch.arange(40.0)[None, :, None, None].expand(1, 40, 2, 16).contiguous()
    feed(cache, 40, k)
    kept = cache._slots.layers[0].tail_k[0, 0, :10, 0]
    assert kept.tolist() == [0, 1, 2, 3, 4, 9, 10, 11, 20, 39]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [name for name in CASES if name != "duo"])
def test_tokens_that_are_not_numbers(name, bad):
    cache = small_cache(CASES[name][0](40, unit=1))
    keys, values = random_kv(1, 100, 2, 16)
    keys[0, 30, 0, 3] = values[0, 50, 1, 2] = bad
    cache.append(0, keys, values)
    cache.attend(0, torch.randn(1, 100, 4, 16))
    assert int(cache.lengths(0).sum()) == 80 or name == "pyramidkv"
    feed(cache, 30)
    assert cache.seen(0).tolist() == [130]


def test_scores_in_inference_mode_can_be_used_outside_of_it():
    cache = small_cache(policies.H2O(20))
    with torch.inference_mode():
        feed(cache, 50)
        cache.trim()
    feed(cache, 50)
    cache.evict(0, torch.ones(1, 2, 20, dtype=torch.bool))
    cache.crop(0)
    assert not cache._slots.scores.layers[0]["mass"].any()


def test_scores_of_tokens_that_were_cropped_are_forgotten():
    pair = Pair("h2o", 40, tokens=120)
    pair.feed(30)
    before = pair.cache._slots.scores.layers[0]["mass"].clone()
    pair.feed(8)
    pair.cache.crop(30)
    mass = pair.cache._slots.scores.layers[0]["mass"]
    assert (mass[..., :30] >= before).all() and not mass[..., 30:].any()


def test_drawn_merging_is_repeatable_and_its_mean_is_the_expectation():
    def values(seed):
        torch.manual_seed(0)
        cache = small_cache(policies.CaM(30, merge=4, seed=seed))
        feed(cache, 60)
        return cache._slots.layers[0].tail_v[0, :, :14], cache

    first, again = values(1)[0], values(1)[0]
    assert torch.equal(first, again) and not torch.equal(first, values(2)[0])
    mean = torch.stack([values(seed)[0] for seed in range(200)]).mean(0)
    torch.testing.assert_close(mean, values(None)[0], rtol=0, atol=0.12)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    folder = tiny_folder(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 60)
    monkeypatch.setattr(sys, "argv", ["own_policy.py", str(folder), str(text)])
    runpy.run_path(str(EXAMPLES / "own_policy.py"), run_name="__main__")
    assert "1,088 of 2,704 tokens kept" in capsys.readouterr().out
