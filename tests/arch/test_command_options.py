"""An option is a promise: adding or removing one needs a line in the changelog and one here."""

import re
from pathlib import Path

from deploy.cli import VERBS, parser

ROOT = Path(__file__).parents[2]
FROZEN = Path(__file__).with_name("command_options.txt")


def options() -> set[str]:
    (verbs,) = (a for a in parser()._actions if a.dest == "verb")
    assert isinstance(verbs.choices, dict)
    return {
        f"{verb} {flag}"
        for verb, sub in verbs.choices.items()
        for action in sub._actions
        for flag in action.option_strings or [action.metavar]
        if flag not in ("-h", "--help")
    }


def test_the_options_are_those_that_were_agreed() -> None:
    assert options() == set(FROZEN.read_text().splitlines())


def test_every_verb_and_option_is_in_the_changelog() -> None:
    mentioned = set(re.findall(r"`([^`]+)`", (ROOT / "CHANGELOG.md").read_text()))
    wanted = {option.split(" ")[1] for option in options()} | {f"headrace {v}" for v in VERBS}
    assert wanted - mentioned == set()


def test_every_option_says_what_it_does() -> None:
    (verbs,) = (a for a in parser()._actions if a.dest == "verb")
    assert isinstance(verbs.choices, dict)
    silent = [
        (verb, action.dest)
        for verb, sub in verbs.choices.items()
        for action in sub._actions
        if not action.help
    ]
    assert silent == []
