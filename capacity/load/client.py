"""One request to the server under test, as a record. Failures are recorded, never raised.

The only exception that leaves is cancellation, after the record says so.
"""

import asyncio
from time import monotonic_ns

from capacity.load.address import Address
from capacity.load.api import Api
from capacity.load.connection import Answer, Broken, Pool
from capacity.load.events import AnswerReader
from capacity.load.records import Failure, Record
from capacity.load.usage import server_stages, token_counts

_OK = 200
_MESSAGE_CHARACTERS = 300


class Attempt:
    """A request under way: its record, and what has come of its answer."""

    def __init__(self, record: Record, endpoint: str, *, keep_text: bool) -> None:
        self.record = record
        self.reader = AnswerReader(endpoint, keep_text=keep_text)
        self.answer = Answer(self.digest)
        self._body: list[bytes] = []

    @property
    def streams(self) -> bool:
        return self.answer.headers.get(b"content-type", b"").startswith(b"text/event-stream")

    @property
    def chunks(self) -> int:
        """Pieces of the body that have come, as a sign of life."""
        return self.answer.digested + len(self.answer.times)

    def digest(self, pieces: list[bytes], times: list[int]) -> None:
        if self.streams:
            self.reader.read_events(pieces, times)
        else:
            self._body += pieces

    def conclude(self) -> None:
        """Read what is left of a complete answer and put everything into the record."""
        self.answer.flush()
        reader, status = self.reader, self.answer.status
        if self.streams:
            reader.end_of_stream()
        else:
            reader.read_whole(b"".join(self._body))
        if status != _OK:
            self.fail(f"http {status}", reader.message or "no message")
        elif reader.failure is not None:
            self.fail(reader.failure, reader.message)
        elif not reader.has_content:
            self.fail(Failure.EMPTY, "the answer ended well but said nothing")
        self.fill()

    def fill(self) -> None:
        """Put times, usage and stages into the record, of a broken answer too."""
        record, answer, reader = self.record, self.answer, self.reader
        record.sent_ns, record.first_byte_ns = answer.sent_ns, answer.first_byte_ns
        record.done_ns = answer.done_ns or monotonic_ns()  # of a failure, when it was noticed
        record.status = answer.status
        record.chunks_ns = reader.arrivals
        if reader.arrivals:
            record.first_token_ns = reader.arrivals[0]
            record.last_token_ns = reader.arrivals[-1]
        record.finish_reason = reader.finish_reason
        counts = token_counts(reader.usage)
        record.input_tokens, record.output_tokens, record.cached_tokens = counts
        timing = answer.headers.get(b"server-timing")
        if timing is not None:
            record.server_ms = server_stages(timing.decode("latin-1"))

    def fail(self, error: str, message: str) -> None:
        self.record.error = str(error)
        self.record.message = message[:_MESSAGE_CHARACTERS]


class Client:
    """Sends requests to one server. ``under_way`` are those that have no end yet."""

    def __init__(self, address: Address, api: Api, *, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self.api = api
        self.pool = Pool(address)
        self.under_way: dict[int, Attempt] = {}

    def request(self, body: bytes) -> bytes:
        return self._address.head("POST", self.api.path, length=len(body)) + body

    async def ask(self, request: bytes, record: Record, *, keep_text: bool = False) -> str:
        """Fill ``record``, whose times are monotonic; the result is the text, if kept."""
        attempt = Attempt(record, self.api.endpoint, keep_text=keep_text)
        self.under_way[record.index] = attempt
        record.started_ns = monotonic_ns()
        try:
            connection, record.new_connection = await self.pool.connection()
            await connection.exchange(request, attempt.answer, timeout_s=self._timeout_s)
            self.pool.give_back(connection)
            attempt.conclude()
        except Broken as broken:
            attempt.answer.flush()
            attempt.fill()
            said = attempt.reader  # a server that names its error and then cuts has said more
            attempt.fail(said.failure or broken.failure, said.message or str(broken))
        except asyncio.CancelledError:
            attempt.answer.flush()
            attempt.fill()
            attempt.fail(Failure.ABANDONED, "the test ended before the answer did")
            raise
        finally:
            del self.under_way[record.index]
            attempt.answer.digest = _ignore  # else a cycle, for the garbage collector to stop at
        return attempt.reader.text

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of a plain GET.

        Raises:
            Broken: no complete answer.
        """
        body: list[bytes] = []
        answer = Answer(lambda pieces, _: body.extend(pieces))
        connection, _ = await self.pool.connection()
        head = self._address.head("GET", path)
        await connection.exchange(head, answer, timeout_s=self._timeout_s)
        self.pool.give_back(connection)
        answer.flush()
        return answer.status, b"".join(body)


def _ignore(pieces: list[bytes], times: list[int]) -> None:
    del pieces, times
