"""The events of a run as sentences in jobq's log."""

from __future__ import annotations

from typing import Any

from jobq.events import (
    Event,
    JobDead,
    JobRetried,
    ProducerEnded,
    RunEnded,
    RunStarted,
    Stopping,
    WorkerEnded,
    WorkerLostEvent,
    WorkerStarted,
)
from jobq.observe.log import tell
from jobq.report import DeadLetter

#: So many failed jobs, and so many retries, are told one by one; the others are counted.
TOLD_IN_FULL = 10

_NEXT_STEP = {
    1: "finishing {items}, press Ctrl-C again to stop now",
    2: "stopping the jobs in progress, {items} unfinished, press Ctrl-C again to kill the workers",
    3: "killing the workers, {items} unfinished",
}
#: The same where no item is left, and workers have yet to end.
_NEXT_STEP_AT_THE_END = {
    1: "no accepted item is left, waiting for {workers} to end, press Ctrl-C again to stop now",
    2: "no accepted item is left, stopping {workers}, press Ctrl-C again to kill",
    3: "killing the workers, no accepted item is left",
}


class LogObserver:
    """Writes what happens to jobq's log: one line per event, the first ten failures with traceback."""

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}  # of every line
        self._failed = 0
        self._retried = 0
        self._cancelled = 0
        self._retired = 0
        self._tracebacks: set[str] = set()

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._fields = {"run": event.run}
                self._say("info", _started(event), pipeline=event.pipeline, backend=event.backend)
            case WorkerLostEvent():
                about = {"stage": event.stage, "worker": event.worker, "pid": event.pid}
                about |= self._told_once(_below(event.reason))
                self._say("warning", _lost(event), **about, in_hand=event.in_hand, put_back=event.put_back)
            case JobRetried():
                self._retry(event)
            case JobDead(letter=letter):
                self._dead(letter, event.worker, event.item_json)
            case Stopping():
                self._say("warning", _stopping(event), step=event.level, unfinished=event.unfinished)
            case RunEnded():
                self._ended(event)
            case ProducerEnded():
                self._say(
                    "debug",
                    f"producer {event.stage} ended after {_items(event.given)}",
                    stage=event.stage,
                    worker=event.worker,
                    given=event.given,
                )
            case WorkerStarted():
                text = f"{_worker(event.stage, event.worker, event.pid)} started"
                self._say("debug", text, stage=event.stage, worker=event.worker, pid=event.pid)
            case WorkerEnded():
                self._left(event)

    def _say(self, level: str, sentence: str, /, **said: Any) -> None:
        tell(level, sentence, said, **self._fields)

    def _told_once(self, below: dict[str, str]) -> dict[str, str]:
        """Return *below* without a traceback that was told: replacements end as those that they replace."""
        new = {name: text for name, text in below.items() if text not in self._tracebacks}
        self._tracebacks.update(new.values())
        return new

    def _retry(self, event: JobRetried) -> None:
        self._retried += 1
        self._say(
            "info" if self._retried <= TOLD_IN_FULL else "debug",
            f"item {event.job} failed in stage {event.stage} (attempt {event.attempt}), next try in "
            f"{event.delay:.1f} s: {_reason(event.error, event.message)}",
            stage=event.stage,
            worker=event.worker,
            job=event.job,
            attempt=event.attempt,
            error=event.error,
        )

    def _left(self, event: WorkerEnded) -> None:
        self._retired += bool(event.why)
        self._say(
            "info" if event.why and self._retired <= TOLD_IN_FULL else "debug",
            f"{_worker(event.stage, event.worker, event.pid)} ended"
            + (f" and is replaced: {event.why}" if event.why else ""),
            stage=event.stage,
            worker=event.worker,
            pid=event.pid,
        )

    def _dead(self, letter: DeadLetter, worker: str, item: str | None) -> None:
        if letter.status == "cancelled":
            self._cancelled += 1
            return
        self._failed += 1
        if self._failed > TOLD_IN_FULL:
            return
        said = {"stage": letter.stage, "worker": worker, "job": letter.job, "error": letter.error}
        if letter.traceback:
            said["traceback"] = letter.traceback
        elif letter.error == "WorkerLost":
            said |= _below(letter.message)
        self._say("error", _gave_up(letter, item), **said)
        if self._failed == TOLD_IN_FULL:
            self._say("warning", f"{TOLD_IN_FULL} jobs failed; further ones are only counted")

    def _ended(self, event: RunEnded) -> None:
        if self._failed > TOLD_IN_FULL:
            more = self._failed - TOLD_IN_FULL
            self._say("error", f"{more:,} more job{'s' * (more > 1)} failed", failed=self._failed)
        if self._cancelled:
            self._say("warning", f"{_items(self._cancelled)} cancelled", cancelled=self._cancelled)
        stages = {name: counts.model_dump() for name, counts in event.stages.items()}
        self._say(
            "info", f"run {event.run} ended after {event.seconds:.1f} s", seconds=event.seconds, stages=stages
        )


def _started(event: RunStarted) -> str:
    refused = event.wanted not in (None, event.backend)
    instead = f" instead of {event.wanted}, which needs semaphores" if refused else ""
    return (
        f"run {event.run} of {event.pipeline} started: {' → '.join(event.stages)} "
        f"(backend {event.backend}{instead}, {event.start_method})"
    )


def _worker(stage: str, worker: str, pid: int | None) -> str:
    number = worker.removeprefix(stage).lstrip("-.:/# ") or worker
    return f"worker {number} of stage {stage}" + ("" if pid is None else f" (pid {pid})")


def _lost(event: WorkerLostEvent) -> str:
    worker, reason = _worker(event.stage, event.worker, event.pid), event.reason.partition("\n")[0]
    others = f"; {_items(event.put_back)} that it had not begun go to others" if event.put_back else ""
    if not event.in_hand:
        return f"{worker} {reason}{others}"
    shown = ", ".join(map(str, event.in_hand[:5])) + (", …" if len(event.in_hand) > 5 else "")
    several = len(event.in_hand) > 1
    fate = others  # one in hand that has no next delivery is dead, or not charged for a death
    if several and event.put_back:
        fate = "; the items go to other workers"
    elif event.delivery is not None:
        fate = f"; the item goes to another worker, attempt {event.delivery} of {event.max_deliveries}"
    return f"{worker} {reason} while on item{'s' * several} {shown}{fate}"


def _gave_up(letter: DeadLetter, item: str | None) -> str:
    if letter.job is None:
        message = letter.message.partition("\n")[0] if letter.error == "WorkerLost" else letter.message
        return f"producer {letter.stage} stopped: {_reason(letter.error, message)}"
    if letter.error == "WorkerLost":
        times = f"{letter.deliveries} times" if letter.deliveries > 1 else "once"
        what = f": {item[:200]}" if item else ""
        return f"item {letter.job} of stage {letter.stage} killed its worker {times} and is given up{what}"
    return f"item {letter.job} failed in stage {letter.stage}: {_reason(letter.error, letter.message)}"


def _reason(error: str, message: str) -> str:
    return f"{error}: {message}" if message else error


def _below(reason: str) -> dict[str, str]:
    """Return, as a field, the traceback below the first line of a worker's end."""
    traceback = reason.partition("\n")[2]
    return {"traceback": traceback} if traceback else {}


def _stopping(event: Stopping) -> str:
    steps = _NEXT_STEP if event.unfinished else _NEXT_STEP_AT_THE_END
    workers = f"{event.workers} worker{'' if event.workers == 1 else 's'}"
    step = steps[event.level].format(items=_items(event.unfinished, "accepted "), workers=workers)
    latest = "" if event.seconds is None else f" (at the latest in {event.seconds:.0f} s)"
    return f"{event.reason}; {step}{latest}"


def _items(count: int, kind: str = "") -> str:
    return f"{count:,} {kind}item{'' if count == 1 else 's'}"
