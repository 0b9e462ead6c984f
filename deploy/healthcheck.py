"""Whether the service in this container answers, for the container engine's health check.

    python3 -m deploy.healthcheck URL            it answers 200 there
    python3 -m deploy.healthcheck PORT [PORT..]  somebody listens on each, at this container's name

A worker listens once its weights are loaded. That a request would be served is not known here:
the gateway's /ready says so.
"""

import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence

from deploy.exits import DONE, FAILED, USAGE

TIMEOUT_S = 3.0


def fault(target: str, host: str) -> str | None:
    """What is wrong with one target, or None."""
    try:
        if target.isdigit():
            socket.create_connection((host, int(target)), TIMEOUT_S).close()
        else:
            urllib.request.urlopen(target, timeout=TIMEOUT_S).close()
    except (OSError, urllib.error.URLError) as error:
        return f"{target}: {error}"
    return None


def main(targets: Sequence[str], host: str) -> int:
    """The exit code; faults go to stderr."""
    if not targets or not all(t.isdigit() or t.startswith("http://") for t in targets):
        print("usage: URL | PORT [PORT..]", file=sys.stderr)
        return USAGE
    faults = [found for target in targets if (found := fault(target, host)) is not None]
    for found in faults:
        print(found, file=sys.stderr)
    return FAILED if faults else DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], socket.gethostname()))
