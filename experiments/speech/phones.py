"""Phones: the 39 of ARPAbet, and what other sets of phones are among them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

BLANK = 0
"""The symbol of CTC that says nothing; phones are numbered from 1."""

ARPABET = (
    "aa", "ae", "ah", "ao", "aw", "ay", "b", "ch", "d", "dh", "eh", "er", "ey", "f", "g", "hh",
    "ih", "iy", "jh", "k", "l", "m", "n", "ng", "ow", "oy", "p", "r", "s", "sh", "t", "th", "uh",
    "uw", "v", "w", "y", "z", "zh",
)  # fmt: skip
"""As the CMU dictionary has them, without stress."""

FLITE = {**{phone: (phone,) for phone in ARPABET}, "ax": ("ah",), "pau": ()}
"""The phones of flite, a schwa and a pause more."""

ESPEAK = {
    "a": ("ae",), "aa": ("ae",), "a#": ("ah",), "@": ("ah",), "@2": ("ah",), "@-": ("ah",),
    "V": ("ah",), "@L": ("ah", "l"), "3": ("er",), "3:": ("er",), "A:": ("aa",), "0": ("aa",),
    "A@": ("aa", "r"), "O:": ("ao",), "O2": ("ao",), "O~": ("ao",), "O@": ("ao", "r"),
    "o@": ("ao", "r"), "E": ("eh",), "e@": ("eh", "r"), "I": ("ih",), "I2": ("ih",),
    "I#": ("ih",), "i": ("iy",), "i:": ("iy",), "i@": ("ih", "r"), "i@3": ("ih", "r"),
    "U": ("uh",), "U@": ("uh", "r"), "u:": ("uw",), "eI": ("ey",), "aI": ("ay",),
    "aI@": ("ay", "ah"), "aI3": ("ay", "er"), "aU": ("aw",), "oU": ("ow",), "OI": ("oy",),
    "b": ("b",), "d": ("d",), "f": ("f",), "g": ("g",), "h": ("hh",), "k": ("k",), "l": ("l",),
    "m": ("m",), "n": ("n",), "n-": ("ah", "n"), "p": ("p",), "r": ("r",), "r-": ("r",),
    "s": ("s",), "t": ("t",), "t#": ("t",), "t2": ("t",), "?": ("t",), "v": ("v",), "w": ("w",),
    "j": ("y",), "z": ("z",), "x": ("k",), "N": ("ng",), "S": ("sh",), "Z": ("zh",), "T": ("th",),
    "D": ("dh",), "tS": ("ch",), "dZ": ("jh",), "_": (), ";": (),
}  # fmt: skip
"""The phones of espeak-ng's American English without marks of stress."""


class PhoneError(ValueError):
    """A phone that is not known; the message says which are."""


@dataclass(frozen=True)
class Phones:
    """The phones of a corpus, in the order of their numbers.

    >>> phones = Phones(("ah", "t"))
    >>> phones.numbers(["t", "ah"]), phones.names([2, 1])
    ([2, 1], ['t', 'ah'])

    Attributes:
        all: their names, of which the first has number 1.
    """

    all: tuple[str, ...] = ARPABET

    def numbers(self, names: Iterable[str]) -> list[int]:
        """The numbers of phones.

        Raises:
            PhoneError: if there is no such phone.
        """
        known = {name: number for number, name in enumerate(self.all, start=1)}
        names = list(names)
        if unknown := sorted(set(names) - set(known)):
            raise PhoneError(
                f"{unknown[0]!r} is none of the phones {' '.join(self.all)}: map it to one of them."
            )
        return [known[name] for name in names]

    def names(self, numbers: Sequence[int]) -> list[str]:
        """The phones that have these numbers."""
        return [self.all[number - 1] for number in numbers]
