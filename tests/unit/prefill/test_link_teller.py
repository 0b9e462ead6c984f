"""Which links a follower tells of: what is new, in turns, and never more than has room."""

from collections.abc import Iterable

from msgspec import structs

from prefill.link_teller import LinkTeller
from prefill.lockstep import LINK_WORDS, LinkNews
from protocol.ids import WorkerId
from protocol.workers import LinkReport


def a_link(number: int, *, reason: str = "same host, auto") -> LinkReport:
    return LinkReport(
        prefill=WorkerId("prefill-0/1"),
        decode=WorkerId(f"decode-0/{number}"),
        transport="shm",
        reason=reason,
        bytes=1 << 50,
        seconds=1.5,
    )


def told(teller: LinkTeller, links: Iterable[LinkReport]) -> list[LinkReport]:
    """What the leader reads of it."""
    words = teller.take(links).to_words()
    assert len(words) == LINK_WORDS
    return list(LinkNews.from_words(words).links)


def test_a_link_is_told_when_it_has_changed_and_only_then() -> None:
    teller, link = LinkTeller(), a_link(0)
    assert told(teller, [link]) == [link]
    assert told(teller, [link]) == []
    changed = structs.replace(link, lost=1)
    assert told(teller, [link, changed]) == [changed]


def test_links_that_have_no_room_take_turns_however_often_others_change() -> None:
    teller = LinkTeller()
    heard: dict[WorkerId, int] = {}
    for turn in range(1, 13):
        links = [structs.replace(a_link(number), bytes=turn) for number in range(72)]
        news = told(teller, links)
        assert news
        heard |= {link.decode: turn for link in news}
    assert len(heard) == 72
    assert min(heard.values()) > 12 - 2 * 72 // len(news)


def test_a_link_whose_words_are_too_long_keeps_none_of_the_others_back() -> None:
    links = [a_link(0, reason="x" * 3000), a_link(1)]
    assert told(LinkTeller(), links) == [links[1]]
