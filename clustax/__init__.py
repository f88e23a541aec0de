"""Clustered attention in JAX (Vyas, Katharopoulos, Fleuret, NeurIPS 2020)."""

from clustax.attention import attend, clustered_attention
from clustax.attention_fn import ClusteredAttention
from clustax.clustering import Clusters, cluster_codes, cluster_queries
from clustax.lsh import hash_codes, hash_planes

__version__ = "0.1.0"

__all__ = [
    "ClusteredAttention",
    "Clusters",
    "__version__",
    "attend",
    "cluster_codes",
    "cluster_queries",
    "clustered_attention",
    "hash_codes",
    "hash_planes",
]
