"""A model's text side from its files: a Hugging Face folder, or one GGUF file.

No model code is run and nothing is fetched. A missing or malformed file is a ``ConfigError`` that
names the file and what would help.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from protocol.errors import ConfigError
from server.text.chat_template import ChatTemplate
from server.text.families.choose import family_of
from server.text.families.reasoning import reasoning_marks
from server.text.model_text import GenerationDefaults, ModelText
from server.text.tokenizer import TextTokenizer

_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_GGUF_CONTROL, _GGUF_USER_DEFINED = 3, 4


def load_model_text(path: Path) -> ModelText:
    """
    Raises:
        ConfigError: something the gateway needs is missing, malformed or of an unknown kind.
    """
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path)
    raise ConfigError(f"{path}: neither a model folder nor a .gguf file")


def _from_folder(folder: Path) -> ModelText:
    source = folder / "tokenizer.json"
    if not source.is_file():
        raise ConfigError(f"{source} is missing: save the model with a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(source))
    except Exception as error:
        raise ConfigError(f"{source} is not a tokenizer: {error}") from error
    config = _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    special_tokens = {
        name: text for name in _TOKEN_NAMES if (text := _token_text(config.get(name))) is not None
    }
    end_ids = generation.get("eos_token_id")
    if end_ids is None and "eos_token" in special_tokens:
        end_ids = tokenizer.token_to_id(special_tokens["eos_token"])
    return _model_text(
        tokenizer,
        template=_folder_template(folder, config),
        special_tokens=special_tokens,
        defaults=_defaults(generation, end_ids, where=folder / "generation_config.json"),
    )


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template


def gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer inside a GGUF file, as the library has it.

    Raises:
        ConfigError: the file is not readable, or its tokenizer is of another kind.
    """
    return _tokenizer_of(_gguf_fields(path), where=path)


def _from_gguf(path: Path) -> ModelText:
    field = _gguf_fields(path)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token"}
    ids = {name: field(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    tokens: list[str] = field("tokenizer.ggml.tokens")
    return _model_text(
        _tokenizer_of(field, where=path),
        template=field("tokenizer.chat_template"),
        special_tokens={name: tokens[i] for name, i in ids.items() if i is not None},
        defaults=_defaults({}, ids["eos_token"], where=path),
    )


def _gguf_fields(path: Path) -> Callable[[str], Any]:
    from gguf import GGUFReader  # half a second of import that folders need not pay

    try:
        fields = GGUFReader(path).fields
    except (ValueError, OSError, IndexError) as error:
        raise ConfigError(f"{path} is not a readable GGUF file: {error}") from error
    return cache(lambda name: fields[name].contents() if name in fields else None)


def _tokenizer_of(field: Callable[[str], Any], *, where: Path) -> Tokenizer:
    kind = (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre"))
    if kind[0] != "gpt2" or kind[1] not in _PRE_TOKENIZERS:
        raise ConfigError(
            f"{where}: tokenizer {kind[0]}/{kind[1]} is not supported; supported are gpt2 with "
            f"{', '.join(sorted(_PRE_TOKENIZERS))}: serve the model's Hugging Face folder instead"
        )
    tokens: list[str] = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*_PRE_TOKENIZERS[kind[1]], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, field("tokenizer.ggml.token_type"), strict=True):
        if token_type in (_GGUF_CONTROL, _GGUF_USER_DEFINED):
            special = token_type == _GGUF_CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    return tokenizer


_PRE_TOKENIZERS = {
    "gpt-2": [],
    "default": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
}


def _model_text(
    tokenizer: Tokenizer,
    *,
    template: str | None,
    special_tokens: Mapping[str, str],
    defaults: GenerationDefaults,
) -> ModelText:
    added = tokenizer.get_added_tokens_decoder().values()
    control = [t.content for t in added if t.special or (template and t.content in template)]
    return ModelText(
        tokenizer=TextTokenizer(tokenizer, control_tokens=control),
        template=ChatTemplate(template, special_tokens=special_tokens) if template else None,
        defaults=defaults,
        family=family_of(template),
        reasoning=reasoning_marks(template),
    )


def _defaults(
    generation: Mapping[str, Any], end_ids: int | Iterable[int] | None, *, where: Path
) -> GenerationDefaults:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    if isinstance(end_ids, int):
        end_ids = (end_ids,)
    try:
        return msgspec.convert({**given, "end_token_ids": tuple(end_ids or ())}, GenerationDefaults)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not a JSON object: {error}") from error
