"""How the ranks of a worker find one another, again after each loss.

The lowest rank that answers leads. Rank 0's address is a setting; the others tell theirs with their
tickets, so that the group can meet without rank 0, and where theirs are settings too, a new rank
finds such a group. Each rank tries the ranks below it, waits where one answers, and leads where
none does. The leader calls the roll when all are there that can be expected
(``engine.meeting.roll_call``): after a loss that is whoever lives, if their slots hold every
expert. Connections are made under the epoch and the roll's own random number, so nothing of an
earlier life can join; and a group counts only when all of its members have exchanged a row.

Two groups of the same ranks may come to be, where a network is cut. Each computes right results,
for neither needs the other; the higher one's leader goes on looking for lower ranks, and they meet
again when it finds one. Who starts the processes is unknown here.
"""

import errno
import socket
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from secrets import randbits

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from engine.backends import Backends, RowsChoice, alone, terms_of
from engine.collectives import ExpertGroup, StepGroup
from engine.meeting.doorman import Doorman
from engine.meeting.gathering import Gathering
from engine.meeting.lookout import Lookout
from engine.meeting.roll_call import Quorum
from engine.meeting.tickets import Roll, Ticket
from engine.meeting.waiting import FormingProgress, Waiting
from protocol.errors import ConfigError, DeadlineExceeded, WorkerLost

_RETRY_S = 0.1
_PORT_GRACE_S = 2.0  # the previous rank 0 may still be on its way out


@dataclass(frozen=True, slots=True, kw_only=True)
class Circle:
    """Some neighbouring ranks of a group that needs all of its ranks; ``group`` is this rank's seat
    among them.
    """

    group: ExpertGroup
    seats: range


class Rendezvous:
    """One rank's way into its group, from its first meeting to its last.

    ``form`` is called again after every loss. In between, ``newcomers`` is read every step.
    """

    def __init__(
        self,
        expert_group: ExpertGroup,
        address: str,
        *,
        name: str = "",
        role: str = "decode",
        places: Mapping[int, str] | None = None,
        first: int | None = None,
        least: int | None = None,
        collective_timeout_s: float = 10.0,
        attempt_s: float = 10.0,
        rows: RowsChoice = "auto",
        terms: Mapping[str, str] | None = None,
        key: bytes = b"",
        circle: Circle | None = None,
    ) -> None:
        """``address`` is "host:port" of rank 0, and ``name`` tells groups apart. ``places`` are
        those of further ranks, which receive visitors there and else at any port. ``first`` ranks
        are enough for the first meeting and ``least`` ever after; None: all. A rank that keeps the
        others waiting for longer than ``collective_timeout_s`` counts as lost. ``attempt_s``
        bounds the making of connections. ``rows``: what carries rows on a CPU. ``terms`` must be
        equal on all ranks, by name. The ranks of ``circle`` are connected among themselves too.

        Raises:
            ConfigError: ``address`` is not an address, or this host cannot share memory and must.
        """
        ranks = expert_group.num_seats
        self._group = expert_group
        self._rank = expert_group.seat
        self._quorum = Quorum(ranks=ranks, first=first or ranks, least=least or ranks)
        self._host, self._port = _parse(address) if ranks > 1 else ("", 0)
        self._name = f"{name}:{self._port}"
        self._places = {rank: _parse(place) for rank, place in (places or {}).items()}
        self._places[0] = self._host, self._port
        self._addresses = {rank: _joined(*place) for rank, place in self._places.items()}
        self._collective_timeout_s = collective_timeout_s
        self._attempt_s = attempt_s
        self._role = role
        self._backends = Backends(
            role=role,
            device=expert_group.device,
            choice=rows,
            collective_timeout_s=collective_timeout_s,
            attempt_s=attempt_s,
        )
        self._terms = {f"{role}.group.ranks": str(ranks), **terms_of(role, rows), **(terms or {})}
        self._failure = ""
        self._key = key
        self._circle = circle
        self._doorman: Doorman | None = None
        self._own_host = ""
        self._own_address = ""
        self._last_epoch = 0
        self._last_members: tuple[int, ...] = ()
        self._lookout: Lookout | None = None

    @property
    def newcomers(self) -> bool:
        """Somebody wants to join the group that this rank leads. Asking shows that it lives."""
        if self._doorman is None:
            return False
        self._doorman.seen()
        return bool(self._doorman.visitors) or (self._lookout is not None and self._lookout.found)

    def form(
        self,
        *,
        deadline_s: float,
        leaving: Collection[int] = (),
        on_progress: Callable[[FormingProgress], None] = lambda _: None,
    ) -> StepGroup:
        """Meet the other ranks and connect, without those that are ``leaving``.

        ``on_progress`` is called about once a second; what it raises ends the meeting.

        Raises:
            DeadlineExceeded: too few ranks came within ``deadline_s``; the message names who is
                known to be missing, and the last failure.
            ConfigError: rank 0 cannot listen at the address; or a rank cannot take part in the
                first group, or has other terms than the others, and every rank hears that; or this
                rank has other terms than the group that it wants to join.
        """
        if self._quorum.ranks == 1:
            self._last_epoch += 1
            return _alone(self._group, self._last_epoch)
        self._stop_looking()
        self._backends.prepare()
        waiting = Waiting(deadline_s, on_progress, role=self._role)
        doorman = self._open(waiting)
        while True:
            try:
                roll, store = self._gather(doorman, leaving, waiting)
                group = self._connect(roll, store)
            except WorkerLost as error:
                self._group.disconnect()
                waiting.last_failure = str(error)
                doorman.seen()
                waiting.pause(_RETRY_S)
            else:
                self._enter(roll, doorman)
                return group

    def tell(
        self,
        failure: str,
        *,
        deadline_s: float,
        on_progress: Callable[[FormingProgress], None] = lambda _: None,
    ) -> None:
        """Come to the meeting only to say why this rank cannot take part, and ``close``. Before
        the first group that ends all ranks with this reason; it returns when they have heard it,
        or after ``deadline_s``. A group that serves goes on without this rank.
        """
        self._failure = failure
        with suppress(ConfigError, DeadlineExceeded):
            self.form(deadline_s=deadline_s, on_progress=on_progress)
        self.close()

    def close(self) -> None:
        """Receive nobody any more."""
        self._stop_looking()
        if self._doorman is not None:
            self._doorman.close()

    def _gather(
        self, doorman: Doorman, leaving: Collection[int], waiting: Waiting
    ) -> tuple[Roll, Store | None]:
        served: list[Store] = []

        def open_store() -> str:
            with _failing("serving"):
                store, port = _serve(self._own_host, self._attempt_s)
            served.append(store)
            return _joined(self._own_host, port)

        gathering = Gathering(
            Ticket(
                rank=self._rank,
                number=randbits(62),
                address=self._own_address,
                last_epoch=self._last_epoch,
                last_members=self._last_members,
                terms=self._terms,
                failure=self._failure,
            ),
            doorman=doorman,
            addresses=self._addresses,
            quorum=self._quorum,
            leaving=leaving,
            group=self._name,
            key=self._key,
            late_s=self._collective_timeout_s,
            waiting=waiting,
        )
        roll = gathering.roll(open_store)
        return roll, served[0] if served else None

    def _connect(self, roll: Roll, store: Store | None) -> StepGroup:
        if len(roll.members) == 1:
            return _alone(self._group, roll.epoch)
        with _failing("connecting"):
            store = store or _reach(roll.store, self._attempt_s)
            group = self._life(self._group, roll, store, roll.members)
            try:
                if self._circle is not None:
                    own = PrefixStore(f"circle of {self._circle.seats.start}", store)
                    seats = range(len(self._circle.seats))
                    group.enclose(self._life(self._circle.group, roll, own, seats))
            except BaseException:
                group.close()
                raise
        rows = group.exchange([roll.epoch])
        assert rows == [(roll.epoch,)] * len(roll.members)
        return group

    def _life(
        self, group: ExpertGroup, roll: Roll, store: Store, members: Sequence[int]
    ) -> StepGroup:
        connection = self._backends.connect(
            store,
            epoch=roll.epoch,
            number=roll.number,
            members=members,
            rank=members.index(group.seat),
            host=self._own_host,
        )
        return StepGroup(group, epoch=roll.epoch, members=members, connection=connection)

    def _enter(self, roll: Roll, doorman: Doorman) -> None:
        self._last_epoch, self._last_members = roll.epoch, roll.members
        self._addresses.update(zip(roll.members, roll.addresses, strict=True))
        doorman.seen()
        doorman.formed()
        leader = roll.members[0]
        if leader != self._rank:
            doorman.send_on(leader, self._addresses[leader])
            return
        doorman.keep()
        lower = [address for rank, address in self._addresses.items() if rank < leader]
        self._lookout = Lookout(lower, self._name) if lower else None

    def _stop_looking(self) -> None:
        if self._lookout is not None:
            self._lookout.stop()
            self._lookout = None

    def _open(self, waiting: Waiting) -> Doorman:
        """Visitors come to an agreed address, or else where rank 0 reaches this rank."""
        if self._doorman is not None:
            return self._doorman
        place = self._places.get(self._rank)
        self._own_host, port = place or (_towards(self._host, self._port), 0)
        while True:
            try:
                listener = _bound(self._own_host, port)
                break
            except OSError as error:
                self._explain(error, waiting)
                waiting.last_failure = str(error)
                waiting.pause(_RETRY_S)
        self._own_address = _joined(self._own_host, listener.getsockname()[1])
        self._doorman = Doorman(
            listener,
            group=self._name,
            role=self._role,
            rank=self._rank,
            num_ranks=self._quorum.ranks,
            terms=self._terms,
            key=self._key,
            stuck_s=self._collective_timeout_s,
            waited_until=self._waited_until,
        )
        return self._doorman

    def _waited_until(self) -> float:
        """When the engine thread last waited for other ranks."""
        groups = [self._group, *([] if self._circle is None else [self._circle.group])]
        return max(group.waited_until for group in groups)

    def _explain(self, error: OSError, waiting: Waiting) -> None:
        """Raise what only an operator can change; what may pass by itself is tried again."""
        place = self._addresses.get(self._rank, self._own_host)
        where = f"rank {self._rank} cannot listen at {place} for the other {self._role} ranks"
        if error.errno == errno.EADDRINUSE and waiting.waited_s() > _PORT_GRACE_S:
            raise ConfigError(
                f"{where}: the port is in use; stop what listens there or choose another port"
            ) from error
        if error.errno in {errno.EADDRNOTAVAIL, errno.EACCES}:
            raise ConfigError(
                f"{where}: {error.strerror}; choose an address of this host and a port above 1023"
            ) from error


def _alone(group: ExpertGroup, epoch: int) -> StepGroup:
    return StepGroup(group, epoch=epoch, members=(group.seat,), connection=alone())


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def _serve(host: str, timeout_s: float) -> tuple[Store, int]:
    # A socket of our own: the store by itself would listen on every interface.
    with _bound(host, 0) as listener:
        port = int(listener.getsockname()[1])
        store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
    return store, port


def _reach(address: str, timeout_s: float) -> Store:
    host, _, port = address.rpartition(":")
    return TCPStore(
        host.strip("[]"),
        int(port),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )


def _towards(host: str, port: int) -> str:
    """The address of the interface that reaches ``host``; peers connect to it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        return str(probe.getsockname()[0])


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse(rendezvous: str) -> tuple[str, int]:
    host, _, port = rendezvous.rpartition(":")
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"rendezvous must be host:port of rank 0, such as 127.0.0.1:29500, not {rendezvous!r}"
        ) from error
    # Every rank must settle on the same of several addresses: IPv4, which is seldom switched off.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0]), int(port)


@contextmanager
def _failing(stage: str) -> Generator[None]:
    """Stores and backends raise plain ``RuntimeError`` and ``OSError`` for whatever goes wrong."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WorkerLost(f"{stage} failed: {reason}", stage="decode") from error
