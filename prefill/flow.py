"""Steps on their way through the stages of a prefill worker. No torch, no I/O.

Every tick one step enters at the first stage, be it an empty one, and all others move on by one
stage; with one stage a step leaves in the tick in which it enters. All ranks see the same steps, so
each knows what any other computes, without being told.
"""

from collections import deque
from collections.abc import Sequence, Sized
from typing import Generic, TypeVar

S = TypeVar("S", bound=Sized)


class Flow(Generic[S]):
    """A tick is ``enter``, compute, ``leave``. A step without length is an empty one."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._steps: deque[S] = deque()  # by stage

    @property
    def busy(self) -> bool:
        """Whether a step has still to be computed by some stage."""
        return any(len(step) for step in self._steps)

    def enter(self, step: S) -> None:
        assert len(self._steps) < self._num_stages, "the last step has not left"
        self._steps.appendleft(step)

    def at(self, stage: int) -> S | None:
        """What the stage computes in this tick; None: no step has come so far."""
        return self._steps[stage] if stage < len(self._steps) else None

    def leave(self) -> S | None:
        """What the last stage has computed in this tick."""
        return self._steps.pop() if len(self._steps) == self._num_stages else None

    def take_all(self) -> Sequence[S]:
        """The steps that will not be computed to their end, the oldest one first."""
        steps = tuple(reversed(self._steps))
        self._steps.clear()
        return steps
