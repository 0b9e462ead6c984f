"""``headrace conformance``: ask any OpenAI-compatible server whether it does what clients need.

0: everything that it offers holds; 1: something fails; 2: it cannot be reached.
"""

import argparse
import json
import sys

from capacity.conformance.case import Finding
from capacity.conformance.suite import Unreachable, run_suite
from deploy.exits import DONE, FAILED, USAGE

_MARKS = {"holds": "ok", "fails": "FAILS", "not offered": "-"}
_NAME_WIDTH = 30


def conformance(chosen: argparse.Namespace) -> int:
    """Print one line a case as it is tried, with its reason where it fails; then the sum."""
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
            chosen.base_url, api_key=key, model=chosen.model, timeout_s=chosen.timeout
        ):
            findings.append(finding)
            if not chosen.json:
                _print_line(finding)
    except Unreachable as error:
        print(f"headrace: {error}", file=sys.stderr)
        return USAGE
    failed = sum(finding.outcome == "fails" for finding in findings)
    if chosen.json:
        print(json.dumps(_as_json(chosen.base_url, findings), indent=2))
    else:
        held = sum(finding.outcome == "holds" for finding in findings)
        print(f"\n{held} hold, {failed} fail, {len(findings) - held - failed} not offered")
    return FAILED if failed else DONE


def _print_line(finding: Finding) -> None:
    case = finding.case
    line = f"{_MARKS[finding.outcome]:6}{case.name:{_NAME_WIDTH}}"
    if finding.outcome == "fails":
        line += f"{finding.detail}\n{'':8}why: {case.reason}\n{'':8}breaks: {case.breaks}"
    elif finding.detail:
        line += finding.detail
    print(line.rstrip(), flush=True)


def _as_json(base_url: str, findings: list[Finding]) -> dict[str, object]:
    return {
        "base_url": base_url,
        "cases": [
            {
                "name": finding.case.name,
                "outcome": finding.outcome,
                "detail": finding.detail,
                "reason": finding.case.reason,
                "breaks": finding.case.breaks,
            }
            for finding in findings
        ],
    }
