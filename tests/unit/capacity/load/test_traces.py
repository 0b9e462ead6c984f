import json
from pathlib import Path

import pytest

from capacity.load.errors import WrongOption
from capacity.load.lengths import parse_lengths
from capacity.load.text import Calibration
from capacity.load.traces import read_trace
from capacity.load.workload import Turn, Workload, WorkloadSpec


def trace(folder: Path, *lines: object) -> Path:
    file = folder / "trace"
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return file


def mooncake(timestamp: int, length: int, hashes: list[int]) -> dict[str, object]:
    return {
        "timestamp": timestamp,
        "input_length": length,
        "output_length": 7,
        "hash_ids": hashes,
    }


def turns_of(file: Path) -> list[list[Turn]]:
    one = parse_lengths("1", "--input")
    spec = WorkloadSpec(input=one, output=one, trace=str(file))
    workload = Workload(spec, Calibration(overhead=10.0, per_word=1.0))
    return [workload.session(number) for number in range(workload.count or 0)]


def test_mooncake_times_are_milliseconds_and_begin_at_zero(tmp_path: Path) -> None:
    rows = read_trace(trace(tmp_path, mooncake(5000, 600, [1, 2]), mooncake(3500, 512, [1])))
    assert [row.at_s for row in rows] == [0.0, 1.5]
    assert rows[1].block_hashes == (1, 2)


def test_equal_hash_ids_are_equal_prefixes_and_others_are_not(tmp_path: Path) -> None:
    file = trace(
        tmp_path,
        mooncake(0, 1536, [4, 5, 6]),
        mooncake(1, 1300, [4, 5, 9]),
        mooncake(2, 1100, [8, 5, 7]),
    )
    first, second, third = (str(s[0].prompt).split() for s in turns_of(file))
    assert first[:1024] == second[:1024]
    assert first[1024] != second[1024]
    assert third[:4] != first[:4]
    assert [len(words) for words in (first, second, third)] == [1536, 1290, 1090]


def test_azure_times_have_seven_digits(tmp_path: Path) -> None:
    file = trace(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,4808,10",
        "2023-11-16 18:17:04.4799600,110,27",
    )
    rows = read_trace(file)
    assert [row.at_s for row in rows] == pytest.approx([0.0, 0.5])
    assert (rows[0].input_tokens, rows[0].output_tokens) == (4808, 10)


def test_burstgpt_leaves_out_requests_that_failed_then(tmp_path: Path) -> None:
    file = trace(
        tmp_path,
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,472,18,490,Conversation log",
        "45,ChatGPT,1087,0,1087,Conversation log",
        "118,GPT-4,417,276,693,Conversation log",
    )
    assert [(row.at_s, row.output_tokens) for row in read_trace(file)] == [(0.0, 18), (113.0, 276)]


def test_sharegpt_turns_follow_each_other(tmp_path: Path) -> None:
    said = [
        ("human", "Hello there"),
        ("gpt", "Hi, what is it?"),
        ("human", "Nothing"),
        ("gpt", "Ah"),
    ]
    file = trace(tmp_path, [{"conversations": [{"from": a, "value": b} for a, b in said]}])
    (session,) = turns_of(file)
    assert [turn.prompt for turn in session] == ["Hello there", "Nothing"]
    assert [turn.continues for turn in session] == [False, True]


def test_our_own_format_has_ids_prompts_and_groups(tmp_path: Path) -> None:
    file = trace(
        tmp_path,
        {"t": 1.0, "ids": [1, 2, 3], "output": 4},
        {"t": 2.0, "input": 300, "output": 4, "prefix_group": "a", "prefix_tokens": 200},
        {"t": 3.0, "input": 300, "output": 4, "prefix_group": "a", "prefix_tokens": 200},
    )
    (ids,), (one,), (two,) = turns_of(file)
    assert ids.prompt == (1, 2, 3)
    first, second = str(one.prompt).split(), str(two.prompt).split()
    assert first[:200] == second[:200]
    assert first[200:] != second[200:]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([mooncake(0, 5, []), "{broken"], "line 2: not JSON from column 2 on"),
        ([{"timestamp": 1, "input_length": 5}], "line 1: 'output_length' is missing"),
        ([mooncake(0, 512, [1, 2])], "line 1: 2 hash_ids"),
        ([{"t": 0, "input": 5, "output": 0}], "line 1: output must be"),
        ([{"t": 0, "output": 5}], "exactly one of prompt"),
        ([{"t": 0, "input": 5, "output": 5, "tokens": 5}], "unknown field 'tokens'"),
        ([{"t": -1, "input": 5, "output": 5}], "line 1: -1 is no time"),
        (
            ["TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,2"],
            "line 2: TIMESTAMP 'yesterday'",
        ),
        (["a,b,c", "1,2,3"], "neither JSON nor a CSV"),
        ([""], "it is empty"),
        (["[1]"], "conversation 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: list[object], said: str) -> None:
    with pytest.raises(WrongOption, match=said):
        read_trace(trace(tmp_path, *lines))


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(WrongOption, match="No such file"):
        read_trace(tmp_path / "nowhere")


def test_rows_of_a_session_stay_together(tmp_path: Path) -> None:
    rows = [
        {"t": 0, "session": "a", "prompt": "one", "output": 2},
        {"t": 1, "session": "b", "prompt": "two", "output": 2},
        {"t": 2, "session": "a", "prompt": "three", "output": 2, "delay": 0.5},
    ]
    sessions = turns_of(trace(tmp_path, *rows))
    assert [[turn.prompt for turn in turns] for turns in sessions] == [["one", "three"], ["two"]]
    assert sessions[0][1].delay_s == 0.5


def test_a_row_without_a_time_among_timed_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongOption, match="some have none"):
        read_trace(trace(tmp_path, {"t": 0, "input": 1, "output": 1}, {"input": 1, "output": 1}))
