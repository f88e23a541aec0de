"""The object of settings: conversions, shared clusters, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clustax
from clustax import ClusteredAttention
from tests.helpers import largest_error, others_once

ATTENTION = ClusteredAttention.paper(num_clusters=3, topk=2, num_bits=16, num_iterations=2)
QUERY, KEY, VALUE = (
    jax.random.normal(rng, (2, length, heads, 4))
    for rng, length, heads in zip(
        jax.random.split(jax.random.key(0), 3), (10, 7, 7), (4, 2, 2), strict=True
    )
)


@pytest.mark.once
@pytest.mark.parametrize("space", ["query", "logit"])
def test_is_clustered_attention(space):
    lengths = {
        "query_seq_lengths": jnp.array([10, 4]),
        "key_value_seq_lengths": jnp.array([5, 7]),
    }
    bias = jnp.linspace(-1.0, 1.0, 7)[None, None, None]
    mask = jnp.arange(7) != 1
    settings = dataclasses.asdict(ATTENTION) | {"space": space}
    attention = ClusteredAttention(**settings)
    rng = jax.random.key(settings.pop("seed"))
    expected = clustax.clustered_attention(
        QUERY, KEY, VALUE, bias, mask[None, None, None], rng=rng, **settings, **lengths
    )
    mask = mask[None, None, None].astype(jnp.float32)  # as Flax makes masks
    assert largest_error(attention(QUERY, KEY, VALUE, bias, mask, **lengths), expected) == 0
    clusters = attention.cluster(QUERY, KEY, mask, **lengths)
    out = attention(QUERY, KEY, VALUE, bias, mask, clusters=clusters, **lengths)
    assert largest_error(out, expected) == 0


@pytest.mark.once
@pytest.mark.parametrize("heads", [1, 2])
def test_heads_can_share_clusters(heads):
    shared = clustax.cluster_queries(QUERY[..., :heads, :], num_clusters=3)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 4 // heads, axis=1), shared)
    expected = clustax.attend(QUERY, KEY, VALUE, clusters=repeated, topk=2)
    assert largest_error(ATTENTION(QUERY, KEY, VALUE, clusters=shared), expected) == 0


@pytest.mark.parametrize("heads", others_once(3, 8))
def test_clusters_of_a_wrong_number_of_heads_are_refused(heads):
    clusters = clustax.cluster_queries(jnp.repeat(QUERY, 2, 2)[..., :heads, :], num_clusters=3)
    with pytest.raises(ValueError, match="assignment must have shape"):
        ATTENTION(QUERY, KEY, VALUE, clusters=clusters)


@pytest.mark.parametrize("shape", [(9,), ()])
def test_clusters_of_too_few_axes_are_refused(shape):
    clusters = clustax.Clusters(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))
    with pytest.raises(ValueError, match=r"clusters\.assignment must"):
        ATTENTION(QUERY, KEY, VALUE, clusters=clusters)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float16)],
)
def test_dtype(dtype, expected):
    query = QUERY.astype(jnp.bfloat16)  # the common dtype is float32
    out = jax.eval_shape(lambda: ATTENTION(query, KEY, VALUE, dtype=dtype))
    assert out.dtype == expected


@pytest.mark.parametrize("precision", others_once(jax.lax.Precision.HIGHEST, "highest"))
def test_precision_is_that_of_all_products_of_attention(precision):
    clusters = ATTENTION.cluster(QUERY, KEY)

    def attend(query, key, value, precision):
        return ATTENTION(query, key, value, clusters=clusters, precision=precision)

    def products(precision):
        """The number of products, and of those with the highest precision."""
        jaxpr = str(jax.make_jaxpr(attend, static_argnums=3)(QUERY, KEY, VALUE, precision))
        highest = "precision=(Precision.HIGHEST, Precision.HIGHEST)"
        return jaxpr.count("dot_general["), jaxpr.count(highest)

    number, highest = products(None)
    assert (number > 0, highest) == (True, 0)
    assert products(precision) == (number, number)
    with jax.default_matmul_precision("highest"):
        assert products(None) == (number, number)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"is_causal": True}, "later positions would leak"),
        ({"dropout_rate": 0.1, "deterministic": False}, "dropout_rate=0.1 is not supported"),
        ({"precision": ("high", "high")}, "precision=.* is not supported"),
        ({"module": object()}, "leave sow_weights at False"),
        ({"input_positions": jnp.arange(10)}, "rotate queries and keys"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "leave it at None"),
        ({"attn_weights_value_einsum": jnp.einsum}, "leave it at None"),
    ],
)
def test_what_is_not_supported_is_refused(given, message):
    with pytest.raises(NotImplementedError, match=message):
        ATTENTION(QUERY, KEY, VALUE, **given)


def test_one_query_may_be_causal():
    mask = np.arange(7) < 4
    out = ATTENTION(QUERY[:, :1], KEY, VALUE, mask=mask[None, None, None], is_causal=True)
    expected = jax.nn.dot_product_attention(QUERY[:, :1], KEY[:, :4], VALUE[:, :4])
    assert largest_error(out, expected) < 1e-6


@pytest.mark.parametrize(
    "setting",
    [
        {"num_clusters": 0},
        {"topk": -1},
        {"num_bits": 0},
        {"num_iterations": 0},
        {"merge": "sum"},
        {"num_subclusters": 0},
        {"metric": "cosine"},
        {"space": "key"},
        {"implementation": "cuda"},
        {"exact_below": 0},
        {"seed": 1.5},
    ],
)
def test_wrong_settings_are_refused(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name} must be"):
        ClusteredAttention(**setting)


def test_settings_in_a_list_have_a_hash():
    listed = ClusteredAttention(implementation=["pallas", "xla"])
    assert hash(listed) == hash(ClusteredAttention(implementation=("pallas", "xla")))
