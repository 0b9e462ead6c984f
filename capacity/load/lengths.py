"""How many tokens a request brings and asks for, as distributions that a person can write.

    512                      always 512
    100-500                  uniform
    normal:512,64            normal with mean and standard deviation
    70%:128 30%:2048         a mixture, of any of the above
    pairs:512/64 4096/16     input and output together, each pair equally often

Draws depend on the random source alone, so equal seeds give equal lengths.
"""

from random import Random

import msgspec

from capacity.load.errors import WrongOption

_LEAST = 1


class Part(msgspec.Struct, frozen=True):
    """One shape with its weight: uniform in low..high, or normal where ``deviation`` is given."""

    weight: float
    low: float
    high: float
    deviation: float = 0.0

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2


class Lengths(msgspec.Struct, frozen=True):
    """A distribution of token counts of at least one."""

    written: str
    parts: tuple[Part, ...]

    @property
    def mean(self) -> float:
        whole = sum(part.weight for part in self.parts)
        return sum(part.weight * part.mean for part in self.parts) / whole

    def draw(self, source: Random) -> int:
        part = self.parts[0]
        if len(self.parts) > 1:
            (part,) = source.choices(self.parts, [part.weight for part in self.parts])
        if part.deviation:
            return max(_LEAST, round(source.gauss(part.low, part.deviation)))
        return source.randint(round(part.low), round(part.high))


class LengthPairs(msgspec.Struct, frozen=True):
    """Input and output lengths that belong together."""

    written: str
    pairs: tuple[tuple[int, int], ...]


def parse_lengths(written: str, option: str) -> Lengths:
    """
    Raises:
        WrongOption: it is none of the forms above, or a length is below one.
    """
    parts = []
    for word in written.split():
        share, percent, shape = word.partition("%:")
        weight = _number(share, option) if percent else 1.0
        parts.append(_part(weight, shape if percent else word, option))
    weights = sum(part.weight for part in parts)
    if not parts or weights <= 0:
        raise WrongOption(f"{option} {written!r}: write a number, or see `headrace bench --help`")
    return Lengths(written, tuple(parts))


def parse_pairs(written: str, option: str) -> LengthPairs:
    """``pairs:512/64 4096/16``."""
    pairs = []
    for word in written.removeprefix("pairs:").split():
        given, slash, made = word.partition("/")
        if (
            not slash
            or not given.isdigit()
            or not made.isdigit()
            or not int(given)
            or not int(made)
        ):
            raise WrongOption(f"{option}: {word!r} is no pair; write INPUT/OUTPUT such as 512/64")
        pairs.append((int(given), int(made)))
    if not pairs:
        raise WrongOption(f"{option}: name at least one pair, such as pairs:512/64")
    return LengthPairs(written, tuple(pairs))


def _part(weight: float, shape: str, option: str) -> Part:
    name, colon, numbers = shape.partition(":")
    if colon and name == "normal":
        mean, _, deviation = numbers.partition(",")
        centre = _number(mean, option)
        return Part(weight, centre, centre, _number(deviation, option))
    if colon and name != "uniform":
        raise WrongOption(f"{option}: {name!r} is no distribution; known are uniform and normal")
    low, dash, high = (numbers if colon else shape).partition("-")
    part = Part(weight, _number(low, option), _number(high if dash else low, option))
    if not _LEAST <= part.low <= part.high:
        raise WrongOption(f"{option}: {shape!r} must be at least 1 and not end before it begins")
    return part


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise WrongOption(f"{option}: {text!r} is not a number") from None
