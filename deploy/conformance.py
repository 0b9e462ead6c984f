"""``headrace conformance``: ask any OpenAI-compatible server whether it does what clients need.

0: everything that it offers holds; 1: something fails; 2: it cannot be reached.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence

from capacity.conformance.case import Case, Finding
from capacity.conformance.suite import CASES, Unreachable, run_suite
from deploy.exits import DONE, FAILED, USAGE

_MARKS = {"holds": "ok", "fails": "FAILS", "not offered": "-"}
_NAME_WIDTH = 30


def conformance(chosen: argparse.Namespace) -> int:
    """Print one line a case as it is tried, with its reason where it fails; then the sum."""
    cases = _chosen(chosen.only)
    if not cases:
        print(f"headrace: no case's name begins with {', '.join(chosen.only)}", file=sys.stderr)
        return USAGE
    if chosen.list:
        _print_list(cases, as_json=chosen.json)
        return DONE
    try:
        key = None
        if chosen.api_key_file is not None:
            key = chosen.api_key_file.read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError) as error:
        print(f"headrace: no key in {chosen.api_key_file}: {error}", file=sys.stderr)
        return USAGE
    findings: list[Finding] = []
    try:
        for finding in run_suite(
            chosen.base_url,
            api_key=key,
            model=chosen.model,
            timeout_s=chosen.timeout,
            cases=cases,
        ):
            findings.append(finding)
            if not chosen.json:
                _print_line(finding)
    except Unreachable as error:
        print(f"headrace: {error}", file=sys.stderr)
        return USAGE
    count = Counter(finding.outcome for finding in findings)
    if chosen.json:
        print(json.dumps(_as_json(chosen.base_url, findings), indent=2))
    else:
        print(f"\n{count['holds']} hold, {count['fails']} fail, {count['not offered']} not offered")
    return FAILED if count["fails"] else DONE


def _chosen(beginnings: Sequence[str] | None) -> list[Case]:
    return [case for case in CASES if not beginnings or case.name.startswith(tuple(beginnings))]


def _print_list(cases: Sequence[Case], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([_described(case) for case in cases], indent=2))
        return
    for case in cases:
        print(f"{case.name:{_NAME_WIDTH}}{case.reason}\n{'':{_NAME_WIDTH}}breaks: {case.breaks}")


def _print_line(finding: Finding) -> None:
    case = finding.case
    line = f"{_MARKS[finding.outcome]:6}{case.name:{_NAME_WIDTH}}"
    if finding.outcome == "fails":
        line += f"{finding.detail}\n{'':8}why: {case.reason}\n{'':8}breaks: {case.breaks}"
    elif finding.detail:
        line += finding.detail
    print(line.rstrip(), flush=True)


def _described(case: Case) -> dict[str, object]:
    return {"name": case.name, "reason": case.reason, "breaks": case.breaks}


def _as_json(base_url: str, findings: list[Finding]) -> dict[str, object]:
    return {
        "base_url": base_url,
        "outcomes": Counter(finding.outcome for finding in findings),
        "cases": [
            {**_described(found.case), "outcome": found.outcome, "detail": found.detail}
            for found in findings
        ],
    }
