"""Whether a step's tokens go through the model as one batch or as two, half a layer apart.

With two, one half computes while the other's rows travel; but each half reads the experts' weights
anew and sends its own messages, so with few tokens that loses. Both are tried, in turn, and the
quicker serves until the next trial. Every rank has seen the same rows, so all decide alike.
Pure: how long a step took is told.
"""

from collections.abc import Sequence
from statistics import median
from typing import Literal

Choice = Literal["auto", "measure", "always", "never"]

TRIALS = 8  # steps of each kind
HELD_STEPS = 4000  # until the next trial
WORTH_IT = 0.97  # of the time that one batch takes; less gain may be noise


class TwoBatches:
    """Steps are told apart by the most tokens of a rank, to a power of two: what pays with many
    tokens does not with few.
    """

    def __init__(self, choice: Choice, *, possible: bool) -> None:
        """``possible``: the transport allows two exchanges at once, and there are other ranks."""
        self._choice: Choice = choice if possible else "never"
        self._sizes: dict[int, _Trial] = {}
        self._last: tuple[_Trial, bool] | None = None

    def decide(self, tokens_of_rank: Sequence[int], last_us: int) -> bool:
        """For the step that now starts. ``last_us``: the slowest rank's time in the last one.

        Every rank calls it before every step, with the same values since ``reset``.
        """
        if self._last is not None:
            trial, in_two = self._last
            trial.note(in_two, last_us)
        self._last = None
        most = max(tokens_of_rank)
        if self._choice == "never" or most < 2:  # noqa: PLR2004  one token has no halves
            return False
        if self._choice == "always":
            return True
        trial = self._sizes.setdefault((most - 1).bit_length(), _Trial())
        in_two = trial.next_in_two()
        self._last = trial, in_two
        return in_two

    def reset(self) -> None:
        """The ranks have met anew, and one of them may know nothing of earlier steps."""
        self._sizes.clear()
        self._last = None


class _Trial:
    def __init__(self) -> None:
        self._taken: dict[bool, list[int]] = {False: [], True: []}
        self._held = 0
        self._chosen = False

    def next_in_two(self) -> bool:
        if self._held:
            self._held -= 1
            return self._chosen
        return len(self._taken[True]) < len(self._taken[False])

    def note(self, in_two: bool, took_us: int) -> None:
        if self._held:
            return
        self._taken[in_two].append(took_us)
        if min(map(len, self._taken.values())) == TRIALS:
            self._chosen = pays(self._taken[False], self._taken[True])
            self._held = HELD_STEPS
            self._taken = {False: [], True: []}


def pays(one_us: Sequence[int], two_us: Sequence[int]) -> bool:
    """Whether steps in two batches are quicker than in one, by more than noise."""
    return median(two_us) < WORTH_IT * median(one_us)
