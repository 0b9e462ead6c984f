"""Running one role in this process: settings in, exit code out.

A role's main is imported only here and only when it runs, so the command stays free of torch.
"""

import sys

from decode.settings import DecodeSettings
from deploy.config import Configuration, WrongSetting
from deploy.exits import FAILED, USAGE
from deploy.logs import configure_logging
from prefill.settings import PrefillSettings, rank_name
from protocol.errors import ConfigError, ServingError
from runtime.log import get_log
from runtime.reporting import report
from runtime.settings import REPORT_FD, ModelSettings, inherited_fd
from server.settings import GatewaySettings, SchedulerSettings

log = get_log(__name__)

ROLE_VERBS = ("gateway", "scheduler", "prefill", "decode")


def run_role(role: str, configuration: Configuration) -> int:
    """Serve until told to stop. A failure is said once: by the launcher, if there is one."""
    try:
        return _run(role, configuration)
    except Exception as raised:
        error = _first(raised)
        if not isinstance(error, ServingError):
            log.exception("process failed", role=role)
            report("failed", message=f"{type(error).__name__}: {error}")
            return FAILED
        report("failed", message=str(error))
        if inherited_fd(REPORT_FD) is None:
            print(f"headrace {role}: {error}", file=sys.stderr)
        return USAGE if isinstance(error, WrongSetting) else FAILED


def _first(error: BaseException) -> BaseException:
    """What was raised in the innermost of nested task groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _check_named(model: ModelSettings, role: str) -> None:
    if not model.path:
        raise ConfigError(
            f"no model is named: headrace {role} MODEL, which is a checkpoint directory, a .gguf "
            "file or smollm2; or model.path in the file"
        )


def _run(role: str, configuration: Configuration) -> int:
    if role == "gateway":
        gateway = configuration.settings("gateway", GatewaySettings)
        _check_named(gateway.model, role)
        scheduler = configuration.settings("scheduler", SchedulerSettings)
        configure_logging(gateway.process, role)
        from server.gateway import run as run_gateway

        return run_gateway(gateway, scheduler)
    if role == "scheduler":
        scheduler = configuration.settings("scheduler", SchedulerSettings)
        configure_logging(scheduler.process, role)
        from server.scheduler_process import run as run_scheduler

        return run_scheduler(scheduler)
    if role == "prefill":
        prefill = configuration.settings("prefill", PrefillSettings)
        _check_named(prefill.model, role)
        ranks, rank = prefill.group.ranks, prefill.group.rank
        if ranks > 1 and rank is None:
            from deploy.up import run_prefill_ranks

            return run_prefill_ranks(configuration)
        configure_logging(prefill.process, rank_name(prefill.worker_id, rank or 0))
        from prefill.worker import run as run_prefill

        return run_prefill(prefill)
    decode = configuration.settings("decode", DecodeSettings)
    _check_named(decode.model, role)
    if decode.group.rank is None:
        from deploy.up import run_all_ranks

        return run_all_ranks(configuration)
    configure_logging(decode.process, f"{decode.worker_id}/{decode.group.rank}")
    from decode.worker import run as run_decode

    return run_decode(decode)
