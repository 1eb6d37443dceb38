"""Updates of inputs in place: made where nobody can tell, and in every case the inputs and results that eager leaves."""
import functools

import pytest
import torch
from tileweld import models
from tileweld.compiler import assemble, lower
from tileweld.compiler.backend import tileweld

I = torch.tensor


def run(f, make, calls=2):
    """Compiled and eager on equal inputs, called `calls` times; the text of the executables. Raises where results or inputs differ."""
    torch._dynamo.reset()
    texts, load = [], assemble.load

    def kept(text):
        texts.append(text.source)
        return load(text)

    assemble.load = kept
    try:
        with torch.no_grad():
            compiled = torch.compile(f, backend=functools.partial(tileweld, options=None), dynamic=False)
            ours, theirs = make(), make()
            for _ in range(calls):
                got, expected = compiled(*ours), f(*theirs)
                torch.testing.assert_close(got, expected)
                torch.testing.assert_close(ours, theirs)
    finally:
        assemble.load = load
    assert texts
    return "\n".join(texts)


def cache_and_rows():
    torch.manual_seed(0)
    return torch.randn(2, 8, 4), I([3, 5]), torch.randn(2, 2, 4)


def read_updated(cache, at, v):
    cache.index_copy_(1, at, v)
    return cache.sin() * 2


def put(cache, at, v):
    cache[:, at] = v
    return cache.sum(1)


def sliced(cache, at, v):
    cache[:, 2:4] = v
    return cache.cos() * 3


def selected(cache, at, v):
    cache[:, 5] = v[:, 0]
    return cache.cos() * 3


def twice(cache, at, v):
    cache.index_copy_(1, at, v)
    cache.index_copy_(1, at + 1, v * 2)
    return cache.sum()


def unread(cache, at, v):
    cache.index_copy_(1, at, v)
    return v * 2


def counter(cache, at, v):
    at.add_(1)
    return cache.index_select(1, at)


def old_view_unread(cache, at, v):
    old = cache[0]
    cache.index_copy_(1, at, v)
    return old * 2  # in eager a view sees the new value


@pytest.mark.parametrize("f, op", [(read_updated, "index_copy_"), (put, "index_put_"), (sliced, "copy_"), (selected, "copy_"), (twice, "index_copy_"), (unread, "index_copy_"), (old_view_unread, "index_copy_"),
                                   (counter, "add_")])
def test_in_place(f, op):
    text = run(f, cache_and_rows)
    assert f"{op}" in text
    assert not any(f"aten_{whole}_default(" in text for whole in ("index_copy", "index_put", "slice_scatter", "select_scatter"))


def old_value_read(cache, at, v):
    old = cache * 2
    cache.index_copy_(1, at, v)
    return old + cache


def test_a_value_computed_before_the_update_stays_old():
    run(old_value_read, cache_and_rows)


def clone_read_later(cache, at, v):
    new = cache.index_copy(1, at, v)
    out = cache * 3 + new
    cache.copy_(new)
    return out


def first_of_two_read_later(cache, at, v):
    cache.index_copy_(1, at, v)
    between = cache.clone()
    cache.index_copy_(1, at + 1, v)
    return between * 2 + cache


def reads_itself(cache, at, v):
    cache.index_copy_(1, at, cache[:, :2])
    return cache * 2


def shifts(cache, at, v):
    cache[:, 1:] = cache[:, :-1].clone()
    return cache * 2


def shifts_in_one(cache, at, v):
    new = torch.slice_scatter(cache, cache[:, :-1], 1, 1, 8)
    cache.copy_(new)
    return cache * 2


def leaves_as_a_copy(cache, at, v):
    new = cache.index_copy(1, at, v)
    cache.copy_(new)
    return new


def returned(cache, at, v):
    return cache.index_copy_(1, at, v)


def converted(cache, at, v):
    cache.copy_(cache.index_copy(1, at, v).double().sin())
    return v * 2


@pytest.mark.parametrize("f", [clone_read_later, first_of_two_read_later, reads_itself, shifts, shifts_in_one, leaves_as_a_copy, returned, converted])
def test_values_are_eagers(f):
    run(f, cache_and_rows)


def test_the_old_value_read_later_is_not_overwritten():
    assert "aten_index_copy_default(" in run(clone_read_later, cache_and_rows)


def test_a_result_that_leaves_is_not_the_input():
    torch._dynamo.reset()
    with torch.no_grad():
        inputs = cache_and_rows()
        got = torch.compile(leaves_as_a_copy, backend="tileweld")(*inputs)
        inputs[0].zero_()
        assert got.abs().sum() > 0


def test_inputs_that_are_views_of_one_memory():
    def make():
        base = torch.arange(32.0).view(2, 16)
        return base[:, :10], base[:, 6:]

    def f(x, y):
        x.index_copy_(1, I([8]), torch.ones(2, 1))
        return y * 2 + 1  # sees column 8 of x

    run(f, make)

    def g(x, y):
        a = y.exp()
        x.mul_(2)
        y.add_(1)
        return a + x.sum() + y

    run(g, make)


def test_an_expanded_input_is_eagers_error_or_value():
    def f(x, y):
        x[:, 0].copy_(y)
        return x * 2

    run(f, lambda: (torch.zeros(3, 4), torch.arange(3.0)))


def test_kv_cache_of_llama(monkeypatch):
    """Two layers: four caches are written in place, nothing of a cache's size is copied."""
    seen = []
    real = lower.reinplace
    monkeypatch.setattr(lower, "reinplace", lambda gm: seen.append(real(gm)))
    model = models.load("llama_gqa").build()
    ours, theirs = model.new_cache(1, 32), model.new_cache(1, 32)
    compiled = torch.compile(model, backend="tileweld", dynamic=False)
    with torch.no_grad():
        for step in range(4):
            token = torch.tensor([[7 + step]])
            torch.testing.assert_close(compiled(token, ours, torch.tensor([step])), model(token, theirs, torch.tensor([step])), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert seen == [4]


def test_static_cache_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    model = transformers.LlamaForCausalLM(config).eval()
    compiled = torch.compile(model.forward, backend="tileweld", dynamic=False)
    with torch.no_grad():
        caches = [transformers.StaticCache(config=config, max_cache_len=16) for _ in range(2)]
        for step in range(3):
            at, token = torch.tensor([step]), torch.tensor([[5 + step]])
            got, expected = (f(input_ids=token, past_key_values=c, cache_position=at).logits for f, c in zip((compiled, model), caches))
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
