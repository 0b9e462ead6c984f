import json
from typing import Any

import pytest

from protocol.errors import InvalidRequest
from runtime.grammars import Grammars, grammar_of
from server.structured.constraints import ResponseFormat, StructuredOutputs, constraint_of
from tests.support.model_text import byte_model_text

TEXT = byte_model_text()
GRAMMARS = Grammars(TEXT.tokenizer.vocabulary())
A = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
CONTENT_A = {"type": "json_schema", "json_schema": A}


def ends(asked: dict[str, Any], text: str) -> bool | None:
    """Whether output may end behind ``text``; None where it cannot be written at all."""
    structured = StructuredOutputs(structural_tag=json.dumps(asked))
    constraint = constraint_of(None, structured, spell=TEXT.spell)
    assert constraint is not None
    matcher = GRAMMARS.matcher(grammar_of(constraint.kind, constraint.source))
    for token_id in TEXT.tokenizer.encode(text, add_special_tokens=False):
        if not matcher.accept(token_id):
            return None
    return bool(matcher.allowed()[matcher.end >> 3] >> (matcher.end & 7) & 1)


def tag(name: str, content: Any = CONTENT_A, end: Any = "</f>") -> dict[str, Any]:
    return {"type": "tag", "begin": f"<f={name}>", "content": content, "end": end}


def triggered(**more: Any) -> dict[str, Any]:
    tags = [tag("one"), tag("two", {"type": "regex", "pattern": "[a-z/]+"})]
    return {"format": {"type": "triggered_tags", "triggers": ["<f="], "tags": tags, **more}}


STRUCTURES: dict[str, Any] = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=one>", "schema": A, "end": "</f>"},
        {"begin": "<g>", "schema": {"type": "integer"}, "end": "</g>"},
    ],
    "triggers": ["<f=", "<g"],
}
ONE = '<f=one>{"a": 5}</f>'
ENDS = [
    ("structures", STRUCTURES, "just text", True),
    ("structures", STRUCTURES, f"see {ONE} and <g>7</g>.", True),
    ("structures", STRUCTURES, "see <f=", False),
    ("structures", STRUCTURES, "see <f=two>", None),
    ("structures", STRUCTURES, '<f=one>{"b"', None),
    ("structures", STRUCTURES, '<f=one>{"a": 5} </f>', None),
    ("triggered", triggered(), "<f is no trigger", True),
    ("triggered", triggered(), f"{ONE} and <f=two>a/b</f> and more", True),
    ("triggered", triggered(), "<f=three>", None),
    ("at least one", triggered(at_least_one=True), "text", None),
    ("at least one", triggered(at_least_one=True), f"{ONE} text {ONE}", True),
    ("once", triggered(stop_after_first=True), "only text", True),
    ("once", triggered(stop_after_first=True), f"text {ONE}", True),
    ("once", triggered(stop_after_first=True), f"text {ONE} ", None),
    ("exactly one", triggered(at_least_one=True, stop_after_first=True), ONE, True),
    ("exactly one", triggered(at_least_one=True, stop_after_first=True), f"{ONE}x", None),
]
NESTED: dict[str, Any] = {
    "format": {
        "type": "sequence",
        "elements": [
            tag("think", {"type": "any_text"}, ["</f>", "</end>"]),
            {
                "type": "or",
                "elements": [{"type": "const_string", "value": "no"}, tag("one", end="")],
            },
        ],
    }
}
SEPARATED: dict[str, Any] = {
    "format": {
        "type": "tags_with_separator",
        "tags": [tag("one")],
        "separator": ", ",
        "at_least_one": True,
    }
}
ENDS += [
    ("nested", NESTED, "<f=think>a < b\n</end>no", True),
    ("nested", NESTED, '<f=think></f><f=one>{"a": 1}', True),
    ("nested", NESTED, "<f=think></f>yes", None),
    ("separated", SEPARATED, f"{ONE}, {ONE}", True),
    ("separated", SEPARATED, f"{ONE},{ONE}", None),
    ("separated", SEPARATED, "", False),
    ("perhaps none", {"format": {**SEPARATED["format"], "at_least_one": False}}, "", True),
    (
        "one of them",
        {"format": {**SEPARATED["format"], "stop_after_first": True}},
        f"{ONE}, ",
        None,
    ),
]


@pytest.mark.parametrize(("name", "asked", "text", "expected"), ENDS)
def test_tags_open_what_must_match_and_leave_the_rest_free(
    name: str, asked: dict[str, Any], text: str, expected: bool | None
) -> None:
    assert ends(asked, text) is expected


def test_a_marker_that_is_a_special_token_is_no_text() -> None:
    asked = {
        "structures": [{"begin": "<|im_start|>x", "schema": A, "end": "<|im_end|>"}],
        "triggers": ["<|im_start|>"],
    }
    assert ends(asked, 'a<|im_start|>x{"a":1}<|im_end|>b') is True
    assert ends(asked, "a<|im_start|>y") is None


def test_both_fields_that_take_tags_mean_the_same() -> None:
    format_ = ResponseFormat(
        type="structural_tag",
        structures=STRUCTURES["structures"],
        triggers=STRUCTURES["triggers"],
    )
    by_format = constraint_of(format_, None, spell=TEXT.spell)
    structured = StructuredOutputs(structural_tag=STRUCTURES)
    by_extension = constraint_of(None, structured, spell=TEXT.spell)
    assert by_format is not None
    assert by_extension is not None
    assert by_format.source == by_extension.source


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ("[]", ""),
        ("{", ""),
        ({}, ".structures"),
        ({"structures": [], "triggers": ["x"]}, ".structures"),
        ({"structures": [{"begin": "x", "end": "y", "schema": 5}], "triggers": ["x"]}, ""),
        ({"structures": [{"begin": "y", "schema": A}], "triggers": ["x"]}, ".tags[0].begin"),
        ({"structures": [{"begin": "x", "schema": A, "also": 1}], "triggers": ["x"]}, ""),
        ({"structures": [{"begin": "x", "schema": A}], "triggers": [""]}, ".triggers"),
        ({"format": {"type": "any_text"}}, ".format.type"),
        ({"format": {"type": "grammar", "grammar": "x"}}, ".format.type"),
        ({"format": {"type": "const_string"}}, ".format.value"),
        ({"format": {"type": "sequence", "elements": [triggered()["format"]]}}, ".format.elements"),
        ({"format": tag("x", {"type": "any_text"}, "")}, ".format.end"),
        (triggered(excludes=["z"]), ".format"),
        (triggered(at_least_one="yes"), ".format.at_least_one"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value)[:60],
)
def test_what_is_not_enforced_is_refused_by_its_path(asked: Any, param: str) -> None:
    text = asked if isinstance(asked, str) else json.dumps(asked)
    structured = StructuredOutputs(structural_tag=text)
    with pytest.raises(InvalidRequest) as refused:
        constraint_of(None, structured, spell=TEXT.spell)
    assert (refused.value.param or "").startswith(f"structured_outputs.structural_tag{param}")
