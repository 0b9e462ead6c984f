"""Which of a follower's links the leader hears of next. No torch, no I/O.

What is told at a time has room for some links only, so those that have changed take turns: however
many decode ranks there are, each one's link is told after a bounded number of times.
"""

from collections.abc import Iterable

from prefill.lockstep import LinkNews
from protocol.codec import encode
from protocol.ids import WorkerId
from protocol.workers import LinkReport


class LinkTeller:
    def __init__(self) -> None:
        self._told: dict[WorkerId, LinkReport] = {}  # the one told longest ago first

    def take(self, links: Iterable[LinkReport]) -> LinkNews:
        """Of ``links``, one for each decode rank, those that are to be told now."""
        news = {link.decode: link for link in links if self._told.get(link.decode) != link}
        turns = [
            *(news[decode] for decode in news if decode not in self._told),
            *(news[decode] for decode in self._told if decode in news),
        ]
        room, chosen = LinkNews.ROOM, []
        for link in turns:
            size = len(encode(link))
            if size <= room:
                room -= size
                chosen.append(link)
        for link in chosen:
            self._told.pop(link.decode, None)
            self._told[link.decode] = link
        return LinkNews(tuple(chosen))
