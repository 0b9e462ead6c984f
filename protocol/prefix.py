"""The names of prompt prefixes: a SHA-256 chain over full blocks of tokens.

Two prompts share a block's name exactly when they are in the same namespace, are for the same
model fingerprint and agree on every token up to the block's end (design, decision 11).
"""

import hashlib
from array import array
from collections.abc import Mapping, Sequence

HINT_BYTES = 8


def fingerprint_digest(parts: Mapping[str, str]) -> str:
    """The model fingerprint that ``block_hashes`` takes, from ``WorkerInfo.fingerprint``."""
    lines = "\n".join(f"{part}={parts[part]}" for part in sorted(parts))
    return hashlib.sha256(lines.encode()).hexdigest()


def block_hashes(
    token_ids: Sequence[int], *, block_tokens: int, namespace: str, fingerprint: str
) -> list[bytes]:
    """32-byte names of the full blocks of ``token_ids``, first to last; a partial tail has none."""
    parent = hashlib.sha256(f"{namespace}\0{fingerprint}".encode()).digest()
    tokens = array("I", token_ids)
    names: list[bytes] = []
    for end in range(block_tokens, len(tokens) + 1, block_tokens):
        parent = hashlib.sha256(parent + tokens[end - block_tokens : end].tobytes()).digest()
        names.append(parent)
    return names
