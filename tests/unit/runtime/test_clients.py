from protocol.ids import AttemptRef, RequestId
from runtime.clients import Clients


def ref(name: str) -> AttemptRef:
    return AttemptRef(RequestId(name), 0)


def test_a_silent_gateway_loses_its_requests_and_only_those() -> None:
    clients = Clients(silent_s=10)
    clients.heard(b"quiet", 0.0)
    clients.heard(b"lively", 0.0)
    clients.own(b"quiet", ref("a"))
    clients.own(b"lively", ref("b"))
    clients.heard(b"lively", 9.0)
    assert clients.remove_silent(10.5) == [ref("a")]
    assert clients.owner(ref("a")) is None
    assert clients.owner(ref("b")) == b"lively"
    assert len(clients) == 1


def test_an_ended_request_is_nobodys_and_may_end_twice() -> None:
    clients = Clients(silent_s=10)
    clients.heard(b"g", 0.0)
    clients.own(b"g", ref("a"))
    clients.disown(ref("a"))
    clients.disown(ref("a"))
    assert clients.owner(ref("a")) is None
    assert clients.remove_silent(11.0) == []
