"""The life of one request, top to bottom. Read this file first.

    wait for room -> reserve blocks at a decode rank -> prefill elsewhere, which pushes KV into
    them and samples the first token -> stream the decode rank's tokens

Whatever goes wrong and whoever gives up first, every attempt ends at both workers: it has
finished, or it is cancelled. Which workers are asked is ``server.policies``' business, what they
answer comes through ``server.attempts``, and whether there is another attempt ``server.story``
decides.
"""

from protocol.errors import ServingError
from protocol.kv import Grant
from protocol.messages import Prefill, PrefillDone, Reserve
from protocol.reports import error_of
from protocol.requests import GenerateRequest
from server.attempts import Attempt
from server.cluster import Cluster
from server.cluster_view import Pair
from server.generation import Deliver
from server.story import Story


async def run_request(
    request: GenerateRequest,
    cluster: Cluster,
    deliver: Deliver,
    *,
    deadline: float,
    within: Pair | None = None,
) -> None:
    """Give ``deliver`` the request's tokens, the first as soon as prefill has sampled it.

    When workers are lost in mid-stream the request migrates: the prompt and what has been written
    are prefilled elsewhere, and the stream goes on behind it. ``deadline`` is a time of
    ``cluster.clock``. ``within`` restricts placement to one pair of workers. Cancelling the task
    is how a client that hangs up frees the blocks and stops the work.

    Raises:
        ServingError: the request has ended and holds nothing. Other workers have been tried where
            that could help, and for an interrupted stream waited for.
    """
    story = Story(request, patience_s=0.0 if within else cluster.patience_s)
    while True:
        async with cluster.attempt(
            story.next_attempt(), deadline=deadline, avoid=story.failed, within=within
        ) as attempt:
            try:
                grant = await reserve(attempt, cluster)
                first = await prefill(attempt, grant, cluster)
                if attempt.begin(first, deliver):
                    await attempt.stream(deliver)
                return
            except ServingError as error:
                pause_s = story.pause_after(error, attempt, now=cluster.clock.now())
                if pause_s is None:
                    raise story.failure_of(error) from error
                cluster.note_retry(attempt, error)
        await cluster.clock.sleep(pause_s)


async def reserve(attempt: Attempt, cluster: Cluster) -> Grant:
    """A decode rank's promise of blocks, after waiting in line while every rank is full."""
    with cluster.line(attempt).place(attempt) as place:
        while True:
            await place.turn()
            for rank in cluster.decode_ranks(attempt, behind=place.is_behind):
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
    cluster.prefilled(attempt, worker)
    return first
