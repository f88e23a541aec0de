"""Attentions that the experiments compare, of those that the library has no object for."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array

from clustax import ClusteredAttention
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


@dataclass(frozen=True)
class Attentions:
    """What the attentions that models are trained with have in common."""

    topk: int = 32
    """Keys with exact weights, of improved and default."""
    num_bits: int = 32
    """Bits in a hash code, of clustered and improved."""
    num_iterations: int = 10
    """Assignments in K-means, of clustered and improved."""
    num_buckets: int = 64
    """Buckets of lsh in a round."""
    chunk_size: int = 32
    """Positions in a chunk of lsh."""

    def make(self, method: str, size: int, head_dim: int, seed: int) -> AttentionFn:
        """The attention of a method.

        Args:
            method: "clustered" and "improved", the paper's two in its setting; "default", this
                library's; or "lsh", the Reformer that the paper's authors compare with.
            size: clusters, or rounds of lsh.
            head_dim: of the queries.
            seed: of the hashing.
        """
        if method == "lsh":
            return papers_reformer(
                size,
                head_dim,
                num_buckets=self.num_buckets,
                chunk_size=self.chunk_size,
                seed=seed,
            )
        if method == "default":
            return ClusteredAttention(num_clusters=size, topk=self.topk, seed=seed)
        return ClusteredAttention.paper(
            num_clusters=size,
            topk=self.topk if method == "improved" else 0,
            num_bits=self.num_bits,
            num_iterations=self.num_iterations,
            seed=seed,
        )
