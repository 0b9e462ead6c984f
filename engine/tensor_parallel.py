"""Which part of a model's layers one of several ranks computes, and how the parts become one.

With tensor parallelism every rank has every token, and of each layer some attention heads, some
hidden units and some experts. Each rank's result is then a partial sum, and ``sum`` makes the whole
of all of them. Invariant: all ranks have the same bits after it, because every later choice, such
as a router's, must be the same on all. What the layers compute is unknown here.

Shape suffixes: N tokens   D hidden   P tokens of one rank's part
"""

from dataclasses import replace
from typing import Protocol

import torch
from msgspec import structs
from torch import Tensor

from engine.collectives import ExpertGroup
from engine.config import GqaConfig, MlaConfig, ModelConfig
from protocol.errors import ConfigError, LayoutMismatch
from protocol.kv import KVLayout, heads_of_rank


class TensorRanks(Protocol):
    """This rank's place among those that share each layer of the model."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, x_ND: Tensor) -> Tensor:
        """What all ranks gave, added up: (N, D) of the same bits on every rank. All ranks call it
        in the same order, with as many tokens each.

        Raises:
            WorkerLost: a rank failed or did not answer in time.
        """
        ...


class Undivided:
    """A rank that computes its layers whole, as all do but those of a prefill worker of several."""

    rank = 0
    size = 1

    def sum(self, x_ND: Tensor) -> Tensor:
        return x_ND


class TensorGroup:
    """The ranks of ``group``. ``exact``: the sum is in fp32 and in rank order, whatever carries it.

    Otherwise the backend adds, in any order; still each row's sum is made on one rank only.
    """

    def __init__(self, group: ExpertGroup, *, exact: bool) -> None:
        self._group = group
        self._exact = exact

    @property
    def rank(self) -> int:
        return self._group.seat

    @property
    def size(self) -> int:
        return self._group.num_seats

    def sum(self, x_ND: Tensor) -> Tensor:
        num_tokens, size = x_ND.shape[0], self.size
        if num_tokens == 0:
            return x_ND
        if self._exact and (size == 2 or num_tokens < size):  # noqa: PLR2004
            # As many bytes as by parts, or few, in one exchange instead of two.
            return _sum_in_order(self._gather(x_ND).view(size, num_tokens, -1))
        part = -(-num_tokens // size)
        if part * size != num_tokens:
            x_ND = torch.cat((x_ND, x_ND.new_zeros(part * size - num_tokens, x_ND.shape[1])))
        return self._gather(self._sum_of_part(x_ND, part))[:num_tokens]

    def _sum_of_part(self, x_ND: Tensor, part: int) -> Tensor:
        if not self._exact:
            return self._group.sum_rows(x_ND, x_ND.new_empty(part, x_ND.shape[1])).wait()
        parts = [part] * self.size
        received = self._group.exchange_rows(x_ND, parts, parts).wait()
        return _sum_in_order(received.view(self.size, part, -1))

    def _gather(self, x_PD: Tensor) -> Tensor:
        into = x_PD.new_empty(self.size * x_PD.shape[0], x_PD.shape[1])
        return self._group.gather_rows(x_PD, into).wait()


def _sum_in_order(x_by_rank: Tensor) -> Tensor:
    total_ND = x_by_rank[0].float()
    for x_ND in x_by_rank[1:]:
        total_ND = total_ND + x_ND
    return total_ND.to(x_by_rank.dtype)


def span_of_rank(count: int, ranks: TensorRanks) -> slice:
    """The rank's part of ``count`` units in a row; parts differ by one unit at most."""
    return slice(ranks.rank * count // ranks.size, (ranks.rank + 1) * count // ranks.size)


def heads_here(num_heads: int, ranks: TensorRanks) -> range:
    """The query heads that a rank computes, of a width that ``check_width`` has let pass."""
    count = num_heads // ranks.size
    return range(ranks.rank * count, (ranks.rank + 1) * count)


def check_width(config: ModelConfig, num_ranks: int, *, num_stages: int = 1) -> None:
    """
    Raises:
        ConfigError: the model's heads cannot be split over so many ranks of a stage.
    """
    attention, setting = config.attention, f"prefill.group.ranks is {num_ranks * num_stages}"
    if num_stages > 1:
        setting += f", {num_ranks} in each of {num_stages} stages"
    if attention.num_heads % num_ranks:
        raise ConfigError(
            f"{setting}: the model's {attention.num_heads} attention heads cannot be split over "
            "so many ranks; use a number of ranks that divides them"
        )
    if isinstance(attention, GqaConfig):
        try:
            heads_of_rank(0, num_ranks, attention.num_kv_heads)
        except LayoutMismatch as error:
            raise ConfigError(f"{setting}: {error}") from None


def config_of_rank(config: ModelConfig, ranks: TensorRanks) -> ModelConfig:
    """``config`` with the sizes of what the rank itself holds of attention and dense layers."""
    if ranks.size == 1:
        return config
    experts = config.experts
    if experts is not None:
        experts = replace(experts, shared_width=_length(experts.shared_width, ranks))
    return replace(
        config,
        attention=attention_of_rank(config.attention, ranks),
        intermediate_width=_length(config.intermediate_width, ranks),
        experts=experts,
    )


def attention_of_rank(
    attention: GqaConfig | MlaConfig, ranks: TensorRanks
) -> GqaConfig | MlaConfig:
    """The sizes of the rank's heads."""
    num_heads = len(heads_here(attention.num_heads, ranks))
    if isinstance(attention, MlaConfig):
        return replace(attention, num_heads=num_heads)
    held = heads_of_rank(ranks.rank, ranks.size, attention.num_kv_heads)
    return replace(attention, num_heads=num_heads, num_kv_heads=len(held))


def layout_of_rank(whole: KVLayout, ranks: TensorRanks) -> KVLayout:
    """What the rank's cache holds of the layers of ``whole``, which is of all heads."""
    if whole.kind == "mla" or ranks.size == 1:
        return whole
    held = heads_of_rank(ranks.rank, ranks.size, whole.kv_heads)
    return structs.replace(whole, kv_heads=len(held))


def _length(count: int, ranks: TensorRanks) -> int:
    span: slice = span_of_rank(count, ranks)
    return int(span.stop - span.start)
