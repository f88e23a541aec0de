"""Errors: what a caller gets for a mistake names the argument, what it should be, and what it is.

Each row of a table is a mistake: the arguments that it changes, and what the message has to say.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

import clustax
from clustax import ClusteredAttention, Clusters, attention, clustering, kernels, lsh
from clustax.implementations import Choice, choose
from tests.helpers import others_once

B, T, S, N, K, H, V, C = 2, 6, 7, 4, 2, 8, 5, 3


def floats(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def bools(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bool_)


def words(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.uint32)


QUERY = {"query": floats(B, T, N, H)}
QUERY_KEY = QUERY | {"key": floats(B, S, K, H)}
QUERY_KEY_VALUE = QUERY_KEY | {"value": floats(B, S, K, V)}
CALLS = {  # calls without a mistake
    "hash_planes": {"rng": jax.random.key(0), "num_bits": 4, "head_dim": H},
    "hash_codes": QUERY | {"planes": floats(40, H + 1)},
    "cluster_codes": {"codes": words(B, N, T, 2), "num_bits": 40, "num_clusters": C},
    "cluster_queries": QUERY | {"num_clusters": C},
    "cluster_queries_by_key": QUERY_KEY | {"num_clusters": C},
    "attend": QUERY_KEY_VALUE | {"clusters": Clusters(ints(B, N, T), ints(B, N, C))},
    "clustered_attention": QUERY_KEY_VALUE | {"num_clusters": C},
    "clustered_attention_exact": QUERY_KEY_VALUE | {"num_clusters": C, "exact_below": T + 1},
}

OF_QUERY = [
    ({"query": ints(B, T, N, H)}, "query must be floating, got int32; convert"),
    ({"query": floats(T, H)}, "query must have axes (*B, T, N, H), got shape (6, 8)"),
    ({"query": floats(B, 0, N, H)}, "query must not be empty, got shape (2, 0, 4, 8)"),
]
OF_QUERY_LENGTHS = [
    ({"query_seq_lengths": floats(B)}, "query_seq_lengths must be integer, got float32"),
    ({"query_seq_lengths": ints(3)}, "query_seq_lengths must have shape (2,), got (3,)"),
    ({"query_seq_lengths": ints()}, "query_seq_lengths must have shape (2,), got ()"),
]
OF_KEY = [
    ({"key": ints(B, S, K, H)}, "key must be floating, got int32; convert"),
    ({"key": floats(S, H)}, "key must have axes (*B, S, K, H), got shape (7, 8)"),
    ({"key": floats(B, 0, K, H)}, "key must not be empty, got shape (2, 0, 2, 8)"),
    ({"key": floats(B, S, K, H, dtype=jnp.bfloat16)}, "key must dtype float32, got bfloat16"),
    ({"key": floats(3, S, K, H)}, "key must have the batch axes of query, (2,), got (3, 7, 2, 8)"),
    ({"key": floats(S, K, H)}, "key must have the batch axes of query, (2,), got (7, 2, 8)"),
    ({"key": floats(1, B, S, K, H)}, "key must have the batch axes of query, got (1, 2, 7, 2, 8)"),
    ({"key": floats(B, S, K, 9)}, "key must have the head dim H of query, 8, got 9"),
    (
        {"key": floats(B, S, 3, H)},
        "key must have a number of heads that divides N = 4 of query, got 3",
    ),
    (
        {"key": floats(B, S, 8, H)},
        "key must have a number of heads that divides N = 4 of query, got 8",
    ),
]
OF_MASK = [
    ({"mask": floats(B, 1, 1, S)}, "mask must be bool, got float32; mask.astype(bool) bias"),
    ({"mask": ints(B, 1, 1, S)}, "mask must be bool, got int32; mask.astype(bool)"),
    (
        {"mask": bools(B, 1, T, S)},
        "mask (*B|1, N|1, 1, S), got (2, 1, 6, 7): query_seq_lengths",
    ),
    ({"mask": bools(B, 1, 1, 6)}, "mask must have shape (*B|1, N|1, 1, S), got (2, 1, 1, 6)"),
    ({"mask": bools(B, 3, 1, S)}, "mask must have shape (*B|1, N|1, 1, S), got (2, 3, 1, 7)"),
    ({"mask": bools(3, 1, 1, S)}, "mask must have shape (*B|1, N|1, 1, S), got (3, 1, 1, 7)"),
    ({"mask": bools(B, S)}, "mask must have shape (*B|1, N|1, 1, S), got (2, 7)"),
]
OF_KEY_LENGTHS = [
    ({"key_value_seq_lengths": floats(B)}, "key_value_seq_lengths must be integer, got float32"),
    ({"key_value_seq_lengths": ints(B, 1)}, "key_value_seq_lengths must shape (2,), got (2, 1)"),
]
OF_CLUSTERING = [
    ({"num_clusters": 0}, "num_clusters must be at least 1, got 0"),
    ({"num_clusters": 2.0}, "num_clusters must be a Python int, got 2.0"),
    ({"num_clusters": True}, "num_clusters must be a Python int, got True"),
    ({"num_clusters": ints()}, "num_clusters must be a Python int, got static"),
    ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
    ({"num_iterations": 1.5}, "num_iterations must be a Python int, got 1.5"),
    ({"num_bits": 0}, "num_bits must be at least 1, got 0"),
    ({"num_bits": "64"}, "num_bits must be a Python int, got '64'"),
    ({"rng": 0}, "rng must be one jax.random key, got 0; jax.random.key("),
    ({"rng": floats(2)}, "rng must be one jax.random key, got float32 (2,)"),
    ({"rng": words(3, 2)}, "rng must be one jax.random key, got uint32 (3, 2)"),
]
OF_START = [
    ({"initial_positions": ints(4)}, "initial_positions must have shape (3,), got (4,)"),
    ({"initial_positions": ints(C, 1)}, "initial_positions must have axes (C), got (3, 1)"),
    ({"initial_positions": floats(C)}, "initial_positions must be integer, got float32"),
]
OF_METRIC = [
    ({"metric": "cosine"}, "metric must be one of 'hamming', 'euclidean', got 'cosine'"),
    ({"metric": None}, "metric must be one of 'hamming', 'euclidean', got None"),
]
OF_IMPLEMENTATION = [
    ({"implementation": "cuda"}, "implementation None, 'xla', 'pallas', 'reference', got 'cuda'"),
    ({"implementation": ("xla", "c")}, "implementation 'xla', 'pallas', got ('xla', 'c')"),
    ({"implementation": ()}, "implementation must be 'xla', 'pallas', 'reference', got ()"),
]
OF_LENGTH = [
    ({"exact_below": 0}, "exact_below must be at least 1, got 0"),
    ({"exact_below": 64.0}, "exact_below must be a Python int, got 64.0"),
    ({"exact_below": ints()}, "exact_below must be a Python int, got static"),
]
OF_PLANES = [
    ({"planes": floats(40, H)}, "planes must have shape (bits, H + 1) (40, 9), got (40, 8)"),
    ({"planes": floats(H + 1)}, "planes must have axes (bits, H+1), got shape (9,)"),
    ({"planes": ints(40, H + 1)}, "planes must be floating, got int32"),
]
OF_ATTENTION = [
    ({"value": ints(B, S, K, V)}, "value must be floating, got int32; convert"),
    ({"value": floats(S, V)}, "value must have axes (*B, S, K, V), got shape (7, 5)"),
    ({"value": floats(B, S, K, V, dtype=jnp.float16)}, "value must dtype float32, got float16"),
    ({"value": floats(B, 6, K, V)}, "value (*B, S, K) of key, (2, 7, 2), got (2, 6, 2, 5)"),
    ({"value": floats(B, S, N, V)}, "value (*B, S, K) of key, (2, 7, 2), got (2, 7, 4, 5)"),
    ({"value": floats(1, S, K, V)}, "value (*B, S, K) of key, (2, 7, 2), got (1, 7, 2, 5)"),
    ({"bias": ints(B, 1, 1, S)}, "bias must be floating, got int32"),
    ({"bias": floats(B, N, T, S)}, "bias (*B|1, N|1, 1, S), got (2, 4, 6, 7): query_seq_lengths"),
    ({"bias": floats(B, N, 1, 8)}, "bias must have shape (*B|1, N|1, 1, S), got (2, 4, 1, 8)"),
    ({"bias": floats(N, 1, S)}, "bias must have shape (*B|1, N|1, 1, S), got (4, 1, 7)"),
    ({"topk": -1}, "topk must be at least 0, got -1"),
    ({"topk": 3.0}, "topk must be a Python int, got 3.0"),
    ({"topk": ints()}, "topk must be a Python int, got static"),
    ({"merge": "sum"}, "merge must be one of 'mass', 'lse', got 'sum'"),
    ({"num_subclusters": 0}, "num_subclusters must be at least 1, got 0"),
    ({"scale": floats(N)}, "scale must be one number, got an array of shape (4,)"),
]
MISTAKES = {
    "hash_planes": [
        ({"rng": 0}, "rng must be one jax.random key, got 0; jax.random.key("),
        ({"num_bits": 0}, "num_bits must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"head_dim": ints()}, "head_dim must be a Python int, got static"),
    ],
    "hash_codes": OF_QUERY + OF_PLANES,
    "cluster_codes": [
        ({"codes": ints(B, N, T, 2)}, "codes must be uint32, got int32"),
        ({"codes": words(T, 2)}, "codes must have axes (*B, N, T, W), got shape (6, 2)"),
        ({"codes": words(B, N, T, 3)}, "codes must have shape (2, 4, 6, 2), got (2, 4, 6, 3)"),
        *OF_CLUSTERING,
        *OF_START,
        *OF_QUERY_LENGTHS,
        *OF_IMPLEMENTATION,
    ],
    "cluster_queries": [
        *OF_QUERY,
        *OF_CLUSTERING,
        *OF_START,
        *OF_QUERY_LENGTHS,
        *OF_METRIC,
        *OF_PLANES,
        *OF_IMPLEMENTATION,
        ({"planes": floats(40, H + 1), "metric": "euclidean"}, "planes 'hamming', got 'euclidean'"),
        ({"mask": bools(B, 1, 1, S)}, "mask is about keys, without key"),
        ({"key_value_seq_lengths": ints(B)}, "key_value_seq_lengths is about keys, without key"),
    ],
    "cluster_queries_by_key": OF_QUERY + OF_KEY + OF_MASK + OF_KEY_LENGTHS,
    "attend": [
        *OF_QUERY,
        *OF_KEY,
        *OF_ATTENTION,
        *OF_MASK,
        *OF_QUERY_LENGTHS,
        *OF_KEY_LENGTHS,
        *OF_IMPLEMENTATION,
        ({"clusters": None}, "clusters must be clustax.Clusters, got NoneType; cluster_queries"),
        ({"clusters": (ints(B, N, T), ints(B, N, C))}, "clusters Clusters, got tuple"),
        (
            {"clusters": Clusters(ints(B, N, T + 1), ints(B, N, C))},
            "clusters.assignment must have shape (2, 4, 6), got (2, 4, 7)",
        ),
        (
            {"clusters": Clusters(ints(B, T, N), ints(B, N, C))},
            "clusters.assignment must have shape (2, 4, 6), got (2, 6, 4)",
        ),
        (
            {"clusters": Clusters(floats(B, N, T), ints(B, N, C))},
            "clusters.assignment must be integer, got float32",
        ),
        (
            {"clusters": Clusters(ints(B, N, T), ints(B, K, C))},
            "clusters.counts must have shape (2, 4, 3), got (2, 2, 3)",
        ),
        (
            {"clusters": Clusters(ints(B, N, T), floats(B, N, C))},
            "clusters.counts must be integer, got float32",
        ),
    ],
    "clustered_attention": [
        *OF_QUERY,
        *OF_KEY,
        *OF_ATTENTION,
        *OF_MASK,
        *OF_QUERY_LENGTHS,
        *OF_KEY_LENGTHS,
        *OF_CLUSTERING,
        *OF_METRIC,
        *OF_IMPLEMENTATION,
        *OF_LENGTH,
        ({"space": "key"}, "space must be one of 'query', 'logit', got 'key'"),
    ],
}
MISTAKES["clustered_attention_exact"] = MISTAKES["clustered_attention"]
ROWS = [
    pytest.param(name, changes, message, id=f"{name}-{message}")
    for name, mistakes in MISTAKES.items()
    for changes, message in mistakes
]


def pattern(message):
    """A regular expression for the parts of a message: its words and shapes, in this order."""
    parts = re.findall(r"\([^()]*\)?|[^\s()]+", message)
    return ".*".join(map(re.escape, parts))


def call(name, arguments):
    """Calls a function of clustax, with arrays for the shapes among its arguments."""

    def array(x):
        return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x

    arguments = jax.tree.map(array, arguments, is_leaf=lambda x: x is None)
    return getattr(clustax, name.removesuffix("_by_key").removesuffix("_exact"))(**arguments)


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Fails where a program of any size is run before all arguments are checked."""

    def refuse(*_, **__):
        pytest.fail("a program was run before all arguments were checked")

    for module, name in [
        (attention, "_attend"),
        (attention, "attend_exactly"),
        (clustering, "_run_kmeans"),
        (clustering, "to_logit_space"),
        (lsh, "_hash"),
    ]:
        monkeypatch.setattr(module, name, refuse)


@pytest.mark.once
@pytest.mark.parametrize("name", CALLS)
def test_calls_without_a_mistake_are_served(name):
    for leaf in jax.tree.leaves(call(name, CALLS[name])):
        assert jnp.isfinite(leaf).all()


@pytest.mark.parametrize(("name", "changes", "message"), ROWS)
def test_mistakes_are_explained_before_anything_runs(nothing_compiled, name, changes, message):
    with pytest.raises(ValueError, match=pattern(message)):
        call(name, CALLS[name] | changes)


@pytest.mark.parametrize("num_clusters", [C, T])  # with T of them topk has no effect
def test_mistakes_are_explained_under_jit(num_clusters):
    def attend(topk):
        query = jnp.zeros((T, N, H))
        return clustax.clustered_attention(
            query, query, query, num_clusters=num_clusters, topk=topk
        )

    with pytest.raises(ValueError, match=r"topk must be a Python int.*static argument"):
        jax.jit(attend)(3)


@pytest.mark.parametrize(
    "name", others_once("cluster_queries", "clustered_attention", "hash_planes")
)
@pytest.mark.parametrize(
    "rng", others_once(jax.random.PRNGKey(1), jax.random.key(1)), ids=["legacy", "typed"]
)
def test_both_kinds_of_random_keys_are_served(name, rng):
    assert jax.tree.leaves(call(name, CALLS[name] | {"rng": rng}))


@pytest.mark.parametrize(
    "name", ["attend", "clustered_attention", "cluster_queries", "cluster_codes"]
)
class TestImplementations:
    def test_pallas_is_refused_with_the_reason(self, nothing_compiled, name):
        with pytest.raises(
            NotImplementedError, match=r"'pallas' .*for TPUs.*Hopper and.*GPUs.*'xla'"
        ):
            call(name, CALLS[name] | {"implementation": "pallas"})

    @pytest.mark.once
    def test_next_one_is_tried(self, name):
        for each in (None, ("pallas", "xla"), ["pallas", "reference"]):
            assert jax.tree.leaves(call(name, CALLS[name] | {"implementation": each}))


def test_one_can_ask_which_implementation_runs():
    assert choose().name == choose(("pallas", "xla")).name == choose("xla").name == "xla"
    assert choose("reference").name == choose(("pallas", "reference")).name == "reference"
    assert not choose("xla").refused
    assert list(choose().refused) == ["pallas"]
    assert "TPUs" in choose().refused["pallas"]
    with kernels.interpret("tpu"):
        assert choose().name == choose("pallas").name == "pallas"
        assert choose(None, lambda: "why").refused == {"pallas": "why"}
    tpu = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=tpu)):
        assert choose() == choose("pallas") == Choice("pallas", {})


@pytest.mark.once
def test_kernels_serve_no_float16():
    given = CALLS["attend"] | {
        "query": floats(B, T, N, H, dtype=jnp.float16),
        "key": floats(B, S, K, H, dtype=jnp.float16),
        "value": floats(B, S, K, V, dtype=jnp.float16),
    }
    with kernels.interpret("tpu"):
        assert call("attend", given).dtype == jnp.float16
        with pytest.raises(NotImplementedError, match="float32 and bfloat16, not float16"):
            call("attend", given | {"implementation": "pallas"})


def test_causal_attention_is_refused_with_the_reason(nothing_compiled):
    with pytest.raises(NotImplementedError, match=r"is_causal=True.*later positions"):
        call("clustered_attention", CALLS["clustered_attention"] | {"is_causal": True})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            row
            for row in OF_CLUSTERING + OF_METRIC + OF_IMPLEMENTATION + OF_LENGTH
            if "rng" not in row[0]
        ),
        *(row for row in OF_ATTENTION if row[0].keys() & {"topk", "merge"}),
        ({"space": "key"}, "space must be one of 'query', 'logit', got 'key'"),
    ],
    ids=str,
)
def test_settings_are_checked_when_they_are_made(changes, message):
    changes = {
        name: jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
        for name, x in changes.items()
    }
    with pytest.raises(ValueError, match=pattern(message)):
        ClusteredAttention(**changes)


def test_pallas_is_refused_when_settings_are_used():
    """They may be made elsewhere than on the TPU for which they are meant."""
    attention = ClusteredAttention(implementation="pallas")
    with pytest.raises(NotImplementedError, match="pallas"):
        attention(*jnp.zeros((3, B, T, N, H)))
