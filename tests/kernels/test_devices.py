"""Which devices have kernels, on which versions of JAX."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from clustax import kernels
from clustax.implementations import choose


@pytest.mark.parametrize(
    ("platform", "kind", "expected"),
    [
        ("tpu", "TPU v5 lite", "tpu"),
        ("gpu", "NVIDIA H100 80GB HBM3", "hopper"),
        ("gpu", "NVIDIA H200", "hopper"),
        ("gpu", "NVIDIA B200", "blackwell"),
        ("gpu", "NVIDIA A100-SXM4-80GB", None),
        ("gpu", "NVIDIA RTX PRO 6000 Blackwell Server Edition", None),
    ],
)
def test_devices_have_kernels_of_their_own(monkeypatch, platform, kind, expected):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
        assert kernels.device() == expected
        monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
        assert kernels.device() == (expected if platform == "tpu" else None)


@pytest.mark.parametrize("device", kernels.GPUS)
def test_jax_0_10_has_no_kernels_for_gpus(monkeypatch, device):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with kernels.interpret(device):
        refused = choose(("pallas", "xla")).refused["pallas"]
    assert "from JAX 0.11 on for Hopper and Blackwell GPUs" in refused
