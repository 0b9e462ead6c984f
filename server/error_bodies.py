"""An error's body in the shape of the API that was called."""

from server.messages.errors import is_message_path, message_error
from server.openai.errors import ErrorAnswer


def error_body(answer: ErrorAnswer, path: str) -> bytes:
    return message_error(answer) if is_message_path(path) else answer.body()
