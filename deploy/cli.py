"""The ``headrace`` command: one subcommand a verb. It parses, builds settings, calls one function.

Text for people goes to stderr, data to stdout. Exit codes: 0 done, 1 failed, 2 wrong usage, 130
interrupted. Importing this module does not import torch; a verb imports what it needs.
"""

import argparse
import difflib
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.bench_options import add_bench_options
from deploy.config import KEYS, WrongSetting, variable
from deploy.conformance_options import add_conformance_options
from deploy.exits import DONE, FAILED, INTERRUPTED, USAGE
from deploy.options import OPTIONS, add_options, add_sources, configuration
from deploy.plan_placement import add_plan_options, show_plan
from deploy.roles import ROLE_VERBS, run_role
from deploy.top_options import add_top_options
from protocol.errors import ServingError
from runtime.parent import die_with_parent
from runtime.settings import headrace_environment

VERBS = {
    "up": "start a whole system on this machine and stop it with Ctrl-C",
    "gateway": "run the HTTP API, and by default the scheduler inside it",
    "scheduler": "run the scheduler alone, for several gateways",
    "prefill": "run one prefill worker",
    "decode": "run one rank of a decode worker, or all of them as child processes",
    "drain": "let one worker finish what it does and end",
    "scale": "change the number of prefill workers of a system on Ray",
    "status": "show what a running system serves and how its workers do",
    "top": "watch a running system in the terminal",
    "bench": "test a server under load and say what it can do",
    "conformance": "ask any OpenAI-compatible server whether it does what clients need",
    "plan": "say how a model's experts are placed on so many ranks, and what room that leaves",
    "settings": "list every setting with its default, variable and meaning",
    "key": "make a cluster key file, which processes on several machines share",
    "version": "print the version",
}


def parser() -> argparse.ArgumentParser:
    """The whole command line; a test freezes its options."""
    command = argparse.ArgumentParser(
        prog="headrace",
        allow_abbrev=False,
        description="Serve mixture-of-experts language models with prefill and decode apart.",
        epilog="A flag wins over a HEADRACE_ variable, that over the cluster file, that over the "
        "default.",
    )
    verbs = command.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in VERBS.items():
        sub = verbs.add_parser(
            verb, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        if verb in ("up", *ROLE_VERBS):
            add_options(sub, verb)
    scale = verbs.choices["scale"]
    scale.add_argument("wanted", metavar="ROLE=N", help="such as prefill=3")
    add_sources(scale)
    draining = verbs.choices["drain"]
    draining.add_argument(
        "worker", metavar="WORKER", help="as headrace status names it; decode-0 means all its ranks"
    )
    add_options(draining, "drain")
    status = verbs.choices["status"]
    status.add_argument(
        "url",
        nargs="?",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="of a gateway (default: %(default)s)",
    )
    status.add_argument("--json", action="store_true", help="print JSON instead of a table")
    status.add_argument(
        "--timeout",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="for each question to the gateway (default: %(default)s)",
    )
    status.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="holds the API key, where the gateway asks for one",
    )
    status.add_argument(
        "--experts", action="store_true", help="show each layer's experts, slots and balance too"
    )
    status.add_argument(
        "--links", action="store_true", help="show how KV goes from prefill to decode, and why, too"
    )
    status.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="write the experts' load there, for decode.experts.load_file",
    )
    add_top_options(verbs.choices["top"])
    add_bench_options(verbs.choices["bench"])
    add_conformance_options(verbs.choices["conformance"])
    add_plan_options(verbs.choices["plan"])
    verbs.choices["settings"].add_argument("--json", action="store_true", help="print JSON")
    verbs.choices["key"].add_argument("file", metavar="FILE", type=Path, help="must not exist yet")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the result is the exit code."""
    die_with_parent()
    chosen = _parse(arguments)
    try:
        return _run(chosen)
    except ServingError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return USAGE if isinstance(error, WrongSetting) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read stdout has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Like ``parse_args``, and an unknown option is told the nearest known one."""
    command = parser()
    chosen, unknown = command.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [option.flag for option in OPTIONS if chosen.verb in option.verbs]
        nearest = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"see headrace {chosen.verb} --help"
        command.error(f"unknown argument {flag}: {hint}")
    return chosen


def _run(chosen: argparse.Namespace) -> int:
    verb: str = chosen.verb
    if verb == "version":
        print(importlib.metadata.version("headrace"))
    elif verb == "plan":
        show_plan(chosen)
    elif verb == "settings":
        _print_settings(as_json=chosen.json)
    elif verb == "key":
        return _make_key(chosen.file)
    elif verb in ("status", "top"):
        return _show_system(chosen)
    elif verb in ("bench", "conformance"):
        return _test_server(chosen)
    elif verb in ("up", "scale", "drain"):
        return _launch(chosen)
    else:
        return run_role(verb, configuration(chosen, verb, headrace_environment()))
    return DONE


def _launch(chosen: argparse.Namespace) -> int:
    found = configuration(chosen, chosen.verb, headrace_environment())
    if chosen.verb == "drain":
        from deploy.drain import drain

        return drain(found, chosen.worker)
    from deploy.up import scale, up

    return up(found) if chosen.verb == "up" else scale(found, chosen.wanted)


def _show_system(chosen: argparse.Namespace) -> int:
    if chosen.verb == "top":
        from deploy.top import top

        return top(chosen)
    from deploy.status import show_status

    return show_status(
        chosen.url,
        as_json=chosen.json,
        timeout_s=chosen.timeout,
        api_key_file=chosen.api_key_file,
        experts=chosen.experts,
        links=chosen.links,
        record_file=chosen.record,
    )


def _test_server(chosen: argparse.Namespace) -> int:
    if chosen.verb == "bench":
        from deploy.bench import bench

        return bench(chosen)
    from deploy.conformance import conformance

    return conformance(chosen)


def _print_settings(*, as_json: bool) -> None:
    rows = [
        {
            "key": path,
            "default": None if key.default is None else str(key.default),
            "variable": variable(path),
            "meaning": " ".join(key.description.split()),
        }
        for path, key in KEYS.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['key']} = {row['default'] or ''}\n    {row['variable']}\n    {row['meaning']}")


def _make_key(file: Path) -> int:
    from runtime.keys import ClusterKey

    try:
        ClusterKey.generate().save(file)
    except OSError as error:
        print(f"headrace: cannot write {file}: {error.strerror}", file=sys.stderr)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
