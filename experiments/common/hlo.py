"""What compiled programs consist of, read from their text."""

import re


def computations(program: str) -> dict[str, str]:
    """The instructions of each computation of a program, as text, by its name."""
    found = re.split(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$", program, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def fused(program: str) -> set[str]:
    """The names of computations that are the inside of a fusion: what they make is not held."""
    return set(re.findall(r" fusion\(.*\bcalls=%?([\w.\-]+)", program))
