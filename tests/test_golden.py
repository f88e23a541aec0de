"""The authors' own outputs, on the four golden cases (see golden/README.md)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import clustax
from tests import oracle
from tests.helpers import others_once

NAMES = ("small", "padded", "cross", "paper_scale")


class Golden:
    """The arrays of a golden case, in the conventions of clustax."""

    def __init__(self, name):
        arrays = dict(np.load(Path(__file__).parent / "golden" / f"{name}.npz"))
        for setting in ("num_clusters", "topk", "num_bits", "num_iterations"):
            setattr(self, setting, int(arrays[setting]))
        self.query, self.key, self.value = (
            jnp.asarray(arrays[x]) for x in ("query", "key", "value")
        )
        self.planes = jnp.asarray(arrays["planes"])
        self.init_positions = jnp.asarray(arrays["init_positions"])
        self.lengths = {
            "query_seq_lengths": jnp.asarray(arrays["query_lengths"], jnp.int32),
            "key_value_seq_lengths": jnp.asarray(arrays["key_lengths"], jnp.int32),
        }
        self.valid = np.arange(self.query.shape[1]) < arrays["query_lengths"][:, None]  # B T
        self.hashes = arrays["hashes"]
        padded = ~self.valid[:, None]
        self.assignment = np.where(padded, self.num_clusters, arrays["assignment"])
        self.counts = arrays["counts"]
        self.outputs = {0: arrays["out_clustered"], self.topk: arrays["out_improved"]}


@pytest.fixture(params=others_once(*NAMES), scope="module")
def golden(request):
    return Golden(request.param)


def test_codes_are_those_of_the_authors(golden):
    codes = clustax.hash_codes(golden.query, golden.planes)
    bits = oracle.unpack(codes, golden.num_bits)
    expected = golden.hashes[..., None] >> np.arange(golden.num_bits) & 1
    valid = np.broadcast_to(golden.valid[:, None], golden.hashes.shape)
    np.testing.assert_array_equal(bits[valid], expected[valid])
    assert bits.shape == expected.shape
    assert valid.any()


def test_clusters_are_those_of_the_authors(golden, implementation):
    clusters = clustax.cluster_queries(
        golden.query,
        num_clusters=golden.num_clusters,
        num_iterations=golden.num_iterations,
        planes=golden.planes,
        initial_positions=golden.init_positions,
        query_seq_lengths=golden.lengths["query_seq_lengths"],
        implementation=implementation,
    )
    np.testing.assert_array_equal(clusters.assignment, golden.assignment)
    np.testing.assert_array_equal(clusters.counts, golden.counts)


@pytest.mark.parametrize("improved", others_once(True, False), ids=["improved", "clustered"])
def test_outputs_are_those_of_the_authors(golden, improved, implementation):
    topk = golden.topk if improved else 0
    out = clustax.attend(
        golden.query,
        golden.key,
        golden.value,
        clusters=clustax.Clusters(jnp.asarray(golden.assignment), jnp.asarray(golden.counts)),
        topk=topk,
        implementation=implementation,
        **golden.lengths,
    )
    np.testing.assert_allclose(
        np.asarray(out)[golden.valid], golden.outputs[topk][golden.valid], rtol=0, atol=2e-6
    )
    np.testing.assert_array_equal(np.asarray(out)[~golden.valid], 0)
