"""Attentions that the experiments compare, of those that the library has no object for."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from clustax.baselines import Reformer
from clustax.models.common import AttentionFn


@dataclass(frozen=True)
class QueriesAsKeys:
    """An attention whose keys are its queries, so that a model's projection of keys is left out.

    Attributes:
        attention: what attends.
    """

    attention: AttentionFn

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        """Attends as `attention` does; the keys make no difference."""
        del key
        return self.attention(query, query, value, **options)


def papers_reformer(
    rounds: int, head_dim: int, *, num_buckets: int, chunk_size: int, seed: int
) -> QueriesAsKeys:
    """The Reformer that the paper's authors compare with.

    Args:
        rounds, num_buckets, chunk_size, seed: as for `Reformer`.
        head_dim: of the queries.
    """
    return QueriesAsKeys(
        Reformer(
            rounds=rounds,
            num_buckets=num_buckets,
            chunk_size=chunk_size,
            merge="uniform",
            same_bucket=False,
            scale=head_dim**-0.5,
            seed=seed,
        )
    )
