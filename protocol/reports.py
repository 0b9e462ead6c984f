"""Errors on their way between processes."""

from protocol.errors import BY_CODE, ServingError
from protocol.messages import ErrorReport


def report_of(error: ServingError, *, stage: str = "") -> ErrorReport:
    """``stage`` is used where the error does not know its own."""
    return ErrorReport(
        code=error.code,
        message=str(error),
        stage=error.stage or stage,
        retry_after_s=error.retry_after_s,
    )


def error_of(report: ErrorReport) -> ServingError:
    """The exception a report stands for; an unknown code becomes a plain ``ServingError``."""
    cls = BY_CODE.get(report.code, ServingError)
    error = cls(report.message)
    error.stage = report.stage
    error.retry_after_s = report.retry_after_s
    return error
