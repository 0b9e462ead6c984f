"""The vocabulary of a model's files, for grammars: bytes of every token, nothing else of the text.

The gateway reads the same files with the tokenizer library; here no text is ever cut.
"""

from pathlib import Path
from typing import Any

import msgspec

from engine.weights.gguf_header import GgufHeader, map_gguf
from protocol.errors import ConfigError
from runtime.grammars import Grammars
from runtime.log import get_log
from runtime.vocabulary import Vocabulary, piece_style, token_bytes

log = get_log(__name__)

GGUF_SPECIAL = 3  # token type: control
GGUF_BYTE_LEVEL = "gpt2"


def read_grammars(path: Path) -> Grammars | None:
    """Grammars over the vocabulary of the model at ``path``; None where it cannot be read, which
    costs requests with a grammar and no others.
    """
    try:
        return Grammars(read_vocabulary(path))
    except ConfigError as error:
        log.warning("grammars are off", reason=str(error))
        return None


def read_vocabulary(path: Path) -> Vocabulary:
    """That of the model folder or GGUF file at ``path``.

    Raises:
        ConfigError: there is none, or its kind is not supported.
    """
    return _from_folder(path) if path.is_dir() else _from_gguf(path)


def _from_folder(folder: Path) -> Vocabulary:
    file = folder / "tokenizer.json"
    try:
        whole = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        style = piece_style(whole["decoder"])
        entries = whole["model"]["vocab"]
        added = whole.get("added_tokens", [])
        by_id = (
            {i: token for token, i in entries.items()}
            if isinstance(entries, dict)
            else {i: token for i, (token, _) in enumerate(entries)}
        )
        tokens = {i: token_bytes(token, style) for i, token in by_id.items()}
        tokens |= {entry["id"]: entry["content"].encode() for entry in added}
        special = sorted(entry["id"] for entry in added if entry["special"])
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: no vocabulary can be read from it: {error}") from error
    size = 1 + max(tokens, default=-1)
    return Vocabulary(
        tokens=tuple(tokens.get(i, b"") for i in range(size)), special_ids=tuple(special)
    )


def _from_gguf(path: Path) -> Vocabulary:
    data = map_gguf(path)
    try:
        header = GgufHeader(path, data)
        kind = header.metadata.get("tokenizer.ggml.model")
        if kind != GGUF_BYTE_LEVEL:
            raise ConfigError(f"{path}: tokenizer {kind!r} is not supported, only gpt2")
        spelt = header.strings("tokenizer.ggml.tokens")
        types = header.integers("tokenizer.ggml.token_type")
    finally:
        data.close()
    return Vocabulary(
        tokens=tuple(token_bytes(token, "byte_level") for token in spelt),
        special_ids=tuple(i for i, kind in enumerate(types) if kind == GGUF_SPECIAL),
    )
