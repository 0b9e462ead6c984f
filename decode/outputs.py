"""The requests that decode here: what each has put out, and the frames that tell it.

A request is here from the commit of its KV to its end, and each of its tokens is told once, to the
gateway that owns it. Runs on the engine thread; blocks, samplers and groups are unknown here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.experts.replicas import request_key
from engine.sampling.sampler import Sampled
from engine.sampling.stopping import finish_reason
from protocol.ids import AttemptRef, WorkerRef
from protocol.messages import StepTokens, TokenDelta
from protocol.plain_tokens import pack_token
from protocol.requests import GenerateRequest
from runtime.clients import Clients
from runtime.mailbox import Outbox
from runtime.worker_process import ToPeer


@dataclass(slots=True, kw_only=True)
class _Running:
    """``num_output`` counts the first token, which prefill sampled."""

    request: GenerateRequest
    key: int  # ``engine.experts.replicas.request_key``
    num_output: int


class Outputs:
    def __init__(self, worker: WorkerRef, clients: Clients, outbox: Outbox[ToPeer]) -> None:
        self._worker = worker
        self._clients = clients
        self._outbox = outbox
        self._running: dict[AttemptRef, _Running] = {}
        self._step = 0

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, ref: AttemptRef) -> bool:
        return ref in self._running

    @property
    def refs(self) -> list[AttemptRef]:
        return list(self._running)

    def begin(self, request: GenerateRequest, num_output: int) -> None:
        """``num_output`` tokens of it are there already."""
        key = request_key(request.request_id)
        self._running[request.ref] = _Running(request=request, key=key, num_output=num_output)

    def end(self, ref: AttemptRef) -> None:
        del self._running[ref]

    def key_of(self, ref: AttemptRef) -> int:
        """What spreads the request's tokens over an expert's replicas."""
        return self._running[ref].key

    def tell(self, refs: Sequence[AttemptRef], sampled: Sampled) -> list[AttemptRef]:
        """One frame for each gateway, with the new tokens of all its requests. ``refs`` are those
        of the rows in ``sampled``; rows that failed are left out. Those that end with theirs.
        """
        self._step += 1
        deltas: dict[bytes, list[TokenDelta]] = {}
        plain: dict[bytes, bytearray] = {}
        ended = []
        for row, ref in enumerate(refs):
            if ref in sampled.errors:
                continue
            running = self._running[ref]
            offset, running.num_output = running.num_output, running.num_output + 1
            token_id, logprobs = sampled.token_ids[row], sampled.logprobs[row]
            reason = finish_reason(running.request.stop, token_id, running.num_output)
            peer = self._clients.owner(ref)
            stream = running.request.stream
            if peer is None:
                pass
            elif stream and logprobs is None and reason is None:
                plain.setdefault(peer, bytearray()).extend(pack_token(stream, offset, token_id))
            else:
                told = None if logprobs is None else (logprobs,)
                delta = TokenDelta(ref, offset, (token_id,), told, reason)
                deltas.setdefault(peer, []).append(delta)
            if reason is not None:
                ended.append(ref)
        self._outbox.put(
            (
                peer,
                StepTokens(
                    worker=self._worker,
                    step=self._step,
                    deltas=tuple(deltas.get(peer, ())),
                    plain=bytes(plain.get(peer, b"")),
                ),
            )
            for peer in {**deltas, **plain}
        )
        return ended
