"""The index arithmetic of dispatch and combine, for many ranks inside one process."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Condition
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.experts.all_to_all import AllToAllTransport, sends_padded
from engine.experts.buffers import ExchangeShape
from engine.experts.fixed_size import FixedSize, FixedSizeTransport, order_on_rank, step_tokens
from engine.experts.transport import Arrived, Dispatch, ExpertTransport, Returned
from engine.experts.workspaces import Workspaces

UNROUTED = -1
MOST_TOKENS = 3


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread_per_rank() -> Generator[None]:
    """Each rank is a Python thread here; none may bring a pool of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Parcel:
    rows: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]


class Mail:
    """All ranks' parcels, call by call; one can be opened when every rank has sent its own."""

    def __init__(self, num_ranks: int) -> None:
        self._sent: list[list[Parcel]] = [[] for _ in range(num_ranks)]
        self._news = Condition()
        self.bytes_of = [0] * num_ranks  # to other ranks

    def count(self, rank: int, sent_bytes: int) -> None:
        self.bytes_of[rank] += sent_bytes

    def send(self, rank: int, parcel: Parcel) -> int:
        with self._news:
            self._sent[rank].append(parcel)
            self._news.notify_all()
            return len(self._sent[rank]) - 1

    def receive(self, rank: int, call: int) -> Tensor:
        with self._news:
            arrived = self._news.wait_for(
                lambda: all(len(parcels) > call for parcels in self._sent), timeout=20
            )
            assert arrived, "a rank skipped a collective"
            parcels = [sent[call] for sent in self._sent]
        expected = parcels[rank].receive_counts
        assert tuple(parcel.send_counts[rank] for parcel in parcels) == expected
        return torch.cat([parcel.rows.split(list(parcel.send_counts))[rank] for parcel in parcels])


@dataclass(frozen=True)
class Awaited:
    mail: Mail
    rank: int
    call: int
    into: Tensor | None
    summed: bool = False

    def wait(self) -> Tensor:
        rows = self.mail.receive(self.rank, self.call)
        if self.summed:
            rows = rows.view(-1, *self.into.shape).sum(dim=0)  # type: ignore[union-attr]
        return rows if self.into is None else self.into.copy_(rows)


@dataclass(frozen=True)
class MailGroup:
    """A group of threads: every rank runs the code that processes run."""

    rank: int
    tokens_of_rank: tuple[int, ...]
    mail: Mail
    lives: int = 1

    @property
    def world_size(self) -> int:
        return len(self.tokens_of_rank)

    def exchange_rows(
        self,
        rows_RW: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        into_RW: Tensor | None = None,
    ) -> Awaited:
        assert len(rows_RW) == sum(send_counts)
        others = sum(send_counts) - send_counts[self.rank]
        self.mail.count(self.rank, others * rows_RW.shape[1] * rows_RW.element_size())
        parcel = Parcel(rows_RW.clone(), tuple(send_counts), tuple(receive_counts))
        return Awaited(self.mail, self.rank, self.mail.send(self.rank, parcel), into_RW)

    def gather_rows(self, rows_BW: Tensor, into_RW: Tensor) -> Awaited:
        counts = [len(rows_BW)] * self.world_size
        return self.exchange_rows(rows_BW.repeat(self.world_size, 1), counts, counts, into_RW)

    def sum_rows(self, rows_RW: Tensor, into_BW: Tensor) -> Awaited:
        counts = [len(into_BW)] * self.world_size
        return replace(self.exchange_rows(rows_RW, counts, counts, into_BW), summed=True)


@dataclass(frozen=True)
class Routing:
    slots_per_rank: int
    slots: list[Tensor]  # of each rank, physical, (T, K)
    width: int  # of the payload: wide ones make the exchange send counts instead of padding
    transport: str

    def transport_of(self, group: MailGroup) -> ExpertTransport:
        if self.transport == "all_to_all":
            return AllToAllTransport(group, slots_per_rank=self.slots_per_rank)
        shape = ExchangeShape(
            num_ranks=group.world_size,
            slots_per_rank=self.slots_per_rank,
            experts_per_token=self.slots[0].shape[1],
            hidden=self.width + 1,  # and one for the narrow payload
            element_bytes=8,
            max_tokens_per_rank=MOST_TOKENS,
            numerics="exact" if self.exact else "fast",
        )
        name: FixedSize = "padded" if self.transport == "padded" else "all_gather"
        workspaces = Workspaces(name, shape, in_flight=1, device=torch.device("cpu"))
        return FixedSizeTransport(name, group, shape, workspaces)

    exact: bool = True


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    transport = draw(st.sampled_from(["all_to_all", "padded", "all_gather"]))
    num_ranks, width = draw(st.sampled_from([(1, 2), (2, 2), (5, 2), (72, 2), (6, 8192)]))
    per_rank = draw(st.integers(1, 4))
    chosen = draw(st.integers(1, min(8, num_ranks * per_rank)))
    unrouted = draw(st.sampled_from([0.0, 0.3, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    slots = []
    for _ in range(num_ranks):
        tokens = int(torch.randint(0, MOST_TOKENS + 1, (), generator=generator))
        scores = torch.rand(tokens, num_ranks * per_rank, generator=generator)
        slot_TK = scores.topk(chosen).indices
        slot_TK[torch.rand(tokens, chosen, generator=generator) < unrouted] = UNROUTED
        slots.append(slot_TK)
    return Routing(per_rank, slots, width, transport)


def on_every_rank(routing: Routing, body: Callable[[int, Dispatch, Arrived], None]) -> None:
    """``body(rank, dispatch, arrived)`` in a thread for each rank, after its dispatch."""
    tokens_of_rank = tuple(map(len, routing.slots))
    mail = Mail(len(routing.slots))

    def run(rank: int) -> None:
        transport = routing.transport_of(MailGroup(rank, tokens_of_rank, mail))
        token_T1 = (torch.arange(tokens_of_rank[rank]) + 1000 * rank).unsqueeze(1)
        payloads = (token_T1.expand(-1, routing.width), token_T1.to(torch.int16))
        dispatch = transport.send(payloads, routing.slots[rank])
        body(rank, dispatch, dispatch.receive())
        assert dispatch.sent_bytes == mail.bytes_of[rank]

    with ThreadPoolExecutor(len(routing.slots)) as threads:
        list(threads.map(run, range(len(routing.slots))))


def result_of(token: Tensor, slot: Tensor) -> Tensor:
    """A stand-in for an expert's result that tells its token and its slot."""
    return token * 1000 + slot


def tokens_of(routing: Routing, rank: int) -> Tensor:
    return (torch.arange(len(routing.slots[rank])) + 1000 * rank).unsqueeze(1)


@settings(max_examples=40, deadline=None)
@given(routings())
def test_each_result_comes_home_to_its_own_place(routing: Routing) -> None:
    def check(rank: int, dispatch: Dispatch, arrived: Arrived) -> None:
        token_B1 = arrived.payloads[0][:, :1]
        physical_BK = arrived.slot_BK + rank * routing.slots_per_rank
        rows = result_of(token_B1, physical_BK).flatten().unsqueeze(1)
        dispatch.return_each(rows, torch.arange(len(rows)).view_as(physical_BK))

        home = dispatch.collect()
        slot_TK = routing.slots[rank]
        routed = slot_TK != UNROUTED
        assert routing.transport != "all_to_all" or len(home.rows_RW) == int(routed.sum())
        wanted = result_of(tokens_of(routing, rank), slot_TK)[routed]
        assert torch.equal(home.rows_RW[home.place_TJ[routed], 0], wanted)
        if home.present_TJ is None:
            assert bool(routed.all())
        else:
            assert torch.equal(home.present_TJ, routed)

    on_every_rank(routing, check)


@settings(max_examples=25, deadline=None)
@given(routings())
def test_sums_per_rank_add_up_to_the_whole(routing: Routing) -> None:
    def check(rank: int, dispatch: Dispatch, arrived: Arrived) -> None:
        assert arrived.present_BK is not None
        token_B1 = arrived.payloads[0][:, :1]
        dispatch.return_sums(token_B1 * arrived.present_BK.sum(dim=1, keepdim=True))

        home = dispatch.collect()
        present_TJ = home.present_TJ
        if present_TJ is None:
            present_TJ = torch.ones_like(home.place_TJ, dtype=torch.bool)
        found = torch.zeros_like(home.place_TJ)
        found[present_TJ] = home.rows_RW[home.place_TJ[present_TJ], 0]
        chosen_T1 = (routing.slots[rank] != UNROUTED).sum(dim=1, keepdim=True)
        wanted = tokens_of(routing, rank) * chosen_T1
        assert torch.equal(found.sum(dim=1, keepdim=True), wanted)

    on_every_rank(replace(routing, exact=False), check)


@settings(max_examples=25, deadline=None)
@given(routings())
def test_a_token_reaches_every_rank_that_holds_one_of_its_experts_once(routing: Routing) -> None:
    def check(rank: int, _: Dispatch, arrived: Arrived) -> None:
        assert arrived.present_BK is not None
        assert torch.equal(arrived.present_BK, arrived.slot_BK >= 0)
        wide_BW, narrow_B1 = arrived.payloads
        assert torch.equal(wide_BW[:, -1].to(torch.int16), narrow_B1[:, 0])
        wanted = [
            1000 * source + token
            for source, slot_TK in enumerate(routing.slots)
            for token in range(len(slot_TK))
            if bool((slot_TK[token] // routing.slots_per_rank == rank).any())
        ]
        assert wide_BW[arrived.present_BK.any(dim=1), 0].tolist() == wanted

    on_every_rank(routing, check)


@given(st.lists(st.integers(0, 512), min_size=1, max_size=72), st.integers(1, 24), st.data())
def test_padding_is_never_much_more_than_what_must_travel(
    tokens_of_rank: list[int], chosen: int, data: st.DataObject
) -> None:
    row_bytes = data.draw(st.sampled_from([64, 1200, 14336]))
    num_ranks = len(tokens_of_rank)
    if sends_padded(tokens_of_rank, num_chosen=chosen, row_bytes=row_bytes):
        padded = max(tokens_of_rank) * num_ranks * row_bytes
        reached = num_ranks * (1 - (1 - 1 / num_ranks) ** chosen)
        assert padded <= max(256 * 1024, 1.61 * max(tokens_of_rank) * reached * row_bytes)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=72), st.integers(300, 1024))
def test_a_fixed_size_holds_every_rank_and_few_sizes_occur(tokens: list[int], most: int) -> None:
    rows = step_tokens(tokens, most)
    assert max(*tokens, 1) <= rows <= min(most, 2 * max(*tokens, 1))
    assert rows == most or rows & (rows - 1) == 0


# -- what a CUDA graph needs ----------------------------------------------------------------------


# Operations whose result's shape, or whose caller, depends on values: they wait for the device.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "unique_consecutive",
    "_unique2",
    "repeat_interleave",
    "equal",
}


class Watched(TorchDispatchMode):
    """Notes the operations that would wait for a device, and copies from it to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        picked = name in {"index", "index_put_"} and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or picked:
            self.waiting.append(name)
        return func(*args, **(kwargs or {}))


def one_exchange(transport: ExpertTransport, slot_TK: Tensor, *, exact: bool) -> Returned:
    token_T1 = torch.arange(len(slot_TK)).unsqueeze(1)
    dispatch = transport.send((token_T1.expand(-1, 2),), slot_TK)
    arrived = dispatch.receive()
    rows_BK = torch.arange(arrived.slot_BK.numel()).view_as(arrived.slot_BK)
    if exact:
        dispatch.return_each(rows_BK.flatten().unsqueeze(1), rows_BK)
    else:
        dispatch.return_sums(rows_BK[:, :1])
    return dispatch.collect()


@pytest.mark.parametrize("name", ["padded", "all_gather"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_exchanges_of_fixed_size_wait_for_no_device_and_keep_their_addresses(
    name: str, exact: bool
) -> None:
    routing = Routing(2, [torch.zeros(3, 2)], 2, name, exact)
    transport = routing.transport_of(MailGroup(0, (3,), Mail(1)))
    places = set()
    for slots in ([[0, 1], [1, 0], [-1, 1]], [[-1, -1], [0, -1], [1, 0]]):
        with Watched() as watched:
            home = one_exchange(transport, torch.tensor(slots), exact=exact)
        assert watched.waiting == []
        places.add(home.rows_RW.data_ptr())
    assert len(places) == 1


def test_exact_splits_do_wait() -> None:
    routing = Routing(2, [torch.zeros(3, 2)], 8192, "all_to_all")
    transport = routing.transport_of(MailGroup(0, (3,), Mail(1)))
    with Watched() as watched:
        one_exchange(transport, torch.tensor([[0, 1], [1, 0], [-1, 1]]), exact=True)
    assert watched.waiting


def test_choices_of_a_token_on_one_rank_are_numbered_in_their_order() -> None:
    ranks = torch.tensor([[4, 1, 4, 4, 1], [0, 2, 3, 1, 5]])
    assert order_on_rank(ranks).tolist() == [[0, 0, 1, 2, 1], [0, 0, 0, 0, 0]]
