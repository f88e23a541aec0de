"""Pallas kernels of the hot path, one file a kernel; ``attend`` composes those of attention.

They run on TPUs; ``hopper`` has those for Hopper GPUs, from JAX 0.11 on. ``with
clustax.kernels.interpret("tpu"):``, or ``"hopper"``, has them interpreted, wherever that is:
slowly, for tests and debugging.
"""

import importlib
from types import ModuleType

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")

interpret = jax.make_user_context(default_value=None)
"""The device whose kernels are interpreted, whatever the device is; those that run, if None."""


def device() -> str | None:
    """The device whose kernels a program that is traced now would run, or None if it has none."""
    if interpret.value is not None:
        return interpret.value
    target = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if target is None else target.platform
    if platform == "tpu":
        return "tpu"
    kind = jax.devices()[0].device_kind if target is None else target.device_kind
    is_hopper = any(name in kind.split() for name in HOPPER)
    return "hopper" if is_hopper and jax.__version_info__ >= (0, 11) else None


def of(name: str) -> ModuleType:
    """The module of this name with the kernels of this device.

    It is imported only here: Pallas takes longer to import than all of clustax.
    """
    package = "clustax.kernels.hopper" if device() == "hopper" else "clustax.kernels"
    return importlib.import_module(f"{package}.{name}")
