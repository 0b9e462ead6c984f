"""The configuration reference, written from the settings themselves.

    python3 -m deploy.settings_reference > docs/configuration.md

A test compares the page with this module's output.
"""

import sys
from collections.abc import Iterable
from typing import Literal, get_args, get_origin

from pydantic import BaseModel, ByteSize

from deploy.config import COMMON, SECTIONS
from deploy.options import OPTIONS, Option

_HEAD = """# Configuration

Every setting. This page is generated: `python3 -m deploy.settings_reference >
docs/configuration.md`. `headrace settings` says the same in a terminal.

A flag wins over a variable, that over the cluster file, that over the default. All are names of
the same keys. For `kv.transport`:

| where | how |
|---|---|
| flag | `--transport tcp`, or `--set kv.transport=tcp`, which any key has |
| variable | `HEADRACE_KV_TRANSPORT=tcp` |
| cluster file (`--config FILE` or `HEADRACE_CONFIG`) | `kv:` and below it `transport: tcp` |

The sections `model`, `kv`, `bus` and `process` hold for every role. A role may have its own value
below its name: `decode.process.threads`, `HEADRACE_DECODE_PROCESS_THREADS`. An unknown key is an
error that names the nearest known one. Sizes take units, such as `512MiB`.
"""
_TITLES = {
    "model": "What is served, for all roles.",
    "kv": "The KV cache and its transfer, for all roles.",
    "bus": "How processes find and trust one another, for all roles.",
    "process": "Threads, logs and the drain, for all roles.",
    "gateway": "The HTTP API.",
    "scheduler": "Membership.",
    "prefill": "Prefill workers and the ranks that they consist of.",
    "decode": "Decode ranks and the groups that they form.",
    "launcher": "`headrace up`, and `headrace prefill` or `headrace decode` without a rank.",
    "ray": "With `headrace up --on ray`; see [deployment](deployment.md#several-hosts-ray).",
}


def page() -> str:
    """The Markdown page."""
    parts = [_HEAD]
    for section, model in SECTIONS.items():
        parts.append(f"## {section}\n\n{_TITLES[section]}\n\n{_table(_rows(model, section))}")
    return "\n".join(parts)


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"| key | flag | default | meaning |\n|---|---|---|---|\n{body}\n"


def _rows(model: type[BaseModel], prefix: str) -> Iterable[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        kind, path = field.annotation, f"{prefix}.{name}"
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if name not in COMMON:
                yield from _rows(kind, path)
            continue
        meaning = " ".join((field.description or "").split())
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        named = f" One of {', '.join(f'`{c}`' for c in choices)}." if choices else ""
        yield (
            f"`{path}`",
            ", ".join(dict.fromkeys(f"`{option.flag}`" for option in _flags(path))),
            _shown(field.default),
            f"{meaning}{named}".replace("|", "\\|"),
        )


def _flags(path: str) -> Iterable[Option]:
    return (option for option in OPTIONS if path in option.keys)


def _shown(default: object) -> str:
    if default is None or default == "":
        return ""
    if isinstance(default, ByteSize):
        return f"`{default.human_readable(decimal=False)}`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    sys.stdout.write(page())
