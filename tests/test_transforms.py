"""JAX's transformations, and Flax's hooks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import clustax
from clustax import ClusteredAttention
from tests.cases import BY_NAME, make_inputs
from tests.helpers import largest_error

SETTINGS = {
    "num_clusters": 5,
    "topk": 6,
    "merge": "lse",
    "num_subclusters": 2,
    "num_iterations": 3,
    "metric": "hamming",
    "space": "query",
}


def attention(query, key, value, **changes):
    return clustax.clustered_attention(query, key, value, **SETTINGS | changes)


@pytest.fixture(scope="module")
def qkv():
    return make_inputs(BY_NAME["plain"])[:3]


@pytest.fixture(scope="module")
def other_qkv():
    return make_inputs(BY_NAME["plain"], seed=1)[:3]


@jax.jit
def gradients(query, key, value):
    return jax.grad(lambda *args: jnp.sum(attention(*args) ** 2), argnums=(0, 1, 2))(
        query, key, value
    )


def assert_close(actual, expected, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert largest_error(x, y) <= tolerance


@pytest.mark.once
def test_jit_changes_nothing(qkv):
    assert_close(jax.jit(attention)(*qkv), attention(*qkv), 1e-6)


@pytest.mark.once
def test_two_runs_are_equal_bit_by_bit(qkv):
    np.testing.assert_array_equal(attention(*qkv), attention(*qkv))
    for x, y in zip(gradients(*qkv), gradients(*qkv), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.once
def test_vmap_is_a_loop_and_a_batch_axis(qkv):
    lengths = jnp.array([24, 15]), jnp.array([9, 24])

    def one(query, key, value, query_length, key_length):
        return attention(
            query, key, value, query_seq_lengths=query_length, key_value_seq_lengths=key_length
        )

    mapped = jax.vmap(one)(*qkv, *lengths)
    looped = jnp.stack([one(*(x[i] for x in (*qkv, *lengths))) for i in range(2)])
    assert_close(mapped, looped)
    assert_close(mapped, one(*qkv, *lengths))


@pytest.mark.once
def test_vmap_over_queries_alone(qkv):
    query, key, value = qkv
    mapped = jax.vmap(attention, in_axes=(0, None, None))(query, key[0], value[0])
    looped = jnp.stack([attention(each, key[0], value[0]) for each in query])
    assert_close(mapped, looped)


@pytest.mark.once
def test_vmap_over_random_keys(qkv):
    rngs = jax.random.split(jax.random.key(0), 3)
    mapped = jax.vmap(lambda rng: attention(*qkv, rng=rng))(rngs)
    looped = jnp.stack([attention(*qkv, rng=rng) for rng in rngs])
    assert_close(mapped, looped)
    assert np.abs(mapped[0] - mapped[1]).max() > 1e-3


@pytest.mark.once
def test_vmap_of_gradients_is_a_loop(qkv):
    mapped = jax.vmap(gradients)(*qkv)
    looped = [gradients(*(x[i] for x in qkv)) for i in range(2)]
    assert_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *looped))


@pytest.mark.once
def test_checkpoint_changes_no_gradient(qkv):
    @jax.jit
    def checkpointed(*qkv):
        loss = jax.checkpoint(lambda *args: jnp.sum(attention(*args) ** 2))
        return jax.grad(loss, argnums=(0, 1, 2))(*qkv)

    assert_close(checkpointed(*qkv), gradients(*qkv))


@pytest.mark.once
def test_forward_mode_equals_reverse_mode(qkv, other_qkv):
    tangents = other_qkv

    @jax.jit
    def both(qkv, tangents):
        out, tangent = jax.jvp(attention, qkv, tangents)
        return jnp.vdot(2 * out, tangent)

    reverse = sum(jnp.vdot(x, y) for x, y in zip(gradients(*qkv), tangents, strict=True))
    np.testing.assert_allclose(both(qkv, tangents), reverse, rtol=1e-4)


@pytest.mark.once
def test_scan_over_layers_is_a_loop():
    hidden = make_inputs(BY_NAME["plain"]).query
    weights = jnp.asarray(0.4 * np.random.default_rng(0).standard_normal((2, 3, 8, 8)), jnp.float32)

    def layer(hidden, weights):
        return hidden + attention(*(hidden @ w for w in weights)), None

    def scanned(hidden, weights):
        return jnp.sum(jax.lax.scan(layer, hidden, weights)[0] ** 2)

    def looped(hidden, weights):
        for each in weights:
            hidden, _ = layer(hidden, each)
        return jnp.sum(hidden**2)

    by_scan, by_loop = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, weights) for f in (scanned, looped)
    )
    assert_close(by_scan, by_loop, 1e-4)


def test_export_round_trip(qkv):
    exported = jax.export.export(jax.jit(attention), platforms=["cpu", "cuda", "tpu"])(*qkv)
    loaded = jax.export.deserialize(exported.serialize())
    assert set(loaded.platforms) == {"cpu", "cuda", "tpu"}
    np.testing.assert_array_equal(loaded.call(*qkv), exported.call(*qkv))
    assert_close(loaded.call(*qkv), attention(*qkv), 1e-6)


def test_new_values_compile_nothing_new(qkv, other_qkv):
    """Neither in one program, nor op by op: all sizes are those of the arguments."""
    traced = chex.assert_max_traces(attention, n=1)
    for each in (qkv, other_qkv):
        jax.jit(traced)(*each)

    compiled = []
    everything = {
        "query_seq_lengths": jnp.array([24, 15]),
        "key_value_seq_lengths": jnp.array([9, 24]),
        "mask": jnp.ones((2, 1, 1, 24), bool),
    }
    nothing = {name: jnp.zeros_like(x) for name, x in everything.items()}
    attention(*qkv, **everything, rng=jax.random.key(1))
    jax.block_until_ready(attention(*qkv, **everything, rng=jax.random.key(1)))
    rng = jax.random.key(2)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event)
    )
    jax.block_until_ready(attention(*other_qkv, **nothing, rng=rng))
    assert not [event for event in compiled if "compile" in event]
    jax.jit(lambda x: 2 * x + 1)(jnp.arange(7.0))
    assert [event for event in compiled if "compile" in event]  # that would be seen


class TestClusteredAttention:
    def test_equal_settings_are_equal(self):
        attention = ClusteredAttention(**SETTINGS)
        assert attention == ClusteredAttention(**SETTINGS)
        assert hash(attention) == hash(ClusteredAttention(**SETTINGS))
        assert attention != ClusteredAttention(**SETTINGS | {"topk": 7})
        assert attention != ClusteredAttention(**SETTINGS, seed=1)
        assert len({attention, ClusteredAttention(**SETTINGS)}) == 1
        assert isinstance(hash(ClusteredAttention(implementation=("pallas", "xla"))), int)

    def test_equal_settings_share_a_trace(self, qkv):
        traces = []

        @functools.partial(jax.jit, static_argnums=0)
        def call(attention, *qkv):
            traces.append(attention)
            return attention(*qkv)

        for _ in range(3):
            jax.eval_shape(functools.partial(call, ClusteredAttention(**SETTINGS)), *qkv)
        assert len(traces) == 1
        for number, change in enumerate(({"topk": 0}, {"seed": 1}), start=2):
            other = ClusteredAttention(**SETTINGS | change)
            jax.eval_shape(functools.partial(call, other), *qkv)
            assert len(traces) == number

    @pytest.mark.once
    @pytest.mark.parametrize(
        "changes",
        [
            {"topk": 2, "merge": "mass", "scale": 0.2, "num_bits": 9, "seed": 3},
            {"num_clusters": 3, "metric": "euclidean", "space": "logit", "num_iterations": 1},
        ],
        ids=["hamming", "euclidean"],
    )
    def test_settings_are_those_of_clustered_attention(self, changes, qkv):
        out = ClusteredAttention(**SETTINGS | changes)(*qkv)
        assert np.abs(out - attention(*qkv)).max() > 1e-3
        rng = jax.random.key(changes.get("seed", 0))
        changes = {name: x for name, x in changes.items() if name != "seed"}
        np.testing.assert_array_equal(out, attention(*qkv, rng=rng, **changes))

    @pytest.mark.once
    def test_arguments_are_passed_on(self):
        inputs = make_inputs(BY_NAME["everything"])
        settings = SETTINGS | {"space": "logit"}
        lengths = {
            "query_seq_lengths": inputs.query_seq_lengths,
            "key_value_seq_lengths": inputs.key_value_seq_lengths,
        }
        np.testing.assert_array_equal(
            ClusteredAttention(**settings)(*inputs[:5], **lengths),
            clustax.clustered_attention(*inputs[:5], **lengths, **settings),
        )

    @pytest.mark.once
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.bool_])
    def test_masks_of_any_dtype(self, dtype, qkv):
        mask = np.random.default_rng(0).random((2, 1, 1, 24)) < 0.6
        np.testing.assert_array_equal(
            ClusteredAttention(**SETTINGS)(*qkv, mask=jnp.asarray(mask, dtype)),
            attention(*qkv, mask=jnp.asarray(mask)),
        )


class TestFlax:
    """As the ``attention_fn`` of Flax's own modules, with a mask of keys as Flax makes it."""

    NUM_HEADS, FEATURES, LENGTH = 2, 16, 24

    @pytest.fixture
    def hidden(self):
        rng = np.random.default_rng(0)
        return jnp.asarray(rng.standard_normal((2, self.LENGTH, self.FEATURES)), jnp.float32)

    @pytest.fixture
    def valid(self):
        return jnp.arange(self.LENGTH) < jnp.array([[24], [13]])

    def nnx_module(self, attention_fn):
        return nnx.MultiHeadAttention(
            self.NUM_HEADS,
            self.FEATURES,
            attention_fn=attention_fn,
            decode=False,
            rngs=nnx.Rngs(0),
        )

    def test_nnx(self, hidden, valid):
        mask = nnx.make_attention_mask(jnp.ones((2, 1)), valid)
        assert mask.dtype == jnp.float32
        module = self.nnx_module(ClusteredAttention(**SETTINGS))
        out = module(hidden, mask=mask)
        qkv = (layer(hidden) for layer in (module.query, module.key, module.value))
        by_hand = module.out(attention(*qkv, mask=valid[:, None, None]))
        assert_close(out, by_hand, 1e-6)

    @pytest.mark.once
    def test_nnx_with_all_keys_is_exact(self, hidden, valid):
        mask = nnx.make_attention_mask(jnp.ones((2, 1)), valid)
        exact = self.nnx_module(nnx.dot_product_attention)(hidden, mask=mask)
        settings = SETTINGS | {"topk": self.LENGTH}
        out = self.nnx_module(ClusteredAttention(**settings))(hidden, mask=mask)
        assert_close(out, exact)

    @pytest.mark.once
    def test_linen_with_all_keys_is_exact(self, hidden, valid):
        mask = linen.make_attention_mask(jnp.ones((2, 1)), valid)
        build = functools.partial(
            linen.MultiHeadDotProductAttention, num_heads=self.NUM_HEADS, deterministic=True
        )
        exact = build()
        variables = exact.init(jax.random.key(0), hidden, mask=mask)
        expected = exact.apply(variables, hidden, mask=mask)
        settings = SETTINGS | {"topk": self.LENGTH}
        out = build(attention_fn=ClusteredAttention(**settings)).apply(variables, hidden, mask=mask)
        assert_close(out, expected)

    def test_linen(self, hidden, valid):
        mask = linen.make_attention_mask(jnp.ones((2, 1)), valid)
        module = linen.MultiHeadDotProductAttention(
            num_heads=self.NUM_HEADS, attention_fn=ClusteredAttention(**SETTINGS)
        )
        out, variables = module.init_with_output(jax.random.key(0), hidden, mask=mask)
        params = variables["params"]
        qkv = (
            jnp.einsum("btd,dnh->btnh", hidden, params[name]["kernel"]) + params[name]["bias"]
            for name in ("query", "key", "value")
        )
        heads = attention(*qkv, mask=valid[:, None, None])
        by_hand = jnp.einsum("btnh,nhd->btd", heads, params["out"]["kernel"])
        assert_close(out, by_hand + params["out"]["bias"], 1e-5)
