"""The problems that tests and benchmarks share, by name."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from clustax import Clusters


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and settings of a call.

    Attributes:
      name: its name.
      batch: the batch axes.
      T, S: query and key length.
      N, K: query and key heads.
      H, V: head and value dim.
      C: number of clusters.
      topk: number of keys with exact logits.
      query_lengths, key_lengths: valid positions of each batch entry, in order; all if None.
      mask: over what the mask of keys varies: nothing ("shared"), batch entries ("batch"), or also
        heads ("head"); None for no mask.
      bias: the same for the bias.
      infinite_bias: whether a third of the bias is -inf.
      metric, space: how queries are clustered.
    """

    name: str
    batch: tuple[int, ...] = (2,)
    T: int = 24
    S: int = 24
    N: int = 2
    K: int = 2
    H: int = 8
    V: int = 8
    C: int = 5
    topk: int = 6
    query_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    mask: Literal["shared", "batch", "head"] | None = None
    bias: Literal["shared", "batch", "head"] | None = None
    infinite_bias: bool = False
    metric: str = "hamming"
    space: str = "query"

    def __str__(self) -> str:
        return self.name


class Inputs(NamedTuple):
    """The arrays of a call of ``clustax.attend``, in its words."""

    query: Any
    key: Any
    value: Any
    bias: Any
    mask: Any
    query_seq_lengths: Any
    key_value_seq_lengths: Any


CASES = [
    Case("plain"),
    Case("no_batch_axis_cross", batch=(), T=19, S=33, V=12),
    Case(
        "two_batch_axes_padding",
        batch=(2, 2),
        query_lengths=(24, 7, 1, 9),
        key_lengths=(3, 24, 9, 1),
        mask="batch",
    ),
    Case("multi_query_bias", N=4, K=1, V=5, bias="batch"),
    Case("grouped_query_mask", N=4, K=2, mask="shared"),
    Case("grouped_query_mask_per_head", N=4, K=2, mask="head"),
    Case("multi_query_infinite_bias_per_head", N=4, K=1, bias="head", infinite_bias=True),
    Case("padding", query_lengths=(24, 13), key_lengths=(17, 24)),
    Case("padding_to_nothing", query_lengths=(0, 1), key_lengths=(24, 0)),
    Case(
        "everything",
        T=21,
        S=30,
        N=4,
        K=2,
        V=6,
        query_lengths=(21, 11),
        key_lengths=(30, 23),
        mask="head",
        bias="shared",
        infinite_bias=True,
        metric="euclidean",
        space="logit",
    ),
    Case("one_query", T=1),
    Case("one_key_topk_beyond", S=1),
    Case("one_cluster", C=1),
    Case("more_clusters_than_queries", T=10, C=13),
    Case("topk_zero", topk=0, mask="batch"),
    Case("topk_all", topk=24, mask="batch"),
    Case("uneven", batch=(3,), T=37, S=53, N=3, K=1, H=7, V=5, C=7, topk=11, metric="euclidean"),
    Case("medium", batch=(1,), T=300, S=300, H=16, V=16, C=25, topk=32, space="logit"),
    Case("long_keys", batch=(1,), T=12, S=4197, N=1, K=1, C=2, topk=8, key_lengths=(4150,)),
]
BY_NAME = {case.name: case for case in CASES}


def make_inputs(case: Case, dtype: Any = jnp.float32, seed: int = 0) -> Inputs:
    """Random inputs. The same numbers for every dtype, rounded to it."""
    rng = np.random.default_rng(seed)
    axes = {
        "shared": (1,) * (len(case.batch) + 1),
        "batch": (*case.batch, 1),
        "head": (*case.batch, case.N),
    }

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    def of_keys(kind):
        return None if kind is None else (*axes[kind], 1, case.S)

    def lengths(given):
        return None if given is None else jnp.asarray(given, jnp.int32).reshape(case.batch)

    query = normal(*case.batch, case.T, case.N, case.H)
    key = normal(*case.batch, case.S, case.K, case.H)
    value = normal(*case.batch, case.S, case.K, case.V)
    mask = bias = None
    if case.mask is not None:
        mask = jnp.asarray(rng.random(of_keys(case.mask)) < 0.6)
    if case.bias is not None:
        bias = normal(*of_keys(case.bias))
        if case.infinite_bias:
            bias = jnp.where(jnp.asarray(rng.random(bias.shape) < 1 / 3), -jnp.inf, bias)
    lengths_given = lengths(case.query_lengths), lengths(case.key_lengths)
    return Inputs(query, key, value, bias, mask, *lengths_given)


def make_clusters(case: Case, seed: int = 0) -> Clusters:
    """Random clusters: they need not be good ones to be attended with. Some may be empty."""
    rng = np.random.default_rng(seed)
    shape = (*case.batch, case.N, case.T)
    assignment = rng.integers(case.C, size=shape, dtype=np.int32)
    if case.query_lengths is not None:
        valid = np.arange(case.T) < np.reshape(case.query_lengths, (*case.batch, 1, 1))
        assignment = np.where(valid, assignment, case.C)
    return clusters_of(assignment, case.C)


def clusters_of(assignment: np.ndarray, num_clusters: int) -> Clusters:
    """The clusters of an assignment, in which C stands for a padded query."""
    rows = np.reshape(assignment, (-1, assignment.shape[-1]))
    counts = np.stack([np.bincount(row, minlength=num_clusters + 1)[:num_clusters] for row in rows])
    counts = counts.reshape(*assignment.shape[:-1], num_clusters)
    return Clusters(jnp.asarray(assignment, jnp.int32), jnp.asarray(counts, jnp.int32))
