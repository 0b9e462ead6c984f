"""A tiny text side of a model: one token a byte, so that every character is cut somewhere."""

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from server.text.chat_template import ChatTemplate
from server.text.model_text import GenerationDefaults, ModelText
from server.text.tokenizer import TextTokenizer

TEMPLATE = (
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('secret') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking %}<think>{% endif %}"
)


def byte_tokenizer(*markers: str) -> Tokenizer:
    """``markers`` are tokens that text can spell too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for control in ("<|im_start|>", "<|im_end|>"):
        tokenizer.add_tokens([AddedToken(control, special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in markers])
    return tokenizer


def byte_model_text(*markers: str, **defaults: float) -> ModelText:
    """``<|im_end|>`` ends an answer; ``defaults`` override the neutral sampling values."""
    tokenizer = TextTokenizer(
        byte_tokenizer(*markers), control_tokens=["<|im_start|>", "<|im_end|>"]
    )
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    return ModelText(
        tokenizer=tokenizer,
        template=ChatTemplate(TEMPLATE, special_tokens={}),
        defaults=GenerationDefaults(end_token_ids=(end,), **defaults),  # type: ignore[arg-type]
    )
