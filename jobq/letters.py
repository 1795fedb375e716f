"""Jobs that were given up, as events while the run goes on and as dead letters in its report."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jobq.errors import JobqError, PayloadError, TimeLimitExceeded, WorkerLost
from jobq.events import JobDead
from jobq.failure import (
    REPR_CHARACTERS,
    JsonForm,
    add_note,
    describe_item,
    safe_repr,
    safe_text,
    visible,
)
from jobq.report import DeadLetter
from jobq.scheduler import Dead
from jobq.wire import (
    Codec,
    Failure,
    PackedObjects,
    PackedPlaced,
    PackedRows,
    PackedScalars,
    Part,
    References,
    Undecodable,
)

#: So many letters a report holds; the counts and the file have all.
LETTERS_KEPT = 10_000
#: So many exceptions `JobsFailed` holds.
EXCEPTIONS_KEPT = 100


class RemoteTraceback(JobqError):
    """The traceback of an exception as text, from the process that raised it."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}" if self.args else ""


@dataclass(slots=True)
class Letters:
    """
    Makes letters of dead jobs and keeps the first ones; items are decoded only when the run is over.

    ``forms``: how each consumer's items are told as JSON.
    """

    run: str
    pipeline: str
    target: str | None
    forms: Mapping[str, JsonForm] = field(default_factory=dict)
    kept: list[tuple[Dead, DeadLetter]] = field(default_factory=list)
    undecoded: list[tuple[Dead, JobDead]] = field(default_factory=list)

    def make(self, dead: Dead) -> JobDead:
        """Return the event for *dead*; nothing pickled is loaded, except plain scalars."""
        if dead.part is not None and isinstance(dead.part.block, PackedPlaced):  # letters are kept long
            dead = replace(dead, part=replace(dead.part, block=dead.part.block.owned()))
        failure, part = dead.failure, dead.part
        untold = failure.item_repr is None  # the driver's own: nobody has looked at the item
        scalar = _scalar_json(part) if untold else None
        item_json = failure.item_json if failure.item_json is not None else scalar
        letter = DeadLetter(
            run=self.run,
            pipeline=self.pipeline,
            target=self.target,
            stage=dead.stage,
            job=part.first if part is not None else dead.number,
            key=part.keys[0] if part is not None and part.keys else None,
            item=failure.item_repr,
            item_type=failure.item_type if scalar is None else _scalar_type(part),
            status="cancelled" if dead.status == "cancelled" else "dead",
            attempts=part.attempt if part is not None else 1,
            deliveries=part.delivery if part is not None else 1,
            error=failure.error,
            message=failure.message,
            traceback=failure.traceback,
        )
        if len(self.kept) < LETTERS_KEPT:
            self.kept.append((dead, letter))
        # What is not pickled here must wait: pickling may run user code, and this is the driver's thread.
        foreign = untold or (part is not None and isinstance(part.block, References))
        undecoded = item_json is None and part is not None and dead.loadable and foreign
        pickled = None if item_json is not None else _pickled(part)
        event = JobDead(dead.worker, letter, item_json, pickled, undecoded)
        if undecoded:
            self.undecoded.append((dead, event))
        return event

    def still_encoded(self) -> Iterable[JobDead]:
        """Yield the events of jobs whose items nobody has looked at again, as they are."""
        for _, event in self.undecoded:
            yield replace(event, undecoded=False)

    def decoded(self, codec: Codec) -> Iterable[JobDead]:
        """Yield the events of jobs whose items nobody has looked at again, with their items as JSON."""
        for dead, event in self.undecoded:
            assert dead.part is not None
            item = codec.decode(dead.part.block)[0]
            if not isinstance(item, Undecodable):
                event.letter.item_type = type(item).__qualname__
            text = None if isinstance(item, Undecodable) else self._form(dead.stage).text(item)
            pickled = event.item_pickle if event.item_pickle is not None or text is not None else _dumps(item)
            yield replace(event, item_json=text, item_pickle=pickled, undecoded=False)

    def cancelled(
        self, stage: str, parts: Iterable[Part], codec: Codec, unloadable: Collection[int] = ()
    ) -> Iterable[JobDead]:
        """
        Yield an event for each job of *parts*, none of which came to its end.

        Decodes items, but for parts with a job numbered in *unloadable*: for the caller's thread, when the
        run is over.
        """
        for part in parts:
            last = part.first + part.block.count
            loadable = not any(part.first <= number < last for number in unloadable)
            unknown = Undecodable(TimeoutError("a worker was stopped while it loaded the item"))
            items = codec.decode(part.block) if loadable else [unknown] * part.block.count
            for index, item in enumerate(items):
                failure = Failure(
                    0,
                    "cancelled",
                    "",
                    "the run was stopped before this job came to its end",
                    "",
                    **describe_item(item, self._form(stage).text(item)),
                )
                job = part.take(index, index + 1)
                yield self.make(Dead(stage, "", job, failure, status="cancelled", loadable=loadable))

    def _form(self, stage: str) -> JsonForm:
        return self.forms.get(stage) or JsonForm()

    def finish(self, codec: Codec) -> list[DeadLetter]:
        """Return the letters with their items as objects, as far as these can be loaded."""
        for dead, letter in self.kept:
            if dead.part is not None and dead.loadable:
                item = codec.decode(dead.part.block)[0]
                if not isinstance(item, Undecodable):
                    letter.item = item
                    letter.item_type = type(item).__qualname__
            elif dead.part is None and dead.failure.item is not None:
                letter.item = _load_item(dead.failure.item, letter.item)
        return [letter for _, letter in self.kept]

    def exceptions(self) -> list[Exception]:
        """Return the first exceptions of dead jobs, each of its own type if it can be rebuilt."""
        dead = [(one, letter) for one, letter in self.kept if one.status == "dead"]
        return [
            rebuild(one.failure, one.stage, one.part, item=letter.item)
            for one, letter in dead[:EXCEPTIONS_KEPT]
        ]


def rebuild(
    failure: Failure, stage: str, part: Part | None, *, item: Any = None, index: int | None = None
) -> Exception:
    """
    Return the exception that *failure* tells of, with its remote traceback as its cause.

    A note says which job. *item*: the job's, if it was loaded; *index*: its place in what was mapped.
    """
    error, told = _load(failure), []
    what = "the producer" if part is None else f"job {part.first}"
    if error is not None:
        told += [f"stage {stage}", what]
    else:
        known = {
            "WorkerLost": WorkerLost,
            "PayloadError": PayloadError,
            "TimeLimitExceeded": TimeLimitExceeded,
        }
        prefix = "" if failure.error in known else f"{failure.error}: "
        error = known.get(failure.error, JobqError)(f"stage {stage}, {what}: {prefix}{failure.message}")
    if failure.traceback:
        BaseException.__setattr__(error, "__cause__", RemoteTraceback(failure.traceback))
    note_item(error, *told, _item_in_words(failure, part, item), index=index)
    return error


def note_item(error: Exception, *told: str, index: int | None = None) -> None:
    """Let *error* say which item it is about: what is *told* of it, and its *index* in what was mapped."""
    place = "" if index is None else f"at index {index} of the input"
    if note := ", ".join(filter(None, (*told, place))):
        add_note(error, note)


def item_in_words(item: Any) -> str:
    """Return *item* as a part of a note."""
    return f"item {_short(safe_repr(item))}"


def _item_in_words(failure: Failure, part: Part | None, item: Any) -> str:
    """Return what is known of a job's item; only what runs no user code when it is loaded is loaded here."""
    if failure.item_repr is not None:
        return f"item {_short(failure.item_repr)}" if failure.item_type is not None else failure.item_repr
    if item is None and part is not None and isinstance(part.block, PackedScalars):
        item = _scalar(part.block)
    return "" if item is None else item_in_words(item)


def _short(text: str) -> str:
    """Return *text* as one line that a terminal only shows, and not longer than a repr may be."""
    return visible(text[:REPR_CHARACTERS])[:REPR_CHARACTERS]


def cannot_be_loaded(item: Undecodable, stage: str = "") -> PayloadError:
    """Return the error for a result, of *stage* if that is known, that was made and can't be loaded here."""
    what = f"a result of {stage}()" if stage else "a result"
    error = PayloadError(f"{what} could not be loaded: {type(item.error).__name__}: {safe_text(item.error)}")
    error.__cause__ = item.error
    return error


def _load(failure: Failure) -> Exception | None:
    if failure.exception is None:
        return None
    try:
        error = pickle.loads(failure.exception)
    except BaseException:  # user code: an exception that pickles but does not unpickle
        return None
    return error if isinstance(error, Exception) else None


def _load_item(piece: Any, shown: Any) -> Any:
    """Return what a producer gave and could not be taken: a pickle, or the thing itself."""
    if not isinstance(piece, bytes | memoryview):
        return piece
    try:
        return pickle.loads(piece)
    except BaseException:  # user code
        return shown


def _scalar_type(part: Part | None) -> str | None:
    assert part is not None and isinstance(part.block, PackedScalars)
    return type(_scalar(part.block)).__qualname__


def _scalar_json(part: Part | None) -> str | None:
    """Return a job's item as JSON if it is one that only `SCALARS` can be: loading it runs no user code."""
    if part is None or not isinstance(part.block, PackedScalars):
        return None
    return JsonForm().text(_scalar(part.block))


def _scalar(block: PackedScalars) -> Any:
    """Return the first item of a block that only `SCALARS` are in: loading it runs no user code."""
    items: list[Any] = pickle.loads(block.body)
    return items[block.low]


def _dumps(item: Any) -> bytes | None:
    try:
        return pickle.dumps(item, protocol=5)
    except BaseException:  # user code
        return None


def _pickled(part: Part | None) -> bytes | None:
    if part is None:
        return None
    if isinstance(part.block, PackedObjects | PackedRows):
        return part.block.pickled()
    if isinstance(part.block, PackedScalars):
        return pickle.dumps(_scalar(part.block), protocol=5)
    return None
