"""Who serves: what a worker says of itself when it joins, and what it reports while it lives."""

from typing import Literal

import msgspec

from protocol.holdings import Holding
from protocol.ids import WorkerId, WorkerRef
from protocol.kv import KVLayout

Role = Literal["prefill", "decode"]


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change during one life of a worker process.

    A decode worker of N ranks is N of these with one ``group_id``; a request is placed on a rank.
    ``fingerprint`` names everything that must be equal for two workers to serve one model
    together (protocol, model, config, weights, tokenizer, layout, numerics), part by part, so
    that a refusal can say which part differs.
    """

    ref: WorkerRef
    role: Role
    group_id: str
    rank: int
    world_size: int
    epoch: int  # the group's: ranks that report different epochs are not one group
    absent: tuple[int, ...] = ()  # ranks of the group that are not in it now
    spare_ranks: int = 0  # so many may be absent, and the group still serves
    address: str  # of the worker's bus listener
    model: str
    max_model_len: int  # tokens, prompt and output together
    layout: KVLayout
    num_blocks: int
    fingerprint: dict[str, str]
    pid: int
    host: str


class ExpertTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """What one decode rank's exchanges with the others have cost since its process started.

    Dispatch and combine include waiting for other ranks, ``row_exchange_s`` too: the rank that
    waits least is the one that the others wait for. ``skew_s`` adds up how far apart the first and
    the last rank came to each exchange of rows; it is the same on all ranks.
    """

    transport: str
    buffer_bytes: int  # of the exchange, at most
    layer_calls: int = 0
    dispatch_s: float = 0.0
    compute_s: float = 0.0
    combine_s: float = 0.0
    dispatch_bytes: int = 0  # to other ranks, like the next
    combine_bytes: int = 0
    row_exchanges: int = 0
    row_exchange_s: float = 0.0
    skew_s: float = 0.0
    steps: int = 0
    steps_in_two: int = 0  # of them those that passed as two batches
    groups_formed: int = 0  # how often the ranks have met, the first time included
    interrupted_s: float = 0.0  # from a group's last turn to the next one's first


class LinkReport(msgspec.Struct, frozen=True, kw_only=True):
    """How KV goes from one prefill worker, or a rank of it, to one decode rank, by its account."""

    prefill: WorkerId
    decode: WorkerId
    transport: str
    reason: str  # why this transport
    bytes: int = 0  # written since the link first came up
    seconds: float = 0.0  # of writing them
    measured_bytes_per_s: float = 0.0  # by the probe when the link came up; 0 before it is over
    expected_bytes_per_s: float = 0.0  # what such a path gives at least
    lost: int = 0  # how often the link has ended


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's own account, a moment ago. A hint: the worker still decides what it admits."""

    draining: bool = False
    queued_requests: int = 0
    running_requests: int = 0
    queued_tokens: int = 0  # prefill: prompt tokens that wait or are being computed
    free_blocks: int = 0  # what a request could take now: evictable ones in, headroom out
    spare_blocks: int = 0  # decode: the same, with those kept for requests that are swapped out
    holdings: tuple[Holding, ...] = ()  # decode: by caller, where they have to share blocks
    total_blocks: int = 0  # of which the following, and the rest are free
    cached_blocks: int = 0
    granted_blocks: int = 0
    active_blocks: int = 0
    quarantined_blocks: int = 0
    step_seconds: float = 0.0  # smoothed duration of one engine step
    tokens_per_second: float = 0.0
    prefix_hit_tokens: int = 0  # cumulative
    prompt_tokens: int = 0  # cumulative
    generated_tokens: int = 0  # cumulative
    pushes: int = 0  # prefill: whole KV transfers, cumulative like the next two
    push_hidden_s: float = 0.0  # while the prompt was still being computed
    push_exposed_s: float = 0.0  # after that, until decode had committed
    links: tuple[LinkReport, ...] = ()  # prefill
    traffic: ExpertTraffic | None = None  # decode


class ExpertReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one decode rank's own tokens chose, and which experts it holds: sums over the ranks of
    a group are the group's. Sequences are by layer, in the order of ``layers``.
    """

    layers: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]  # by expert, cumulative
    window_tokens: tuple[tuple[int, ...], ...]  # by expert, of the last whole window
    held: tuple[tuple[int, ...], ...]  # the expert in each of its slots, -1 where there is none
    shares: tuple[tuple[int, ...], ...]  # of its expert's tokens, in proportion over all ranks
    placement_epoch: int  # how often a layer has got another placement
    migrations: int  # experts that have come to this rank, cumulative


class PrefixEvents(msgspec.Struct, frozen=True, kw_only=True):
    """Changes of a prefill worker's prefix cache since its previous report.

    Hashes are the first 8 bytes of block hashes (``protocol.prefix``): enough to place by, and
    never trusted for a hit. ``sequence`` counts reports; a reader that misses one starts over
    from a report with ``snapshot`` set.
    """

    sequence: int
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    snapshot: bool = False


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the cluster view."""

    info: WorkerInfo
    load: WorkerLoad


class FingerprintDifference(msgspec.Struct, frozen=True, array_like=True):
    part: str
    yours: str
    ours: str
    ours_from: WorkerId
