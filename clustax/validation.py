"""Checks of what a caller passes: an error names argument, expectation, finding and remedy.

They look at shapes, dtypes and settings only, so they come before anything is compiled.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32


def integer(name: str, value: Any, why: str = "it is a setting") -> None:
    """Checks a setting that is a whole number."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(
            f"{name} must be a Python int, got {value!r}; {why}, so it cannot be an array: under "
            "jax.jit mark it as a static argument."
        )


def at_least(name: str, value: Any, minimum: int) -> None:
    """Checks an integer setting."""
    integer(name, value, "it decides shapes")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Checks a setting that is one of some names."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def no_keys(**about_keys: Any) -> None:
    """Refuses what says something of keys where there are none."""
    for name, given in about_keys.items():
        if given is not None:
            raise ValueError(f"{name} is about keys, got it without key; pass key or leave it out.")


CLUSTERS_LEAK = (
    "queries share the centroid and the top-k keys of their cluster, so later positions would leak "
    "into earlier ones; use exact attention where it has to be causal"
)


def not_causal(is_causal: bool, why: str = CLUSTERS_LEAK) -> None:
    """Refuses causal attention."""
    if is_causal:
        raise NotImplementedError(f"is_causal=True is not supported: {why}.")


def scalar(name: str, value: Any) -> None:
    """Checks a number, which may be traced."""
    if jnp.ndim(value) != 0:
        raise ValueError(
            f"{name} must be one number, got an array of shape {jnp.shape(value)}; pass a float."
        )


def rng_key(name: str, rng: Any) -> Array:
    """Checks a ``jax.random`` key, typed or legacy; None stands for ``jax.random.key(0)``."""
    if rng is None:
        return jax.random.key(0)
    is_array = isinstance(rng, jax.Array)
    if is_array and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) and rng.ndim == 0:
        return rng
    if is_array and rng.dtype == jnp.uint32 and rng.ndim == 1:  # a legacy key
        return rng
    found = f"an array of {rng.dtype} and shape {rng.shape}" if is_array else repr(rng)
    raise ValueError(f"{name} must be one jax.random key, got {found}; pass jax.random.key(seed).")


def array(name: str, value: Any, axes: str, kind: type, kind_name: str) -> Array:
    """Checks the dtype and the rank of an array, of which no axis may be empty.

    ``axes`` names the axes; a first one of "*B" stands for any number of batch axes.
    """
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, kind):
        raise ValueError(
            f"{name} must be {kind_name}, got {value.dtype}; convert it with {name}.astype(...)."
        )
    named = axes.split()
    core = [axis for axis in named if axis != "*B"]
    if value.ndim < len(core) or (len(core) == len(named) and value.ndim != len(core)):
        any_batch = ", *B being any number of batch axes" if len(core) < len(named) else ""
        raise ValueError(
            f"{name} must have axes ({', '.join(named)}){any_batch}, got shape {value.shape}."
        )
    if 0 in value.shape:
        raise ValueError(f"{name} must not be empty, got shape {value.shape}.")
    return value


def floating(name: str, value: Any, axes: str) -> Float[Array, "..."]:
    """Checks the rank of a floating array."""
    return array(name, value, axes, jnp.floating, "floating")


def shaped(name: str, value: Array, shape: tuple[int, ...], axes: str, fix: str) -> Array:
    """Checks the shape of an array."""
    if value.shape != shape:
        raise ValueError(f"{name} must have shape ({axes}) = {shape}, got {value.shape}; {fix}.")
    return value


def planes(name: str, value: Any, head_dim: int) -> Float[Array, "bits H+1"]:
    """Checks hash planes against the queries that they are to hash."""
    value = floating(name, value, "bits H+1")
    fix = f"draw them with hash_planes(rng, num_bits=..., head_dim={head_dim})"
    return shaped(name, value, (value.shape[0], head_dim + 1), "bits, H + 1", fix)


def codes(name: str, value: Any, num_bits: int, num_words: int) -> UInt32[Array, "*B N T W"]:
    """Checks hash codes against their number of bits."""
    value = array(name, value, "*B N T W", jnp.uint32, "uint32")
    fix = f"num_bits={num_bits} takes {num_words} words of 32 bits, as hash_codes makes them"
    return shaped(name, value, (*value.shape[:-1], num_words), "*B, N, T, W", fix)


def lengths(name: str, value: Any, batch: tuple[int, ...]) -> Int[Array, "*B"] | None:
    """Checks the numbers of valid positions of the batch entries."""
    if value is None:
        return None
    value = array(name, value, "*B", jnp.integer, "integer")
    return shaped(name, value, batch, "*B", "pass one length a batch entry")


def positions(name: str, value: Any, num_clusters: int) -> Int[Array, " C"] | None:
    """Checks the positions of the queries that start the centroids."""
    if value is None:
        return None
    value = array(name, value, "C", jnp.integer, "integer")
    return shaped(name, value, (num_clusters,), "C", "pass one position a cluster")


def query_key(query: Any, key: Any) -> tuple[Float[Array, "*B T N H"], Float[Array, "*B S K H"]]:
    """Checks queries and the keys that they go with."""
    query = floating("query", query, "*B T N H")
    key = floating("key", key, "*B S K H")
    *batch, _, num_heads, head_dim = query.shape
    if key.dtype != query.dtype:
        raise ValueError(
            f"key must have the dtype of query, {query.dtype}, got {key.dtype}; convert it."
        )
    if key.ndim != query.ndim or key.shape[:-3] != tuple(batch):
        raise ValueError(
            f"key must have the batch axes of query, {tuple(batch)}, got shape {key.shape}; "
            "broadcast or reshape it."
        )
    if key.shape[-1] != head_dim:
        raise ValueError(
            f"key must have the head dim H of query, {head_dim}, got {key.shape[-1]} "
            f"(shape {key.shape}); its axes are (*B, S, K, H)."
        )
    if num_heads % key.shape[-2]:
        raise ValueError(
            f"key must have a number of heads that divides the N = {num_heads} of query, got "
            f"{key.shape[-2]} (shape {key.shape}); its axes are (*B, S, K, H)."
        )
    return query, key


def value_of_key(value: Any, key: Float[Array, "*B S K H"]) -> Float[Array, "*B S K V"]:
    """Checks values against their keys."""
    value = floating("value", value, "*B S K V")
    if value.dtype != key.dtype:
        raise ValueError(
            f"value must have the dtype of key, {key.dtype}, got {value.dtype}; convert it."
        )
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"value must have the axes (*B, S, K) of key, {key.shape[:-1]}, got shape "
            f"{value.shape}; only the last axis may differ."
        )
    return value


def of_keys(name: str, value: Any, query: Float[Array, "*B T N H"], num_keys: int) -> Array | None:
    """Checks a mask (bool) or a bias (floating) of keys."""
    if value is None:
        return None
    value = jnp.asarray(value)
    if name == "mask" and value.dtype != jnp.bool_:
        raise ValueError(
            f"mask must be bool, True for keys to attend to, got {value.dtype}; pass "
            "mask.astype(bool), or pass what is to be added to the logits as bias."
        )
    if name == "bias":
        value = floating(name, value, "*B")
    *batch, _, num_heads, _ = query.shape
    if value.ndim == query.ndim and value.shape[-2] > 1:
        raise ValueError(
            f"{name} must be the same for all queries, of shape (*B|1, N|1, 1, S), got "
            f"{value.shape}: the queries of a cluster share one row of attention. For padding pass "
            "a mask of shape (*B, 1, 1, S) or key_value_seq_lengths, and query_seq_lengths for "
            "queries; causal and other query-dependent masks are not supported."
        )
    full = (*batch, num_heads, 1, num_keys)
    allowed = [{1, size} for size in full[:-1]] + [{num_keys}]
    if value.ndim != len(full) or any(
        size not in sizes for size, sizes in zip(value.shape, allowed, strict=True)
    ):
        raise ValueError(
            f"{name} must have shape (*B|1, N|1, 1, S), here {full} or 1 in place of any size but "
            f"the last, got {value.shape}."
        )
    return value


def clusters(value: Any, query: Float[Array, "*B T N H"]) -> tuple[Array, Array]:
    """Checks clusters against the queries that they are of."""
    if not (hasattr(value, "assignment") and hasattr(value, "counts")):
        raise ValueError(
            f"clusters must be clustax.Clusters, got {type(value).__name__}; "
            "make them with cluster_queries(query, num_clusters=...)."
        )
    *batch, length, num_heads, _ = query.shape
    fix = "make them with cluster_queries(query, num_clusters=...) from this query"
    assignment = array("clusters.assignment", value.assignment, "*B N T", jnp.integer, "integer")
    shaped("clusters.assignment", assignment, (*batch, num_heads, length), "*B, N, T", fix)
    counts = array("clusters.counts", value.counts, "*B N C", jnp.integer, "integer")
    shaped("clusters.counts", counts, (*batch, num_heads, counts.shape[-1]), "*B, N, C", fix)
    return assignment, counts
