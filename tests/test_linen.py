"""The Linen module against Flax's own, and what Flax passes to an ``attention_fn``."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn

import clustax
from clustax import ClusteredAttention
from clustax.linen import ClusteredMultiHeadAttention
from tests.helpers import largest_error, others_once

ROUGH = ClusteredAttention(num_clusters=4, topk=3, num_bits=16, num_iterations=2)
EXACT = [ClusteredAttention(num_clusters=4, topk=100), ClusteredAttention(num_clusters=100)]
LENGTH, KEYS, FEATURES, HEADS = 12, 9, 16, 4
X = jax.random.normal(jax.random.key(0), (2, LENGTH, FEATURES))
MEMORY = jax.random.normal(jax.random.key(1), (2, KEYS, 6))
KEY_MASK = (jnp.arange(LENGTH) < jnp.array([[7], [12]])).astype(jnp.float32)
PADDING = nn.make_attention_mask(jnp.ones((2, 1)), KEY_MASK)  # float32 of shape (B, 1, 1, S)

VARIANTS = {
    "self": {},
    "cross": {},
    "sizes": {"qkv_features": 8, "out_features": 5, "use_bias": False},
    "normalize_qk": {"normalize_qk": True},
    "dtypes": {"dtype": jnp.bfloat16, "param_dtype": jnp.float16},
    "precision": {"precision": "highest"},
    "initialisers": {
        "kernel_init": nn.initializers.ones,
        "out_kernel_init": nn.initializers.normal(0.1),
        "bias_init": nn.initializers.ones,
    },
    "sharding": {
        "kernel_init": nn.with_partitioning(nn.initializers.ones, ("embed", "heads", None)),
        "out_kernel_init": nn.with_partitioning(nn.initializers.ones, ("heads", None, "embed")),
    },
}


def exact_layer(**kwargs):
    return nn.MultiHeadDotProductAttention(HEADS, **kwargs)


def clustered_layer(attention=ROUGH, **kwargs):
    return ClusteredMultiHeadAttention(HEADS, attention_fn=attention, **kwargs)


def init(layer, *inputs, seed=0):
    # Under jit nothing but the variables is computed.
    return jax.jit(layer.init)(jax.random.key(seed), *(inputs or (X,)))


VARIABLES = init(exact_layer())


def assert_same_variables(actual, expected):
    """Paths, shapes, dtypes and values are the same; so are the boxes with metadata."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


class Spy:
    """An ``attention_fn`` that keeps what it is called with, and has the signature of ours."""

    __signature__ = inspect.signature(ROUGH)

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
    "force_fp32_for_softmax",
    "qk_attn_weights_einsum",
    "attn_weights_value_einsum",
}


def test_what_flax_passes_is_named_by_the_attention():
    spy = Spy()
    exact_layer(attention_fn=spy).apply(VARIABLES, X)
    assert spy.positional == 3
    assert set(spy.keywords) == PASSED
    # Flax drops what is not named, so all that its own attention takes has to be.
    own = set(inspect.signature(nn.dot_product_attention).parameters)
    missing = own - set(inspect.signature(ROUGH).parameters)
    assert missing == {"einsum_dot_general"}  # Flax's module never passes it


def test_what_flax_passes_in_decoding():
    spy = Spy()
    layer = exact_layer(attention_fn=spy, decode=True)
    variables = init(layer)
    layer.apply(variables, X[:, :1], mutable="cache")
    assert spy.query.shape == (2, 1, HEADS, FEATURES // HEADS)
    mask = spy.keywords["mask"]
    assert (mask.shape, mask.dtype) == ((2, 1, 1, LENGTH), jnp.float32)


def test_flax_passes_the_layer_only_to_sow():
    spy = Spy()
    layer = exact_layer(attention_fn=spy)
    layer.apply(VARIABLES, X, sow_weights=True)
    assert set(spy.keywords) == PASSED | {"module"}
    assert isinstance(spy.keywords["module"], nn.MultiHeadDotProductAttention)


@pytest.mark.parametrize("variant", others_once(*VARIANTS, every=("sharding", "normalize_qk")))
def test_parameters_are_those_of_flax(variant):
    inputs = (X, MEMORY) if variant == "cross" else (X,)
    actual, expected = (
        init(make(**VARIANTS[variant]), *inputs) for make in (clustered_layer, exact_layer)
    )
    assert_same_variables(actual, expected)


def test_sharding_metadata():
    params = init(clustered_layer(**VARIANTS["sharding"]))["params"]
    assert params["query"]["kernel"].names == ("embed", "heads", None)
    assert params["out"]["kernel"].names == ("heads", None, "embed")


@pytest.mark.parametrize("saved", [exact_layer, clustered_layer])
def test_orbax_checkpoints_load_both_ways(saved, tmp_path):
    (loaded,) = {exact_layer, clustered_layer} - {saved}
    source, target = init(saved(), seed=1), init(loaded(), seed=2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", source)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "layer", target)
    assert_same_variables(restored, source)


@pytest.mark.once
@pytest.mark.parametrize("attention", EXACT, ids=["topk", "num_clusters"])
@pytest.mark.parametrize("variant", ["self", "cross", "normalize_qk", "dtypes"])
def test_equals_exact_attention_in_the_limits(variant, attention):
    inputs, mask = ((X, MEMORY), None) if variant == "cross" else ((X,), PADDING)
    exact = exact_layer(**VARIANTS[variant])
    variables = init(exact, *inputs)
    expected = exact.apply(variables, *inputs, mask=mask)
    out = clustered_layer(attention, **VARIANTS[variant]).apply(variables, *inputs, mask=mask)
    assert out.dtype == expected.dtype
    assert largest_error(out, expected) < (2e-2 if variant == "dtypes" else 1e-5)


@pytest.mark.once
def test_masked_keys_have_no_influence():
    layer, exact = clustered_layer(EXACT[1]), exact_layer()
    memory = MEMORY.at[:, 5:].set(jnp.nan)
    mask = nn.make_attention_mask(jnp.ones((2, 1)), jnp.ones((2, KEYS)).at[:, 5:].set(0))
    variables = init(layer, X, MEMORY)
    expected = exact.apply(variables, X, MEMORY[:, :5])
    assert largest_error(layer.apply(variables, X, memory, mask=mask), expected) < 1e-5
    lengths = {"key_value_seq_lengths": jnp.array([5, 5])}
    assert largest_error(layer.apply(variables, X, memory, **lengths), expected) < 1e-5


@pytest.mark.once
def test_query_lengths_leave_padding_out():
    layer, lengths = clustered_layer(), jnp.array([7, 7])

    def call(x):
        return layer.apply(VARIABLES, x, query_seq_lengths=lengths, key_value_seq_lengths=lengths)

    out = call(X)
    assert largest_error(call(X.at[:, 7:].set(9.0)), out) == 0
    bias = VARIABLES["params"]["out"]["bias"]
    np.testing.assert_array_equal(out[:, 7:], np.broadcast_to(bias, (2, 5, 16)))


def test_masks_of_queries_are_refused():
    with pytest.raises(ValueError, match=r"key_value_seq_lengths.*causal"):
        clustered_layer().apply(VARIABLES, X, mask=nn.make_causal_mask(X[..., 0]))


def test_decoding_is_exact():
    layers = [make(decode=True) for make in (clustered_layer, exact_layer)]
    outputs, caches = [], []
    for layer in layers:
        variables = init(layer)
        step = jax.jit(lambda variables, x, f=layer: f.apply(variables, x, mutable="cache"))
        steps = []
        for i in range(LENGTH):
            out, cache = step(variables, X[:, i : i + 1])
            variables = {**variables, **cache}
            steps.append(out)
        outputs.append(jnp.concatenate(steps, axis=1))
        caches.append(variables)
    assert largest_error(*outputs) < 1e-5
    causal = exact_layer().apply(VARIABLES, X, mask=nn.make_causal_mask(X[..., 0]))
    assert largest_error(outputs[0], causal) < 1e-5
    assert_same_variables(*caches)


def test_clustering_does_not_decode():
    layer = clustered_layer(decode=True)
    variables = init(layer)
    clusters, changed = layer.apply(variables, X[:, :1], method="cluster", mutable="cache")
    assert clusters.assignment.shape == (2, HEADS, 1)
    assert_same_variables(changed["cache"], variables["cache"])


@pytest.mark.once
def test_dropout_of_weights_is_refused():
    layer = clustered_layer(dropout_rate=0.5)
    rngs = {"dropout": jax.random.key(0)}
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.5 is not supported"):
        layer.apply(VARIABLES, X, deterministic=False, rngs=rngs)
    out = layer.apply(VARIABLES, X, deterministic=True)
    assert largest_error(out, clustered_layer().apply(VARIABLES, X)) == 0


def test_sowing_weights_and_other_einsums_are_refused():
    with pytest.raises(NotImplementedError, match="leave sow_weights at False"):
        clustered_layer().apply(VARIABLES, X, sow_weights=True)
    einsums = {
        "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
        "attn_weights_value_einsum_cls": lambda: jnp.einsum,
    }
    with pytest.raises(NotImplementedError, match="leave it at None"):
        clustered_layer(**einsums).apply(VARIABLES, X)


def test_an_unbound_layer_is_refused_as_flax_does():
    for layer in (clustered_layer(), exact_layer()):
        with pytest.raises(nn.module.errors.CallCompactUnboundModuleError):
            layer(X)


@pytest.mark.once
def test_changed_settings_take_effect():
    layer = clustered_layer()
    finer = dataclasses.replace(layer.attention_fn, num_clusters=100)
    out = layer.clone(attention_fn=finer).apply(VARIABLES, X)
    assert largest_error(out, exact_layer().apply(VARIABLES, X)) < 1e-5
    swapped = exact_layer().clone(attention_fn=ROUGH)
    assert largest_error(swapped.apply(VARIABLES, X), layer.apply(VARIABLES, X)) == 0


@pytest.mark.once
def test_equal_layers_cost_one_trace():
    traces = 0

    def call(layer, variables):
        nonlocal traces
        traces += 1
        return layer.apply(variables, X)

    jitted = jax.jit(call, static_argnums=0)
    for num_clusters in (20, 20, 21):
        jitted(clustered_layer(ClusteredAttention(num_clusters=num_clusters)), VARIABLES)
    assert traces == 2


@pytest.mark.once
@pytest.mark.parametrize("space", ["query", "logit"])
def test_clusters_are_those_of_a_call(space):
    attention = ClusteredAttention(num_clusters=4, topk=3, space=space)
    layer = clustered_layer(attention, normalize_qk=True, dropout_rate=0.5, deterministic=True)
    variables = init(layer, X, MEMORY)
    about_keys = {"key_value_seq_lengths": jnp.array([5, 9])}
    clusters = layer.apply(variables, X, MEMORY, method="cluster", **about_keys)
    out = layer.apply(variables, X, MEMORY, clusters=clusters, **about_keys)
    assert largest_error(out, layer.apply(variables, X, MEMORY, **about_keys)) == 0


class Stack(nn.Module):
    """Layers that share the clusters of the first one, one after the other."""

    num_layers: int = 2

    @nn.compact
    def __call__(self, x, mask=None):
        clusters = None
        for i in range(self.num_layers):
            layer = clustered_layer(name=f"layer_{i}")
            clusters = layer.cluster(x, mask=mask) if clusters is None else clusters
            x = x + layer(x, clusters=clusters, mask=mask)
        return x


@pytest.mark.once
def test_two_layers_share_clusters():
    stack = Stack()
    variables = init(stack)
    first, second = ({"params": variables["params"][f"layer_{i}"]} for i in range(2))
    layer = clustered_layer()
    clusters = layer.apply(first, X, mask=PADDING, method="cluster")
    y = X + layer.apply(first, X, mask=PADDING)
    query, key, value = (
        jnp.einsum("btf,fnh->btnh", y, second["params"][name]["kernel"])
        for name in ("query", "key", "value")
    )
    mask = PADDING.astype(bool)
    attended = clustax.attend(
        query,
        key,
        value,
        mask=mask,
        clusters=clusters,
        topk=ROUGH.topk,
        merge=ROUGH.merge,
        num_subclusters=ROUGH.num_subclusters,
    )
    expected = y + jnp.einsum("btnh,nhf->btf", attended, second["params"]["out"]["kernel"])
    assert largest_error(stack.apply(variables, X, PADDING), expected) < 1e-5


@pytest.mark.parametrize("remat", others_once(True, False))
def test_gradients(remat):
    def gradients(layer):
        loss = jax.grad(lambda v: jnp.sum(jnp.sin(layer.apply(v, X, mask=PADDING))))
        return jax.tree.leaves(jax.jit(loss)(VARIABLES))

    make = nn.remat(ClusteredMultiHeadAttention) if remat else ClusteredMultiHeadAttention
    actual = gradients(make(HEADS, attention_fn=EXACT[1]))
    for a, b in zip(actual, gradients(exact_layer()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


class Scanned(nn.Module):
    """The layers of a stack under ``nn.scan``, with clusters that are given."""

    num_layers: int = 2

    @nn.compact
    def __call__(self, x, clusters):
        def body(layer, x, clusters):
            return x + layer(x, clusters=clusters), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.num_layers,
        )
        return scan(clustered_layer(name="layers"), x, clusters)[0]


def test_scan_over_layers_that_share_clusters():
    clusters = clustered_layer().apply(VARIABLES, X, method="cluster")
    scanned = Scanned()
    variables = init(scanned, X, clusters)
    out = X
    for i in range(scanned.num_layers):
        params = jax.tree.map(lambda x, i=i: x[i], variables["params"]["layers"])
        out = out + clustered_layer().apply({"params": params}, out, clusters=clusters)
    assert largest_error(scanned.apply(variables, X, clusters), out) < 1e-5


class Copier(nn.Module):
    """Says in each position what the first token was."""

    vocabulary: int

    @nn.compact
    def __call__(self, tokens):
        position = self.param("position", nn.initializers.normal(0.5), (LENGTH, FEATURES))
        x = nn.Embed(self.vocabulary, FEATURES)(tokens) + position
        return nn.Dense(self.vocabulary)(x + clustered_layer()(x))


@pytest.mark.once
def test_training_lowers_the_loss():
    tokens = jax.random.randint(jax.random.key(0), (16, LENGTH), 0, 5)
    model = Copier(5)
    variables = init(model, tokens)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, state):
        def loss(variables):
            return optax.softmax_cross_entropy_with_integer_labels(
                model.apply(variables, tokens), jnp.broadcast_to(tokens[:, :1], tokens.shape)
            ).mean()

        value, gradients = jax.value_and_grad(loss)(variables)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(variables, updates), state, value

    state, losses = optimizer.init(variables), []
    for _ in range(80):
        variables, state, value = step(variables, state)
        losses.append(float(value))
    assert losses[0] > 1.5
    assert losses[-1] < 0.5 * losses[0]
