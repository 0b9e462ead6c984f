"""Settings of the gateway and the scheduler. Values are final; ``deploy`` reads flags and files."""

import ipaddress
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import (
    ByteSize,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from runtime.settings import (
    BusSettings,
    ModelSettings,
    ProcessSettings,
    Settings,
)


class LimitSettings(Settings):
    """What one HTTP request may ask for."""

    max_body_bytes: ByteSize = ByteSize(8 << 20)
    """Size of a request body."""

    max_json_depth: PositiveInt = 64
    """Nesting of a request body."""

    max_messages: PositiveInt = 4096
    """Messages of one chat request."""

    max_prompts: PositiveInt = 128
    """Prompts of one completion request."""

    max_choices: PositiveInt = 8
    """n: choices per prompt."""

    max_top_logprobs: PositiveInt = 20
    """Alternatives reported per token."""

    max_prompt_logprobs: PositiveInt = 5
    """prompt_logprobs: alternatives reported per prompt token."""

    max_stop_strings: PositiveInt = 4
    """Stop strings of one request."""

    max_stop_chars: PositiveInt = 256
    """Characters of one stop string."""

    max_logit_bias: PositiveInt = 1024
    """Entries of logit_bias."""

    strict_params: bool = False
    """Refuse fields that would have no effect, instead of naming them in x-ignored-params."""

    body_timeout_s: PositiveFloat = 30.0
    """Seconds that a client may take to send its request."""

    write_stall_s: PositiveFloat = 30.0
    """Seconds after which a client that does not read its stream is dropped."""


class GatewaySettings(Settings):
    model: ModelSettings = ModelSettings()
    bus: BusSettings = BusSettings()
    process: ProcessSettings = ProcessSettings()
    limits: LimitSettings = LimitSettings()

    host: str = "127.0.0.1"
    """Address of the HTTP API. Off loopback it needs api_keys_file."""

    port: int = Field(default=8000, ge=0, le=65535)
    """Port of the HTTP API. 0 takes a free one."""

    processes: PositiveInt = 1
    """Gateway processes that share the port, with the scheduler in a process of its own. Above 1
    each counts limits by itself and none stores responses; see docs/api.md, Several gateways."""

    process_port: int = Field(default=0, ge=0, le=65535)
    """A second port, of this process alone, such as for its own metrics. 0: none."""

    api_keys_file: Path | None = None
    """One API key a line, or its sha256: digest, and options; see docs/api.md, Access."""

    metrics_compat: Literal["none", "vllm"] = "none"
    """vllm: /metrics also has the gauges that autoscalers read, under vLLM's names."""

    otlp_endpoint: str | None = None
    """Base URL of an OpenTelemetry collector (OTLP over HTTP) that gets a span a request."""

    embed_scheduler: bool = True
    """Run the scheduler inside the gateway's process, listening at bus.scheduler."""

    request_timeout_s: PositiveFloat = 600.0
    """Seconds that one request may take, all stages together."""

    max_waiting_requests: PositiveInt = 512
    """Beyond this many requests without a decode reservation, answer 503."""

    migration_patience_s: NonNegativeFloat = 30.0
    """Seconds that a stream whose workers were lost waits for others; 0 ends it at once. A new
    request waits too, until this long after there was one to serve it.
    """

    max_open_requests: PositiveInt = 4096
    """Beyond this many open HTTP requests, answer 503."""

    @model_validator(mode="after")
    def _collector_has_an_address(self) -> "GatewaySettings":
        if self.otlp_endpoint is not None and not _is_web_address(self.otlp_endpoint):
            raise ValueError(
                f"otlp_endpoint {self.otlp_endpoint!r} is no base URL: "
                "write one such as http://collector:4318"
            )
        return self

    @model_validator(mode="after")
    def _off_loopback_only_with_keys(self) -> "GatewaySettings":
        if self.api_keys_file is None and not _loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines: "
                "set gateway.api_keys_file, or bind to 127.0.0.1"
            )
        return self


class SchedulerSettings(Settings):
    bus: BusSettings = BusSettings()
    process: ProcessSettings = ProcessSettings()

    lease_s: PositiveFloat = 10.0
    """Seconds after its last heartbeat until a worker is gone."""

    heartbeat_s: PositiveFloat = 1.0
    """Seconds between a worker's heartbeats."""

    @model_validator(mode="after")
    def _a_lease_outlives_lost_heartbeats(self) -> "SchedulerSettings":
        if self.lease_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"lease_s {self.lease_s} is shorter than two heartbeats of {self.heartbeat_s} s"
            )
        return self


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
