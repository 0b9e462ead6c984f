"""``headrace status``: what a running system serves, asked over HTTP like any client would."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from deploy.exits import DONE, FAILED

_COLUMNS = (
    ("worker", "worker"),
    ("role", "role"),
    ("state", "state"),
    ("running", "running"),
    ("queued", "queued"),
    ("free blocks", "free_blocks"),
    ("of", "total_blocks"),
    ("tokens/s", "tokens_per_second"),
)


def show_status(url: str, *, as_json: bool, timeout_s: float, api_key_file: Path | None) -> int:
    """Print the state of the gateway at ``url``; failed when it is not ready or not there."""
    url = url.rstrip("/")
    headers = {}
    if api_key_file is not None:
        try:
            headers["authorization"] = f"Bearer {api_key_file.read_text().split()[0]}"
        except (OSError, IndexError):
            print(f"headrace: no API key in {api_key_file}", file=sys.stderr)
            return FAILED
    try:
        with httpx.Client(timeout=timeout_s, trust_env=False, headers=headers) as client:
            ready = client.get(f"{url}/ready")
            health = client.get(f"{url}/health")
            models = client.get(f"{url}/v1/models")
            cluster = client.get(f"{url}/cluster")
    except httpx.HTTPError as error:
        print(f"headrace: no gateway answers at {url}: {error}", file=sys.stderr)
        return FAILED
    state = {
        "url": url,
        "healthy": health.status_code == httpx.codes.OK,
        "ready": ready.status_code == httpx.codes.OK,
        "readiness": _json(ready),
        "models": [model.get("id") for model in _list(_json(models), "data")],
        "workers": _list(_json(cluster), "workers"),
    }
    if as_json:
        print(json.dumps(state, indent=2))
    else:
        print(_table(state))
    return DONE if state["ready"] else FAILED


def _json(response: httpx.Response) -> object:
    try:
        return response.json() if response.status_code == httpx.codes.OK else None
    except ValueError:
        return None


def _list(document: object, key: str) -> list[Mapping[str, object]]:
    rows = document.get(key) if isinstance(document, dict) else None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _table(state: Mapping[str, object]) -> str:
    models = state["models"]
    workers = state["workers"]
    assert isinstance(models, list)
    assert isinstance(workers, list)
    word = "ready" if state["ready"] else "not ready"
    lines = [f"{state['url']}  {word}  models: {', '.join(map(str, models)) or 'none'}"]
    if workers:
        rows = [[title for title, _ in _COLUMNS]]
        rows += [[_cell(worker.get(key)) for _, key in _COLUMNS] for worker in workers]
        lines += ["", *_aligned(rows)]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "" if value is None else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
