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
        monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
        assert kernels.device() == expected
        monkeypatch.setattr(jax, "__version_info__", (0, 10, 1))
        assert kernels.device() == (expected if platform == "tpu" else None)


@pytest.mark.parametrize("device", kernels.GPUS)
def test_jax_0_10_does_not_interpret_kernels_for_gpus(monkeypatch, device):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with kernels.interpret(device):
        refused = choose(("pallas", "xla")).refused["pallas"]
    assert "(to interpret these, 0.11)" in refused


@pytest.mark.parametrize(
    ("kind", "version", "is_default"),
    [("H200", (0, 11, 2), True), ("H200", (0, 10, 2), False), ("B200", (0, 12, 0), False)],
)
def test_kernels_that_never_ran_have_to_be_asked_for(monkeypatch, kind, version, is_default):
    device = AbstractDevice(device_kind=f"NVIDIA {kind}", num_cores=None, platform="gpu")
    monkeypatch.setattr(jax, "__version_info__", version)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert choose("pallas").name == "pallas"
        assert choose().name == ("pallas" if is_default else "xla")
        if not is_default:
            assert "asked for" in choose().refused["pallas"]
