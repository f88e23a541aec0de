"""Which code serves a call: xla (fast, portable), pallas (kernels) or reference (the oracle)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax

from clustax import kernels

CHOICES = ("xla", "pallas", "reference")
DEFAULT = ("pallas", "xla")  # what implementation=None tries, in order


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that serves a call.

    Attributes:
      name: its name.
      refused: the implementations that came first but cannot serve the call, with the reasons.
    """

    name: str
    refused: Mapping[str, str]


def choose(
    implementation: str | Sequence[str] | None = None,
    unfit: Callable[[], str | None] = lambda: None,
) -> Choice:
    """Says which implementation serves a call.

    The Pallas kernels are for TPUs and for Hopper and Blackwell GPUs: for those of
    ``jax.default_backend()``, or for those that a program is compiled for ahead of time, under
    ``jax.sharding.use_abstract_mesh`` with an abstract device. Elsewhere they are only interpreted,
    under :data:`clustax.kernels.interpret`. Those for Blackwell, or any GPU under JAX 0.10, never
    ran there, and have to be asked for.

    Args:
      implementation: a name, names to try in order, or None for the default order.
      unfit: says why the Pallas kernels cannot serve the shapes and dtypes of the call; None if
        they can. It is asked only where they could run.

    Returns:
      The first one that can serve the call, with the reasons why those before it cannot.

    Raises:
      ValueError: if a name is unknown.
      NotImplementedError: if none of them can serve the call.

    >>> choose("xla")
    Choice(name='xla', refused={})
    >>> choose(("pallas", "reference"), lambda: "it takes no float16").name
    'reference'
    """
    refused = {}
    for name in names(implementation):
        is_asked = implementation is not None
        reason = _refusal(unfit, is_asked) if name == "pallas" else None
        if reason is None:
            return Choice(name, refused)
        refused[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise NotImplementedError(
        f"implementation={implementation!r} cannot serve this call ({reasons}); "
        "pass implementation='xla', or None to let clustax choose."
    )


def names(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    """The implementations to try, in order; ValueError if one is unknown."""
    wanted = DEFAULT if implementation is None else implementation
    wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    unknown = [name for name in wanted if name not in CHOICES]
    if unknown or not wanted:
        raise ValueError(
            f"implementation must be None, one of {', '.join(map(repr, CHOICES))}, or a sequence "
            f"of these to try in order, got {implementation!r}."
        )
    return wanted


def _refusal(unfit: Callable[[], str | None], is_asked: bool) -> str | None:
    """Why the Pallas kernels do not serve a call, or None."""
    device = kernels.device()
    if device is None:
        return (
            "its kernels are for TPUs, and from JAX 0.10.2 on for Hopper and Blackwell GPUs (to "
            f"interpret these, 0.11), not for this device under JAX {jax.__version__}"
        )
    has_run = device != "blackwell" and jax.__version_info__ >= (0, 11)
    if device in kernels.GPUS and not has_run and not is_asked:
        return (
            f"its kernels never ran on {device.capitalize()} GPUs under JAX {jax.__version__}, "
            "and have to be asked for"
        )
    return unfit()
