"""The command's options: which flag sets which key, and for which verbs.

A flag's help and default are those of its key, so they are written once, in the settings modules.
Whatever has no flag of its own is set with ``--set KEY=VALUE``.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.config import (
    KEYS,
    Configuration,
    Table,
    WrongSetting,
    from_environment,
    from_flag,
    from_yaml,
)


@dataclass(frozen=True, slots=True)
class Option:
    flag: str
    keys: tuple[str, ...]  # all of them get the flag's value
    verbs: tuple[str, ...]
    metavar: str = "N"


WORKERS = ("up", "prefill", "decode")
ALL = ("up", "gateway", "scheduler", "prefill", "decode")

OPTIONS = (
    Option("--on", ("launcher.on",), ("up",), "WHERE"),
    Option("--gateways", ("gateway.processes",), ("up",)),
    Option("--prefill", ("prefill.workers",), ("up",)),
    Option("--prefill-ranks", ("prefill.group.ranks",), ("up",)),
    Option("--prefill-stages", ("prefill.group.stages",), ("up",)),
    Option("--decode-ranks", ("decode.group.ranks",), ("up",)),
    Option("--ranks", ("decode.group.ranks",), ("decode",)),
    Option("--rank", ("decode.group.rank",), ("decode",)),
    Option("--rendezvous", ("decode.group.rendezvous",), ("decode",), "ADDRESS"),
    Option("--ranks", ("prefill.group.ranks",), ("prefill",)),
    Option("--stages", ("prefill.group.stages",), ("prefill",)),
    Option("--rank", ("prefill.group.rank",), ("prefill",)),
    Option("--rendezvous", ("prefill.group.rendezvous",), ("prefill",), "ADDRESS"),
    Option("--host", ("gateway.host",), ("up", "gateway"), "HOST"),
    Option("--port", ("gateway.port",), ("up", "gateway")),
    Option("--api-keys-file", ("gateway.api_keys_file",), ("up", "gateway"), "FILE"),
    Option("--metrics-compat", ("gateway.metrics_compat",), ("up", "gateway"), "WHICH"),
    Option("--scheduler", ("bus.scheduler",), (*ALL[1:], "drain"), "ADDRESS"),
    Option("--cluster-key-file", ("bus.cluster_key_file",), (*ALL, "drain"), "FILE"),
    Option("--name", ("model.name",), ("up", "gateway", "prefill", "decode"), "NAME"),
    Option("--dtype", ("model.dtype",), WORKERS, "DTYPE"),
    Option("--numerics", ("model.numerics",), WORKERS, "WHICH"),
    Option("--max-model-len", ("model.max_model_len",), ("up", "gateway", "prefill", "decode")),
    Option("--split-dense-experts", ("decode.model.split_dense_experts",), ("up", "decode")),
    Option("--transport", ("kv.transport",), WORKERS, "WHICH"),
    Option("--block-tokens", ("kv.block_tokens",), WORKERS),
    Option("--device", ("prefill.device", "decode.device"), ("up",), "DEVICE"),
    Option("--device", ("prefill.device",), ("prefill",), "DEVICE"),
    Option("--device", ("decode.device",), ("decode",), "DEVICE"),
    Option("--kv-cache", ("prefill.kv_cache_bytes", "decode.kv_cache_bytes"), ("up",), "BYTES"),
    Option("--kv-cache", ("prefill.kv_cache_bytes",), ("prefill",), "BYTES"),
    Option("--kv-cache", ("decode.kv_cache_bytes",), ("decode",), "BYTES"),
    Option("--max-batch-tokens", ("prefill.max_batch_tokens",), ("up", "prefill")),
    Option("--max-batch", ("decode.max_batch",), ("up", "decode")),
    Option("--worker-id", ("prefill.worker_id",), ("prefill",), "ID"),
    Option("--worker-id", ("decode.worker_id",), ("decode",), "ID"),
    Option("--bind", ("prefill.bind",), ("prefill",), "ADDRESS"),
    Option("--bind", ("decode.bind",), ("decode",), "ADDRESS"),
    Option("--threads", ("process.threads",), ALL),
    Option("--drain", ("process.drain_s",), ALL, "SECONDS"),
    Option("--log-level", ("process.log_level",), ALL, "LEVEL"),
    Option("--log-format", ("process.log_format",), ALL, "FORMAT"),
)


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """All options of a verb that runs something; defaults are shown, never filled in."""
    if verb in ("up", "gateway", "prefill", "decode"):
        parser.add_argument(
            "model",
            nargs="?",
            metavar="MODEL",
            help="a checkpoint directory, a .gguf file or smollm2 (default of up: smollm2)",
        )
    for option in OPTIONS:
        if verb in option.verbs:
            parser.add_argument(option.flag, metavar=option.metavar, help=_help(option))
    add_sources(parser)


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Where settings without an option of their own are from."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="cluster file, YAML (default: the variable HEADRACE_CONFIG)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting of the cluster file; `headrace settings` lists them (may be repeated)",
    )


def configuration(
    arguments: argparse.Namespace, verb: str, environment: Mapping[str, str]
) -> Configuration:
    """What flags, environment and file say together.

    Raises:
        WrongSetting: an unknown key, variable or file.
    """
    variables = dict(environment)
    from_variable = variables.pop("HEADRACE_CONFIG", None)
    file = arguments.config or from_variable
    flags: dict[str, object] = vars(arguments)
    tables: list[Table] = [from_yaml(Path(file))] if file else []
    tables.append(from_environment(variables))
    if flags.get("model") is not None:
        tables.append(from_flag("model.path", str(flags["model"]), "MODEL"))
    for option in OPTIONS:
        value = flags.get(option.flag.removeprefix("--").replace("-", "_"))
        if verb in option.verbs and value is not None:
            tables += [from_flag(key, str(value), option.flag) for key in option.keys]
    for assignment in arguments.set:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise WrongSetting(f"--set {assignment}: write --set KEY=VALUE")
        tables.append(from_flag(key, value, "--set"))
    return Configuration(*tables)


def _help(option: Option) -> str:
    key = KEYS[option.keys[0]]
    text = " ".join(key.description.split()).replace("%", "%%")
    return text if key.default in (None, "") else f"{text} (default: {_shown(key.default)})"


def _shown(default: object) -> str:
    if isinstance(default, int) and default >= 1 << 20 and default % (1 << 20) == 0:
        return f"{default >> 20}MiB"
    return str(default)
