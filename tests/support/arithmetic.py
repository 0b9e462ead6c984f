"""A model that is arithmetic, and builders with one interesting argument each.

Prefill and decode use different formulas, so a test can tell which side made a token.
"""

from collections.abc import Sequence

from protocol.ids import WorkerId, WorkerRef, new_incarnation, new_request_id
from protocol.kv import KVLayout
from protocol.messages import FinishReason
from protocol.requests import GenerateRequest, SamplingParams, StopConditions
from protocol.workers import Role, WorkerInfo

MODEL = "arithmetic"
FIRST_ID, NUM_IDS = 1000, 20_000  # tokens are in [FIRST_ID, FIRST_ID + NUM_IDS)
LAYOUT = KVLayout(
    kind="gqa",
    dtype="float32",
    num_layers=1,
    block_tokens=16,
    kv_heads=1,
    key_width=1,
    value_width=1,
)
FINGERPRINT = {"protocol": "1", "weights": "arithmetic"}


def first_token(prompt: Sequence[int]) -> int:
    """What prefill makes of a prompt."""
    return FIRST_ID + (31 * sum(prompt) + len(prompt)) % NUM_IDS


def next_token(previous: int, index: int) -> int:
    """What decode makes of the token before, as output token ``index``."""
    return FIRST_ID + (7 * previous + index + 3) % NUM_IDS


def token_after(request: GenerateRequest) -> int:
    """What prefill makes of a request: decode's next token, where something has been written."""
    outputs = request.output_token_ids
    if not outputs:
        return first_token(request.prompt_token_ids)
    return next_token(outputs[-1], len(outputs))


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    tokens = [first_token(prompt)]
    for index in range(1, count):
        tokens.append(next_token(tokens[-1], index))
    return tokens


def a_request(
    prompt: Sequence[int] = (5, 6, 7), *, max_tokens: int = 8, model: str = MODEL
) -> GenerateRequest:
    return GenerateRequest(
        request_id=new_request_id(),
        attempt=1,
        model=model,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(temperature=0.0),
        stop=StopConditions(max_tokens=max_tokens),
    )


def a_worker_info(
    worker_id: str,
    role: Role,
    *,
    group_id: str | None = None,
    rank: int = 0,
    world_size: int = 1,
    epoch: int = 1,
    address: str = "tcp://127.0.0.1:1",
    model: str = MODEL,
    num_blocks: int = 1000,
    fingerprint: dict[str, str] | None = None,
    layout: KVLayout = LAYOUT,
) -> WorkerInfo:
    return WorkerInfo(
        ref=WorkerRef(WorkerId(worker_id), new_incarnation()),
        role=role,
        group_id=group_id or worker_id,
        rank=rank,
        world_size=world_size,
        epoch=epoch,
        address=address,
        model=model,
        max_model_len=4096,
        layout=layout,
        num_blocks=num_blocks,
        fingerprint=FINGERPRINT if fingerprint is None else fingerprint,
        pid=1,
        host="localhost",
    )


def finish_of(request: GenerateRequest, token: int, count: int) -> FinishReason | None:
    if token in request.stop.stop_token_ids:
        return "stop"
    return "length" if count >= request.stop.max_tokens else None
