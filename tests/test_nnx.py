"""The NNX module against Flax's own, and what Flax passes to an ``attention_fn``."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import clustax
from clustax import ClusteredAttention
from clustax.nnx import ClusteredMultiHeadAttention
from tests.helpers import largest_error, others_once

ROUGH = ClusteredAttention(num_clusters=4, topk=3, num_bits=16, num_iterations=2)
EXACT = [ClusteredAttention(num_clusters=4, topk=100), ClusteredAttention(num_clusters=100)]
LENGTH, KEYS, FEATURES, HEADS = 12, 9, 16, 4
X = jax.random.normal(jax.random.key(0), (2, LENGTH, FEATURES))
MEMORY = jax.random.normal(jax.random.key(1), (2, KEYS, 6))
KEY_MASK = (jnp.arange(LENGTH) < jnp.array([[7], [12]])).astype(jnp.float32)
PADDING = nnx.make_attention_mask(jnp.ones((2, 1)), KEY_MASK)  # float32 of shape (B, 1, 1, S)

VARIANTS = {
    "self": {},
    "cross": {"in_kv_features": 6},
    "gqa": {"num_kv_heads": 2},
    "sizes": {"qkv_features": 8, "out_features": 5, "use_bias": False},
    "normalize_qk": {"normalize_qk": True},
    "dtypes": {"dtype": jnp.bfloat16, "param_dtype": jnp.float16},
    "precision": {"precision": "highest"},
    "initialisers": {
        "kernel_init": nnx.initializers.ones,
        "out_kernel_init": nnx.initializers.normal(0.1),
        "bias_init": nnx.initializers.ones,
    },
    "sharding": {
        "kernel_metadata": {"out_sharding": ("embed", "heads", None)},
        "out_kernel_init": nnx.with_partitioning(nnx.initializers.ones, ("heads", None, "embed")),
    },
}
MESH = jax.make_mesh((1, 1), ("embed", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def exact_layer(seed=0, **kwargs):
    kwargs = {"decode": False} | kwargs
    return nnx.MultiHeadAttention(HEADS, FEATURES, rngs=nnx.Rngs(seed), **kwargs)


def clustered_layer(attention=ROUGH, seed=0, **kwargs):
    kwargs = {"decode": False} | kwargs
    return ClusteredMultiHeadAttention(
        HEADS, FEATURES, attention=attention, rngs=nnx.Rngs(seed), **kwargs
    )


def variables(layer):
    """Everything about the variables of a layer, by path."""

    def describe(variable):
        return (type(variable), variable.get_metadata(), np.asarray(variable[...]))

    return {path: describe(variable) for path, variable in nnx.to_flat_state(nnx.state(layer))}


def assert_same_variables(actual, expected):
    actual, expected = variables(actual), variables(expected)
    assert list(actual) == list(expected)
    for path, (kind, metadata, value) in expected.items():
        assert actual[path][:2] == (kind, metadata), path
        assert actual[path][2].dtype == value.dtype, path
        np.testing.assert_array_equal(actual[path][2], value, err_msg=str(path))


class Spy:
    """An ``attention_fn`` that keeps what it is called with."""

    def __call__(self, query, *args, **kwargs):
        self.positional, self.keywords, self.query = 1 + len(args), kwargs, query
        return query


PASSED = {
    "mask",
    "dropout_rng",
    "dropout_rate",
    "broadcast_dropout",
    "deterministic",
    "dtype",
    "precision",
    "module",
    "is_causal",
}
POSITIONS = "input_positions" in inspect.signature(nnx.MultiHeadAttention.__call__).parameters


@pytest.mark.parametrize("positions", [False, True] if POSITIONS else [False])
def test_what_flax_passes_is_named_by_the_attention(positions):
    spy = Spy()
    given = {"input_positions": jnp.arange(LENGTH)} if positions else {}
    exact_layer(attention_fn=spy)(X, **given)
    assert spy.positional == 3
    assert set(spy.keywords) == PASSED | set(given)
    parameters = inspect.signature(ROUGH).parameters
    assert set(spy.keywords) <= set(parameters)
    assert not any(p.kind == p.VAR_KEYWORD for p in parameters.values())  # it would hide new ones


def test_what_flax_passes_in_decoding():
    spy = Spy()
    layer = exact_layer(attention_fn=spy, decode=True)
    layer.init_cache(X.shape)
    layer(X[:, :1], is_causal=True)
    assert spy.query.shape == (2, 1, HEADS, FEATURES // HEADS)
    mask = spy.keywords["mask"]
    assert (mask.shape, mask.dtype) == ((2, 1, 1, LENGTH), jnp.float32)
    # From 0.12.12 on Flax leaves it out; before, it would hide all keys but the first.
    assert spy.keywords["is_causal"] is (not POSITIONS)


def test_flax_passes_the_layer_only_to_sow():
    spy = Spy()
    layer = exact_layer(attention_fn=spy)
    layer(X)
    assert spy.keywords["module"] is None
    layer(X, sow_weights=True)
    assert spy.keywords["module"] is layer


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_flax(variant):
    with jax.set_mesh(MESH):
        clustered, exact = (make(**VARIANTS[variant]) for make in (clustered_layer, exact_layer))
    assert_same_variables(clustered, exact)


def test_sharding_metadata():
    with jax.set_mesh(MESH):
        layer = clustered_layer(**VARIANTS["sharding"])
    assert layer.query.kernel.get_metadata("out_sharding") == ("embed", "heads", None)
    assert layer.out.kernel.get_metadata("out_sharding") == ("heads", None, "embed")


@pytest.mark.once
def test_state_moves_both_ways():
    exact, clustered = exact_layer(seed=1), clustered_layer(EXACT[1], seed=2)
    nnx.update(clustered, nnx.state(exact))
    assert_same_variables(clustered, exact)
    assert largest_error(clustered(X), exact(X)) < 1e-5
    other = exact_layer(seed=3)
    nnx.update(other, nnx.state(clustered))
    assert_same_variables(other, exact)


@pytest.mark.parametrize("saved", [exact_layer, clustered_layer])
def test_orbax_checkpoints_load_both_ways(saved, tmp_path):
    (loaded,) = {exact_layer, clustered_layer} - {saved}
    source, target = saved(seed=1, normalize_qk=True), loaded(seed=2, normalize_qk=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.state(source))
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "layer", nnx.state(target))
    nnx.update(target, state)
    assert_same_variables(target, source)


@pytest.mark.once
@pytest.mark.parametrize("attention", EXACT, ids=["topk", "num_clusters"])
@pytest.mark.parametrize("variant", ["self", "cross", "gqa", "normalize_qk", "dtypes"])
def test_equals_exact_attention_in_the_limits(variant, attention):
    inputs = (X, MEMORY) if variant == "cross" else (X,)
    mask = None if variant == "cross" else PADDING
    out = clustered_layer(attention, **VARIANTS[variant])(*inputs, mask=mask)
    expected = exact_layer(**VARIANTS[variant])(*inputs, mask=mask)
    assert out.dtype == expected.dtype
    assert largest_error(out, expected) < (2e-2 if variant == "dtypes" else 1e-5)


@pytest.mark.once
def test_no_batch_axes_and_several():
    layer, expected = clustered_layer(EXACT[1]), exact_layer()(X)
    assert largest_error(layer(X[0]), expected[0]) < 1e-5
    assert largest_error(layer(X[None]), expected[None]) < 1e-5


@pytest.mark.once
def test_masked_keys_have_no_influence():
    layer = clustered_layer(EXACT[1], in_kv_features=6)
    memory = MEMORY.at[:, 5:].set(jnp.nan)
    mask = nnx.make_attention_mask(jnp.ones((2, 1)), jnp.ones((2, KEYS)).at[:, 5:].set(0))
    expected = exact_layer(in_kv_features=6)(X, MEMORY[:, :5])
    assert largest_error(layer(X, memory, mask=mask), expected) < 1e-5
    by_length = layer(X, memory, key_value_seq_lengths=jnp.array([5, 5]))
    assert largest_error(by_length, expected) < 1e-5


@pytest.mark.once
def test_query_lengths_leave_padding_out():
    layer = clustered_layer()
    lengths = jnp.array([7, 7])
    out = layer(X, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    other = layer(X.at[:, 7:].set(9.0), query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    assert largest_error(other, out) == 0
    np.testing.assert_array_equal(out[:, 7:], np.broadcast_to(layer.out.bias[...], (2, 5, 16)))


def test_masks_of_queries_are_refused():
    layer = clustered_layer()
    with pytest.raises(ValueError, match=r"key_value_seq_lengths.*causal"):
        layer(X, mask=nnx.make_causal_mask(X[..., 0]))
    with pytest.raises(NotImplementedError, match="later positions would leak"):
        layer(X, is_causal=True)


@pytest.mark.parametrize("kwargs", others_once({"num_kv_heads": 2}, {}), ids=["gqa", "mha"])
def test_decoding_is_exact(kwargs):
    layers = [f(decode=True, **kwargs) for f in (clustered_layer, exact_layer)]
    steps = []
    for layer in layers:
        layer.init_cache(X.shape)
        step = nnx.jit(lambda layer, x: layer(x))
        steps.append([step(layer, X[:, i : i + 1]) for i in range(LENGTH)])
    out, expected = (jnp.concatenate(step, axis=1) for step in steps)
    assert largest_error(out, expected) < 1e-5
    causal = exact_layer(**kwargs)(X, mask=nnx.make_causal_mask(X[..., 0]))
    assert largest_error(out, causal) < 1e-5
    assert_same_variables(*layers)  # the caches too


def test_a_causal_flag_does_not_hide_what_was_decoded():
    layer, expected = (f(decode=True) for f in (clustered_layer, exact_layer))
    for each in (layer, expected):
        each.init_cache(X.shape)
    for i in range(3):
        x = X[:, i : i + 1]
        assert largest_error(layer(x, is_causal=True), expected(x)) < 1e-5


@pytest.mark.once
def test_dropout_of_weights_is_refused():
    layer = clustered_layer(dropout_rate=0.5)
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.5 is not supported"):
        layer(X, deterministic=False)
    assert largest_error(layer(X, deterministic=True), clustered_layer()(X)) == 0


def test_sowing_weights_is_refused():
    with pytest.raises(NotImplementedError, match="leave sow_weights at False"):
        clustered_layer()(X, sow_weights=True)


def test_fresh_equal_attentions_cost_one_trace():
    traces = 0

    @nnx.jit
    def call(layer, x):
        nonlocal traces
        traces += 1
        return layer(x)

    for seed in range(3):
        call(clustered_layer(ClusteredAttention(num_clusters=20), seed=seed), X)
    assert traces == 1
    call(clustered_layer(ClusteredAttention(num_clusters=21)), X)
    assert traces == 2


@pytest.mark.once
def test_attention_can_be_replaced():
    layer = clustered_layer()
    layer.attention_fn = EXACT[1]
    expected = exact_layer()
    assert largest_error(layer(X), expected(X)) < 1e-5
    swapped = exact_layer()
    swapped.attention_fn = ROUGH
    assert largest_error(swapped(X), clustered_layer()(X)) == 0


def test_default_attention():
    layer = ClusteredMultiHeadAttention(HEADS, FEATURES, rngs=nnx.Rngs(0))
    assert layer.attention_fn == ClusteredAttention()


@pytest.mark.once
def test_two_layers_share_clusters(monkeypatch):
    first, second = clustered_layer(seed=1), clustered_layer(seed=2)
    clusters = first.cluster(X, mask=PADDING)
    query, key, value = (project(X) for project in (second.query, second.key, second.value))
    expected = clustax.attend(
        query,
        key,
        value,
        mask=PADDING.astype(bool),
        clusters=clusters,
        topk=ROUGH.topk,
        merge=ROUGH.merge,
        num_subclusters=ROUGH.num_subclusters,
    )
    monkeypatch.setattr("clustax.attention_fn.cluster_queries", None)  # nothing is clustered again
    out = second(X, mask=PADDING, clusters=clusters)
    assert largest_error(out, second.out(expected)) < 1e-6


@pytest.mark.once
@pytest.mark.parametrize("kwargs", [{}, {"normalize_qk": True}], ids=["plain", "normalize_qk"])
@pytest.mark.parametrize("space", ["query", "logit"])
def test_clusters_are_those_of_a_call(space, kwargs):
    attention = ClusteredAttention(num_clusters=4, topk=3, space=space)
    layer = clustered_layer(attention, in_kv_features=6, **kwargs)
    about_keys = {"key_value_seq_lengths": jnp.array([5, 9])}
    clusters = layer.cluster(X, MEMORY, **about_keys)
    out = layer(X, MEMORY, clusters=clusters, **about_keys)
    assert largest_error(out, layer(X, MEMORY, **about_keys)) == 0


@pytest.mark.parametrize("remat", others_once(True, False))
def test_gradients(remat):
    def gradients(layer, call):
        loss = nnx.grad(lambda layer: jnp.sum(jnp.sin(call(layer, X, mask=PADDING))))
        return jax.tree.leaves(nnx.jit(loss)(layer))

    def call(layer, x, mask):
        return layer(x, mask=mask)

    actual = gradients(clustered_layer(EXACT[1]), nnx.remat(call) if remat else call)
    for a, b in zip(actual, gradients(exact_layer(), call), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.once
def test_transforms_may_close_over_a_layer():
    layer = clustered_layer(EXACT[1])
    out = jax.jit(jax.vmap(lambda x: layer(x, key_value_seq_lengths=jnp.array(5))))(X)
    assert largest_error(out, layer(X, key_value_seq_lengths=jnp.array([5, 5]))) < 1e-6


@nnx.vmap(in_axes=0, out_axes=0)
def make_layers(rng):
    return ClusteredMultiHeadAttention(
        HEADS, FEATURES, attention=ROUGH, decode=False, rngs=nnx.Rngs(rng)
    )


def test_vmap_and_scan_over_layers_that_share_clusters():
    layers = make_layers(jax.random.split(jax.random.key(0), 3))
    each = [
        nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
        for graph, state in [nnx.split(layers)]
        for i in range(3)
    ]
    clusters = each[0].cluster(X)

    stacked = nnx.vmap(lambda layer, x: layer(x, clusters=clusters), in_axes=(0, None))(layers, X)
    assert largest_error(stacked, jnp.stack([layer(X, clusters=clusters) for layer in each])) < 1e-5

    @nnx.scan(in_axes=(nnx.Carry, 0, None), out_axes=nnx.Carry)
    def forward(x, layer, clusters):
        return x + layer(x, clusters=clusters)

    x = X
    for layer in each:
        x = x + layer(x, clusters=clusters)
    assert largest_error(forward(X, layers, clusters), x) < 1e-5


class Copier(nnx.Module):
    """Says in each position what the first token was."""

    def __init__(self, vocabulary, *, rngs):
        self.embed = nnx.Embed(vocabulary, FEATURES, rngs=rngs)
        self.position = nnx.Param(0.5 * jax.random.normal(rngs.params(), (LENGTH, FEATURES)))
        self.attention = ClusteredMultiHeadAttention(
            HEADS, FEATURES, attention=ROUGH, decode=False, rngs=rngs
        )
        self.head = nnx.Linear(FEATURES, vocabulary, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position[...]
        return self.head(x + self.attention(x))


@pytest.mark.once
def test_training_lowers_the_loss():
    tokens = jax.random.randint(jax.random.key(0), (16, LENGTH), 0, 5)
    model = Copier(5, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logits = model(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, jnp.broadcast_to(tokens[:, :1], tokens.shape)
            ).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(80)]
    assert losses[0] > 1.5
    assert losses[-1] < 0.5 * losses[0]
