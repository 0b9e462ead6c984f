"""What has become of one request over its attempts, and whether there is to be another. Pure.

Before the first token a failed worker is replaced by another, at once. After it the client has been
promised the rest, so the gateway also waits for workers to be there again.
"""

import msgspec

from protocol.errors import CapacityError, ServingError
from protocol.ids import WorkerId
from protocol.requests import GenerateRequest
from server.attempts import Attempt

MAX_FAILURES = 3  # of workers: before the first token, and again after it
BACKOFF_S = 0.025  # after the first failure, twice that after the second
LOOK_AGAIN_S = 0.25  # while there is no worker that could go on


class Story:
    def __init__(self, request: GenerateRequest, *, patience_s: float) -> None:
        """``patience_s``: how long an interrupted stream may stand still; 0 ends it at once."""
        self._request = request
        self._patience_s = patience_s
        self._number = 0
        self._failures = 0
        self._written: tuple[int, ...] = ()
        self._interruption: ServingError | None = None
        self._interrupted_at = 0.0
        self.failed: set[WorkerId] = set()

    def next_attempt(self) -> GenerateRequest:
        self._number += 1
        if not self._written:
            return msgspec.structs.replace(self._request, attempt=self._number)
        sampling = msgspec.structs.replace(self._request.sampling, prompt_logprobs=None)
        return msgspec.structs.replace(
            self._request,
            attempt=self._number,
            output_token_ids=self._written,
            sampling=sampling,  # the prompt has been scored
        )

    def pause_after(self, error: ServingError, attempt: Attempt, *, now: float) -> float | None:
        """Seconds until the next attempt; None: the request has failed."""
        if attempt.undelivered or not error.retryable:
            return None
        if len(attempt.written) > len(self._written):
            self._failures = 0 if not self._written else self._failures
            self._written = tuple(attempt.written)
            self._interruption, self._interrupted_at = error, now
        in_queue = attempt.stage == "queue"
        if not in_queue:
            self._failures += 1
            self.failed.update(ref.worker_id for ref in attempt.workers)
        if self._interruption is None:
            # Nobody else knows a way round a queue.
            over = in_queue or self._failures == MAX_FAILURES
            return None if over else BACKOFF_S * self._failures
        late = now - self._interrupted_at >= self._patience_s
        if late or self._failures > MAX_FAILURES:
            return None
        return LOOK_AGAIN_S if isinstance(error, CapacityError) else BACKOFF_S

    def failure_of(self, error: ServingError) -> ServingError:
        """What the client is told: why its stream broke, not why nobody could mend it."""
        if self._interruption is not None and isinstance(error, CapacityError):
            return self._interruption
        return error
