"""
What runs in a worker: an order in, answers out.

    Chunk ─> decode ─> validate ─> your function, job by job ─> encode each ─> Outbox ─> Answer
    Grant ─────────────────────> next(your producer) ─────────> encode each ─> Outbox ─> Answer

The loops of `Serial` and `Producer` are the hot path. Before each job begins its ticket is written to the
worker's page, so that the driver knows after a death which job was in hand, and the limit word is read, so
that jobs that have not begun can be taken back.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from operator import is_not
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from typing_extensions import is_typeddict

from jobq import faults
from jobq.annotations import Signature, origin_of, read_signature, spell
from jobq.arena import LARGE_BYTES, Slot
from jobq.backend import DECODING, HINT, IDLE, LANES, LIMIT, STOPPING, Port, Work, may_begin, past
from jobq.claims import CLAIM_JOBS, QUICK_SECONDS, Claims
from jobq.errors import Interrupted, PayloadError, Skip, TimeLimitExceeded
from jobq.failure import JsonForm, add_note, failure_of, pickling_hint, refusal, safe_repr, safe_text
from jobq.locks import inside, join, joined
from jobq.outbox import DONE, FAILED, FILTERED, ManyRoutes, NoTaker, OneRoute, Outbox, Packer, Piece, Tally
from jobq.retirement import Retirement
from jobq.shapes import MOST_HEADS, SCALARS, Keys, shape_of
from jobq.shared import Proxy
from jobq.stage import CLOSING, OPENING, Job, Resource, Shard, Stage, describe
from jobq.validation import Router, Validator, decided_by_types
from jobq.wire import (
    CHUNK_BYTES,
    PLACED_WEIGHT,
    TEXTS,
    Block,
    Chunk,
    Codec,
    Failure,
    Grant,
    Order,
    PackedObjects,
    PackedRows,
    PackedScalars,
    Part,
    PickleCodec,
    Undecodable,
    length_of,
)

if TYPE_CHECKING:
    from jobq.observe.log import LogSettings

Function = Callable[..., Any]
T = TypeVar("T")

#: Takes all that an iterator yields, and keeps none of it.
consume = deque[Any](maxlen=0).extend

#: Outputs of one job that are held until it ends; a longer stream travels in parts (the contract's number).
HELD_OUTPUTS = 1000
#: A producer's finished item waits at most so long for the next one, in seconds.
LINGER_SECONDS = 0.001
#: A slice of a producer's items is taken in one go while it takes less than this.
SLICE_SECONDS = 0.0003


@dataclass(frozen=True, slots=True)
class Unfit:
    """What a producer of jobq's own yields for something that can't be an item."""

    shown: Any
    error: PayloadError


@dataclass(frozen=True, slots=True)
class Addressed:
    """What a producer of jobq's own yields for an item that is to take a certain route, whatever its type."""

    item: Any
    route: int


#: Told of what a job raised, where it was raised: the stage, the job's number, the exception.
OnError = Callable[[str, int, BaseException], None]


@dataclass(frozen=True, slots=True)
class RouteUse:
    """
    What becomes of a route's items: "items" for other stages or results, "json" lines, or only a "count".

    ``keys`` holds, for each taker that has a key, its place among the takers and its key function.
    """

    kind: Literal["items", "json", "count"]
    keys: tuple[tuple[int, Function], ...] = ()


@dataclass(frozen=True, slots=True)
class ResourceUse:
    """A resource that a stage needs, with its parameters; those it needs itself come before it."""

    resource: Resource
    signature: Signature
    values: Mapping[str, Any]


class Sending(Work, Protocol):
    """Work that may hold back what its jobs gave, for a moment."""

    def flush(self) -> object:
        """Send what the jobs that have ended gave."""
        ...


@dataclass(frozen=True)
class StageRecipe:
    """
    Everything that a worker of one stage needs to know. Implements `jobq.backend.Recipe`.

    ``place`` is the run's address for locks and run-scoped resources. ``addressing``: the stage is jobq's
    own, and yields `Addressed` and `Unfit` too. ``on_error`` is called in the worker. ``stops_at_failure``: a
    job that fails ends its chunk, so that none begins before the driver has heard of it.
    """

    run: str
    stage: Stage
    signature: Signature
    routes: tuple[RouteUse, ...]
    member_routes: tuple[int, ...]
    values: Mapping[str, Any] = field(default_factory=dict)
    resources: tuple[ResourceUse, ...] = ()
    shard: Shard = field(default_factory=lambda: Shard(0, 1))
    lanes: int = 1
    flusher: bool = True
    log: LogSettings | None = None
    addressing: bool = False
    place: str = ""
    on_error: OnError | None = None
    stops_at_failure: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave annotations out of the pickle: many can't be pickled, and the child reads them again."""
        state = {name: getattr(self, name) for name in self.__dataclass_fields__}
        state["signature"] = None
        state["resources"] = tuple((use.resource, use.values) for use in self.resources)
        return _rebuild, (state,)

    def open(self, port: Port) -> Work:
        """Return the work of this stage, ready for its first order."""
        if self.log is not None:
            from jobq.observe.log import configure

            configure(self.log)
        if faults.armed:
            faults.become("producer" if self.stage.kind == "producer" else "worker")
            faults.reach("started")
        if not self.place:
            return self._open(port)
        join(self.place)
        with inside(self.place):
            work = self._open(port)
        return joined(work, self.place, work.flush)

    def _open(self, port: Port) -> Sending:
        if self.stage.kind == "producer":
            return Producer(self, port)
        if self.lanes > 1:
            from jobq.lanes import AsyncLanes, ThreadLanes

            return AsyncLanes(self, port) if self.signature.is_async else ThreadLanes(self, port)
        return Serial(self, port)


def _rebuild(state: dict[str, Any]) -> StageRecipe:
    state["signature"] = read_signature(state["stage"])
    state["resources"] = tuple(
        ResourceUse(resource, read_signature(resource), values) for resource, values in state["resources"]
    )
    return StageRecipe(**state)


# ── what surrounds a call ────────────────────────────────────────────────────


class Resources:
    """
    A worker's (or a lane's) resources: opened before its first job, closed in reverse order.

    With *keeping* the run-scoped ones are opened here, too: else they are with the keeper. *job* makes what
    one gets that asks for its `Job`. Its coroutines wait only where one of the resources is async: else
    `at_once` will do.
    """

    def __init__(
        self, uses: Sequence[ResourceUse], job: Callable[[], Job] | None = None, *, keeping: bool = False
    ) -> None:
        self._uses = uses
        self._job = job
        self._keeping = keeping
        self._stack = contextlib.AsyncExitStack()
        self._opened: dict[str, Any] | None = None
        self._failure: BaseException | None = None

    async def values(self) -> dict[str, Any]:
        """Return every resource by name, opening them the first time."""
        if self._opened is None:
            opened: dict[str, Any] = {}
            for use in self._uses:
                if use.resource.options.scope == "run" and not self._keeping:
                    opened[use.resource.name] = Proxy(use.resource.name)
                    continue
                wanted = {b.name: opened[b.name] for b in use.signature.bindings if b.name in opened}
                if self._job is not None:
                    wanted |= {name: self._job() for name in use.signature.job_names}
                try:
                    opened[use.resource.name] = await self._open(use, wanted)
                except BaseException as error:  # user code
                    add_note(error, f"{OPENING}{describe(use.resource)}")
                    raise
            self._opened = opened
        return self._opened

    async def _open(self, use: ResourceUse, wanted: Mapping[str, Any]) -> Any:
        made = use.resource.function(**{**wanted, **use.values})
        if use.signature.is_generator:
            self._stack.push(partial(self._name_failure, use.resource))  # called after its own end
        if use.signature.is_async and use.signature.is_generator:
            return await self._stack.enter_async_context(contextlib.asynccontextmanager(lambda: made)())
        if use.signature.is_generator:
            return self._stack.enter_context(contextlib.contextmanager(lambda: made)())
        return await made if use.signature.is_async else made

    def _name_failure(self, resource: Resource, _: object, error: BaseException | None, __: object) -> None:
        """Say of an error at the end which resource it came from: the first that sees it."""
        if error is not None and error is not self._failure:
            self._failure = error
            add_note(error, f"{CLOSING}{describe(resource)}")

    async def close(self) -> None:
        """Close what was opened."""
        await self._stack.aclose()


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what *coroutine* returns, which waits for nothing: it needs no event loop."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise RuntimeError(f"{coroutine} waits, and there is no event loop")


class JsonCodec(PickleCodec):
    """Results as JSON lines, made where the result is made, so that the driver has only bytes to write."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self._where = where
        self.encode = self._line

    def _line(self, item: Any) -> bytes:
        """Return *item* as one JSON line; raises `PayloadError` if it has no JSON form."""
        from pydantic_core import to_json

        try:
            if isinstance(item, Iterator):
                raise TypeError("it is an iterator, which need not end")
            return to_json(item, inf_nan_mode="null") + b"\n"
        except Exception as error:
            raise PayloadError(f"a result of {self._where} has no JSON form: {error}") from error


@dataclass(frozen=True, slots=True)
class Giving:
    """
    How what a function gives becomes outcomes.

    ``encode`` makes a piece of an item; None: items are their own pieces. ``ignore``: nothing is given on.
    """

    packer: Packer
    encode: Callable[[Any], Any] | None
    ignore: bool = False


def read_giving(recipe: StageRecipe, codec: Codec) -> Giving:
    """Return how the outputs of *recipe*'s stage are encoded and routed."""
    signature, routes, where = recipe.signature, recipe.routes, f"{recipe.stage.name}()"
    if not signature.gives:
        return Giving(NoTaker(), None, ignore=True)
    if recipe.addressing:
        return _giving_as_addressed(codec, routes)
    codecs: list[Codec | None] = [
        None
        if use.kind == "count"
        else JsonCodec(where)
        if use.kind == "json"
        else shaped(codec, recipe, route)
        for route, use in enumerate(routes)
    ]
    if len(signature.outputs) == 1 and not routes[0].keys:
        chosen = codecs[0]
        if chosen is None:
            return Giving(NoTaker(), None)
        own_pieces = chosen.by_reference or signature.outputs[0] in SCALARS
        if own_pieces and routes[0].kind == "items":
            return Giving(OneRoute(chosen, scalars=True), None)
        return Giving(OneRoute(chosen), chosen.encode)
    router = Router(signature.outputs)
    encoders = [None if chosen is None else chosen.encode for chosen in codecs]
    spelled = " | ".join(map(spell, signature.outputs))

    def encode_routed(item: Any) -> Piece:
        member = router.member(item)
        if member < 0:
            raise PayloadError(
                f"{where} gave a {type(item).__qualname__}, which is no member of {spelled}"
                f" ({recipe.stage.location})"
            )
        route = recipe.member_routes[member]
        encoder, use = encoders[route], routes[route]
        keys = tuple((place, key_of(function, item)) for place, function in use.keys)
        return Piece(route, None if encoder is None else encoder(item), keys)

    return Giving(ManyRoutes(tuple(codecs)), encode_routed)


def shaped(codec: Codec, recipe: StageRecipe, route: int) -> Codec:
    """Return the codec for the items of a route: its own where they have one class that has a shape."""
    declared = [
        output
        for output, its in zip(recipe.signature.outputs, recipe.member_routes, strict=True)
        if its == route
    ]
    if codec.by_reference or len(declared) != 1:
        return codec
    is_dict = origin_of(declared[0]) is dict or is_typeddict(origin_of(declared[0]))
    shape = Keys() if is_dict else shape_of(declared[0])
    return codec if shape is None else codec.shaped(shape)


def _giving_as_addressed(codec: Codec, routes: Sequence[RouteUse]) -> Giving:
    """Return how the items of a producer of jobq's own are encoded: not by their types."""

    def encode(given: Any) -> Piece:
        if isinstance(given, Unfit):
            raise given.error
        item, route = (given.item, given.route) if isinstance(given, Addressed) else (given, 0)
        keys = tuple((place, key_of(function, item)) for place, function in routes[route].keys)
        return Piece(route, codec.encode(item), keys)

    return Giving(ManyRoutes((codec,) * len(routes)), encode)


def key_of(function: Function, item: Any) -> Any:
    """Return the key of *item*, or ``("!", why)`` where there is none."""
    try:
        key = function(item)
    except BaseException as error:  # user code: the taker's job is a dead letter, the giver's is fine
        return ("!", f"key raised {type(error).__name__}: {safe_text(error)}")
    # A subclass (StrEnum) is made a plain string: keys travel in headers, which know no classes.
    return str.__str__(key) if isinstance(key, str) else ("!", f"key gave a {type(key).__name__}, not a str")


class Noted(Protocol):
    """What jobs said of their progress gathers here."""

    notes: list[tuple[int, float | None, float | None]]


class Caller:
    """
    Calls a stage's function with an item, its resources, its parameters and, if it asks, its `Job`.

    *run* runs the coroutines by which resources are opened and closed where the function's own run.
    """

    def __init__(
        self,
        recipe: StageRecipe,
        port: Port,
        tally: Callable[[], Noted | None],
        run: Callable[[Coroutine[Any, Any, Any]], Any] = at_once,
    ) -> None:
        self._recipe = recipe
        self._tally = tally
        self._page = port.page
        self._run = run if recipe.resources and recipe.signature.is_async else at_once
        self._resources = Resources(recipe.resources, lambda: self._job(None, 0, 0))
        signature = recipe.signature
        self._job_names = signature.job_names
        self.wants_job = bool(self._job_names)
        self.function: Function = recipe.stage.function
        self._ready = False

    def prepare(self) -> None:
        """Open the resources and bind everything that is the same for all jobs. Idempotent."""
        if self._ready:
            return
        self._ready = True
        recipe, signature = self._recipe, self._recipe.signature
        opened = self._run(self._resources.values())
        fixed: dict[str, Any] = {
            b.name: opened[b.name] for b in signature.bindings if b.kind == "free" and b.name in opened
        }
        fixed.update(recipe.values)
        fixed.update({b.name: recipe.shard for b in signature.bindings if b.kind == "shard"})
        function = recipe.stage.function
        if fixed:
            function = partial(function, **fixed)
        if signature.item is not None and not signature.item_first:
            function = _by_name(function, signature.item)
        self.function = faults.around(function) if faults.armed else function

    def job(self, part: Part | None, index: int, offset: int) -> dict[str, Job]:
        """Return the `Job` arguments for one call."""
        return dict.fromkeys(self._job_names, self._job(part, index, offset))

    def _job(self, part: Part | None, index: int, offset: int) -> Job:
        number = part.first + offset if part is not None else index
        return Job(
            id=f"{self._recipe.run}/{self._recipe.stage.name}/{number}",
            stage=self._recipe.stage.name,
            attempt=part.attempt if part is not None else 1,
            delivery=part.delivery if part is not None else 1,
            key=part.keys[offset] if part is not None and part.keys is not None else None,
            log=partial(self._logger, number, part),
            note=partial(self._note, index),
            stopping=self._stopping,
        )

    def _logger(self, number: int, part: Part | None) -> Any:
        from jobq.observe.log import job_logger

        return job_logger(
            run=self._recipe.run,
            stage=self._recipe.stage.name,
            job=number,
            attempt=part.attempt if part is not None else 1,
        )

    def _stopping(self) -> bool:
        return bool(self._page[STOPPING])

    def _note(self, index: int, done: float | None, total: float | None) -> None:
        done, total = (
            value if value is None or type(value) is int else float(value) for value in (done, total)
        )
        tally = self._tally()
        if tally is not None:
            tally.notes.append((index, done, total))

    def close(self) -> None:
        """Close the resources."""
        self._run(self._resources.close())


def _by_name(function: Function, name: str) -> Function:
    def call(item: Any, **others: Any) -> Any:
        return function(**{name: item}, **others)

    return call


class Intake:
    """Decodes and validates a chunk's items."""

    def __init__(self, recipe: StageRecipe, port: Port, retirement: Retirement) -> None:
        self._codec = port.codec
        self._page = port.page
        self._retirement = retirement
        self._name = recipe.stage.name
        signature = recipe.signature
        self.form = JsonForm(signature.item_type)
        self._validator = Validator(signature.item_type) if recipe.stage.consumer.validate_items else None
        #: The name of the scalar type that was seen to be right when the items were packed.
        self._known = signature.item_type.__name__ if signature.item_type in SCALARS else None
        self._spelled = spell(signature.item_type)
        self._by_types = decided_by_types(signature.item_type)
        self._good: set[tuple[bytes, str]] = set()  # shapes of rows, and types of their values

    def open(self, chunk: Chunk) -> tuple[list[Any], dict[int, str]]:
        """Return a chunk's items, and what is wrong with some of them, by index."""
        page, codec, parts = self._page, self._codec, chunk.parts
        page[DECODING] = chunk.number  # loading an item may run user code, and kill us
        before = codec.undecoded
        if len(parts) == 1:
            items = codec.decode(parts[0].block)
        else:
            items = [item for part in parts for item in codec.decode(part.block)]
        bad: dict[int, str] = {}
        if self._validator is not None and not all(self._is_known(part.block) for part in parts):
            bad = self._validator.check(items)
            if self._by_types and not bad:
                self._learn(parts)
        page[DECODING] = IDLE
        if bad or codec.undecoded != before:
            return items, self._explain(items, bad)
        return items, bad

    def _is_known(self, block: Block) -> bool:
        """Whether the items' types, which were seen when they were packed, are known to be right."""
        if type(block) is PackedRows:
            return (block.shape, block.types) in self._good
        return type(block) is PackedScalars and block.only == self._known

    def _learn(self, parts: Iterable[Part]) -> None:
        """Remember what was found right: what is like it need not be looked at again."""
        for part in parts:
            if isinstance(part.block, PackedRows) and part.block.types and len(self._good) < MOST_HEADS:
                self._good.add((part.block.shape, part.block.types))

    def open_one(self, part: Part, offset: int) -> tuple[Any, str | None]:
        """Return one job's item, and what is wrong with it."""
        items = self._codec.decode(part.block.take(offset, offset + 1))
        bad = self._validator.check(items) if self._validator is not None else {}
        return items[0], self._explain(items, bad).get(0)

    def original(self, part: Part, offset: int, item: Any) -> Any:
        """Return *item* as it came, whatever its job did to it: its dead letter is to be run again."""
        if not isinstance(part.block, PackedObjects | PackedRows):
            return item
        (again,) = self._codec.decode(part.block.take(offset, offset + 1))
        return item if isinstance(again, Undecodable) else again

    def _explain(self, items: list[Any], bad: Mapping[int, str]) -> dict[int, str]:
        explained = {
            index: f"{self._name}() takes {self._spelled}: {message}" for index, message in bad.items()
        }
        for index, item in enumerate(items):
            if isinstance(item, Undecodable):
                self._retirement.note(item.error)
                why = f"{type(item.error).__name__}: {safe_text(item.error)}"
                explained[index] = f"an item for {self._name}() could not be loaded: {why}"
        return explained


class Awaiter:
    """
    Runs coroutines one at a time, on an event loop that is made with the first.

    Where a ``limit`` is set, seconds and when they began (`time.monotonic_ns`), what is still running when
    they are over is cancelled, and is a `TimeLimitExceeded`.
    """

    def __init__(self) -> None:
        self._runner: Any = None  # Any: asyncio is imported only if it is needed
        self.limit: tuple[float, int] | None = None

    def run(self, awaitable: Any) -> Any:
        """Return the result of *awaitable*."""
        if self._runner is None:
            import asyncio

            self._runner = asyncio.Runner()
        return self._runner.run(
            _await(awaitable) if self.limit is None else _await_for(awaitable, *self.limit)
        )

    def iterate(self, items: Any) -> Iterator[Any]:
        """Yield the items of an async iterator."""
        try:
            while True:
                try:
                    yield self.run(anext(items))
                except StopAsyncIteration:
                    return
        finally:
            self.limit = None
            close = getattr(items, "aclose", None)
            if close is not None:
                self.run(close())

    def close(self) -> None:
        """Close the event loop."""
        if self._runner is not None:
            self._runner.close()


async def _await(awaitable: Any) -> Any:
    return await awaitable


async def _await_for(awaitable: Any, seconds: float, began: int) -> Any:
    import asyncio

    try:
        async with asyncio.timeout(began / 1e9 + seconds - time.monotonic()) as limit:
            return await awaitable
    except TimeoutError as error:
        if limit.expired():
            raise TimeLimitExceeded(f"the job took longer than {seconds:g} s") from error
        raise


# ── consumers, one job at a time ─────────────────────────────────────────────


class Serial:
    """A consumer's work, one job after the other."""

    def __init__(self, recipe: StageRecipe, port: Port) -> None:
        self._recipe = recipe
        self._page = port.page
        signature = recipe.signature
        self._giving = read_giving(recipe, port.codec)
        self._retirement = retirement_of(recipe, port)
        self._intake = Intake(recipe, port, self._retirement)
        self._outbox = Outbox(
            port.send,
            self._giving.packer,
            len(recipe.routes),
            many=signature.many,
            flusher=recipe.flusher,
            refuse=self._refuse,
            retirement=self._retirement,
            patient=self._is_patient,
        )
        self._awaiter = Awaiter()
        self._caller = Caller(recipe, port, lambda: self._outbox.tally, self._awaiter.run)
        self._retry_on = recipe.stage.consumer.retry_on
        self._nullable = signature.nullable
        self._plain = (
            not (signature.many or signature.is_async or self._caller.wants_job or signature.batched)
            and recipe.stage.consumer.timeout is None
            and not self._retirement.watches
        )
        #: A job that was claimed with others may be tried again although it has not begun: once more is fine.
        if self._plain and not self._nullable and self._giving.encode is None and recipe.flusher:
            may_be_charged = recipe.stage.consumer.max_deliveries > 1
            self._outbox.claims = Claims(port.page) if may_be_charged else None
        self._pace = 1.0  # seconds a job took in the last chunk
        self._stopped = False  # by a failure: the rest of this chunk goes back

    def _is_patient(self) -> bool:
        """Whether nobody waits for what was done: where one does, the driver has put the hint down to 1."""
        return self._page[HINT] > 1

    def run(self, order: Order) -> None:
        """Do a chunk's jobs and answer it."""
        assert isinstance(order, Chunk)
        self._chunk, self._stopped = order, False
        self._caller.prepare()
        tally = self._outbox.begin(order.number, alone=order.count == 1 and not self._recipe.signature.many)
        # Not to be begun: its sockets are another's now, or soon.
        if self._retirement.why or not may_begin(self._page, order.number):
            self._outbox.flush(final=True)
            return
        began = tally.began  # which each answer sets anew
        items, bad = self._intake.open(order)
        tally.items = items
        if self._recipe.signature.batched:
            self._batch(order, items, bad, tally)
        elif self._plain and not bad:
            claims = self._outbox.claims
            if claims is not None and self._pace < QUICK_SECONDS and is_first_try(order):
                self._quick(order.number, items, tally, claims)
            else:
                self._fast(order.number, items, tally)
            self._pace = (time.monotonic() - began) / max(1, len(tally.outcomes))
        else:
            self._each(order, items, bad, tally)
        if self._retirement.watches:
            self._retirement.look(now := time.monotonic_ns(), now)
        # The page still shows the last job: until its answer has left, a death is charged to it.
        self._outbox.flush(final=True)
        self._page[LANES] = past(self._page[LANES])

    def _quick(self, number: int, items: list[Any], tally: Tally, claims: Claims) -> None:
        """Do jobs that took next to no time until now, a claim at a time."""
        page, call, outcomes, ignore = self._page, self._caller.function, tally.outcomes, self._giving.ignore
        at, count = 0, len(items)
        while at < count:
            claim = items[at : at + CLAIM_JOBS]
            jobs = claims.begin(claim, number + at)
            if page[LIMIT] >= 0 and not may_begin(page, number + at + len(claim) - 1):
                claims.end(number + at - 1)
                self._fast(number, items, tally, at)
                return
            try:
                if ignore:
                    consume(map(call, jobs))
                else:
                    outcomes.extend(map(call, jobs))
            except Interrupted:
                raise
            except BaseException as error:  # the job's, whatever it is
                if ignore:
                    failed = len(claim) - jobs.__length_hint__() - 1
                    outcomes.extend([DONE] * failed)
                failed = len(outcomes)
                self._failed(failed, error, items[failed], tally)
                if self._begins_no_more:
                    claims.end(number + failed)
                    return
            else:
                if ignore:
                    outcomes.extend([DONE] * len(claim))  # the flusher may have shortened it
            at = len(outcomes)
        claims.end(number + count - 1)

    def _fast(self, number: int, items: list[Any], tally: Tally, start: int = 0) -> None:
        page, call, append = self._page, self._caller.function, tally.outcomes.append
        encode, ignore, nullable = self._giving.encode, self._giving.ignore, self._nullable
        unset = given = FAILED  # what the call gave: tells whether it or the encoding raised
        tickets = enumerate(items[start:] if start else items, number + start)
        item = None
        while True:
            try:
                if ignore:
                    for page[LANES], item in tickets:
                        if page[LIMIT] >= 0 and not may_begin(page, page[LANES]):
                            return
                        call(item)
                        append(DONE)
                elif encode is None and not nullable:
                    for page[LANES], item in tickets:
                        if page[LIMIT] >= 0 and not may_begin(page, page[LANES]):
                            return
                        append(call(item))
                else:
                    for page[LANES], item in tickets:
                        if page[LIMIT] >= 0 and not may_begin(page, page[LANES]):
                            return
                        given = unset
                        given = call(item)
                        if given is None and nullable:
                            tally.marked = True
                            append(FILTERED)
                        else:
                            append(given if encode is None else encode(given))
                return
            except Interrupted:
                raise
            except BaseException as error:  # the job's, whatever it is
                if given is not unset:
                    error = cannot_be_pickled(error, self._recipe)
                    given = unset
                self._failed(page[LANES] - number, error, item, tally)
                if self._begins_no_more:
                    return

    @property
    def _begins_no_more(self) -> bool:
        """Whether the rest of the chunk is to go back."""
        return self._stopped or bool(self._retirement.why)

    def _failed(self, index: int, error: BaseException, item: Any, tally: Tally) -> None:
        self._retirement.note(error.__cause__ if isinstance(error, PayloadError) else error)
        outcome = outcome_of(error)
        if outcome is FAILED:
            self._stopped = self._recipe.stops_at_failure
            self._tell(index, error)
            tally.failures.append(self._failure(index, error, item, self._retry_on))
        tally.marked = True
        tally.outcomes.append(outcome)

    def _tell(self, index: int, error: BaseException) -> None:
        if self._recipe.on_error is not None:
            part, offset = place_of(self._chunk, index)
            self._recipe.on_error(self._recipe.stage.name, part.first + offset, error)

    def _failure(
        self, index: int, error: BaseException, item: Any, retry_on: tuple[type[BaseException], ...]
    ) -> Failure:
        item = self._intake.original(*place_of(self._chunk, index), item)
        return failure_of(index, error, item, retry_on, self._intake.form)

    def _refuse(self, index: int, error: BaseException, item: Any) -> Failure:
        return self._failure(index, cannot_be_pickled(error, self._recipe), item, ())

    def _each(self, chunk: Chunk, items: list[Any], bad: Mapping[int, str], tally: Tally) -> None:
        page, number = self._page, chunk.number
        tally.marked = True
        timeout, retirement = self._recipe.stage.consumer.timeout, self._retirement
        for index, (item, (part, offset)) in enumerate(zip(items, places(chunk), strict=True)):
            began = time.monotonic_ns()
            if index and (self._begins_no_more or (retirement.watches and retirement.look(began, began))):
                return  # never before the first job: each worker does at least one
            page[LANES + 1] = began  # before the ticket: the driver may take a job for younger, not for older
            page[LANES] = number + index
            if not may_begin(page, number + index):
                return
            if index in bad:
                tally.failures.append(refusal(index, bad[index], item))
                tally.outcomes.append(FAILED)
                self._stopped = self._recipe.stops_at_failure
                continue
            try:
                job = self._caller.job(part, index, offset) if self._caller.wants_job else {}
                outcome = self._in_time(began, index, self._caller.function(item, **job))
                check_limit(timeout, began)
                tally.outcomes.append(outcome)
            except Interrupted:
                raise
            except BaseException as error:  # the job's, whatever it is
                self._failed(index, error, item, tally)

    def _in_time(self, began: int, index: int, given: Any) -> Any:
        """Return what a call gave as an outcome; what is async is cancelled when its time is over."""
        timeout = self._recipe.stage.consumer.timeout
        if timeout is None or not self._recipe.signature.is_async:
            return self._outcome(index, given)
        self._awaiter.limit = timeout, began
        try:
            return self._outcome(index, given)
        finally:
            self._awaiter.limit = None

    def _outcome(self, index: int, given: Any) -> Any:
        """Return what a call gave as an outcome."""
        signature = self._recipe.signature
        if signature.is_async and not signature.many:
            given = self._awaiter.run(given)
        if self._giving.ignore:
            return DONE
        if signature.many:
            if hasattr(given, "__aiter__"):
                given = self._awaiter.iterate(aiter(given))
            elif signature.is_async and hasattr(given, "__await__"):
                given = self._awaiter.run(given)
            return self._collect(index, given)
        if given is None and self._nullable:
            return FILTERED
        return encode_carefully(self._giving, given, self._recipe)

    def _collect(self, index: int, given: Iterable[Any]) -> list[Any]:
        """Encode each of a job's outputs as it comes; return those that leave when the job ends."""
        pieces: list[Any] = []
        items = iter(given) if given is not None else iter(())
        try:
            for item in items:
                if item is None:
                    continue  # a generator's None is not given on
                pieces.append(encode_carefully(self._giving, item, self._recipe))
                if len(pieces) > HELD_OUTPUTS:
                    self._outbox.flush()
                    self._outbox.part(index, pieces)
                    pieces = []
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
        return pieces

    def _batch(self, chunk: Chunk, items: list[Any], bad: Mapping[int, str], tally: Tally) -> None:
        """Call the function once with all items that are fine."""
        page = self._page
        tally.marked = True
        began = time.monotonic_ns()
        page[LANES + 1] = began
        page[LANES] = chunk.number
        if not may_begin(page, chunk.number):
            return
        tally.failures += [refusal(index, bad[index], items[index]) for index in sorted(bad)]
        good = [item for index, item in enumerate(items) if index not in bad]
        outcomes: list[Any] = [FAILED if index in bad else DONE for index in range(len(items))]
        last = max((i for i, outcome in enumerate(outcomes) if outcome is DONE), default=None)
        if last is None:
            tally.outcomes += outcomes
            return
        part, offset = list(places(chunk))[last]
        try:
            job = self._caller.job(part, last, offset) if self._caller.wants_job else {}
            given = self._in_time(began, last, self._caller.function(good, **job))
            check_limit(self._recipe.stage.consumer.timeout, began)
            if given is FILTERED:
                outcomes = [FILTERED if outcome is DONE else outcome for outcome in outcomes]
            elif given is not DONE:
                if self._recipe.signature.many:
                    outcomes = [[] if outcome is DONE else outcome for outcome in outcomes]
                outcomes[last] = given
        except Interrupted:
            raise
        except Skip:
            outcomes = [FILTERED if outcome is DONE else outcome for outcome in outcomes]
        except BaseException as error:  # the job's, whatever it is
            self._tell(last, error)
            self._retirement.note(error)
            tally.failures += [
                self._failure(index, error, item, self._retry_on)
                for index, item in enumerate(items)
                if index not in bad
            ]
            outcomes = [FAILED] * len(items)
        tally.outcomes += outcomes

    def flush(self) -> None:
        """Send what the jobs that have ended gave."""
        self._outbox.flush()

    def close(self) -> None:
        """Close resources, event loop and flusher."""
        try:
            self._caller.close()
        finally:
            self._awaiter.close()
            self._outbox.close()


def is_first_try(chunk: Chunk) -> bool:
    """Whether no job of several has been in hand when a worker died: which one it was is then to be known."""
    return chunk.count > 1 and all(part.delivery == 1 for part in chunk.parts)


def retirement_of(recipe: StageRecipe, port: Port) -> Retirement:
    """Return when a worker is to be replaced; how much memory only a process of its own can tell."""
    return Retirement(None if port.codec.by_reference else recipe.stage.consumer.max_memory)


def places(chunk: Chunk) -> Iterator[tuple[Part, int]]:
    """Yield the part of each job of *chunk*, and its place in the part."""
    for part in chunk.parts:
        for offset in range(part.block.count):
            yield part, offset


def place_of(chunk: Chunk, index: int) -> tuple[Part, int]:
    """Return the part of the job at *index* of *chunk*, and its place in the part."""
    for part in chunk.parts:
        if index < part.block.count:
            return part, index
        index -= part.block.count
    raise IndexError(index)


def check_limit(timeout: float | None, began: int) -> None:
    """Raise `TimeLimitExceeded` for a call that took too long and was not stopped in time."""
    if timeout is not None and time.monotonic_ns() - began > timeout * 1e9:
        raise TimeLimitExceeded(f"the job took longer than {timeout:g} s")


def outcome_of(error: BaseException) -> Any:
    """Return FILTERED for a job that raised `Skip`, else FAILED."""
    return FILTERED if isinstance(error, Skip) else FAILED


def encode_carefully(giving: Giving, given: Any, recipe: StageRecipe) -> Any:
    """Return *given* as a piece; raises `PayloadError` if it can't travel."""
    try:
        if giving.encode is not None:
            return giving.encode(given)
        if isinstance(giving.packer, OneRoute) and type(given) not in SCALARS:
            giving.packer.codec.encode(given)  # it travels as it is, or not at all
        return given
    except BaseException as error:  # user code runs in it (__reduce__, __getstate__)
        raise cannot_be_pickled(error, recipe) from error


def cannot_be_pickled(error: BaseException, recipe: StageRecipe) -> PayloadError:
    """Return the error for something that a stage's function gives and that can't travel."""
    if isinstance(error, PayloadError):
        return error
    explained = PayloadError(
        f"what {recipe.stage.name}() ({recipe.stage.location}) gives cannot be pickled:"
        f" {type(error).__name__}: {safe_text(error)}{pickling_hint(error)}"
    )
    explained.__cause__ = error
    return explained


# ── producers ────────────────────────────────────────────────────────────────


class Producer:
    """A producer's work: it gives items as far as it is granted."""

    def __init__(self, recipe: StageRecipe, port: Port) -> None:
        self._recipe = recipe
        self._page = port.page
        self._giving = read_giving(recipe, port.codec)
        packer = self._giving.packer
        self._by_rows = isinstance(packer, OneRoute) and packer.codec.by_rows
        scalars = isinstance(packer, OneRoute) and packer.scalars and not packer.codec.by_reference
        self._drops_none = scalars and self._giving.encode is None and not recipe.signature.nullable
        self._outbox = Outbox(
            port.send,
            packer,
            len(recipe.routes),
            many=False,
            flusher=recipe.flusher,
            refuse=self._refuse,
            drops_none=self._drops_none,
        )
        self._awaiter = Awaiter()
        self._caller = Caller(recipe, port, lambda: self._outbox.tally, self._awaiter.run)
        self._items: Any = None
        self._given_by: Any = None
        self._source: Any = None
        self._ended = False
        self._stopped = False
        self._given = 0
        self._slice = 1
        self._length = 1  # of a text, as they came last
        self._codec = port.codec
        self._size = port.codec.size
        #: Returns the bytes of a slice, where its items may be long.
        self._measure: Callable[[list[Any]], int] | None = None
        if isinstance(packer, OneRoute) and self._by_rows:
            self._size = packer.codec.size
            self._measure = self._about
        elif recipe.signature.outputs and recipe.signature.outputs[0] in TEXTS:
            self._measure = length_of

    def run(self, order: Order) -> None:
        """Give at most as many items as granted, and answer the grant."""
        assert isinstance(order, Grant)
        tally = self._outbox.begin(order.number)
        if self._ended or self._stopped:
            self._outbox.flush(final=True)
            return
        try:
            if self._items is None:
                self._start()
            slices = self._by_rows or self._giving.encode is None
            self._ended = self._slices(order, tally) if slices else self._objects(order, tally)
        except Interrupted:
            raise
        except BaseException as error:  # the producer's, whatever it is
            self._ended = True
            failure = failure_of(-1, error, None, ())
            # Whole when it is appended: the flusher may send it at once.
            tally.failures.append(replace(failure, item_type=None, item_json=None, item_repr=None))
        self._outbox.flush(final=True, ended=self._ended)

    def _start(self) -> None:
        self._caller.prepare()
        job = self._caller.job(None, 0, 0) if self._caller.wants_job else {}
        source = self._caller.function(**job)
        if self._recipe.signature.is_async and hasattr(source, "__await__"):
            source = self._awaiter.run(source)
        self._source = source
        if hasattr(source, "__aiter__"):
            items = self._awaiter.iterate(aiter(source))
        else:
            items = iter(source if source is not None else ())
        self._given_by = items
        # A generator's None is not given on; among scalars that leave as they are the outbox sees to it.
        self._items = items if self._drops_none else filter(partial(is_not, None), items)

    def _slices(self, grant: Grant, tally: Tally) -> bool:
        """
        Give items slice by slice; return whether the producer has ended.

        They are their own pieces, or rows: each is made into one before the producer is asked for the next.
        """
        page, outcomes, flusher, measure = self._page, tally.outcomes, self._outbox.flusher, self._measure
        items = self._items if self._giving.encode is None else self._encoded(tally)
        clock = time.monotonic
        flushed = clock()
        nbytes = unsent_bytes = 0
        while (left := grant.count - len(outcomes)) > 0 and nbytes < grant.nbytes:
            if page[LIMIT] == 0:
                self._stopped = True  # which is no end: there may be more
                return False
            before = len(outcomes)
            began = clock()
            wanted = min(left, self._slice)
            if measure is not None:
                # They may be long: no more than what would be a large chunk of those that came last.
                wanted = min(wanted, CHUNK_BYTES // self._length, (grant.nbytes - nbytes) // self._length)
                wanted = max(1, wanted)
            # What lies there, or comes first of several, is not to wait until the producer comes back.
            if flusher is not None and (wanted > 1 or before > tally.sent):
                flusher.arm()
            outcomes.extend(islice(items, wanted))
            now = clock()
            if now - began < SLICE_SECONDS:
                self._slice = min(self._slice * 2, 1024)
            else:
                self._slice = 1
            if measure is not None:
                size = measure(outcomes[before:])
                nbytes += size
                unsent_bytes += size if size < wanted * LARGE_BYTES else size // PLACED_WEIGHT
                self._length = max(1, size // wanted)
            if len(outcomes) - before < wanted:
                return True
            if flusher is None:
                return False  # nobody else runs meanwhile: let those after us have these first
            ripe = unsent_bytes >= CHUNK_BYTES or self._is_ripe(tally, flushed, now)
            if ripe and len(outcomes) < grant.count:
                self._outbox.flush()
                flushed, unsent_bytes = now, 0
        return False

    def _about(self, pieces: list[Any]) -> int:
        """Return the bytes of so many rows, if all are like the last: to look at each costs more than it."""
        last = pieces[-1] if pieces else FAILED
        return 0 if last is FAILED else len(pieces) * self._size(last)

    def _encoded(self, tally: Tally) -> Iterator[Any]:
        """Yield a piece for each item: as long as nobody asks for one, the producer is not asked either."""
        encode = self._giving.encode
        assert encode is not None

        def piece(item: Any) -> Any:
            try:
                return encode(item)
            except BaseException as error:  # user code runs in it: this item's, the producer goes on
                return self._unfit(item, error, tally)

        return map(piece, self._items)

    def _is_ripe(self, tally: Tally, flushed: float, now: float) -> bool:
        """Whether what was given should leave now; what ends a grant leaves with its last answer anyway."""
        unsent = len(tally.outcomes) - tally.sent
        return unsent >= self._page[HINT] or now - flushed > LINGER_SECONDS

    def _objects(self, grant: Grant, tally: Tally) -> bool:
        """Give items, each encoded at its yield; return whether the producer has ended."""
        items, page, outcomes, flusher = self._items, self._page, tally.outcomes, self._outbox.flusher
        encode, size, append, began = self._giving.encode, self._size, outcomes.append, time.monotonic()
        nbytes = 0
        assert encode is not None
        if flusher is not None:
            flusher.arm()
        while page[LIMIT] != 0:
            item = next(items, FAILED)  # no user's item is ours
            if item is FAILED:
                return True
            try:
                piece = encode(item)
            except BaseException as error:  # user code runs in it: this item's, the producer goes on
                append(self._unfit(item, error, tally))
            else:
                append(piece)
                nbytes += size(piece.data if type(piece) is Piece else piece)
            del item  # a socket that was handed over must not stay open here until the next item comes
            given = len(outcomes)
            if given >= grant.count or nbytes >= grant.nbytes:
                return False
            if flusher is None:
                if time.monotonic() - began > SLICE_SECONDS:
                    return False  # nobody else runs meanwhile: let those after us have these first
            elif given - tally.sent >= page[HINT]:
                self._outbox.flush()
            else:
                flusher.arm()  # what is given leaves in a few milliseconds, whatever comes after it
        self._stopped = True  # which is no end: there may be more
        return False

    def _unfit(self, item: Any, error: BaseException, tally: Tally) -> Any:
        """Make a dead letter of an item that can't travel; return its outcome."""
        tally.marked = True
        if isinstance(item, Unfit):
            tally.failures.append(refusal(len(tally.outcomes), str(item.error), item.shown))
            return FAILED
        where = self._recipe.stage.location
        frame = getattr(self._source, "gi_frame", None) or getattr(self._source, "ag_frame", None)
        if frame is not None:
            where = f"{where.rpartition(':')[0]}:{frame.f_lineno}"
        tally.failures.append(self._refuse(len(tally.outcomes), error, item, where))
        return FAILED

    def _refuse(self, index: int, error: BaseException, item: Any, where: str = "") -> Failure:
        if not isinstance(error, PayloadError):
            explained = PayloadError(
                f"an item that {self._recipe.stage.name}() yields ({where or self._recipe.stage.location})"
                f" cannot be pickled: {type(error).__name__}: {safe_text(error)}{pickling_hint(error)}"
            )
            explained.__cause__ = error
            error = explained
        copy = self._copy(item)
        if copy is not None:
            return replace(failure_of(index, error, item, ()), item=copy)
        # To look for its JSON form would use up a generator in it, which need not end.
        failure = failure_of(index, error, None, ())
        return replace(failure, item_type=type(item).__qualname__, item_json=None, item_repr=safe_repr(item))

    def _copy(self, item: Any) -> Any:
        """Return *item* encoded, for its dead letter; None if it can't be."""
        try:
            piece = self._codec.encode(item)
            return bytes(piece) if isinstance(piece, Slot) else piece
        except BaseException:  # user code
            return None

    def flush(self) -> None:
        """Send what was given so far."""
        self._outbox.flush()

    def close(self) -> None:
        """Close the producer (its ``finally`` blocks run), its resources and the rest."""
        try:
            for generator in (self._given_by, self._source):
                close = getattr(generator, "close", None)
                if close is not None:
                    close()
        finally:
            try:
                self._caller.close()
            finally:
                self._awaiter.close()
                self._outbox.close()
