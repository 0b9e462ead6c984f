"""One mechanism for every setting: flag, else environment, else cluster file, else default.

Each source becomes a flat table from key to value and origin. A key is a dotted path: ``kv``,
``model`` and the other common sections apply to every role, and a role may override them below its
own name, as in ``decode.model.split_dense_experts``; of one source, the role's key wins. The
environment spells a key in capitals with underscores, ``HEADRACE_KV_TRANSPORT``. An error names
the origin, the key and the nearest known one.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from decode.settings import DecodeSettings
from deploy.demo import DEMO_MODEL, DEMO_SPLIT, demo_weights
from deploy.settings import LauncherSettings, RaySettings
from prefill.settings import PrefillSettings
from protocol.errors import ConfigError
from runtime.settings import (
    ENVIRONMENT_PREFIX,
    BusSettings,
    KVSettings,
    ModelSettings,
    ProcessSettings,
)
from server.settings import GatewaySettings, SchedulerSettings


class WrongSetting(ConfigError):
    """A flag, a variable or the cluster file is wrong: the command ends as wrongly used."""


S = TypeVar("S", bound=BaseModel)

COMMON: dict[str, type[BaseModel]] = {
    "model": ModelSettings,
    "kv": KVSettings,
    "bus": BusSettings,
    "process": ProcessSettings,
}
ROLES: dict[str, type[BaseModel]] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
}
SECTIONS: dict[str, type[BaseModel]] = {
    **COMMON,
    **ROLES,
    "launcher": LauncherSettings,
    "ray": RaySettings,
}


@dataclass(frozen=True, slots=True)
class Given:
    """A value, and where it is from: ``--port``, ``HEADRACE_GATEWAY_PORT`` or ``a.yaml:3``."""

    value: object
    origin: str


Table = Mapping[str, Given]


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, object]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _leaves(kind, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", field.description or "", field.default


@dataclass(frozen=True, slots=True)
class Key:
    description: str
    default: object


KEYS: Mapping[str, Key] = {
    path: Key(description, default)
    for section, model in SECTIONS.items()
    for path, description, default in _leaves(model, section)
}
_VARIABLES: Mapping[str, str] = {
    ENVIRONMENT_PREFIX + path.replace(".", "_").upper(): path for path in KEYS
}


def variable(path: str) -> str:
    """The environment variable of a key."""
    return ENVIRONMENT_PREFIX + path.replace(".", "_").upper()


def _unknown(origin: str, what: str, name: str, known: list[str]) -> WrongSetting:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "`headrace settings` lists all"
    return WrongSetting(f"{origin}: unknown {what} {name}: {hint}")


def from_flag(path: str, value: str, origin: str) -> Table:
    if path not in KEYS:
        raise _unknown(origin, "key", path, list(KEYS))
    return {path: Given(value, origin)}


def from_environment(environment: Mapping[str, str]) -> Table:
    """``environment`` holds HEADRACE_ variables only; an empty one counts as unset."""
    table: dict[str, Given] = {}
    for name, value in environment.items():
        if name not in _VARIABLES:
            raise _unknown("environment", "variable", name, list(_VARIABLES))
        if value:
            table[_VARIABLES[name]] = Given(value, name)
    return table


def from_yaml(file: Path) -> Table:
    """
    Raises:
        WrongSetting: the file is missing, is not YAML, or has an unknown key; says which line.
    """
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise WrongSetting(f"cannot read {file}: {error}") from None
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        return dict(_yaml_leaves(loader, root, "", file)) if root is not None else {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise WrongSetting(f"{file}:{line}: not YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise WrongSetting(f"{file}: not YAML: {error}") from None
    finally:
        loader.dispose()


def _yaml_leaves(
    loader: yaml.SafeLoader, node: yaml.Node, prefix: str, file: Path
) -> Iterator[tuple[str, Given]]:
    if not isinstance(node, yaml.MappingNode):
        raise WrongSetting(f"{file}:{node.start_mark.line + 1}: {prefix or 'it'} must hold keys")
    for key, value in node.value:
        path = f"{prefix}.{key.value}" if prefix else str(key.value)
        origin = f"{file}:{key.start_mark.line + 1}"
        if path in KEYS:
            leaf = loader.construct_object(value, deep=True)
            if leaf is not None:  # ``key:`` without a value leaves the default
                yield path, Given(leaf, origin)
        elif any(known.startswith(f"{path}.") for known in KEYS):
            if not (isinstance(value, yaml.ScalarNode) and value.value == ""):
                yield from _yaml_leaves(loader, value, path, file)
        else:
            depth = path.count(".") + 1
            known = sorted({".".join(name.split(".")[:depth]) for name in KEYS})
            raise _unknown(origin, "key", path, known)


class Configuration:
    """All that was given, from lowest to highest precedence; hands out each role's settings."""

    def __init__(self, *tables: Table) -> None:
        given: dict[str, Given] = {}
        for table in tables:
            for path in table:  # a flag for all roles beats what the file says of one role
                for role in ROLES:
                    given.pop(f"{role}.{path}", None)
            given |= table
        self._given: Mapping[str, Given] = _with_model(given)

    def given(self, path: str) -> bool:
        return path in self._given

    def replace(self, values: Mapping[str, object], origin: str) -> "Configuration":
        """A copy in which ``values`` win over everything."""
        return Configuration(self._given, {k: Given(v, origin) for k, v in values.items()})

    def default(self, values: Mapping[str, object], origin: str) -> "Configuration":
        """A copy in which ``values`` take the place of defaults only."""
        return Configuration({k: Given(v, origin) for k, v in values.items()}, self._given)

    def settings(self, section: str, kind: type[S]) -> S:
        """The settings of a role, or of another section.

        Raises:
            WrongSetting: a value is of the wrong type or out of range; names origin and key.
        """
        document: dict[str, object] = {}
        for path, given in self._paths_of(section):
            *parents, leaf = path.split(".")
            place = document
            for parent in parents:
                place = place.setdefault(parent, {})  # type: ignore[assignment]  # nested dicts
            place[leaf] = given.value
        try:
            return kind.model_validate(document)
        except ValidationError as error:
            raise self._explain(section, error) from None

    def flags(self, section: str) -> list[str]:
        """The same settings as command-line flags, for a child process."""
        by_path = dict(self._paths_of(section))
        return [
            part
            for path, given in by_path.items()
            for part in ("--set", f"{section}.{path}={given.value}")
        ]

    def _paths_of(self, section: str) -> Iterator[tuple[str, Given]]:
        """Common keys first, so that the role's own override them."""
        own = f"{section}."
        for path, given in self._given.items():
            if path.split(".")[0] in COMMON and own + path in KEYS:
                yield path, given
        for path, given in self._given.items():
            if path.startswith(own):
                yield path.removeprefix(own), given

    def _explain(self, section: str, error: ValidationError) -> WrongSetting:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        given = dict(self._paths_of(section)).get(path)
        if given is None:
            return WrongSetting(
                f"{section}: {message}" if not path else f"{section}.{path}: {message}"
            )
        return WrongSetting(f"{given.origin}: {section}.{path} is {given.value!r}: {message}")


def _with_model(given: dict[str, Given]) -> dict[str, Given]:
    """Turn the demo's name into its file and settings, and a path into the model's name."""
    model = given.get("model.path")
    if model is None:
        return given
    found: dict[str, Given] = {}
    path = str(model.value)
    if path == DEMO_MODEL and not os.path.exists(path):
        given["model.path"] = Given(str(demo_weights()), model.origin)
        found["model.name"] = Given(DEMO_MODEL, model.origin)
        found["decode.model.split_dense_experts"] = Given(DEMO_SPLIT, model.origin)
    else:
        found["model.name"] = Given(Path(path).name.removesuffix(".gguf"), model.origin)
    return found | given
