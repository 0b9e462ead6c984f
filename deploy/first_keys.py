"""A deployment's keys, made at its first start and kept ever after.

Each consumer has a folder of its own, which becomes a volume that nobody else mounts: a container
holds no key but those that it uses. The gateway gets digests only. What exists is never replaced;
a folder that was emptied is filled again to match the others. Services are unknown here.

    cluster/cluster.key    every process of headrace
    gateway/api-keys       digests of the API keys below
    metrics/api-key        Prometheus
    grafana/admin-password Grafana
    operator/api-key       people, and the load test

    python3 -m deploy.first_keys FOLDER              make what is missing
    python3 -m deploy.first_keys FOLDER show FILE    print one of them, such as operator/api-key
"""

import hashlib
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.exits import DONE, FAILED, USAGE
from runtime.keys import ClusterKey

CLUSTER_KEY = "cluster/cluster.key"
API_KEYS = "gateway/api-keys"
METRICS_KEY = "metrics/api-key"
GRAFANA_PASSWORD = "grafana/admin-password"
OPERATOR_KEY = "operator/api-key"
SHOWN = (OPERATOR_KEY, GRAFANA_PASSWORD)

# Prometheus reads and does not generate: what its key could ask for is next to nothing.
_METRICS_LIMITS = "requests_per_minute=1 tokens_per_minute=1 concurrency=1"


def make_missing(folder: Path) -> list[str]:
    """Make every key that is not there; the names of those that were made.

    Raises:
        OSError: the folder cannot be written.
    """
    made = []
    for name in (CLUSTER_KEY, METRICS_KEY, GRAFANA_PASSWORD, OPERATOR_KEY, API_KEYS):
        file = folder / name
        if file.exists():
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if name == CLUSTER_KEY:
            ClusterKey.generate().save(file)
        elif name == API_KEYS:
            _write(file, _digests(folder))
        else:
            # Other users' processes read these; only their container has the folder.
            _write(file, f"hr-{secrets.token_urlsafe(32)}\n")
        made.append(name)
    return made


def _digests(folder: Path) -> str:
    lines = []
    for name, options in ((OPERATOR_KEY, "name=operator"), (METRICS_KEY, "name=prometheus")):
        digest = hashlib.sha256((folder / name).read_bytes().strip()).hexdigest()
        limits = f" {_METRICS_LIMITS}" if name == METRICS_KEY else ""
        lines.append(f"sha256:{digest} {options}{limits}\n")
    return "".join(lines)


def _write(file: Path, text: str) -> None:
    """In one piece: a start that is interrupted must not leave half a key."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.chmod(0o444)
    os.replace(part, file)


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    match arguments:
        case [folder]:
            try:
                made = make_missing(Path(folder))
            except OSError as error:
                print(f"cannot make keys in {folder}: {error}", file=sys.stderr)
                return FAILED
            print(f"made {', '.join(made)}" if made else "all keys are there", file=sys.stderr)
            return DONE
        case [folder, "show", name] if name in SHOWN:
            print((Path(folder) / name).read_text().strip())
            return DONE
        case _:
            print(f"usage: FOLDER [show {'|'.join(SHOWN)}]", file=sys.stderr)
            return USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
