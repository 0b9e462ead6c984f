"""What is known of a request while a prefill worker has it, and what its gateway hears at the end.

A request is held from ``Prefill`` to the end of its push. Who computes it, and when, is unknown
here.
"""

from dataclasses import dataclass, field

from engine.sampling.stopping import finish_reason
from kvtransfer.interface import Push
from protocol.errors import TransferError
from protocol.ids import WorkerRef
from protocol.messages import PrefillDone, PrefillTimes
from protocol.requests import GenerateRequest, TokenLogprobs


@dataclass(slots=True, kw_only=True)
class Held:
    """Times are of one monotonic clock, in seconds."""

    request: GenerateRequest
    push: Push
    arrived_at: float
    started_at: float | None = None
    failed: TransferError | None = None
    ending: bool = False  # its push has been told to
    scores: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])  # of its own tokens

    def done(
        self,
        worker: WorkerRef,
        *,
        token_id: int,
        logprobs: TokenLogprobs | None,
        cached_tokens: int,
        now: float,
    ) -> PrefillDone:
        """``token_id`` follows the context; it may end the request."""
        started = self.started_at or now
        num_outputs = len(self.request.output_token_ids) + 1
        return PrefillDone(
            ref=self.request.ref,
            worker=worker,
            token_id=token_id,
            logprobs=logprobs,
            finish_reason=finish_reason(self.request.stop, token_id, num_outputs),
            cached_tokens=cached_tokens,
            times=PrefillTimes(queue_s=started - self.arrived_at, compute_s=now - started),
            prompt_logprobs=(
                None if self.request.sampling.prompt_logprobs is None else tuple(self.scores)
            ),
        )
