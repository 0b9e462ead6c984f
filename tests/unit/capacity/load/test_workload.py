import pytest

from capacity.load.errors import WrongOption
from capacity.load.lengths import parse_lengths, parse_pairs
from capacity.load.text import WORDS, Calibration, Text
from capacity.load.workload import PrefixPool, Turn, Workload, WorkloadSpec, parse_prefix

LINE = Calibration(overhead=12.0, per_word=1.25)


def spec(**changed: object) -> WorkloadSpec:
    fields: dict[str, object] = {
        "input": parse_lengths("100", "--input"),
        "output": parse_lengths("8", "--output"),
    }
    return WorkloadSpec(**fields | changed)  # type: ignore[arg-type]


def prompts(wanted: WorkloadSpec, count: int = 20) -> list[str]:
    workload = Workload(wanted, LINE)
    return [str(workload.session(number)[0].prompt) for number in range(count)]


def tokens(prompt: str) -> float:
    return LINE.overhead + LINE.per_word * len(prompt.split())


def test_prompts_have_the_tokens_that_were_asked_for() -> None:
    assert all(abs(tokens(prompt) - 100) <= LINE.per_word for prompt in prompts(spec()))


def test_sessions_depend_on_seed_and_number_alone() -> None:
    assert prompts(spec(seed=3)) == prompts(spec(seed=3))
    assert prompts(spec(seed=3))[5] == str(Workload(spec(seed=3), LINE).session(5)[0].prompt)
    assert not set(prompts(spec(seed=3))) & set(prompts(spec(seed=4)))


def test_no_two_prompts_begin_alike() -> None:
    begun = {tuple(prompt.split()[:4]) for prompt in prompts(spec(), 500)}
    assert len(begun) == 500


def test_a_prefix_pool_is_shared_by_as_many_prompts_as_there_are() -> None:
    found = prompts(spec(prefix=PrefixPool(count=3, tokens=50)), 60)
    assert len({tuple(prompt.split()[:40]) for prompt in found}) == 3
    assert len({tuple(prompt.split()[40:]) for prompt in found}) == 60


def test_a_nonce_comes_first_and_is_that_of_the_run_or_of_the_request() -> None:
    run = prompts(spec(nonce="a"))
    assert len({tuple(prompt.split()[:4]) for prompt in run}) == 1
    assert run[0].split()[:4] != prompts(spec(nonce="b"))[0].split()[:4]
    each = prompts(spec(nonce="a", nonce_per_request=True))
    assert len({tuple(prompt.split()[:4]) for prompt in each}) == len(each)


def test_later_turns_continue_after_a_pause_and_do_not_repeat_the_nonce() -> None:
    wanted = spec(turns=parse_lengths("3", "--turns"), think_s=2.0, nonce="a")
    session = Workload(wanted, LINE).session(0)
    assert [(turn.continues, turn.delay_s) for turn in session] == [
        (False, 0),
        (True, 2),
        (True, 2),
    ]
    nonce = str(session[0].prompt).split()[:4]
    assert all(str(turn.prompt).split()[:4] != nonce for turn in session[1:])


def test_pairs_keep_input_and_output_together() -> None:
    workload = Workload(spec(pairs=parse_pairs("pairs:64/1 640/10", "--input")), LINE)
    turns: list[Turn] = [workload.session(number)[0] for number in range(40)]
    assert {(turn.input_tokens, turn.output_tokens) for turn in turns} == {(64, 1), (640, 10)}


def test_text_of_any_length_has_that_many_words() -> None:
    text = Text()
    for count in (1, 3, 4, 5, 1000, 70_000, 140_000):
        words = text.words(count, "key").split(" ")
        assert len(words) == count
    assert set(words) <= set(WORDS)


def test_a_prefix_option_is_a_count_and_a_length() -> None:
    assert parse_prefix("4x512") == PrefixPool(count=4, tokens=512)
    assert parse_prefix("512") == PrefixPool(count=1, tokens=512)
    for wrong in ("x", "4x", "0x5", "ax5", "-1"):
        with pytest.raises(WrongOption, match="--prefix"):
            parse_prefix(wrong)
