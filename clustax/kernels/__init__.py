"""Pallas kernels of the hot path, one file a kernel; ``attend`` composes those of attention.

They run on TPUs; ``gpu`` has those for GPUs. ``with
clustax.kernels.interpret("tpu"):``, or one of :data:`GPUS`, has them interpreted, wherever that
is: slowly, for tests and debugging.
"""

import importlib
from types import ModuleType

import jax

GPUS = {
    "hopper": ("H100", "H200", "H800", "H20", "GH200"),
    "blackwell": ("B200", "GB200"),
}
"""The generations of GPUs that there are kernels for, and which GPUs are of them."""

interpret = jax.make_user_context(default_value=None)
"""The device whose kernels are interpreted, whatever the device is; those that run, if None."""


def device() -> str | None:
    """The device whose kernels a program that is traced now would run, or None if it has none."""
    found = interpret.value or _target()
    # The interpreter of JAX 0.10 has no matrix products of GPUs.
    oldest = (0, 11) if interpret.value else (0, 10, 2)
    return None if found in GPUS and jax.__version_info__ < oldest else found


def _target() -> str | None:
    target = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if target is None else target.platform
    if platform == "tpu":
        return "tpu"
    found = (name for name, kinds in GPUS.items() if set(kinds) & set(kind().split()))
    return next(found, None)


def kind() -> str:
    """What JAX calls the device that a program which is traced now is for."""
    target = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if target is None else target.device_kind


def of(name: str) -> ModuleType:
    """The module of this name with the kernels of this device.

    It is imported only here: Pallas takes longer to import than all of clustax.
    """
    package = "clustax.kernels.gpu" if device() in GPUS else "clustax.kernels"
    return importlib.import_module(f"{package}.{name}")
