"""A run from its parts: checked graph, parameters, recipes, backend, scheduler, driver; then its report."""

from __future__ import annotations

import contextlib
import importlib
import random
import selectors
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from jobq import backends, events
from jobq.annotations import read_signature
from jobq.backend import Backend, Plan, Preload, Recipe
from jobq.driver import KILL, STOP, Clock, Driver
from jobq.errors import BackendUnavailable, Interrupted, PipelineError
from jobq.failure import JsonForm
from jobq.graph import Edge, Graph, Node, Route, bind, find_by_name_problems
from jobq.inputs import Source, input_source
from jobq.keeper import RECIPE, KeeperRecipe
from jobq.ladder import waking
from jobq.letters import Letters, cannot_be_loaded
from jobq.locks import open_desk
from jobq.observe import somebody_listens
from jobq.options import RunOptions, Workers
from jobq.outcome import Outcome
from jobq.policy import Uniform
from jobq.pool import describe_lack, first_workers
from jobq.report import DeadLetter, Report
from jobq.results import Collect, Sink
from jobq.scheduler import Scheduler
from jobq.stage import Shard, describe
from jobq.wire import Codec
from jobq.work import OnError, ResourceUse, RouteUse, StageRecipe

if TYPE_CHECKING:
    from jobq.inlet import Entrance
    from jobq.observe.log import LogSettings


@dataclass(slots=True)
class Watchers:
    """Those who hear of a run's events; one that raises is not told again, and harms nobody."""

    observers: list[events.Observer]

    def tell(self, event: events.Event) -> None:
        """Tell everybody."""
        for observer in tuple(self.observers):
            try:
                observer(event)
            except Exception:  # an observer's bug must not be the run's
                self.observers.remove(observer)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run needs of the computer that it is on: a simulation has one of its own."""

    backend: type[Backend]
    clock: Clock = time
    selector: selectors.BaseSelector | None = None
    chance: Uniform = field(default_factory=random.Random)
    run_id: str = ""


@dataclass(slots=True)
class Running:
    """One run, ready to be driven: by `Driver.run` in this thread, or step by step by whoever waits."""

    id: str
    name: str
    graph: Graph
    options: RunOptions
    backend: Backend
    driver: Driver
    sink: Sink
    letters: Letters
    watchers: Watchers
    began: float
    clock: Clock
    file: events.Observer | None = None
    attended: bool = False  # whoever the main thread works for heeds the stops
    told: bool = False  # the program has been interrupted by a stop signal

    def conclude(self) -> Outcome:
        """Return how the run ended; call it when the driver is through, in the caller's thread."""
        driver, codec = self.driver, self.backend.codec
        hurried = driver.ending.level >= KILL or driver.abandoned
        self.attended |= driver.ending.level >= KILL  # what is left takes no time
        if not hurried:
            for cancelled in driver.cancelled:
                for event in self.letters.cancelled(
                    cancelled.stage, cancelled.parts, codec, cancelled.unloadable
                ):
                    self.watchers.tell(event)
        if self.file is not None:
            for event in self.letters.still_encoded() if hurried else self.letters.decoded(codec):
                self.file(event)
        counts = driver.counts()
        seconds = self.clock.monotonic() - self.began
        self.watchers.tell(events.RunEnded(self.id, seconds, counts))
        ending, imbalance = driver.ending, driver.imbalance()
        stopped = ending.signal if ending.level and ending.interrupted else None
        closed = self.sink.broken == ""
        report = Report(
            run=self.id,
            pipeline=self.name,
            ok=not any(one.dead or one.cancelled for one in counts.values()),
            seconds=seconds,
            dead=self.letters.finish(codec),
            stages=counts,
            edges=driver.edges(),
        )
        unloadable: tuple[Exception, ...] = ()
        if isinstance(self.sink, Collect):
            report.results += self.sink.load_all()
            unloadable = tuple(cannot_be_loaded(item, stage) for stage, item in self.sink.unloadable)
            report.ok &= not unloadable
            report.dead += [
                DeadLetter(
                    run=self.id,
                    pipeline=self.name,
                    stage=stage,
                    job=None,
                    error="PayloadError",
                    message=str(error),
                )
                for (stage, _), error in zip(self.sink.unloadable, unloadable, strict=True)
            ]
        return Outcome(
            report,
            signal=stopped,
            heard=None if self.told else driver.signal,
            gave_up=ending.gave_up,
            unbalanced=imbalance if ending.level < KILL else None,
            stdout_closed=closed,
            exceptions=tuple(self.letters.exceptions()),
            unloadable=unloadable,
        )

    def climb(self, number: int) -> bool:
        """
        Take a stop signal; return whether it is to interrupt the program. Called by a signal handler.

        The third is, where the main thread is in the program's own code, or in conclusions.
        """
        self.driver.request_stop(number)
        if self.backend.at_work:  # the driver waits for the very job that we came upon
            self.driver.heed()
            if self.driver.stops >= STOP:
                raise Interrupted
        interrupts = not self.attended and self.driver.stops >= KILL
        self.told |= interrupts
        return interrupts

    def start_thread(self, drive: Callable[..., None], *given: Any) -> threading.Thread:
        """Return a thread that has begun to *drive*; raises `BackendUnavailable` where there is none."""
        thread = threading.Thread(target=drive, args=given, name="jobq-driver", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise BackendUnavailable(f"the thread that drives the run can't be started: {error}") from error
        return thread

    @contextlib.contextmanager
    def attention(self) -> Iterator[None]:
        """Inside the ``with`` this thread drives, or waits for the driver: each wait ends at a signal."""
        before, self.attended = self.attended, True
        try:
            with waking(self.driver.wake_fd):
                yield
        finally:
            self.attended = before


def prepare(
    graph: Graph,
    options: RunOptions,
    parameters: Mapping[str, Any],
    *,
    name: str,
    texts: bool,
    observers: Sequence[events.Observer],
    sink: Sink,
    preload: Preload | None = None,
    target: str | None = None,
    log: LogSettings | None = None,
    make_inlet: Callable[[Graph, Codec], Entrance] | None = None,
    source: Source | None = None,
    on_error: OnError | None = None,
    machine: Machine | None = None,
) -> Running:
    """
    Return a run that is ready to start: no worker exists yet.

    Its producers don't run with *make_inlet* (items come through the inlet), nor with *source*.
    Raises `PipelineError` for whatever can be known to be wrong before, `BackendUnavailable`.
    """
    wanted = None
    if machine is None:
        # Whoever names a backend means it; the default is meant to work.
        wanted = None if "backend" in options.model_fields_set else options.backend
        machine = Machine(backends.load(options.backend) if wanted is None else backends.load_default())
    backend_class = machine.backend
    if source is None and options.input is not None:
        source = input_source(options.input, graph)
    values = bind(graph, parameters, texts, producers=source is None and make_inlet is None)
    if source is not None:
        graph = _with_source(graph, source)
        values[source.stage.name] = dict(source.values)
    sizes, automatic = _sizes(graph, options)
    if make_inlet is not None:
        sizes.update({node.stage.name: 0 for node in graph.producers()})
    own_thread = backend_class.own_thread
    lanes = {
        key: node.stage.consumer.concurrency if node.stage.kind == "consumer" and own_thread else 1
        for key, node in graph.nodes.items()
    }
    if any(count > 1 for count in lanes.values()):
        # Imported once, not by every worker that is forked: it brings asyncio.
        importlib.import_module("jobq.lanes")
    may_log = any(node.signature.job_names for node in graph.nodes.values())
    if may_log and (log is not None or somebody_listens()):
        importlib.import_module("structlog")  # likewise: they may log
    run_id = machine.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    # Consumers' workers are all alike, and how many there will be may not be known yet.
    numbers = {
        key: range(sizes[key] if node.stage.kind == "producer" else 1) for key, node in graph.nodes.items()
    }
    place = uuid.uuid4().hex
    recipes: dict[str, Recipe] = {
        f"{key}/{index}": _recipe(
            graph,
            node,
            values,
            sink,
            run_id,
            Shard(index, sizes[key]),
            lanes[key],
            own_thread,
            log,
            place,
            addressing=source is not None and node.stage is source.stage,
            on_error=on_error,
            stops_at_failure=options.failure_limit is not None,
        )
        for key, node in graph.nodes.items()
        for index in numbers[key]
    }
    daemon = {
        f"{key}/{index}": node.stage.kind == "producer" or node.stage.consumer.daemon
        for key, node in graph.nodes.items()
        for index in numbers[key]
    }
    kept = _run_scoped(graph, values)
    if kept:
        recipes[RECIPE] = KeeperRecipe(place, kept, log)
    problems = find_by_name_problems(graph, options.start_method, backend_class.resolve(options.start_method))
    if problems:
        raise PipelineError(*problems)
    began = machine.clock.monotonic()
    producers = {node.stage.name for node in graph.producers()}
    plan = Plan(
        recipes,
        options.start_method,
        preload,
        daemon,
        _standard_input(graph, sizes),
        sum(sizes.values()) + bool(kept),
        [(RECIPE, RECIPE)] if kept else list(first_workers(sizes, producers)),
    )
    with contextlib.ExitStack() as undo, _telling_what_lacks():
        backend = backend_class(plan)  # type: ignore[call-arg]  # a Protocol has no constructor
        undo.callback(backend.close)
        watchers = Watchers(list(observers))
        forms = {node.stage.name: JsonForm(node.signature.item_type) for node in graph.consumers()}
        letters = Letters(run_id, name, target, forms)
        if isinstance(sink, Collect):
            sink.codec = backend.codec
        desk = open_desk(place, threads=backend.codec.encode(place) is place)
        if desk is not None:
            undo.callback(desk.close)
        driver = Driver(
            Scheduler(graph, sizes, lanes, machine.chance),
            backend,
            sizes,
            sink,
            watchers.tell,
            timeout=options.timeout,
            shutdown_timeout=options.shutdown_timeout,
            failure_limit=options.failure_limit,
            letter=letters.make,
            ticking=options.progress,
            inlet=make_inlet(graph, backend.codec) if make_inlet is not None else None,
            desk=desk,
            keeper=RECIPE if kept else None,
            clock=machine.clock,
            selector=machine.selector,
            automatic=automatic,
            leisure=sink if isinstance(sink, Collect) else None,
        )
        driver.scheduler.fed = make_inlet is not None
        undo.pop_all()
    running = Running(
        run_id, name, graph, options, backend, driver, sink, letters, watchers, began, machine.clock
    )
    if options.dead_letters is not None:
        from jobq.observe.dead_file import DeadLetterFile

        running.file = DeadLetterFile(options.dead_letters, run=run_id, pipeline=name, target=target)
        watchers.observers.append(running.file)
    watchers.tell(
        events.RunStarted(run_id, name, backend.name, backend.start_method, tuple(graph.nodes), wanted)
    )
    return running


@contextlib.contextmanager
def _telling_what_lacks() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackendUnavailable(describe_lack(error)) from error


def _with_source(graph: Graph, source: Source) -> Graph:
    """Return *graph* with *source* in place of its producers."""
    name = source.stage.name
    kept = {key: node for key, node in graph.nodes.items() if node.stage.kind == "consumer"}
    if name in kept:
        raise PipelineError(
            f"{describe(kept[name].stage)} is named like the stage that reads --input or dead letters:"
            " give it another name=."
        )
    node = Node(source.stage, read_signature(source.stage), tuple(map(Route, source.routes)), (0,))
    takers = chain.from_iterable(source.routes)
    edges = (*(Edge(name, taker) for taker in takers), *(e for e in graph.edges if e.source in kept))
    return Graph({name: node, **kept}, graph.resources, edges, graph.loops, graph.name)


def _sizes(graph: Graph, options: RunOptions) -> tuple[dict[str, int], list[str]]:
    """Return how many workers each stage gets, and for which stages that is only to begin with."""
    wanted = options.workers
    if isinstance(wanted, dict):
        unknown = [name for name in wanted if name not in graph.nodes]
        if unknown:
            raise PipelineError(
                *(
                    f"workers: there is no stage {name!r}; there are {', '.join(graph.nodes)}."
                    for name in unknown
                )
            )
    asked: dict[str, Workers] = {}
    for name, node in graph.nodes.items():
        asked[name] = node.stage.options.workers
        if isinstance(wanted, dict):
            asked[name] = wanted.get(name, asked[name])
        elif wanted is not None and node.stage.kind == "consumer":
            asked[name] = wanted
    shared = [
        f"{describe(node.stage)}: 'auto' is for consumers: a producer has as many workers as it is told."
        for name, node in graph.nodes.items()
        if node.stage.kind == "producer" and asked[name] == "auto"
    ]
    sizes = {name: 1 if count == "auto" else count for name, count in asked.items()}
    alike = [
        f"{describe(node.stage)}: {sizes[name]} workers would all give the same items;"
        "\n  Take a parameter annotated jobq.Shard, and give only the items of that share."
        for name, node in graph.nodes.items()
        if node.stage.kind == "producer"
        and sizes[name] > 1
        and not any(binding.kind == "shard" for binding in node.signature.bindings)
    ]
    if alike or shared:
        raise PipelineError(*shared, *alike)
    return sizes, [name for name, count in asked.items() if count == "auto"]


def _standard_input(graph: Graph, sizes: Mapping[str, int]) -> dict[str, str]:
    """Return for each producer's recipe why it can't have the program's standard input; "" if it has it."""
    producers = [
        f"{node.stage.name}/{n}" for node in graph.producers() for n in range(sizes[node.stage.name])
    ]
    why = ""
    if len(producers) > 1:
        why = (
            f"one worker only could read standard input, and this run's producers have {len(producers)}"
            " (--input - reads JSON lines in place of the producers)"
        )
    elif sys.stdin is not sys.__stdin__:
        why = "the program has put something else in place of its sys.stdin, which other processes can't read"
    return dict.fromkeys(producers, why)


def _recipe(
    graph: Graph,
    node: Node,
    values: Mapping[str, Mapping[str, Any]],
    sink: Sink,
    run_id: str,
    shard: Shard,
    lanes: int,
    own_thread: bool,
    log: LogSettings | None,
    place: str,
    *,
    addressing: bool,
    on_error: OnError | None,
    stops_at_failure: bool,
) -> StageRecipe:
    return StageRecipe(
        run_id,
        node.stage,
        node.signature,
        tuple(_route_use(graph, route, sink) for route in node.routes),
        node.member_routes,
        values.get(node.stage.name, {}),
        _resources(graph, graph.opening_order(node.stage.name) if node.resources else (), values),
        shard,
        lanes,
        own_thread,
        log,
        addressing,
        place,
        on_error,
        stops_at_failure,
    )


def _resources(
    graph: Graph, names: Iterable[str], values: Mapping[str, Mapping[str, Any]]
) -> tuple[ResourceUse, ...]:
    return tuple(
        ResourceUse(
            graph.resources[name].resource,
            graph.resources[name].signature,
            values.get(f"resource:{name}", {}),
        )
        for name in names
    )


def _run_scoped(graph: Graph, values: Mapping[str, Mapping[str, Any]]) -> tuple[ResourceUse, ...]:
    """Return the run-scoped resources that stages need, those that others need first."""
    names = dict.fromkeys(name for stage in graph.nodes for name in graph.opening_order(stage))
    shared = [name for name in names if graph.resources[name].resource.options.scope == "run"]
    return _resources(graph, shared, values)


def _route_use(graph: Graph, route: Route, sink: Sink) -> RouteUse:
    if not route.takers:
        return RouteUse(sink.kind)
    keys: list[tuple[int, Callable[..., Any]]] = []
    for place, taker in enumerate(route.takers):
        key = graph.nodes[taker].stage.consumer.key
        if key is not None:
            keys.append((place, key))
    return RouteUse("items", tuple(keys))
