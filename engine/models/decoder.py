"""A decoder-only transformer: embedding, layers, final norm, logits.

What the layers' halves are is the architecture's business (``engine.models.registry``). A step of
no tokens still passes every layer, because experts on this rank may be wanted by others.

Shape suffixes: N tokens   D hidden   R rows whose logits are wanted   V vocabulary
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.batch import ForwardBatch, tokens_of_halves
from engine.config import GqaConfig, ModelConfig
from engine.experts.replicas import token_keys
from engine.experts.slot_exchange import SlotExchange
from engine.kvcache.storage import KVStorage
from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.norm import add_rms_norm, rms_norm
from engine.layers.rope import Rope
from engine.models.parts import (
    Attention,
    DescribeLayer,
    FeedForward,
    LayerWeights,
    PendingFeedForward,
    Setting,
)
from engine.weights.reader import Wanted, WeightReader

AfterLayer = Callable[[int], None]  # told the layer whose KV of this step is now in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    attention_norm_D: Tensor
    attention: Attention
    feed_forward_norm_D: Tensor
    feed_forward: FeedForward


class Decoder:
    """One rank's model. Read and built layer by layer, so weights are held once."""

    def __init__(self, weights: "DecoderWeights", reader: WeightReader, setting: Setting) -> None:
        config = setting.config
        self._ends = None if weights.ends is None else Ends(weights.ends, setting)
        self._norm_D = None if weights.norm_D is None else weights.norm_D.read()
        self.epsilon = config.norm_epsilon
        kind = config.attention
        self.rope = Rope(
            config.rope,
            kind.head_width if isinstance(kind, GqaConfig) else kind.rope_width,
            device=reader.device,
            dtype=reader.dtype,
        )
        # Ranks agree on how many tokens pass a layer, so rows may go early only where a rank is
        # alone, or all ranks have the same ones.
        self._may_drop_rows = setting.group.num_seats == 1 or setting.tensor.size > 1
        self._group = setting.group
        self._exchange = setting.exchange
        self._chooses_replicas = setting.chooses_replicas
        self._layers = {
            index: _build(layer, setting.of_layer(index)) for index, layer in weights.layers.items()
        }
        self._last_layer = config.num_layers - 1

    @property
    def slot_exchanges(self) -> Mapping[int, SlotExchange]:
        """By layer, where experts may move."""
        slots = {index: layer.feed_forward.slots for index, layer in self._layers.items()}
        return {index: exchange for index, exchange in slots.items() if exchange is not None}

    def connect(self) -> None:
        """The ranks have met; all call it before they compute together.

        Raises:
            WorkerLost: a rank is gone again.
        """
        if self._exchange is not None:
            self._exchange.transport.connect()

    def forward(
        self, batch: ForwardBatch, cache: KVStorage, after_layer: AfterLayer | None = None
    ) -> Tensor:
        """Logits (R, V) float32 of ``batch.logits_rows``; the cache then holds the batch's KV.

        ``after_layer`` is called in layer order, each time as soon as that layer's KV is written.
        """
        return self.logits(self.hidden(batch, cache, after_layer))

    def logits(self, x_RD: Tensor) -> Tensor:
        """(R, V) float32 of what ``hidden`` gave, or of some of its rows; of the first stage only,
        wherever these rows come from.
        """
        assert self._ends is not None, "later stages have no output head"
        return self._ends.head(x_RD).float()

    def embed(self, batch: ForwardBatch) -> Tensor:
        assert self._ends is not None, "later stages have no embedding"
        return self._ends.embedding(batch.token_ids)

    def hidden(
        self,
        batch: ForwardBatch,
        cache: KVStorage,
        after_layer: AfterLayer | None = None,
        x_ND: Tensor | None = None,
    ) -> Tensor:
        """As ``forward``, up to the last norm: (R, D), a small part of what the logits need.

        A stage that is not the last one gives (N, D), with which the next one goes on, as its
        ``x_ND``.
        """
        rotation = self.rope.at(batch.positions)
        rows_R = batch.logits_rows
        all_rows = rows_R.shape[0] == batch.num_tokens
        residual_ND = self.embed(batch) if x_ND is None else x_ND
        keys_N = self.keys_of(batch)
        out_ND: Tensor | None = None
        for index, layer in self._layers.items():
            if out_ND is None:
                x_ND = rms_norm(residual_ND, layer.attention_norm_D, self.epsilon)
            else:
                x_ND, residual_ND = add_rms_norm(
                    out_ND, residual_ND, layer.attention_norm_D, self.epsilon
                )
            out_ND = layer.attention(x_ND, rotation, cache.layer(index), batch)
            if after_layer is not None:
                after_layer(index)
            if self._may_drop_rows and not all_rows and index == self._last_layer:
                out_ND, residual_ND, all_rows = out_ND[rows_R], residual_ND[rows_R], True
            x_ND, residual_ND = add_rms_norm(
                out_ND, residual_ND, layer.feed_forward_norm_D, self.epsilon
            )
            out_ND = layer.feed_forward(x_ND, keys_N)
        assert out_ND is not None
        if self._norm_D is None:
            return out_ND + residual_ND
        if not all_rows:
            out_ND, residual_ND = out_ND[rows_R], residual_ND[rows_R]
        x_RD, _ = add_rms_norm(out_ND, residual_ND, self._norm_D, self.epsilon)
        return x_RD

    def hidden_in_two(self, batch: ForwardBatch, cache: KVStorage) -> Tensor:
        """As ``hidden``, for a decode step that all ranks pass as two batches: while rows of one
        travel the other computes. With exact numerics the bits are the same.
        """
        group, whole = self._group, self._group.tokens_of_rank
        halves = [_HalfStep(self, half, cache) for half in batch.halves()]
        shares = tokens_of_halves(whole)
        for index, layer in self._layers.items():
            for half, tokens_of_rank in zip(halves, shares, strict=True):
                group.begin_step(tokens_of_rank)
                half.begin(index, layer)
            for half in halves:
                half.compute()
        group.begin_step(whole)
        assert self._norm_D is not None, "what passes in two batches passes all layers"
        return torch.cat([half.end(self._norm_D) for half in halves])

    def keys_of(self, batch: ForwardBatch) -> Tensor | None:
        """What chooses among replicas; None where there are none."""
        return token_keys(batch.request_keys, batch.positions) if self._chooses_replicas else None


class _HalfStep:
    """One of the two batches of a step on its way through the layers."""

    def __init__(self, decoder: Decoder, batch: ForwardBatch, cache: KVStorage) -> None:
        self._batch = batch
        self._cache = cache
        self._epsilon = decoder.epsilon
        self._rotation = decoder.rope.at(batch.positions)
        self._residual_ND = decoder.embed(batch)
        self._keys_N = decoder.keys_of(batch)
        self._pending: PendingFeedForward | None = None

    def begin(self, index: int, layer: DecoderLayer) -> None:
        """End the layer before; attend in this one, and send its rows to their experts."""
        x_ND = self._normed(layer.attention_norm_D)
        cache = self._cache.layer(index)
        out_ND = layer.attention(x_ND, self._rotation, cache, self._batch)
        x_ND, self._residual_ND = add_rms_norm(
            out_ND, self._residual_ND, layer.feed_forward_norm_D, self._epsilon
        )
        self._pending = layer.feed_forward.begin(x_ND, self._keys_N)

    def compute(self) -> None:
        assert self._pending is not None
        self._pending.compute()

    def end(self, norm_D: Tensor) -> Tensor:
        """(R, D) of the rows whose logits are wanted, after the last norm."""
        return self._normed(norm_D)[self._batch.logits_rows]

    def _normed(self, norm_D: Tensor) -> Tensor:
        if self._pending is None:
            return rms_norm(self._residual_ND, norm_D, self._epsilon)
        x_ND, self._residual_ND = add_rms_norm(
            self._pending.finish(), self._residual_ND, norm_D, self._epsilon
        )
        return x_ND


class Ends:
    """Where token ids come in and logits go out."""

    def __init__(self, weights: "EndWeights", setting: Setting) -> None:
        embedding_VD = weights.embedding_VD.read()
        head_VD = weights.head_VD.read() if weights.head_VD else embedding_VD
        self.embedding = Embedding(embedding_VD)
        self.head = Linear(head_VD, numerics=setting.numerics)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndWeights:
    embedding_VD: Wanted
    head_VD: Wanted | None  # None: the embedding serves


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """``ends`` are the first stage's, ``norm_D`` is the last one's, which may be the same."""

    ends: EndWeights | None
    norm_D: Wanted | None
    layers: Mapping[int, LayerWeights]


def describe_decoder(
    reader: WeightReader, setting: Setting, describe_layer: DescribeLayer
) -> DecoderWeights:
    """All tensors of the rank's stage, known to be in the checkpoint; none is read.

    Raises:
        ConfigError: one is missing or has the wrong shape.
    """
    config, stage = setting.config, setting.stage
    hidden = config.hidden_width
    return DecoderWeights(
        ends=_describe_ends(reader, config) if stage.is_first else None,
        norm_D=reader.want("model.norm.weight", hidden) if stage.is_last else None,
        layers={
            layer: describe_layer(reader, setting.of_layer(layer), layer)
            for layer in stage.layers(config.num_layers)
        },
    )


def _describe_ends(reader: WeightReader, config: ModelConfig) -> EndWeights:
    shape = config.vocab_size, config.hidden_width
    return EndWeights(
        embedding_VD=reader.want("model.embed_tokens.weight", *shape),
        head_VD=None if config.tied_embeddings else reader.want("lm_head.weight", *shape),
    )


def _build(layer: LayerWeights, setting: Setting) -> DecoderLayer:
    return DecoderLayer(
        attention_norm_D=layer.attention_norm_D.read(),
        attention=layer.attention.build(setting),
        feed_forward_norm_D=layer.feed_forward_norm_D.read(),
        feed_forward=layer.feed_forward.build(setting),
    )
