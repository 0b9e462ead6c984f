"""Token ids to vectors."""

# Shape suffixes: N tokens   V vocabulary   D hidden

from torch import Tensor
from torch.nn import functional


class Embedding:
    """Rows of ``weight``; the tensor is kept as it came, so it may be a mapped file."""

    def __init__(self, weight_VD: Tensor) -> None:
        self._weight_VD = weight_VD

    def __call__(self, token_ids_N: Tensor) -> Tensor:
        """(N, D) in the weight's dtype."""
        return functional.embedding(token_ids_N, self._weight_VD)
