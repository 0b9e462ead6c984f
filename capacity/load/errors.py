"""What a load test can refuse before or instead of measuring.

Every one of these is a sentence for the person who typed the command. Failures of single requests
are no exceptions here: they are ``Record.error``, because a failed request is a result.
"""

from protocol.errors import ServingError


class LoadError(ServingError):
    """The test cannot be run as asked; nothing was measured."""

    code = "load_test_refused"


class WrongOption(LoadError):
    """An option, an objective or a trace line says something that cannot be meant."""

    code = "wrong_option"


class ServerUnusable(LoadError):
    """Nobody answers at the URL, or whoever does is not an OpenAI-compatible server."""

    code = "server_unusable"
