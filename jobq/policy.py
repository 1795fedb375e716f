"""What becomes of a job that failed: pure decisions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jobq.stage import ConsumerOptions
    from jobq.wire import Failure


class Uniform(Protocol):
    """A source of chance, such as `random.Random`."""

    def uniform(self, a: float, b: float) -> float:
        """Return a number between *a* and *b*."""
        ...


def backoff_seconds(options: ConsumerOptions, attempt: int, chance: Uniform) -> float:
    """
    Return how long to wait after failed attempt number *attempt*: from ``min_backoff`` to ``max_backoff``.

    Exponential with "equal jitter" (half fixed, half by chance), so that jobs that failed together don't
    come back together: the scheme of the AWS architecture blog's "Exponential Backoff And Jitter" (2015).
    """
    exponent = min(attempt, 60)  # 2.0 ** 60 seconds is past any max_backoff; more would overflow
    high: float = min(options.max_backoff, options.min_backoff * 2.0**exponent)
    low = min(high, max(options.min_backoff, high / 2))
    return chance.uniform(low, high)


def retry_delay(failure: Failure, attempt: int, options: ConsumerOptions, chance: Uniform) -> float | None:
    """Return the seconds after which the failed job is tried again; None: it is a dead letter."""
    if attempt > options.max_retries:
        return None
    if failure.verdict == "retry":
        return backoff_seconds(options, attempt, chance) if failure.delay is None else failure.delay
    if failure.verdict == "error" and failure.retriable:
        return backoff_seconds(options, attempt, chance)
    return None
