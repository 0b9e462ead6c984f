"""What an engine thread says reaches the event loop, to the last word."""

import threading

import anyio
import pytest

from runtime.mailbox import Inbox, Outbox

pytestmark = pytest.mark.anyio


async def taken(outbox: Outbox[int]) -> list[int]:
    return [item async for item in outbox]


async def test_a_closed_outbox_gives_what_was_put_before_and_ends() -> None:
    outbox: Outbox[int] = Outbox()

    def count() -> None:
        for number in range(100):
            outbox.put([number])

    engine = threading.Thread(target=count)
    engine.start()
    await anyio.to_thread.run_sync(engine.join)
    outbox.close()
    with anyio.fail_after(5):
        assert await taken(outbox) == list(range(100))


async def test_whoever_waits_at_an_outbox_learns_that_it_was_closed() -> None:
    outbox: Outbox[int] = Outbox()
    found: list[list[int]] = []

    async def wait() -> None:
        found.append(await taken(outbox))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            outbox.put([1])
            await anyio.wait_all_tasks_blocked()
            outbox.close()
    assert found == [[1]]


def test_an_inbox_gives_what_was_put_in_its_order() -> None:
    inbox: Inbox[int] = Inbox()
    assert inbox.drain() == []
    inbox.put(1)
    inbox.put(2)
    inbox.wait(5)
    assert inbox.drain() == [1, 2]
