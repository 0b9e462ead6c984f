"""Streaming text equals decoding at once, wherever the stream is cut."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from server.text.detokenizer import detokenizer
from server.text.stop_strings import StopStrings
from server.text.tokenizer import TextTokenizer


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġthe", "ing", "ðŁ", "ðŁĻ", "âĤ", "Ã©", "ĠðŁĻĤ"]  # whole and broken characters
    vocab = {piece: i for i, piece in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True), AddedToken("日本", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    words = ["▁", "▁the", "a", "é", "日", "▁▁", "ing"]
    vocab = {piece: i for i, piece in enumerate([*(f"<0x{b:02X}>" for b in range(256)), *words])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_tokens([AddedToken("<s>", special=True)])
    return tokenizer


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
MULTIBYTE = [*"é€🙂日".encode(), *"e\u0301".encode()]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    spelt = [f"<0x{b:02X}>" for b in MULTIBYTE]
    likely = [i for piece in spelt if (i := tokenizer.token_to_id(piece)) is not None]
    any_id = st.integers(0, size - 1)
    return st.lists(any_id | st.sampled_from(likely) if likely else any_id, max_size=40)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip_special_tokens", [True, False], ids=["skipped", "kept"])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_streamed_text_equals_text_decoded_at_once(
    name: str, skip_special_tokens: bool, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(ids_of(tokenizer))
    stream = detokenizer(
        TextTokenizer(tokenizer, control_tokens=[]), skip_special_tokens=skip_special_tokens
    )
    streamed = "".join([*map(stream.push, ids), stream.finish()])
    assert streamed == tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_no_character_is_ever_split(name: str, text: str) -> None:
    """Every prefix of a text's byte tokens streams as a prefix of the text."""
    tokenizer = TextTokenizer(TOKENIZERS[name], control_tokens=[])
    by_piece = {tokenizer.piece(i): i for i in range(256)}
    stream = detokenizer(tokenizer)
    shown = ""
    text = "x" + text  # a leading space is another property
    for byte in text.encode():
        shown += stream.push(by_piece[bytes([byte])])
        assert text.startswith(shown)
    assert shown + stream.finish() == text


def cut(text: str, points: list[int]) -> list[str]:
    edges = [0, *sorted(point % (len(text) + 1) for point in points), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def released(pieces: list[str], stops: list[str], *, include: bool) -> tuple[str, str | None]:
    watch = StopStrings(stops, include_in_output=include)
    shown = ""
    for piece in pieces:
        shown += watch.push(piece)
        assert include or not any(stop in shown for stop in stops)
        if watch.matched is not None:
            return shown, watch.matched
    return shown + watch.finish(), None


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end, stop
    return None


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4),
    points=st.lists(st.integers(0, 40), max_size=12),
    include=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_are_found_wherever_the_text_is_cut(
    text: str, stops: list[str], points: list[int], include: bool
) -> None:
    expected = first_stop(text, stops)
    shown, matched = released(cut(text, points), stops, include=include)
    if expected is None:
        assert (shown, matched) == (text, None)
    else:
        end, stop = expected
        assert (shown, matched) == (text[: end if include else end - len(stop)], stop)


def test_text_is_held_only_while_a_stop_string_may_still_come() -> None:
    watch = StopStrings(["\n\nUser:"], include_in_output=False)
    assert watch.push("one\n") == "one"
    assert watch.push("two") == "\ntwo"
