"""From a checkpoint on disk to a model that runs on one rank.

A checkpoint is a folder with ``config.json`` and safetensors, or a GGUF file. Everything is
checked before anything large is allocated; what is loaded is only what this rank needs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from msgspec import structs

from engine.collectives import ExpertGroup
from engine.config import ModelConfig, split_dense
from engine.config_files import config_from_folder, config_from_gguf
from engine.cpu.prepare import compile_kernels
from engine.experts.buffers import ExchangeShape
from engine.experts.counting import ExpertCounts
from engine.experts.cover import least_ranks
from engine.experts.exchange import ANY_EXCHANGE, ExchangeChoice
from engine.experts.meter import ExchangeMeter
from engine.experts.placement import ExpertPlacement
from engine.experts.spread import EVENLY, ExpertSpread
from engine.experts.transports import make_exchange, own_slots
from engine.layers.linear import Numerics
from engine.models.decoder import Decoder, describe_decoder
from engine.models.parts import Setting
from engine.models.registry import DESCRIBE_LAYER
from engine.pipeline import ALL_LAYERS, Stage
from engine.tensor_parallel import (
    TensorGroup,
    Undivided,
    check_width,
    config_of_rank,
    layout_of_rank,
)
from engine.weights.checkpoint import Checkpoint
from engine.weights.gguf import GgufFile
from engine.weights.reader import Progress, WeightReader
from engine.weights.source import TensorSource
from protocol.codec import WIRE_VERSION
from protocol.errors import ConfigError, LayoutMismatch
from protocol.kv import KVLayout

DtypeChoice = Literal["auto", "float32", "bfloat16"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    model: Decoder
    config: ModelConfig
    layout: KVLayout  # of a rank that has all heads of all layers
    held: KVLayout  # what this rank's cache holds of it
    layers: range  # those that this rank has
    dtype: torch.dtype
    fingerprint: Mapping[str, str]  # as ``protocol.workers.WorkerInfo`` describes it
    placements: tuple[ExpertPlacement, ...]  # by layer; empty without experts
    least_ranks: int  # fewer have not enough slots for every expert
    counts: ExpertCounts | None
    meter: ExchangeMeter
    allows_two_batches: bool  # in one step, among ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    config: ModelConfig
    source: TensorSource
    weights_digest: str
    tokenizer_digest: str


def load(
    path: Path,
    *,
    device: torch.device,
    dtype: DtypeChoice,
    numerics: Numerics,
    group: ExpertGroup,
    tensor_parallel: bool = False,
    stage: Stage = ALL_LAYERS,
    split_dense_experts: int = 0,
    spread: ExpertSpread = EVENLY,
    exchange: ExchangeChoice = ANY_EXCHANGE,
    block_tokens: int = 16,
    progress: Progress | None = None,
) -> LoadedModel:
    """The model at ``path`` with this rank's experts, as ``spread`` places them over ``group``.

    ``tensor_parallel``: all ranks of ``group`` have the same tokens, and each computes its heads,
    its hidden units and its experts of them. ``stage``: only these layers are loaded, and
    ``group`` are the ranks that have the same ones.

    Raises:
        ConfigError: a file is missing or corrupt, a tensor is missing or misshapen, the model is
            not supported, its heads or layers do not divide, or ``exchange`` cannot serve it; no
            weights were read.
    """
    opened = _open(path)
    movable = False
    try:
        config = opened.config
        if split_dense_experts:
            config = split_dense(config, split_dense_experts)
        experts = config.num_routed_experts
        sparse = [layer for layer, has_experts in enumerate(config.sparse_layers) if has_experts]
        placements = (
            spread.placements(experts, config.sparse_layers, group.num_seats) if experts else ()
        )
        least = max(map(least_ranks, placements), default=1)
        divided = tensor_parallel and group.num_seats > 1
        layers = _layers_of(stage, config)
        if divided:
            check_width(config, group.num_seats, num_stages=stage.count)
        movable = not divided and (spread.movable or least < group.num_seats)
        setting = Setting(
            config=config,
            numerics=numerics,
            group=group,
            placements=placements,
            movable=movable,
            counts=(
                ExpertCounts(sparse, experts, device=device)
                if config.experts and spread.counted
                else None
            ),
            exchange=None,
            tensor=TensorGroup(group, exact=numerics == "exact") if divided else Undivided(),
            stage=stage,
        )
        chosen = resolve_dtype(dtype, device)
        if experts and divided:
            slots = placements[0].slots_per_rank
            setting = replace(setting, exchange=own_slots(group, slots_per_rank=slots))
        elif experts:
            shape = _exchange_shape(setting, exchange, DTYPES[chosen])
            setting = replace(setting, exchange=make_exchange(exchange.transport, group, shape))
        if device.type == "cpu":
            compile_kernels(config_of_rank(config, setting.tensor), DTYPES[chosen], block_tokens)
        reader = WeightReader(opened.source, device=device, dtype=DTYPES[chosen], progress=progress)
        weights = describe_decoder(reader, setting, DESCRIBE_LAYER[config.architecture])
        model = Decoder(weights, reader, setting)
    finally:
        if not movable:
            opened.source.close()
    layout = config.layout(dtype=chosen, block_tokens=block_tokens)
    fingerprint = {
        "protocol": str(WIRE_VERSION),
        "config": opened.config.digest(),  # prefill runs dense what decode may split
        "weights": opened.weights_digest,
        "tokenizer": opened.tokenizer_digest,
        "layout": layout.digest(),
        "dtype": chosen,
    }
    return LoadedModel(
        model=model,
        config=config,
        layout=layout,
        held=layout_of_rank(structs.replace(layout, num_layers=len(layers)), setting.tensor),
        layers=layers,
        dtype=DTYPES[chosen],
        fingerprint=fingerprint,
        placements=placements,
        least_ranks=least,
        counts=setting.counts,
        meter=setting.exchange.meter if setting.exchange else ExchangeMeter(device),
        allows_two_batches=setting.exchange is not None and setting.exchange.allows_two_batches,
    )


def _exchange_shape(setting: Setting, choice: ExchangeChoice, dtype: torch.dtype) -> ExchangeShape:
    config, group = setting.config, setting.group
    return ExchangeShape(
        num_ranks=group.num_seats,
        slots_per_rank=setting.placements[0].slots_per_rank,
        experts_per_token=(
            config.experts.experts_per_token if config.experts else config.split_dense_experts
        ),
        hidden=config.hidden_width,
        element_bytes=dtype.itemsize,
        max_tokens_per_rank=choice.max_tokens_per_rank,
        numerics=setting.numerics,
        payload=choice.payload,
        on_gpu=group.device.type == "cuda",
        queue_pair_depth=choice.queue_pair_depth,
    )


def _layers_of(stage: Stage, config: ModelConfig) -> range:
    try:
        return stage.layers(config.num_layers)
    except LayoutMismatch:
        raise ConfigError(
            f"prefill.group.stages is {stage.count}: the model has {config.num_layers} layers, "
            "and each stage needs one; use fewer stages"
        ) from None


def read_config(path: Path) -> ModelConfig:
    """Only the sizes and switches of the model at ``path``; headers are read, weights are not.

    Raises:
        ConfigError: as ``load``.
    """
    opened = _open(path)
    opened.source.close()
    return opened.config


def resolve_dtype(choice: DtypeChoice, device: torch.device) -> Literal["float32", "bfloat16"]:
    """``auto`` is bfloat16 where matrix products in it are done by hardware, else float32."""
    if choice != "auto":
        return choice
    if device.type != "cpu":
        return "bfloat16"
    capabilities = torch.cpu.get_capabilities()
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bfloat16" if fast else "float32"


def resolve_numerics(choice: Literal["auto", "exact", "fast"], device: torch.device) -> Numerics:
    """``auto`` is exact on a CPU and fast on a GPU (design, decision 7)."""
    if choice == "auto":
        return "exact" if device.type == "cpu" else "fast"
    return choice


def _open(path: Path) -> _Opened:
    if path.is_dir():
        config = config_from_folder(path)
        checkpoint = Checkpoint(path)
        return _Opened(
            config=config,
            source=checkpoint,
            weights_digest=checkpoint.digest(),
            tokenizer_digest=_digest_tokenizer(path),
        )
    if not path.exists():
        raise ConfigError(f"{path}: there is no such model folder or GGUF file")
    if path.suffix != ".gguf":
        raise ConfigError(f"{path}: must be a folder with config.json, or a .gguf file")
    file = GgufFile(path)
    if file.shape("rope_freqs.weight") is not None:
        raise ConfigError(f"{path}: tensor rope_freqs.weight scales rope, which is not supported")
    config = config_from_gguf(path, file.metadata)
    return _Opened(
        config=replace(config, tied_embeddings=file.shape("lm_head.weight") is None),
        source=file,
        weights_digest=file.digest(),
        tokenizer_digest=file.tokenizer_digest,
    )


def _digest_tokenizer(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = folder / name
        digest.update(name.encode())
        if path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
