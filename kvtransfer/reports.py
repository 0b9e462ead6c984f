"""What control frames carry besides numbers: the attempt of a grant, and errors."""

from protocol.codec import Decoder, encode
from protocol.errors import TransferError
from protocol.ids import AttemptRef
from protocol.messages import ErrorReport
from protocol.reports import error_of, report_of

_attempt: Decoder[AttemptRef] = Decoder(AttemptRef)
_report: Decoder[ErrorReport] = Decoder(ErrorReport)


def encode_attempt(ref: AttemptRef) -> bytes:
    return encode(ref)


def decode_attempt(payload: bytes) -> AttemptRef:
    """
    Raises:
        ProtocolError: the payload is not an attempt.
    """
    return _attempt.decode(payload)


def encode_error(error: TransferError) -> bytes:
    return encode(report_of(error, stage="transfer"))


def decode_error(payload: bytes) -> TransferError:
    """The peer's error; whatever it calls it, to this side it is a failed transfer.

    Raises:
        ProtocolError: the payload is not an error report.
    """
    error = error_of(_report.decode(payload))
    if isinstance(error, TransferError):
        return error
    return TransferError(str(error), stage="transfer")
