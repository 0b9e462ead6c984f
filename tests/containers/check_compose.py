"""Runs deploy/compose.yaml with real containers and says whether it keeps its promises.

    python3 tests/containers/check_compose.py                            with docker compose
    python3 tests/containers/check_compose.py --compose podman-compose --engine podman

From nothing to the first streamed token; doors that must be closed; the ranks of a decode container
killed in the middle of a stream; one more prefill worker; a whole decode container killed. Takes
minutes, and 4 GB of memory, so no test run calls it by itself. It removes what it started, volumes
included, unless told to --keep it.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

COMPOSE_FILE = Path(__file__).parents[2] / "deploy/compose.yaml"
URL = "http://127.0.0.1:8000"
SERVING = ("keys", "scheduler", "gateway", "prefill", "decode-0", "decode-1")
PROMPT = "List the numbers from one to thirty in words."
TOKENS = 24


class Deployment:
    def __init__(self, compose: str, engine: str, deadline_s: float) -> None:
        self._compose = [*shlex.split(compose), "-f", str(COMPOSE_FILE)]
        self._engine = engine
        self._deadline_s = deadline_s
        self._key = ""

    def compose(self, *arguments: str) -> str:
        return self._run(*self._compose, *arguments)

    def engine(self, *arguments: str) -> str:
        return self._run(self._engine, *arguments)

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=self._deadline_s, check=False
        )
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        return done.stdout

    def until(self, what: str, condition: Callable[[], bool]) -> float:
        """Seconds until ``condition`` holds; ends the check when that takes too long."""
        start = time.monotonic()
        while time.monotonic() - start < self._deadline_s:
            try:
                if condition():
                    return time.monotonic() - start
            except httpx.HTTPError:
                pass
            time.sleep(1.0)
        raise SystemExit(f"not within {self._deadline_s:g} s: {what}")

    def read_key(self) -> None:
        self._key = self.compose("run", "--rm", "-T", "keys", "show", "operator/api-key").strip()

    def get(self, path: str, *, key: bool = True) -> httpx.Response:
        headers = {"authorization": f"Bearer {self._key}"} if key else {}
        return httpx.get(f"{URL}{path}", headers=headers, timeout=10.0)

    def stream(self) -> Iterator[str]:
        """The pieces of a greedy answer; fails unless the stream ends as it should."""
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": PROMPT}],
            "stream": True,
            "temperature": 0,
            "max_tokens": TOKENS,
        }
        headers = {"authorization": f"Bearer {self._key}"}
        url = f"{URL}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=self._deadline_s) as got:
            got.raise_for_status()
            for line in got.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    require("error" not in event, f"the stream has an error: {event}")
                    for choice in event["choices"]:
                        if choice["delta"].get("content"):
                            yield choice["delta"]["content"]
        raise SystemExit("the stream ended without [DONE]")

    def linked(self, role: str) -> int:
        lines = self.get("/metrics").text.splitlines()
        mine = [line for line in lines if line.startswith("headrace_worker_up{")]
        return sum(line.endswith(" 1.0") for line in mine if f'role="{role}"' in line)

    def containers(self, service: str) -> list[str]:
        """Names, as one or another compose builds them."""
        names = self.engine("ps", "--format", "{{.Names}}").split()
        return [name for name in names if re.fullmatch(rf"headrace[_-]{service}[_-]\d+", name)]


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(otherwise)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def check(system: Deployment, services: list[str]) -> None:
    start = time.monotonic()
    if services:
        system.compose("up", "-d", *services)
    system.until("ready", lambda: system.get("/ready", key=False).status_code == 200)
    system.read_key()
    next(system.stream())
    say(f"first streamed token after {time.monotonic() - start:.0f} s")

    for path in ("/v1/models", "/metrics"):
        require(system.get(path, key=False).status_code == 401, f"{path} is open without a key")
    published = {
        line.split(" -> ")[1].rpartition(":")[2]
        for name in system.engine("ps", "--format", "{{.Names}}").split()
        if "headrace" in name
        for line in system.engine("port", name).splitlines()
    }
    require(published <= {"8000", "3000"}, f"ports are published: {published}")
    say(f"published ports: {', '.join(sorted(published))}; the rest asks for a key")

    undisturbed = "".join(system.stream())

    def goes_on_without(what: str, lose: Callable[[], object]) -> None:
        pieces = []
        for piece in system.stream():
            pieces.append(piece)
            if len(pieces) == 4:
                lose()
        require("".join(pieces) == undisturbed, f"{pieces} instead of {undisturbed!r}")
        say(f"{what} and the stream went on: same text, nothing twice")

    victim = system.containers("decode-1")[0]
    # All but the container's first process, which starts them again.
    kill_ranks = ("exec", victim, "python3", "-c", "import os; os.kill(-1, 9)")
    goes_on_without("four decode ranks were killed", lambda: system.engine(*kill_ranks))

    system.compose("up", "-d", "--scale", "prefill=3", "prefill")
    seconds = system.until(
        "three prefill workers and eight decode ranks",
        lambda: (system.linked("prefill"), system.linked("decode")) == (3, 8),
    )
    say(f"three prefill workers and eight decode ranks linked, {seconds:.0f} s after scaling")

    goes_on_without("a decode container was killed", lambda: system.engine("kill", victim))
    system.engine("start", victim)
    seconds = system.until("eight decode ranks again", lambda: system.linked("decode") == 8)
    say(f"its ranks were back {seconds:.0f} s after it had been started again")


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compose", default="docker compose", help="default: %(default)s")
    parser.add_argument("--engine", default="docker", help="default: %(default)s")
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds for each wait")
    parser.add_argument("--services", nargs="*", default=list(SERVING))
    parser.add_argument("--running", action="store_true", help="it runs already: start nothing")
    parser.add_argument("--keep", action="store_true", help="leave everything running")
    chosen = parser.parse_args()
    system = Deployment(chosen.compose, chosen.engine, chosen.deadline)
    try:
        check(system, [] if chosen.running else chosen.services)
    finally:
        if not chosen.keep:
            system.compose("down", "-v")
    return 0


if __name__ == "__main__":
    sys.exit(main())
