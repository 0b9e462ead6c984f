"""A decoder-only transformer: embedding, layers, final norm, logits.

What the layers' halves are is the architecture's business (``engine.models.registry``). A step of
no tokens still passes every layer, because experts on this rank may be wanted by others.

Shape suffixes: N tokens   D hidden   R rows whose logits are wanted   V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.batch import ForwardBatch
from engine.config import GqaConfig
from engine.kvcache.storage import KVStorage
from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.norm import add_rms_norm, rms_norm
from engine.layers.rope import Rope
from engine.models.parts import Attention, FeedForward, LayerWeights, ReadLayer, Setting
from engine.weights.reader import WeightReader

AfterLayer = Callable[[int], None]  # told the layer whose KV of this step is now in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    attention_norm_D: Tensor
    attention: Attention
    feed_forward_norm_D: Tensor
    feed_forward: FeedForward


class Decoder:
    """One rank's model. Read and built layer by layer, so weights are held once."""

    def __init__(self, weights: WeightReader, setting: Setting, read_layer: ReadLayer) -> None:
        config = setting.config
        embedding_VD, norm_D, head_VD = _read_ends(weights, setting)
        self._embedding = Embedding(embedding_VD)
        self._norm_D = norm_D
        self._head = Linear(head_VD, numerics=setting.numerics)
        self._epsilon = config.norm_epsilon
        kind = config.attention
        self._rope = Rope(
            config.rope,
            kind.head_width if isinstance(kind, GqaConfig) else kind.rope_width,
            device=weights.device,
            dtype=weights.dtype,
        )
        # Ranks agree on how many tokens pass a layer, so only a rank alone may let rows go early.
        self._may_drop_rows = setting.group.world_size == 1
        self._layers = tuple(
            _build(read_layer(weights, setting, index), setting)
            for index in range(config.num_layers)
        )

    def forward(
        self, batch: ForwardBatch, cache: KVStorage, after_layer: AfterLayer | None = None
    ) -> Tensor:
        """Logits (R, V) float32 of ``batch.logits_rows``; the cache then holds the batch's KV.

        ``after_layer`` is called in layer order, each time as soon as that layer's KV is written.
        """
        rotation = self._rope.at(batch.positions)
        rows_R = batch.logits_rows
        all_rows = rows_R.shape[0] == batch.num_tokens
        residual_ND = self._embedding(batch.token_ids)
        out_ND: Tensor | None = None
        for index, layer in enumerate(self._layers):
            if out_ND is None:
                x_ND = rms_norm(residual_ND, layer.attention_norm_D, self._epsilon)
            else:
                x_ND, residual_ND = add_rms_norm(
                    out_ND, residual_ND, layer.attention_norm_D, self._epsilon
                )
            out_ND = layer.attention(x_ND, rotation, cache.layer(index), batch)
            if after_layer is not None:
                after_layer(index)
            if self._may_drop_rows and not all_rows and layer is self._layers[-1]:
                out_ND, residual_ND, all_rows = out_ND[rows_R], residual_ND[rows_R], True
            x_ND, residual_ND = add_rms_norm(
                out_ND, residual_ND, layer.feed_forward_norm_D, self._epsilon
            )
            out_ND = layer.feed_forward(x_ND)
        assert out_ND is not None
        if not all_rows:
            out_ND, residual_ND = out_ND[rows_R], residual_ND[rows_R]
        x_RD, _ = add_rms_norm(out_ND, residual_ND, self._norm_D, self._epsilon)
        return self._head(x_RD).float()


def check_weights(weights: WeightReader, setting: Setting, read_layer: ReadLayer) -> None:
    """Ask for every tensor of the model, in the order of loading, and keep none.

    Raises:
        ConfigError: one is missing or has the wrong shape.
    """
    _read_ends(weights, setting)
    for index in range(setting.config.num_layers):
        read_layer(weights, setting, index)


def _read_ends(weights: WeightReader, setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    vocabulary, hidden = setting.config.vocab_size, setting.config.hidden_width
    embedding_VD = weights.take("model.embed_tokens.weight", vocabulary, hidden)
    norm_D = weights.take("model.norm.weight", hidden)
    if setting.config.tied_embeddings:
        return embedding_VD, norm_D, embedding_VD
    return embedding_VD, norm_D, weights.take("lm_head.weight", vocabulary, hidden)


def _build(layer: LayerWeights, setting: Setting) -> DecoderLayer:
    return DecoderLayer(
        attention_norm_D=layer.attention_norm_D,
        attention=layer.attention.build(setting),
        feed_forward_norm_D=layer.feed_forward_norm_D,
        feed_forward=layer.feed_forward.build(setting),
    )
