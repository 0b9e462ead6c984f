"""The life of one request, top to bottom. Read this file first.

    wait for room -> reserve blocks at a decode rank -> prefill elsewhere, which pushes KV into
    them and samples the first token -> stream the decode rank's tokens

Whatever goes wrong and whoever gives up first, every attempt ends at both workers: it has
finished, or it is cancelled. Which workers are asked is ``server.policies``' business, and what
they answer comes through ``server.attempts``.
"""

import msgspec

from protocol.errors import ServingError
from protocol.ids import WorkerId
from protocol.kv import Grant
from protocol.messages import Prefill, PrefillDone, Reserve
from protocol.reports import error_of
from protocol.requests import GenerateRequest
from runtime.log import get_log
from server.attempts import Attempt
from server.cluster import Cluster
from server.cluster_view import Pair
from server.generation import Deliver, TokenChunk

log = get_log(__name__)

MAX_ATTEMPTS = 3
BACKOFF_S = 0.025  # before the second attempt, and twice that before the third


async def run_request(
    request: GenerateRequest,
    cluster: Cluster,
    deliver: Deliver,
    *,
    deadline: float,
    within: Pair | None = None,
) -> None:
    """Give ``deliver`` the request's tokens, the first as soon as prefill has sampled it.

    ``deadline`` is a time of ``cluster.clock``. ``within`` restricts placement to one pair of
    workers. Cancelling the task is how a client that hangs up frees the blocks and stops the work.

    Raises:
        ServingError: the request has ended and holds nothing. Before the first token, other
            workers have been tried where that could help.
    """
    failed: set[WorkerId] = set()
    for number in range(1, MAX_ATTEMPTS + 1):
        if number > 1:
            await cluster.clock.sleep(BACKOFF_S * (number - 1))
        numbered = msgspec.structs.replace(request, attempt=number)
        async with cluster.attempt(
            numbered, deadline=deadline, avoid=failed, within=within
        ) as attempt:
            try:
                grant = await reserve(attempt, cluster)
                first = await prefill(attempt, grant, cluster)
            except ServingError as error:
                if number == MAX_ATTEMPTS or not may_help_elsewhere(error, attempt):
                    raise
                log.warning("trying elsewhere", request=request.request_id, error=str(error))
                cluster.retries += 1
                failed.update(ref.worker_id for ref in attempt.workers)
                continue
            if deliver(first_chunk(first)) and not attempt.finished:
                # A decode rank that is lost from here on ends the stream. Migration belongs here.
                await attempt.stream(deliver)
            return


async def reserve(attempt: Attempt, cluster: Cluster) -> Grant:
    """A decode rank's promise of blocks, after waiting in line while every rank is full."""
    with cluster.line(attempt).place(attempt) as place:
        while True:
            await place.turn()
            for rank in cluster.decode_ranks(attempt):
                remaining_s = cluster.remaining_s(attempt)
                await cluster.ask(
                    attempt, rank, Reserve(request=attempt.request, remaining_s=remaining_s)
                )
                answer = await attempt.reservation()
                if isinstance(answer, Grant):
                    return answer
                cluster.release(attempt, rank.info.ref)
                rejection = error_of(answer)
                if not rejection.retryable:
                    raise rejection


async def prefill(attempt: Attempt, grant: Grant, cluster: Cluster) -> PrefillDone:
    """The first token; by then the prompt's KV is in the granted blocks, or on its way."""
    worker = cluster.prefill_worker(attempt)
    remaining_s = cluster.remaining_s(attempt)
    await cluster.ask(
        attempt, worker, Prefill(request=attempt.request, grant=grant, remaining_s=remaining_s)
    )
    first = await attempt.first_token()
    cluster.worker_done(attempt, worker.info.ref)
    return first


def may_help_elsewhere(error: ServingError, attempt: Attempt) -> bool:
    """A worker failed the attempt, and another might not. Nobody else knows a way round a queue."""
    return error.retryable and attempt.stage != "queue"


def first_chunk(first: PrefillDone) -> TokenChunk:
    return TokenChunk(
        token_ids=(first.token_id,),
        logprobs=None if first.logprobs is None else (first.logprobs,),
        finish_reason=first.finish_reason,
        cached_tokens=first.cached_tokens,
        times=first.times,
        prompt_logprobs=first.prompt_logprobs,
    )
