"""A system in the foreground of a terminal: started, announced when ready, drained by Ctrl-C.

What the system consists of and where its processes run is unknown here.
"""

import json
import signal
from dataclasses import dataclass
from typing import Protocol

import anyio
import httpx

from deploy.console import Console
from deploy.exits import DONE, FAILED, INTERRUPTED
from deploy.supervisor import SystemFailed

READY_POLL_S = 0.1


class RunningSystem(Protocol):
    """The local ``Supervisor``, or workers on Ray."""

    def system_is_ready(self) -> None:
        """From now on a process that ends is started again instead of ending the system."""
        ...

    def kill(self) -> None:
        """End every process at once; ``run`` then returns."""
        ...

    async def run(self, stop: anyio.Event) -> None:
        """Start everything; after ``stop``, drain and end everything. Nothing runs afterwards.

        Raises:
            SystemFailed: a process could not start, or ended too often.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """``url`` is the gateway's. It is to be ready within ``start_timeout_s``."""

    url: str
    model: str
    scheduler: str
    start_timeout_s: float


async def serve(system: RunningSystem, title: str, console: Console, *, api: Api | None) -> int:
    """Run until Ctrl-C or SIGTERM; a second one does not wait. The result is the exit code."""
    console.say(title)
    stop = anyio.Event()
    received: list[signal.Signals] = []

    async def watch_signals() -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for number in signals:
                received.append(number)
                if len(received) > 1:
                    system.kill()
                else:
                    console.say("draining; press Ctrl-C again to stop at once")
                stop.set()

    failures: list[str] = []
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch_signals)
            if api is None:
                system.system_is_ready()
            else:
                tasks.start_soon(_announce, system, console, api)
            await system.run(stop)
            tasks.cancel_scope.cancel()
    except* SystemFailed as group:
        failures += [str(error) for error in group.exceptions]
    if failures:
        console.say(f"headrace: {failures[0]}")
        return FAILED
    console.say("stopped")
    return INTERRUPTED if received and received[0] == signal.SIGINT else DONE


async def _announce(system: RunningSystem, console: Console, api: Api) -> None:
    """Wait until a canary request has passed through the whole system, then say how to use it."""
    answer = "no answer"
    with anyio.move_on_after(api.start_timeout_s):
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as client:
            while True:
                try:
                    response = await client.get(f"{api.url}/ready")
                    answer = response.text[:200]
                    if response.status_code == httpx.codes.OK:
                        break
                except httpx.HTTPError:
                    answer = "no answer"
                await anyio.sleep(READY_POLL_S)
        system.system_is_ready()
        console.say(_welcome(api))
        return
    raise SystemFailed(f"not ready after {api.start_timeout_s:g} s: /ready says: {answer}")


def _welcome(api: Api) -> str:
    url, model = api.url, api.model
    question = {"model": model, "messages": [{"role": "user", "content": "What is a headrace?"}]}
    streamed = json.dumps({**question, "stream": True})
    short = json.dumps({**question, "max_tokens": 64})
    return f"""
ready at {url}

  curl -N {url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{streamed}'

  python3 -c 'import json, urllib.request as u; print(json.load(u.urlopen(u.Request(
    "{url}/v1/chat/completions", json.dumps({short}).encode(),
    {{"content-type": "application/json"}})))["choices"][0]["message"]["content"])'

Any OpenAI client works with base_url="{url}/v1". Ctrl-C drains and stops.
Workers: headrace status {url}; replace one: headrace drain WORKER --scheduler {api.scheduler}
"""
