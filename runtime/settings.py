"""Settings that several roles have in common, and what a process inherits from its launcher.

A role's own settings module composes these sections. Values are final when a role gets them: all
reading of flags, environment and files is done in ``deploy``. This module does not know roles.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
)

from protocol.errors import ConfigError

ENVIRONMENT_PREFIX = "HEADRACE_"
REPORT_FD = "HEADRACE_REPORT_FD"
PARENT_FD = "HEADRACE_PARENT_FD"
INHERITED = frozenset({REPORT_FD, PARENT_FD})

Dtype = Literal["auto", "float32", "bfloat16"]
Numerics = Literal["auto", "exact", "fast"]
Transport = Literal["auto", "shm", "tcp", "nixl", "cuda_ipc", "nccl"]
_HOST_PORT = r"([^:/\s\[\]]+|\[[0-9a-fA-F:]+\]):\d{1,5}$"
HostPort = Annotated[str, Field(pattern=rf"^{_HOST_PORT}")]
_PLACE = rf"\d+={_HOST_PORT.removesuffix('$')}"
Places = Annotated[str, Field(pattern=rf"^({_PLACE}(,{_PLACE})*)?$")]  # of ranks
Address = Annotated[str, Field(pattern=rf"^tcp://{_HOST_PORT}")]


def host_of(address: str) -> str:
    """The host of ``tcp://host:port``, without the brackets of an IPv6 address."""
    return address.removeprefix("tcp://").rpartition(":")[0].strip("[]")


def _one_interface(address: str) -> str:
    host = host_of(address)
    if host in ("0.0.0.0", "::", "*"):
        raise ValueError(
            f"{address} is every interface, and others are told this address: "
            "name the one at which they reach this worker"
        )
    return address


# Where a worker listens, which is also what it tells others.
WorkerAddress = Annotated[Address, AfterValidator(_one_interface)]
Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]


class Settings(BaseModel):
    """What every section is: read-only, and strict about its keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelSettings(Settings):
    path: str = ""
    """A checkpoint directory, a .gguf file, or the name of the demo: smollm2."""

    name: str = ""
    """What clients call the model. Empty: the last part of the path."""

    dtype: Dtype = "auto"
    """Of weights, activations and KV cache. auto: bfloat16 where the hardware multiplies it."""

    numerics: Numerics = "auto"
    """exact: bit-identical results whatever the number of ranks and whoever shares the batch.
    auto: exact on cpu, fast on cuda."""

    max_model_len: PositiveInt | None = None
    """Tokens, prompt and output together. Empty: as the model was trained."""

    split_dense_experts: NonNegativeInt = 0
    """Cut each dense FFN into this many always-chosen experts, an exact rewriting. 0: leave it."""


class KVSettings(Settings):
    block_tokens: PositiveInt = 16
    """Tokens in one block of the KV cache; equal on all workers."""

    transport: Transport = "auto"
    """How KV travels from prefill to decode. auto: cuda_ipc or nccl between GPUs, else shm on one
    host and tcp between hosts. nixl needs its extra, and a network without strangers."""

    payload: Literal["exact", "fp8"] = "exact"
    """What tcp carries. fp8: half of bfloat16's bytes, each element with an error of up to 1/16 of
    itself; the outputs then depend on it. The decode worker's setting counts."""


class BusSettings(Settings):
    scheduler: Address = "tcp://127.0.0.1:8100"
    """Where the scheduler listens."""

    cluster_key_file: Path | None = None
    """The cluster's key (`headrace key FILE` makes one). Needed by every address off loopback."""


class ProcessSettings(Settings):
    threads: PositiveInt | None = None
    """Compute threads of the process. Empty: a fair share of the cores."""

    drain_s: NonNegativeFloat = 30.0
    """Seconds that running requests get to finish after SIGTERM."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Log records below this level are dropped."""

    log_format: Literal["json", "text"] = "json"
    """One JSON object or one readable line per event, on stderr."""


def headrace_environment() -> dict[str, str]:
    """The HEADRACE_ variables that set something; those from a launcher are not among them."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name not in INHERITED
    }


def inherited_fd(name: str, environment: Mapping[str, str] | None = None) -> int | None:
    """The file descriptor that the launcher left in variable ``name``, or None.

    Raises:
        ConfigError: the variable is not a number.
    """
    value = (os.environ if environment is None else environment).get(name)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"{name} must be the number of an open file, not {value!r}") from None


def child_environment(*, report_fd: int, parent_fd: int) -> dict[str, str]:
    """This process's environment for a child that reports on ``report_fd`` and dies with us."""
    inherited = {REPORT_FD: str(report_fd), PARENT_FD: str(parent_fd)}
    # A lost rank is ours to report, in a line; torch's own account of it has pages.
    quiet = {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    # Weights are read once a step, from end to end: in 4 KB pages that waits for the TLB.
    large_pages = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}
    return {**os.environ, **quiet, **large_pages, **inherited}
