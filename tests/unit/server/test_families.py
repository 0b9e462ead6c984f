"""Golden texts of each family of models, cut at every character."""

import itertools
import json
from typing import Any

import pytest

from runtime.grammars import Grammars, grammar_of
from server.text.families.choose import FAMILIES, family_of
from server.text.families.family import Tool
from server.text.families.parts import (
    CallArguments,
    CallBegun,
    Content,
    Part,
    PartReader,
    Reasoning,
)
from server.text.families.reasoning import PlainReader, ReasoningMarks, ReasoningReader
from tests.support.model_text import byte_model_text

THINK = ReasoningMarks("<think>", "</think>")
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    Tool(name=name, parameters=WEATHER, definition={"type": "function", "function": {"name": name}})
    for name in ("weather", "time")
]
ARGUMENTS = '{"city": "Pa}r\\"is</tool_call>", "days": [1, {"a": 2}]}'

# family, text, content, calls
GOLDEN: list[tuple[str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Just text, with a < and {.", "Just text, with a < and {.", []),
    (
        "hermes",
        f'I look.\n<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"city": "Rome"}, "name": "time"}\n</tool_call>',
        "I look.\n",
        [("weather", ARGUMENTS), ("time", '{"city": "Rome"}')],
    ),
    ("hermes", '<tool_call>{"name": "time"}</tool_call>', "", [("time", "{}")]),
    ("hermes", '<tool_call>{"name": "a", "arguments": {"x": 1', "", [("a", '{"x": 1')]),
    ("hermes", "<tool_call>no object</tool_call>", "<tool_call>no object", []),
    (
        "hermes",
        '<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>',
        "",
        [("a", '{"x": 1}')],
    ),
    ("llama3_json", "It is 5.", "It is 5.", []),
    (
        "llama3_json",
        f'<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}}; '
        '{"name": "time", "parameters": {}}',
        "",
        [("weather", ARGUMENTS), ("time", "{}")],
    ),
    ("llama3_json", '{"answer": 4} it is', '{"answer": 4} it is', []),
    (
        "deepseek_v3",
        "I call.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{ARGUMENTS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n"
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "I call.",
        [("weather", ARGUMENTS), ("time", "{}")],
    ),
    (
        "deepseek_v3",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        [("weather", ARGUMENTS)],
    ),
    (
        "kimi_k2",
        "Well.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        f"<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|><|tool_call_begin|>"
        "functions.time:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "Well.",
        [("weather", ARGUMENTS), ("time", "{}")],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
        "",
        [("weather", ARGUMENTS)],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
        "It rains.<|return|>",
        "It rains.",
        [],
    ),
]


def reader_of(family: str) -> PartReader:
    ids = itertools.count()
    (chosen,) = (f for f in FAMILIES if f.name == family)
    return chosen.reader(lambda: f"call_{next(ids)}", TOOLS)


def read(reader: PartReader, pieces: list[str]) -> list[Part]:
    return [part for piece in pieces for part in reader.push(piece)] + reader.finish()


def joined(parts: list[Part]) -> dict[str, Any]:
    calls = {p.index: [p.call_id, p.name, ""] for p in parts if isinstance(p, CallBegun)}
    for part in parts:
        if isinstance(part, CallArguments):
            calls[part.index][2] += part.text
    assert list(calls) == list(range(len(calls)))
    return {
        "content": "".join(p.text for p in parts if isinstance(p, Content)),
        "reasoning": "".join(p.text for p in parts if isinstance(p, Reasoning)),
        "calls": list(calls.values()),
    }


@pytest.mark.parametrize(("family", "text", "content", "calls"), GOLDEN)
def test_a_text_is_read_alike_wherever_it_is_cut(
    family: str, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    whole = joined(read(reader_of(family), [text]))
    assert whole["content"] == content
    assert [(name, arguments) for _, name, arguments in whole["calls"]] == calls
    for cut in range(len(text)):
        assert joined(read(reader_of(family), [text[:cut], text[cut:]])) == whole
    assert joined(read(reader_of(family), list(text))) == whole


def test_arguments_are_shown_while_they_are_written() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"'
    shown = [p for p in reader_of("hermes").push(text) if isinstance(p, CallArguments)]
    assert "".join(p.text for p in shown) == '{"city": "Paris"'


def test_nothing_is_certain_of_a_marker_that_is_not_complete() -> None:
    reader = reader_of("hermes")
    assert reader.push("so <tool_c") == [Content("so ")]
    assert reader.push("ake>") == [Content("<tool_cake>")]


def test_kimi_calls_keep_the_ids_that_the_model_wrote() -> None:
    text = next(text for family, text, _, _ in GOLDEN if family == "kimi_k2")
    calls = joined(read(reader_of("kimi_k2"), [text]))["calls"]
    assert [call_id for call_id, _, _ in calls] == ["functions.weather:0", "functions.time:1"]


def test_harmony_reasons_on_its_analysis_channel() -> None:
    text = GOLDEN[-1][1]
    assert joined(read(reader_of("harmony"), [text]))["reasoning"] == "Hm."


@pytest.mark.parametrize(
    ("text", "begun", "reasoning", "content"),
    [
        ("<think>\nLet me see.\n</think>\n\nYes.", False, "Let me see.\n", "Yes."),
        ("Let me see.</think>Yes.", True, "Let me see.", "Yes."),
        ("\n<think>a</think>b <think>c</think>", False, "a", "b <think>c</think>"),
        ("No <think>x</think>", False, "", "No <think>x</think>"),
        ("<think>cut off", False, "cut off", ""),
        ("  <thi", False, "", "  <thi"),
        ("", True, "", ""),
    ],
)
def test_reasoning_is_told_apart_wherever_it_is_cut(
    text: str, begun: bool, reasoning: str, content: str
) -> None:
    for pieces in [[text], list(text), *([text[:n], text[n:]] for n in range(len(text)))]:
        found = joined(read(ReasoningReader(THINK, PlainReader(), begun=begun), pieces))
        assert (found["reasoning"], found["content"]) == (reasoning, content)


def test_a_call_may_follow_reasoning() -> None:
    text = '<think>a</think>\n<tool_call>{"name": "time"}</tool_call>'
    found = joined(read(ReasoningReader(THINK, reader_of("hermes"), begun=False), list(text)))
    assert (found["reasoning"], found["content"], len(found["calls"])) == ("a", "", 1)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
@pytest.mark.parametrize("parallel", [False, True])
def test_a_forced_call_is_one_that_the_family_reads(family: Any, parallel: bool) -> None:
    """The shortest text of the grammar, by always taking the first token that is allowed."""
    grammars = Grammars(byte_model_text().tokenizer.vocabulary())
    lark = "start: calls\n" + family.grammar(TOOLS, parallel=parallel, spell=json.dumps)
    matcher = grammars.matcher(grammar_of("lark", lark))
    text = b""
    for _ in range(400):
        allowed = matcher.allowed()
        if allowed[matcher.end >> 3] >> (matcher.end & 7) & 1:
            break
        tokenizer = byte_model_text().tokenizer
        options = [i for i in range(matcher.end) if allowed[i >> 3] >> (i & 7) & 1]
        best = min(options, key=lambda i: (tokenizer.piece(i) not in b'"}', i))
        assert matcher.accept(best)
        text += tokenizer.piece(best)
    found = joined(read(reader_of(family.name), [text.decode()]))
    assert [name for _, name, _ in found["calls"]] == ["time"] or found["calls"], text
    assert "city" in json.loads(found["calls"][0][2])
    assert found["content"] == ""


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "hermes"),
        ("{{ messages }}", "hermes"),
        ("... <tool_call> ...", "hermes"),
        ('... <|python_tag|> ... "parameters": ...', "llama3_json"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
        ("<|tool_calls_section_begin|>", "kimi_k2"),
        ("<|start|><|channel|>", "harmony"),
    ],
)
def test_a_template_tells_its_family(template: str | None, name: str) -> None:
    assert family_of(template).name == name
