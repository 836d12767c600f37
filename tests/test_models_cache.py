"""A decoder that reads left to right through a paged cache against the same text read at once."""

import pytest
import torch
from model_cases import CASES, random_tokens, reference_logits, write_reference

import lcore

SEQ = 150  # pages of 64: two full ones and a tail
CHUNKS = {"one": [150], "halves": [75, 75], "mixed": [1, 2, 61, 1, 64, 20, 1], "page-edges": [63, 1, 1, 63, 22]}


def read(model, tokens, chunks, **cache_options):
    """Logits of all tokens, read chunk by chunk into a fresh cache."""
    cache = model.new_cache(tokens.shape[0], **cache_options)
    return torch.cat([model(part, cache) for part in tokens.split(chunks, dim=1)], dim=1), cache


@pytest.mark.parametrize("name", CASES)
def test_chunks_equal_one_pass(name, tmp_path):
    reference = write_reference(name, tmp_path)
    tokens = random_tokens(2, SEQ)
    want = reference_logits(reference, tokens)
    model = lcore.load_model(tmp_path)
    for chunks in (CHUNKS["one"], CHUNKS["mixed"]):
        got, cache = read(model, tokens, chunks)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        assert cache.seen().tolist() == [SEQ, SEQ]


def keeps_row_order(dtype):
    """Whether oneDNN sums a row of a product in one order: not where it imitates bfloat16 with float32 AVX-512."""
    can = torch.cpu.get_capabilities()
    return dtype == torch.float32 or not can.get("avx512_f") or bool(can.get("avx512_bf16"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mistral-window", "qwen3"])
def test_bits_do_not_depend_on_chunks_batch_or_threads(name, dtype, tmp_path):
    if not keeps_row_order(dtype):
        pytest.skip("torch's bfloat16 product depends on the number of rows on this CPU")
    write_reference(name, tmp_path)
    model = lcore.load_model(tmp_path, dtype=dtype)
    tokens = random_tokens(3, SEQ)
    want, _ = read(model, tokens, CHUNKS["one"])
    for chunks in CHUNKS.values():
        assert torch.equal(read(model, tokens, chunks)[0], want), chunks
        assert torch.equal(read(model, tokens[1:2], chunks)[0], want[1:2]), chunks
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(read(model, tokens, CHUNKS["mixed"])[0], want), count
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["llama-yarn", "qwen2-sliding"])
def test_rows_of_different_lengths(name, tmp_path):
    reference = write_reference(name, tmp_path)
    model = lcore.load_model(tmp_path)
    texts = [random_tokens(1, n, seed=n) for n in (90, 33, 70)]
    cache = model.new_cache(3)
    # The second text ends in the first chunk and has no token in the second.
    for start in (0, 45):
        parts = [text[:, start : start + 45] for text in texts]
        lengths = torch.tensor([part.shape[1] for part in parts])
        tokens = torch.full((3, 45), 7)
        for row, part in enumerate(parts):
            tokens[row, : part.shape[1]] = part
        last = model(tokens, cache, lengths=lengths, last_only=True)
        for row, text in enumerate(texts):
            if lengths[row] > 0:
                want = reference_logits(reference, text[:, : start + 45])[0, -1]
                torch.testing.assert_close(last[row, 0], want, rtol=0, atol=1e-4)
            else:
                assert torch.equal(last[row], torch.zeros_like(last[row]))
    assert cache.seen().tolist() == [90, 33, 70]
    # Each row goes on from its own position.
    step = random_tokens(3, 1, seed=5)
    got = model(step, cache)
    for row, text in enumerate(texts):
        want = reference_logits(reference, torch.cat([text, step[row : row + 1]], dim=1))[0, -1:]
        torch.testing.assert_close(got[row], want, rtol=0, atol=1e-4)


def test_no_gradient_is_kept_with_a_cache(tmp_path):
    write_reference("llama", tmp_path)
    model = lcore.load_model(tmp_path)
    logits = model(random_tokens(1, 5), model.new_cache())
    assert not logits.requires_grad
    assert model(random_tokens(1, 5)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_new_cache_has_the_models_geometry(dtype, tmp_path):
    write_reference("qwen3", tmp_path)
    model = lcore.load_model(tmp_path, dtype=dtype)
    cache = model.new_cache(2)
    tokens = random_tokens(2, 70)
    with torch.no_grad():
        want = model(tokens)
        got = model(tokens, cache)
    torch.testing.assert_close(got, want, rtol=0, atol={torch.float32: 1e-4, torch.float16: 0.1}.get(dtype, 0.6))
    assert cache.lengths(0).shape == (2, 1)
    for layer in range(3):
        assert cache.lengths(layer).tolist() == [[70], [70]]


def test_stored_in_less_than_the_models_dtype(tmp_path):
    reference = write_reference("llama-gqa-tied", tmp_path)
    model = lcore.load_model(tmp_path)
    tokens = random_tokens(1, SEQ)
    want = reference_logits(reference, tokens)
    got, _ = read(model, tokens, CHUNKS["halves"], kv_format="bf16")
    error = (got - want).abs().max()
    assert 1e-4 < error < 1, "bf16 pages must be used, and be near"


def test_a_cache_of_another_batch_is_refused(tmp_path):
    write_reference("llama", tmp_path)
    model = lcore.load_model(tmp_path)
    with pytest.raises(ValueError, match="batch_size") as caught:
        model(random_tokens(2, 5), model.new_cache(1))
    assert str(caught.value) == "lcore.Decoder: cache must have batch_size = 2, the rows of tokens, got 1"
