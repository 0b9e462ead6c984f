import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import InvalidRequest
from server.openai.json_body import read_object
from server.settings import LimitSettings

LIMITS = LimitSettings()
NAMES = st.sampled_from(["a", "b", '"', "\\", ":", '":', '\\"', " ", ""]) | st.text(max_size=4)
Members = list[tuple[str, Any]]


class Pairs(list[tuple[str, Any]]):
    """The members of an object in the order in which they are written, names perhaps equal."""


def members_of(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Members]:
    return st.lists(st.tuples(NAMES, values), max_size=4)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers(-9, 9) | NAMES,
    lambda inner: st.lists(inner, max_size=4) | members_of(inner).map(Pairs),
    max_leaves=12,
)


def written(value: Any, colon: str) -> str:
    if isinstance(value, Pairs):
        members = (f"{json.dumps(name)}{colon}{written(one, colon)}" for name, one in value)
        return f"{{{','.join(members)}}}"
    if isinstance(value, list):
        return f"[{','.join(written(one, colon) for one in value)}]"
    return json.dumps(value)


def repeats(value: Any) -> bool:
    if isinstance(value, Pairs):
        names = [name for name, _ in value]
        return len(set(names)) < len(names) or any(repeats(one) for _, one in value)
    return isinstance(value, list) and any(map(repeats, value))


@given(members_of(VALUES).map(Pairs), st.sampled_from([":", ": ", " :", "\n:\t"]))
def test_exactly_the_bodies_that_name_a_member_twice_are_refused(body: Pairs, colon: str) -> None:
    text = written(body, colon)
    try:
        read_object(text.encode(), LIMITS)
        refused = False
    except InvalidRequest:
        refused = True
    assert refused == repeats(body), text
