"""Remembered words change no token: the tokenizer alone is the reference."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from server.text.word_cache import MAX_ASKED, MAX_NEW_WORDS, MAX_TEXT_CHARS, WordCache, word_cache

REPOSITORY = Path(__file__).parents[2]
ENDINGS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    + ENDINGS
)
QWEN = LLAMA.replace("{1,3}", "")
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + ENDINGS
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_OSS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + ENDINGS
)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def byte_level(*, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


STAGES = {
    "gpt2": [byte_level(use_regex=True)],
    "smollm2": [pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)],
    "llama3": [split(LLAMA), byte_level(use_regex=False)],
    "qwen": [split(QWEN), byte_level(use_regex=False)],
    "deepseek": [
        split(r"\p{N}{1,3}"),
        split("[一-龥\u3040-ゟ゠-ヿ]+"),
        split(DEEPSEEK.replace(r"\r", "\r").replace(r"\n", "\n")),  # as its file spells it
        byte_level(use_regex=False),
    ],
    "gpt-oss": [split(GPT_OSS), byte_level(use_regex=False)],
}


def trained(stages: list[pre_tokenizers.PreTokenizer]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train([str(path) for path in REPOSITORY.glob("*.md")], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=STAGES)
def remembered(request: pytest.FixtureRequest) -> tuple[Tokenizer, WordCache]:
    """A tokenizer and its words, which stay from one example to the next."""
    tokenizer = trained(STAGES[request.param])
    tokenizer.add_tokens([AddedToken("<two words>", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|im_end|>|>", normalized=False)])
    cache = word_cache(tokenizer)
    assert cache is not None
    return tokenizer, cache


class Counting:
    """A tokenizer that notes what a cache asks it for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.get_added_tokens_decoder = tokenizer.get_added_tokens_decoder
        self.encode_batch_fast = tokenizer.encode_batch_fast
        self.asked: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool) -> Encoding:
        self.asked.append(text)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


def alone(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


PROSE = ["the", "Headrace", "it's", "I'LL", "10", "2026", "4a", "a,", "...", "--", "(b)", "/", "'s"]
ODD = [
    "漢字",
    "naïve",
    "e\u0301",
    "\u0301",
    "\u200b",
    "\x1c",
    "\x85",
    "🙂",
    "ſ",
    "\u00a0",
    "\u3000",
]
MARKS = ["<|im_end|>", "<|im_end|>|>", "<two words>", "<|im_start|>user\nhi", "\n", "\t", "a" * 30]
WORDS = st.sampled_from([*PROSE, *ODD, *MARKS])
GAPS = st.sampled_from(
    [" ", " ", " ", "", "  ", "   ", "\n", " \n", "\n ", "\t", "\r\n", " \u00a0"]
)
TEXTS = st.one_of(
    st.lists(st.one_of(WORDS, GAPS), max_size=40).map("".join),
    st.lists(WORDS, max_size=20).map(" ".join),
    st.text(max_size=60),
)


@settings(max_examples=300)
@given(text=TEXTS)
def test_a_text_has_the_tokens_that_the_tokenizer_gives_it(
    remembered: tuple[Tokenizer, WordCache], text: str
) -> None:
    tokenizer, cache = remembered
    wanted = alone(tokenizer, text)

    assert cache.encode(text) == wanted
    assert cache.encode(text) == wanted, "now that its words are known"


def test_prose_has_the_tokenizers_tokens_however_much_of_it_is_new(
    remembered: tuple[Tokenizer, WordCache],
) -> None:
    tokenizer, cache = remembered
    text = (REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert len(text.split(" ")) > 2 * MAX_NEW_WORDS
    wanted = alone(tokenizer, text)
    for _ in range(len(text) // MAX_NEW_WORDS):
        assert cache.encode(text) == wanted
    longer = text * (MAX_TEXT_CHARS // len(text) + 1)
    assert cache.encode(longer) == alone(tokenizer, longer)


def test_a_text_of_many_new_words_becomes_known_by_and_by() -> None:
    tokenizer = trained(STAGES["gpt2"])
    words = [f"w{number}" for number in range(3 * MAX_NEW_WORDS)]
    counting = Counting(tokenizer)
    cache = WordCache(cast("Tokenizer", counting))
    for _ in range(5):
        assert cache.encode(" ".join(words)) == alone(tokenizer, " ".join(words))

    assert sorted(" ".join(counting.asked).split()) == sorted(words), "each of them once"


def test_a_text_of_many_turns_asks_a_bounded_number_of_times() -> None:
    tokenizer = trained(STAGES["gpt2"])
    counting = Counting(tokenizer)
    cache = WordCache(cast("Tokenizer", counting))
    text = "".join(f"<|im_end|>q {number}x\n" for number in range(10 * MAX_ASKED))

    for times in (1, 2):
        assert cache.encode(text) == alone(tokenizer, text)
        assert len(counting.asked) <= times * (MAX_ASKED + 1)


def test_a_text_of_many_words_too_long_to_be_remembered_has_the_tokenizers_tokens(
    remembered: tuple[Tokenizer, WordCache],
) -> None:
    tokenizer, cache = remembered
    text = " ".join(f"{number}{'x' * 30}" for number in range(2 * MAX_NEW_WORDS))

    assert cache.encode(text) == alone(tokenizer, text)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda t: setattr(t, "pre_tokenizer", byte_level(use_regex=False)),
        lambda t: setattr(t, "pre_tokenizer", split(r"\w+\s+")),
        lambda t: setattr(t, "normalizer", normalizers.Replace(" ", "▁")),
        lambda t: setattr(t, "model", models.WordPiece({"a": 0}, unk_token="a")),
        lambda t: t.add_tokens([AddedToken("<mark>", normalized=True)]),
        lambda t: t.add_tokens([AddedToken("<mask>", lstrip=True)]),
    ],
    ids=[
        "metaspace",
        "prefix",
        "uncut",
        "unknown",
        "replaced",
        "wordpiece",
        "normalised",
        "stripping",
    ],
)
def test_words_that_may_see_their_neighbours_are_not_remembered(
    change: Callable[[Tokenizer], None],
) -> None:
    tokenizer = trained(STAGES["gpt2"])

    change(tokenizer)

    assert word_cache(tokenizer) is None
