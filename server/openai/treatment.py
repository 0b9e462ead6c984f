"""What becomes of the fields that the schema does not list: refused, or ignored and said so.

A field that would constrain the output, or steer the inside of the cluster, is never ignored:
output that silently lacks its constraint is the worst answer. ``null`` counts as absent.
"""

import re
from collections.abc import Mapping

from protocol.errors import InvalidRequest

_CONSTRAINS = (
    "it would constrain the output, for which this server takes response_format and "
    "structured_outputs"
)
_INTERNAL = "it is internal to the server"
_UNSAFE = "the server's operator chooses it"
_UNSUPPORTED = "this server does not support it"

_REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("response_schema", "json_schema", "json_object", "grammar"),
            *("regex", "ebnf", "structural_tag", "choice"),
            *("logits_processors", "tool_parser", "guidance"),
        ),
        _CONSTRAINS,
    ),
    **dict.fromkeys(
        (
            *("kv_transfer_params", "ec_transfer_params", "disaggregated_params"),
            *("bootstrap_host", "bootstrap_port", "bootstrap_room"),
            *("routed_dp_rank", "disagg_prefill_dp_rank", "data_parallel_rank"),
            *("rid", "extra_key", "vllm_xargs", "nvext"),
        ),
        _INTERNAL,
    ),
    "functions": "it is deprecated: use tools",
    **dict.fromkeys(
        (
            *("chat_template", "mm_processor_kwargs", "media_io_kwargs", "prompt_embeds"),
            *("custom_logit_processor", "custom_params", "lora_path", "input_ids"),
        ),
        _UNSAFE,
    ),
    **dict.fromkeys(
        (
            *("audio", "web_search_options", "suffix", "use_beam_search"),
            "input_embeds",
        ),
        _UNSUPPORTED,
    ),
}
# Fields that are harmless with some values. The value is data of the caller: compare it only.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "function_call": ("none",),
    "modalities": (["text"],),
    "store": (False,),
    "best_of": (1,),
    "mcp_servers": ([],),
}
_WHEN_HARMFUL: dict[str, str] = {
    "function_call": "it is deprecated: use tool_choice",
    "modalities": "this server answers with text only",
    "store": "this server stores nothing",
    "best_of": "this server returns every choice that it makes: use n",
    "mcp_servers": "this server calls no other servers: give their tools as tools",
}
_REFUSED_PREFIX = "guided_"
PRINTABLE = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_MAX_NAMES = 20


def ignored_params(body: Mapping[str, object], known: frozenset[str]) -> tuple[str, ...]:
    """The fields of ``body`` that will have no effect, as many as fit into a header.

    Raises:
        InvalidRequest: a field must not be ignored and cannot be honoured.
    """
    ignored: list[str] = []
    for name, value in body.items():
        if name in known or value is None:
            continue
        if name in _HARMLESS:
            if not any(type(value) is type(it) and value == it for it in _HARMLESS[name]):
                raise InvalidRequest(f"{name}: {_WHEN_HARMFUL[name]}", param=name)
        elif reason := _CONSTRAINS if name.startswith(_REFUSED_PREFIX) else _REFUSED.get(name):
            param = name if PRINTABLE.match(name) else _REFUSED_PREFIX + "*"
            raise InvalidRequest(f"{param}: {reason}; leave it out", param=param)
        if PRINTABLE.match(name):
            ignored.append(name)
    return tuple(ignored[:_MAX_NAMES])
