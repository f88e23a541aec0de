"""Which code serves a call: xla (fast, portable), pallas (kernels) or reference (the oracle)."""

import dataclasses
from collections.abc import Mapping, Sequence

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


def choose(implementation: str | Sequence[str] | None = None) -> Choice:
    """Says which implementation serves a call.

    Args:
      implementation: a name, names to try in order, or None for the default order.

    Returns:
      The first one that can serve the call, with the reasons why those before it cannot.

    Raises:
      ValueError: if a name is unknown.
      NotImplementedError: if none of them can serve the call.

    >>> choose().name
    'xla'
    >>> choose(("pallas", "reference")).refused
    {'pallas': 'this version of clustax has no Pallas kernels'}
    """
    names = DEFAULT if implementation is None else implementation
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in CHOICES]
    if unknown or not names:
        raise ValueError(
            f"implementation must be None, one of {', '.join(map(repr, CHOICES))}, or a sequence "
            f"of these to try in order, got {implementation!r}."
        )
    refused = {}
    for name in names:
        reason = _refusal(name)
        if reason is None:
            return Choice(name, refused)
        refused[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    raise NotImplementedError(
        f"implementation={implementation!r} cannot serve this call ({reasons}); "
        "pass implementation='xla', or None to let clustax choose."
    )


def _refusal(name: str) -> str | None:
    return "this version of clustax has no Pallas kernels" if name == "pallas" else None
