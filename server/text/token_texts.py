"""What each token adds to a text that no character is open in, ready to stand in JSON.

One block of bytes for the whole vocabulary, and where each token's part begins in it: compiled
code reads it by address (``server.step_writer``).
"""

from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import orjson

from server.text.tokenizer import TextTokenizer


class TokenTexts:
    """``starts[i]`` to ``starts[i + 1]`` are the quoted text of token ``i`` in ``block``; nothing
    where a token by itself is no text: a special one, part of a character, a hole.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        quoted = list(_quoted(tokenizer))
        self.block: npt.NDArray[np.uint8] = np.frombuffer(bytearray().join(quoted), np.uint8)
        self.starts: npt.NDArray[np.int64] = np.fromiter(
            accumulate(map(len, quoted), initial=0), np.int64, len(quoted) + 1
        )


def _quoted(tokenizer: TextTokenizer) -> Iterator[bytes]:
    for token_id in range(tokenizer.vocab_size):
        text = ""
        if token_id not in tokenizer.special_ids and not tokenizer.is_byte_piece(token_id):
            with suppress(UnicodeDecodeError):
                text = tokenizer.piece(token_id).decode()
        yield orjson.dumps(text) if text else b""
