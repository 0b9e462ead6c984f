"""What each token adds to a text that no character is open in, ready to stand in JSON.

One block of bytes for the whole vocabulary, and where each token's part begins in it: compiled
code reads it by address (``server.step_writer``).
"""

from array import array

import numpy as np
import numpy.typing as npt
import orjson

from server.text.tokenizer import TextTokenizer


class TokenTexts:
    """``starts[i]`` to ``starts[i + 1]`` are the quoted text of token ``i`` in ``block``; nothing
    where a token by itself is no text: a special one, part of a character, a hole.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        block, starts = bytearray(), array("q", [0])
        for token_id in range(tokenizer.vocab_size):
            if text := _own_text(tokenizer, token_id):
                block += orjson.dumps(text)
            starts.append(len(block))
        self.block: npt.NDArray[np.uint8] = np.frombuffer(block, np.uint8)
        self.starts: npt.NDArray[np.int64] = np.frombuffer(starts, np.int64)


def _own_text(tokenizer: TextTokenizer, token_id: int) -> str:
    if token_id in tokenizer.special_ids or tokenizer.is_byte_piece(token_id):
        return ""
    try:
        return tokenizer.piece(token_id).decode()
    except UnicodeDecodeError:
        return ""
