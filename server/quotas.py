"""How much one caller may ask for: requests and tokens a minute, and requests at a time.

Buckets fill evenly: a limit of 60 a minute allows 60 at once, then one a second. Tokens are taken
when a request has been read, for its prompt and the longest answer it allows, and what it did not
use comes back when it ends. Pure: the time is the caller's.
"""

from dataclasses import dataclass

from protocol.errors import RateLimited

_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """None: no limit.

    Raises:
        ValueError: a limit is below 1.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        given = (self.requests_per_minute, self.tokens_per_minute, self.concurrency)
        if any(limit is not None and limit < 1 for limit in given):
            raise ValueError("a limit must be at least 1")


class Bucket:
    def __init__(self, per_minute: int) -> None:
        self.limit = per_minute
        self._level = float(per_minute)
        self._filled_at: float | None = None

    def level(self, now: float) -> float:
        if self._filled_at is not None:
            gained = (now - self._filled_at) * self.limit / _MINUTE_S
            self._level = min(float(self.limit), self._level + gained)
        self._filled_at = now
        return self._level

    def missing_s(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` is there; 0 when it is."""
        return max(0.0, amount - self.level(now)) * _MINUTE_S / self.limit

    def take(self, amount: float, now: float) -> None:
        """Possibly more than there is: what has been used cannot be left uncounted."""
        self._level = self.level(now) - amount

    def give_back(self, amount: float, now: float) -> None:
        self._level = min(float(self.limit), self.level(now) + amount)

    def full_in_s(self, now: float) -> float:
        return self.missing_s(float(self.limit), now)


class Quota:
    """Of one caller. ``begin`` and ``end`` bracket a request."""

    def __init__(self, limits: KeyLimits) -> None:
        self._limits = limits
        self._requests = _bucket(limits.requests_per_minute)
        self._tokens = _bucket(limits.tokens_per_minute)
        self.running = 0

    def begin(self, now: float) -> None:
        """
        Raises:
            RateLimited: too many requests a minute, or at a time; nothing was taken.
        """
        most = self._limits.concurrency
        if most is not None and self.running >= most:
            raise RateLimited(
                f"this API key may have {most} requests open at a time", retry_after_s=1.0
            )
        if self._requests is not None:
            wait_s = self._requests.missing_s(1.0, now)
            if wait_s > 0:
                raise RateLimited(
                    f"this API key may send {self._requests.limit} requests a minute",
                    retry_after_s=wait_s,
                )
            self._requests.take(1.0, now)
        self.running += 1

    def take_tokens(self, count: int, now: float) -> None:
        """
        Raises:
            RateLimited: too many tokens a minute; nothing was taken.
        """
        if self._tokens is None:
            return
        # A request that is larger than the whole bucket may go when the bucket is full.
        wait_s = self._tokens.missing_s(float(min(count, self._tokens.limit)), now)
        if wait_s > 0:
            raise RateLimited(
                f"this API key may use {self._tokens.limit} tokens a minute, and the request "
                f"may need {count}",
                retry_after_s=wait_s,
            )
        self._tokens.take(float(count), now)

    def give_back_tokens(self, count: int, now: float) -> None:
        if self._tokens is not None:
            self._tokens.give_back(float(count), now)

    def goes_on(self) -> None:
        """A request that has begun is answered and not over: it needs an ``end`` more."""
        self.running += 1

    def end(self) -> None:
        self.running -= 1

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """What OpenAI's servers say of their limits; nothing where there are none."""
        shown: list[tuple[bytes, bytes]] = []
        for name, bucket in ((b"requests", self._requests), (b"tokens", self._tokens)):
            if bucket is not None:
                shown += [
                    (b"x-ratelimit-limit-" + name, b"%d" % bucket.limit),
                    (b"x-ratelimit-remaining-" + name, b"%d" % max(0.0, bucket.level(now))),
                    (b"x-ratelimit-reset-" + name, b"%.3fs" % bucket.full_in_s(now)),
                ]
        return shown


UNLIMITED = KeyLimits()


def _bucket(per_minute: int | None) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute)
