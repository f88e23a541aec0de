"""The rivals against dense float64 attention to the keys that they say they attend to."""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from clustax import ClusteredAttention, baselines
from clustax.baselines.lsh import buckets, draw_rotations
from clustax.baselines.nnx import ReformerSelfAttention
from clustax.models import Encoder
from tests.cases import Case, make_inputs
from tests.helpers import as_numpy, double, largest_error, random_like_output, sizes_of

pytestmark = pytest.mark.once

CROSS = Case(
    "cross",
    T=21,
    S=30,
    N=4,
    V=6,
    query_lengths=(21, 11),
    key_lengths=(30, 23),
    mask="head",
    bias="shared",
    infinite_bias=True,
)
ITSELF = Case(
    "itself",
    T=70,
    S=70,
    N=4,
    V=12,
    query_lengths=(70, 41),
    key_lengths=(53, 70),
    mask="head",
    bias="batch",
)
SHARED = dataclasses.replace(ITSELF, name="shared", K=4)  # as many keys as queries
SCALE = 0.7  # no default
CHUNK = 8


def valid_pairs(inputs):
    """Which queries (B, N, T, 1) and which keys (B, N, 1, S) count."""
    batch, length, heads, _ = inputs.query.shape
    num_keys = inputs.key.shape[1]
    keys = np.ones((batch, heads, 1, num_keys), bool)
    for given in (inputs.mask, None if inputs.bias is None else inputs.bias > -np.inf):
        keys &= True if given is None else np.asarray(given)
    queries = np.arange(length) < np.asarray(inputs.query_seq_lengths)[:, None, None]
    keys &= np.arange(num_keys) < np.asarray(inputs.key_value_seq_lengths)[:, None, None, None]
    return np.broadcast_to(queries[..., None], (batch, heads, length, 1)), keys


def dense(query, key, value, bias, scale, counts):
    """Softmax attention in which key l counts ``counts`` (B, N, T, S) times for a query."""
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    logits = scale * jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest")
    logits = jnp.where(counts > 0, logits + (0 if bias is None else bias), -1e30)
    weights = counts * jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    return jnp.einsum("bnts,bsnv->btnv", weights, value, precision="highest")


def dense_reformer(query, key, value, bias, scale, rounds):
    """The same for queries that are their own keys: itself counts where nothing else does.

    The outputs for several ``rounds`` of counts are averaged.
    """
    key = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    out = 0
    for counts in rounds:
        alone = (counts * (1 - np.eye(counts.shape[-1]))).sum(axis=-1, keepdims=True) == 0
        counts = np.where(np.eye(counts.shape[-1]) == 1, alone & (counts > 0), counts)
        out += dense(query, key, value, bias, scale, counts) / len(rounds)
    return out


def counts_of_topk(inputs, topk):
    queries, keys = valid_pairs(inputs)
    query, key, bias = (np.asarray(x, np.float64) for x in (inputs.query, inputs.key, inputs.bias))
    key = np.repeat(key, query.shape[2] // key.shape[2], axis=2)
    logits = np.where(keys, SCALE * np.einsum("btnh,bsnh->bnts", query, key) + bias, -np.inf)
    kth = np.sort(logits, axis=-1)[..., -topk, None]
    return queries & keys & (logits >= kth)


def counts_of_window(inputs, window):
    queries, keys = valid_pairs(inputs)
    position = np.arange(inputs.query.shape[1])
    return queries & keys & (abs(position[:, None] - position) <= window)


def counts_of_reformer(inputs, rotations, *, same_bucket=True):
    """How often each token meets each other one (rounds, B, N, T, T), by loops."""
    queries, keys = valid_pairs(inputs)
    valid = queries[..., 0] & keys[..., 0, :]
    batch, heads, length = valid.shape
    counts = np.zeros((len(rotations), batch, heads, length, length))
    for r, b, n in np.ndindex(len(rotations), batch, heads):
        rotated = np.asarray(inputs.query, np.float64)[b, :, n] @ np.asarray(rotations[r])
        bucket = np.concatenate([rotated, -rotated], axis=-1).argmax(axis=-1)
        order = sorted(np.flatnonzero(valid[b, n]), key=lambda i: bucket[i])
        chunks = [order[i : i + CHUNK] for i in range(0, len(order), CHUNK)]
        for c, chunk in enumerate(chunks):
            for i in chunk:
                for j in {*chunk, *chunks[c - 1]}:  # the first one looks back at the last
                    counts[r, b, n, i, j] = bucket[i] == bucket[j] or not same_bucket
    return counts


def reformer(query, key, value, bias, mask, **kwargs):
    return baselines.reformer(query, value, bias, mask, **kwargs)


ROTATIONS = draw_rotations(jax.random.key(0), 3, 6, head_dim=8)
REFORMER = partial(reformer, rounds=3, num_buckets=6, chunk_size=CHUNK)
RIVALS = {
    "exact": (
        CROSS,
        baselines.exact,
        dense,
        lambda inputs: np.logical_and(*valid_pairs(inputs)),
    ),
    "oracle_topk": (
        CROSS,
        partial(baselines.oracle_topk, topk=5),
        dense,
        partial(counts_of_topk, topk=5),
    ),
    "local": (
        ITSELF,
        partial(baselines.local, window=9),
        dense,
        partial(counts_of_window, window=9),
    ),
    "local_narrow": (
        ITSELF,
        partial(baselines.local, window=1),
        dense,
        partial(counts_of_window, window=1),
    ),
    "reformer_lse": (
        SHARED,
        REFORMER,
        dense_reformer,
        lambda inputs: counts_of_reformer(inputs, ROTATIONS).sum(axis=0, keepdims=True),
    ),
    "reformer_uniform": (
        SHARED,
        partial(REFORMER, merge="uniform"),
        dense_reformer,
        lambda inputs: counts_of_reformer(inputs, ROTATIONS),
    ),
    "reformer_across_buckets": (
        SHARED,
        partial(REFORMER, merge="uniform", same_bucket=False),
        dense_reformer,
        lambda inputs: counts_of_reformer(inputs, ROTATIONS, same_bucket=False),
    ),
}


def with_nothing_where_nothing_counts(inputs, shared):
    """NaN and infinity in padded queries, and in keys and values that no head sees."""
    queries, keys = valid_pairs(inputs)
    seen = keys.reshape(len(keys), inputs.key.shape[2], -1, keys.shape[-1]).any(axis=2)
    seen = np.swapaxes(seen, 1, 2)[..., None]
    if shared:  # a token is a query and a key
        queries = queries & np.swapaxes(keys, 2, 3)
    assert not seen.all()
    assert not queries.all()
    return inputs._replace(
        query=jnp.where(np.swapaxes(queries, 1, 2), inputs.query, jnp.nan),
        key=jnp.where(seen, inputs.key, jnp.inf),
        value=jnp.where(seen, inputs.value, jnp.nan),
    )


@pytest.mark.parametrize("name", RIVALS)
def test_outputs_and_gradients(name):
    case, function, expected_function, counts_of = RIVALS[name]
    inputs = make_inputs(case)
    counts = counts_of(inputs)
    rows = counts.sum(axis=(0, -1) if counts.ndim == 5 else -1)
    assert (rows > 0).any()
    assert (rows == 0).any()

    @jax.jit
    def evaluate(inputs, cotangent):
        def outputs(query, key, value, bias, scale):
            lengths = {
                "query_seq_lengths": inputs.query_seq_lengths,
                "key_value_seq_lengths": inputs.key_value_seq_lengths,
            }
            return function(query, key, value, bias, inputs.mask, scale=scale, **lengths)

        out, vjp = jax.vjp(outputs, *inputs[:4], jnp.float32(SCALE))
        return out, vjp(cotangent)

    cotangent = random_like_output(inputs)
    dirty = with_nothing_where_nothing_counts(inputs, shared=case is SHARED)
    out, gradients = evaluate(dirty, cotangent)
    with jax.enable_x64(True):
        expected, vjp = jax.vjp(
            lambda *args: expected_function(*args, counts), *double(inputs[:4]), np.float64(SCALE)
        )
        expected, expected_gradients = as_numpy((expected, vjp(double(cotangent))))
    assert out.dtype == jnp.float32
    assert largest_error(out, expected) <= 1e-5
    assert not np.asarray(out)[np.swapaxes(rows == 0, 1, 2)].any()
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert largest_error(gradient, wanted) <= 1e-5


@pytest.mark.parametrize("name", ["exact", "oracle_topk", "local", "reformer_lse"])
def test_half_precision_and_batch_axes(name):
    case, function, *_ = RIVALS[name]
    inputs = make_inputs(Case("small", batch=(), T=20, S=20, K=case.K // 2), jnp.bfloat16)
    out = function(*inputs[:5])
    assert out.dtype == jnp.bfloat16
    expected = function(*(x.astype(jnp.float32)[None, None] for x in inputs[:3]), None, None)
    assert largest_error(out, expected[0, 0]) < 1e-2


def plain(length=50, **settings):
    return make_inputs(Case("plain", T=length, S=length, **settings))


def test_limits_are_exact_attention():
    query, key, value = plain(N=4)[:3]
    expected = baselines.exact(query, key, value)
    assert largest_error(expected, jax.nn.dot_product_attention(query, key, value)) <= 1e-6
    for window in (49, 50, 1000):
        assert largest_error(baselines.local(query, key, value, window=window), expected) <= 1e-6
    for topk in (50, 1000):
        assert largest_error(baselines.oracle_topk(query, key, value, topk=topk), expected) <= 1e-6


def test_oracle_takes_queries_in_turn_and_the_first_of_equal_keys(monkeypatch):
    monkeypatch.setattr("clustax.baselines.softmax.QUERIES_AT_ONCE", 7)
    key = jnp.zeros((50, 1, 8)).at[20:].set(-1.0)
    query, value = jnp.ones((50, 1, 8)), jnp.arange(50.0)[:, None, None]
    out = baselines.oracle_topk(query, key, value, topk=5)
    np.testing.assert_allclose(out, np.full((50, 1, 1), 2.0), rtol=1e-6)  # the mean of 0 to 4


@pytest.mark.parametrize(
    "settings",
    [{"num_buckets": 1, "rounds": 2}, {"same_bucket": False, "rounds": 1}],
    ids=["one_bucket", "across_buckets"],
)
@pytest.mark.parametrize("chunk_size", [25, 64], ids=["two_chunks", "one_chunk"])
def test_reformer_of_one_bucket_is_exact_attention_to_all_others(settings, chunk_size):
    query, _, value = plain()[:3]
    out = baselines.reformer(query, value, chunk_size=chunk_size, **settings)
    key = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    expected = dense(query, key, value, None, 1.0, 1 - np.eye(50))
    assert largest_error(out, expected) <= 1e-5


def test_both_merges_of_one_round_are_the_same():
    query, _, value = plain()[:3]
    lse, uniform = (
        baselines.reformer(query, value, rounds=1, merge=merge, chunk_size=CHUNK, num_buckets=6)
        for merge in ("lse", "uniform")
    )
    assert largest_error(lse, uniform) <= 1e-6


@pytest.mark.parametrize("num_buckets", [2, 6])
def test_padding_makes_no_difference_to_reformer(num_buckets):
    query, _, value = plain(length=29)[:3]
    settings = {"chunk_size": CHUNK, "num_buckets": num_buckets, "rounds": 2}
    expected = baselines.reformer(query, value, same_bucket=False, **settings)
    query, value = (
        jnp.pad(x, ((0, 0), (0, 41), (0, 0), (0, 0)), constant_values=jnp.nan)
        for x in (query, value)
    )
    lengths = jnp.array([29, 29])
    for given in ("query_seq_lengths", "key_value_seq_lengths"):
        out = baselines.reformer(query, value, same_bucket=False, **settings, **{given: lengths})
        assert largest_error(out[:, :29], expected) <= 1e-6
        assert not np.any(out[:, 29:])


def test_buckets_are_the_nearest_of_directions_and_their_opposites():
    tokens = jax.random.normal(jax.random.key(1), (40, 8))
    assert ROTATIONS.shape == (3, 8, 3)
    found = buckets(tokens, ROTATIONS)
    for rotation, bucket in zip(np.asarray(ROTATIONS), found, strict=True):
        rotated = np.asarray(tokens) @ rotation
        np.testing.assert_array_equal(bucket, np.hstack([rotated, -rotated]).argmax(axis=1))
    assert set(np.unique(found)) == set(range(6))
    np.testing.assert_array_equal(buckets(-tokens, ROTATIONS), (found + 3) % 6)
    np.testing.assert_array_equal(buckets(3 * tokens, ROTATIONS), found)


def test_reformer_draws_from_its_key():
    query, _, value = plain()[:3]
    outs = [
        baselines.reformer(query, value, rng=rng) for rng in (None, *map(jax.random.key, (0, 1)))
    ]
    assert largest_error(outs[0], outs[1]) == 0
    assert largest_error(outs[0], outs[2]) > 0.1


@pytest.mark.parametrize(
    "function",
    [partial(baselines.oracle_topk, topk=8), partial(baselines.local, window=32), reformer],
    ids=["oracle_topk", "local", "reformer"],
)
def test_no_array_is_quadratic(function):
    length = 4096
    shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    loss = jax.grad(lambda *args: function(*args, None, None).sum(), argnums=(0, 1, 2))
    assert max(sizes_of(jax.make_jaxpr(loss)(*(shape,) * 3).jaxpr)) <= length**2 / 8


QUERY, KEY, VALUE = plain(length=6)[:3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: baselines.oracle_topk(QUERY, KEY, VALUE, topk=0), "topk must be at least 1"),
        (lambda: baselines.local(QUERY, KEY, VALUE, window=-1), "window must be at least 0"),
        (
            lambda: baselines.local(QUERY[:, :5], KEY, VALUE, window=1),
            r"key must have the length T of query, 5, got 6 .*use exact",
        ),
        (lambda: baselines.exact(QUERY, KEY, VALUE, scale=jnp.ones(2)), "scale must be one number"),
        (lambda: baselines.exact(QUERY, KEY[..., :3], VALUE), "key must have the head dim H"),
        (lambda: baselines.reformer(QUERY, KEY, VALUE), "bias must"),
        (lambda: baselines.reformer(QUERY, QUERY, scale=jnp.ones(2)), "scale must be one number"),
        (lambda: baselines.reformer(QUERY, QUERY, rng=3), "rng must be one jax.random key"),
        (lambda: baselines.Reformer(rounds=0), "rounds must be at least 1"),
        (lambda: baselines.Reformer(num_buckets=0), "num_buckets must be at least 1"),
        (lambda: baselines.Reformer(num_buckets=7), "num_buckets must be 1 or even, got 7"),
        (lambda: baselines.Reformer(chunk_size=0), "chunk_size must be at least 1"),
        (lambda: baselines.Reformer(merge="mass"), "merge must be one of 'lse', 'uniform'"),
        (lambda: baselines.OracleTopk(topk=0), "topk must be at least 1"),
        (lambda: baselines.Local(window=-1), "window must be at least 0"),
        (
            lambda: ReformerSelfAttention(3, 16, rngs=nnx.Rngs(0)),
            "in_features must be a multiple of num_heads, got 16 and 3",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


X = jax.random.normal(jax.random.key(0), (2, 12, 16))
LENGTHS = jnp.array([7, 12])
PADDING = nnx.make_attention_mask(jnp.ones((2, 1)), jnp.arange(12) < LENGTHS[:, None])
LIKE_EXACT = [
    baselines.Exact(),
    baselines.OracleTopk(topk=12),
    baselines.Local(window=12),
]


@pytest.mark.parametrize("attention", LIKE_EXACT, ids=repr)
def test_in_flax(attention):
    exact = nnx.MultiHeadAttention(4, 16, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0))
    swapped = nnx.clone(exact)
    swapped.attention_fn = attention
    assert PADDING.dtype == jnp.float32
    assert largest_error(swapped(X, mask=PADDING), exact(X, mask=PADDING)) <= 1e-5
    exact = nn.MultiHeadDotProductAttention(num_heads=4)
    variables = exact.init(jax.random.key(0), X)
    out = exact.clone(attention_fn=attention).apply(variables, X, mask=PADDING)
    assert largest_error(out, exact.apply(variables, X, mask=PADDING)) <= 1e-5


def test_in_models():
    expected = Encoder(1, 16, 4, rngs=nnx.Rngs(0))
    encoders = [Encoder(1, 16, 4, attention_fn=each, rngs=nnx.Rngs(0)) for each in LIKE_EXACT]
    for encoder in (expected, *encoders):
        encoder.eval()
    expected = expected(X, LENGTHS)
    for encoder in encoders:
        out = encoder(X, LENGTHS)
        for entry, length in enumerate(LENGTHS):  # padding may hold anything
            assert largest_error(out[entry, :length], expected[entry, :length]) <= 1e-5


def test_settings_and_what_flax_passes_reach_the_function():
    dtype = {"dtype": jnp.bfloat16}
    out = baselines.Local(window=2, scale=0.3)(QUERY, KEY, VALUE, **dtype)
    arrays = (x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE))
    assert largest_error(out, baselines.local(*arrays, window=2, scale=0.3)) == 0
    settings = {
        "rounds": 2,
        "num_buckets": 4,
        "chunk_size": 2,
        "merge": "uniform",
        "same_bucket": False,
        "scale": 0.3,
    }
    lengths = jnp.array([4, 6])
    out = baselines.Reformer(**settings, seed=5)(QUERY, QUERY, VALUE, query_seq_lengths=lengths)
    wanted = {"rng": jax.random.key(5), "query_seq_lengths": lengths}
    assert largest_error(out, baselines.reformer(QUERY, VALUE, **settings, **wanted)) == 0
    assert baselines.Reformer(**settings) == baselines.Reformer(**settings)
    assert hash(baselines.Exact()) == hash(baselines.Exact())
    assert baselines.Local(window=2) != baselines.Local(window=3)


def test_the_rivals_are_called_as_clustered_attention_is():
    ours, rivals = (
        [(each.name, each.kind, each.default) for each in inspect.signature(of).parameters.values()]
        for of in (ClusteredAttention(), baselines.Exact())
    )
    assert [each for each in ours if each[0] != "clusters"] == rivals


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"is_causal": True}, "the rivals attend in both directions"),
        ({"dropout_rate": 0.1, "deterministic": False}, "dropout_rate=0.1 is not supported"),
        ({"precision": ("high", "high")}, "precision=.* is not supported"),
        ({"module": object()}, "leave sow_weights at False"),
        ({"input_positions": jnp.arange(6)}, "rotate queries and keys"),
    ],
)
def test_what_is_not_supported_is_refused(given, message):
    with pytest.raises(NotImplementedError, match=message):
        baselines.Exact()(QUERY, KEY, VALUE, **given)


def test_decoding_is_exact():
    mask = (np.arange(6) < 4)[None, None, None]
    out = baselines.Exact()(QUERY[:, :1], KEY, VALUE, mask=mask, is_causal=True)
    expected = jax.nn.dot_product_attention(QUERY[:, :1], KEY[:, :4], VALUE[:, :4])
    assert largest_error(out, expected) <= 1e-6


def test_reformer_needs_shared_queries_and_keys():
    with pytest.raises(NotImplementedError, match="one projection for queries and keys"):
        baselines.Reformer()(QUERY, QUERY + 0, VALUE)
    layer = nnx.MultiHeadAttention(
        4, 16, attention_fn=baselines.Reformer(), decode=False, rngs=nnx.Rngs(0)
    )
    with pytest.raises(NotImplementedError, match="ReformerSelfAttention"):
        layer(X)


def test_layer_with_shared_queries_and_keys():
    attention = baselines.Reformer(rounds=2, num_buckets=4, chunk_size=4)
    layer = ReformerSelfAttention(4, 16, attention=attention, rngs=nnx.Rngs(0))
    query, value = layer.query_key(X), layer.value(X)
    assert query.shape == (2, 12, 4, 4)
    settings = {"rounds": 2, "num_buckets": 4, "chunk_size": 4}
    expected = baselines.reformer(query, value, query_seq_lengths=LENGTHS, **settings)
    call = nnx.jit(lambda layer, x: (layer(x, lengths=LENGTHS), layer(x, mask=PADDING)))
    for out in call(layer, X):
        assert largest_error(out, layer.out(expected)) <= 1e-5
    gradients = nnx.grad(lambda layer: jnp.sum(layer(X) ** 2))(layer)
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(gradients))
    layer.attention_fn = baselines.Exact()
    expected = baselines.exact(query, query, value)
    assert largest_error(layer(X), layer.out(expected)) <= 1e-5
    assert ReformerSelfAttention(4, 16, rngs=nnx.Rngs(0)).attention_fn == baselines.Reformer()
