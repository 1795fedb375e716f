"""`Pipeline`: declare producers, consumers and resources; check them; run them."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from jobq.errors import JobsFailed, JobsLost, PipelineError, RunFailed
from jobq.files import check_files
from jobq.graph import Graph, build_graph, find_by_name_problems, graph_parameters
from jobq.ladder import Ladder, hand_on, interruption
from jobq.letters import EXCEPTIONS_KEPT
from jobq.load import refuse_while_loading
from jobq.mapstream import MapStream
from jobq.options import NOT_YET, RunOptions, read_run_options
from jobq.outcome import Outcome
from jobq.report import counted
from jobq.results import Collect, Discard, Fates, JsonLines, Sink
from jobq.running import Running, prepare
from jobq.session import Session
from jobq.stage import (
    ConsumerOptions,
    Function,
    ProducerOptions,
    Resource,
    ResourceOptions,
    Stage,
    StageOptions,
    locate,
    read_options,
)
from jobq.stream import ResultStream

if TYPE_CHECKING:
    from jobq.backend import Preload
    from jobq.events import Observer
    from jobq.inlet import Entrance
    from jobq.inputs import Source
    from jobq.report import Report
    from jobq.wire import Codec
    from jobq.work import OnError

F = TypeVar("F", bound=Callable[..., Any])
Sources = str | Function | Sequence[str | Function] | None


class Pipeline:
    """
    Producers, consumers and resources under one name.

    *run_options* are the defaults of its runs (`jobq.options.RunOptions`). Nothing is started until
    `run`, `stream` or ``jobq run``.
    """

    def __init__(self, name: str, **run_options: Any) -> None:
        if not isinstance(name, str) or not name:
            raise PipelineError(f"a pipeline's name is a text that is not empty; got {name!r}.")
        self.name = name
        self._stages: list[Stage] = []
        self._resources: list[Resource] = []
        self._defaults = dict(run_options)
        read_run_options(self._defaults)

    def __repr__(self) -> str:
        return f"<Pipeline {self.name!r}: {', '.join(stage.name for stage in self._stages) or 'empty'}>"

    # ── declare ──────────────────────────────────────────────────────────────

    @overload
    def producer(self, function: F, /, **options: Any) -> F: ...
    @overload
    def producer(self, /, **options: Any) -> Callable[[F], F]: ...

    def producer(self, function: F | None = None, /, **options: Any) -> F | Callable[[F], F]:
        """
        Declare a function that gives items; it is returned unchanged.

        Options: ``name``, ``workers`` (each calls it, with a `Shard` of its own), ``params`` (binds some of
        its parameters). Raises `PipelineError` for a wrong option.
        """
        return self._declare("producer", function, options)

    @overload
    def consumer(self, function: F, /, **options: Any) -> F: ...
    @overload
    def consumer(self, /, **options: Any) -> Callable[[F], F]: ...

    def consumer(self, function: F | None = None, /, **options: Any) -> F | Callable[[F], F]:
        """
        Declare a function that takes items; it is returned unchanged.

        Options: ``name``, ``source``, and those of `jobq.stage.ConsumerOptions`. Raises `PipelineError`
        for a wrong option.
        """
        return self._declare("consumer", function, options)

    def _declare(
        self, kind: Literal["producer", "consumer"], function: F | None, options: dict[str, Any]
    ) -> F | Callable[[F], F]:
        if function is None:
            return lambda function: self._add_stage(kind, function, dict(options))
        return self._add_stage(kind, function, options)

    def _add_stage(self, kind: Literal["producer", "consumer"], function: F, options: dict[str, Any]) -> F:
        name = self._name(kind, function, options)
        location = locate(function)
        what = f"{name}() ({location})"
        source = _sources(options.pop("source", None), what) if kind == "consumer" else ()
        model = ProducerOptions if kind == "producer" else ConsumerOptions
        others = ("name", "source") if kind == "consumer" else ("name",)
        read: StageOptions = read_options(model, what, options, others=others)
        for other in self._stages:
            if other.name == name:
                raise PipelineError(
                    f"{what}: a stage named {name!r} is declared at {other.location} already."
                    f"\n  Give one of them another name: @pipeline.{kind}(name=...)."
                )
        self._stages.append(Stage(name, kind, function, read, source, location))
        return function

    @overload
    def resource(self, function: F, /, **options: Any) -> F: ...
    @overload
    def resource(self, /, **options: Any) -> Callable[[F], F]: ...

    def resource(self, function: F | None = None, /, **options: Any) -> F | Callable[[F], F]:
        """
        Declare what stages may ask for by a parameter's name; the function is returned unchanged.

        A function, or a generator that yields once: opened once per worker before its first job, closed at
        its end. With ``scope="run"``: opened once, in a process of its own, and shared by all workers
        through a `jobq.shared.Proxy`. Options: ``name``, ``scope``.
        """
        if function is None:
            return lambda function: self._add_resource(function, dict(options))
        return self._add_resource(function, options)

    def _add_resource(self, function: F, options: dict[str, Any]) -> F:
        name = self._name("resource", function, options)
        location = locate(function)
        read: ResourceOptions = read_options(ResourceOptions, f"{name}() ({location})", options)
        if any(other.name == name for other in self._resources):
            raise PipelineError(f"{name}() ({location}): there is a resource {name!r} already.")
        self._resources.append(Resource(name, function, read, location))
        return function

    @staticmethod
    def _name(kind: str, function: object, options: dict[str, Any]) -> str:
        if not callable(function):
            raise PipelineError(f"@pipeline.{kind} takes a function, got {function!r}.")
        name = options.pop("name", None)
        if name is None:
            name = getattr(function, "__name__", None)
        if not isinstance(name, str) or not name:
            raise PipelineError(f"@pipeline.{kind}: {function!r} needs a name=.")
        return name

    # ── check ────────────────────────────────────────────────────────────────

    def graph(self, parameters: Mapping[str, Any] | None = None) -> Graph:
        """
        Return how the stages are connected; raises `PipelineError` with everything that is wrong.

        *parameters* are those of a run, if it is for one.
        """
        return build_graph(self._stages, self._resources, pipeline=self.name, given=parameters)

    def check(self) -> None:
        """Find every error of definition that shows before a run; raise one `PipelineError` with all."""
        problems: list[str] = []
        options = read_run_options(self._defaults)
        try:
            graph = self.graph()
        except PipelineError as error:
            problems += error.problems
        else:
            problems += find_by_name_problems(graph, options.start_method, self._resolved(options))
        if problems:
            raise PipelineError(*problems)

    @staticmethod
    def _resolved(options: RunOptions) -> str:
        from jobq import backends

        return backends.load(options.backend).resolve(options.start_method)

    @property
    def run_options(self) -> dict[str, Any]:
        """The defaults of this pipeline's runs, as they were given."""
        return dict(self._defaults)

    # ── run ──────────────────────────────────────────────────────────────────

    def run(self, **given: Any) -> Report:
        """
        Run to the end and return the report.

        Keywords are run options (`jobq.options.RunOptions`) or parameters of the run (``params={…}`` for
        names that collide). Raises `PipelineError` before anything starts, `JobsFailed` at the end if there
        are dead letters (unless ``check=False``), `RunFailed` if the run gave up, `JobsLost` if the books
        don't balance, and `KeyboardInterrupt`, with the ``report``, if it was told to stop by a signal. One
        for which the program has a handler of its own goes to that, and is raised only if work is unfinished.
        """
        options, parameters = self._read(given)
        with _observing(options) as observers:
            outcome = self.execute(options, parameters, observers=observers)
        return _raise_or_report(outcome, options)

    def stream(self, **given: Any) -> ResultStream:
        """
        Return an iterator over the results as they come; the run starts at the first ``next()``.

        Keywords and errors are those of `run`, raised at the end of the loop. Leaving the loop stops the
        run. ``.report`` holds the report when it is over.
        """
        options, parameters = self._read(given)
        options = _without(options, given, "stream", ("collect", "output"), "its results come in the loop")
        self._check_files(options)
        return ResultStream(
            lambda sink, observers: self._prepare(options, parameters, sink, observers),
            _observing(options),
            lambda outcome: _raise_or_report(outcome, options),
        )

    def over(self, items: Iterable[Any], *, ordered: bool, **given: Any) -> ResultStream:
        """
        Return what the only stage, a consumer that gives one thing for each item, gives for *items*.

        For `jobq.map`. They are read in the thread that asks for results. An item that fails raises at its
        turn, as does what *items* raises; else as `stream`.
        """
        options, parameters = self._read(given)
        useless = ("collect", "output", "input")
        options = _without(options, given, "map", useless, "its results come in the loop")
        options = options.model_copy(update={"check": False})  # of what failed the first is raised
        self._check_files(options)
        return MapStream(
            lambda sink, observers, make_inlet: self._prepare(
                options, parameters, sink, observers, make_inlet=make_inlet
            ),
            _observing(options),
            lambda outcome: _raise_or_report(outcome, options),
            items,
            ordered=ordered,
        )

    def open(self, **given: Any) -> Session:
        """
        Return a run in progress that the program feeds: producers don't run.

        Keywords are those of `run`. A context manager: its end waits for everything submitted, then closes;
        an exception stops the run. Raises `PipelineError` before anything starts.
        """
        options, parameters = self._read(given)
        useless = ("collect", "output", "input")
        options = _without(options, given, "open", useless, "its results are the futures' of submit()")
        self._check_files(options)
        cleanup = contextlib.ExitStack()
        observers = cleanup.enter_context(_observing(options))
        session: Session | None = None
        try:
            with Ladder():  # a signal that comes meanwhile strikes when there is something to close
                session = Session(
                    lambda make_inlet: self._prepare(
                        options, parameters, Fates(), observers, make_inlet=make_inlet
                    ),
                    cleanup,
                )
        except BaseException:
            if session is not None:
                session.stop()
            cleanup.close()
            raise
        return session

    def execute(
        self,
        options: RunOptions,
        parameters: Mapping[str, Any],
        *,
        texts: bool = False,
        observers: Sequence[Observer] = (),
        preload: Preload | None = None,
        target: str | None = None,
        output_fd: int | None = None,
        source: Source | None = None,
        on_error: OnError | None = None,
    ) -> Outcome:
        """
        Run to the end and return how it ended, without raising for what jobs did: for command lines.

        *texts*: parameters are texts to be read by their annotations. *output_fd*: where ``output="-"``
        writes. *preload* and *target*: how a child process finds the pipeline's file, and its name in
        dead letters. *source*: what takes the place of the producers. *on_error*: called in the worker with
        what jobs raise (`jobq.work.OnError`).
        """
        self._check_files(options)
        with _sink(options, output_fd) as sink, Ladder() as ladder:
            running = self._prepare(
                options, parameters, sink, observers, texts=texts, preload=preload, target=target,
                source=source, on_error=on_error,
            )  # fmt: skip
            try:
                ladder.lead(running.climb)
                if isinstance(sink, JsonLines):
                    sink.begin()
                with running.attention():
                    running.driver.run()
                return running.conclude()
            finally:
                running.driver.close()

    def _prepare(
        self,
        options: RunOptions,
        parameters: Mapping[str, Any],
        sink: Sink,
        observers: Sequence[Observer],
        *,
        texts: bool = False,
        preload: Preload | None = None,
        target: str | None = None,
        make_inlet: Callable[[Graph, Codec], Entrance] | None = None,
        source: Source | None = None,
        on_error: OnError | None = None,
    ) -> Running:
        refuse_while_loading()
        graph = build_graph(
            self._stages,
            self._resources,
            pipeline=self.name,
            given=dict(parameters),
            need_producer=options.input is None and make_inlet is None and source is None,
        )
        from jobq.observe import log_settings

        return prepare(
            graph,
            options,
            parameters,
            name=self.name,
            texts=texts,
            observers=observers,
            sink=sink,
            preload=preload,
            target=target,
            log=log_settings(options),
            make_inlet=make_inlet,
            source=source,
            on_error=on_error,
        )

    def _check_files(self, options: RunOptions) -> None:
        check_files(options, [*self._stages, *self._resources], self.name)

    def _read(self, given: dict[str, Any]) -> tuple[RunOptions, dict[str, Any]]:
        """Return *given* as run options and parameters of the run."""
        named = dict(given)
        params = named.pop("params", {})
        if not isinstance(params, Mapping) or not all(isinstance(name, str) for name in params):
            raise PipelineError(f"params= takes a dict of parameters by name, got {params!r}.")
        parameters = dict(params)
        declared: list[Stage | Resource] = [*self._stages, *self._resources]
        taken = {name for one in declared for name in _parameter_names(one)}
        if doubtful := RunOptions.model_fields.keys() & named.keys() & taken - parameters.keys():
            self._refuse_doubtful(sorted(doubtful))
        stated = {**self._defaults}
        for name, value in named.items():
            if name in RunOptions.model_fields:
                stated[name] = value
            elif name in parameters:
                raise PipelineError(f"the parameter {name!r} is given twice: as a keyword and in params=.")
            else:
                parameters[name] = value
        early = sorted(NOT_YET & named.keys())
        refused = [name for name in early if name not in taken]
        if refused:
            raise PipelineError(*(f"run option {name!r} is not built yet." for name in refused))
        return read_run_options(stated), parameters

    def _refuse_doubtful(self, names: Iterable[str]) -> None:
        """Raise `PipelineError` if one of *names*, which are run options, is a parameter as well."""
        try:
            graph = self.graph()
        except PipelineError:  # the run will say what is wrong
            return
        parameters = graph_parameters(graph)
        takers = {name: [who for who, _, _ in parameters[name]] for name in names if name in parameters}
        if takers:
            raise PipelineError(
                *(
                    f"{name}=... is an option of the run, and {' and '.join(who)} has a parameter of this "
                    f"name: give the parameter in params={{{name!r}: ...}}, or another name."
                    for name, who in takers.items()
                )
            )


def _parameter_names(declared: Stage | Resource) -> Iterator[str]:
    with contextlib.suppress(TypeError, ValueError):
        yield from inspect.signature(declared.function).parameters


def _sources(given: Sources, what: str) -> tuple[str | Function, ...]:
    sources: tuple[Any, ...]
    if isinstance(given, str) or callable(given) or not isinstance(given, Iterable):
        sources = (given,)
    else:
        sources = tuple(given)
    if not sources:
        raise PipelineError(f"{what}: source= names no stage; leave it out to take what comes before.")
    for source in sources:
        if source is not None and not isinstance(source, str) and not callable(source):
            raise PipelineError(f"{what}: source= takes stage functions or names, got {source!r}.")
    return tuple(source for source in sources if source is not None)


@contextlib.contextmanager
def _observing(options: RunOptions) -> Iterator[Sequence[Observer]]:
    """Give the observers that an embedding program asked for."""
    from jobq.observe import observing

    with observing(options) as observers:
        yield observers


def _without(
    options: RunOptions, given: Mapping[str, Any], method: str, names: Sequence[str], why: str
) -> RunOptions:
    """Return *options* without those that *method* has no use for; raises if one of them was *given*."""
    for name in names:
        if given.get(name):
            raise PipelineError(f"{method}() has no use for {name}=: {why}.")
    return options.model_copy(update={name: RunOptions.model_fields[name].default for name in names})


@contextlib.contextmanager
def _sink(options: RunOptions, output_fd: int | None) -> Iterator[Sink]:
    """Give the place where results go; a file is closed at the end, and emptied when the run begins."""
    if options.collect and options.output is not None:
        raise PipelineError("collect=True returns the results, output= writes them: ask for one of the two.")
    if options.collect:
        yield Collect()
    elif options.output is None:
        yield Discard()
    elif options.output == Path("-"):
        yield JsonLines(1 if output_fd is None else output_fd)
    else:
        try:
            fd = os.open(options.output, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise PipelineError(f"can't write results to {options.output}: {error.strerror}.") from error
        try:
            yield JsonLines(fd, anew=True)
        finally:
            os.close(fd)


def _raise_or_report(outcome: Outcome, options: RunOptions) -> Report:
    report = outcome.report
    if outcome.unbalanced is not None:
        raise JobsLost(f"the books don't balance, a bug in jobq: {outcome.unbalanced}", report)
    if outcome.heard is not None:
        hand_on(outcome.heard, report, unfinished=outcome.signal is not None)
    elif outcome.signal is not None:
        raise interruption(report)
    if outcome.gave_up is not None and "main guard" in outcome.gave_up:
        raise PipelineError(outcome.gave_up)
    if outcome.gave_up is not None:
        raise RunFailed(outcome.gave_up, report)
    dead = sum(stage.dead for stage in report.stages.values())
    cancelled = sum(stage.cancelled for stage in report.stages.values())
    unloadable = len(outcome.unloadable)
    if options.check and (dead or unloadable):
        rest = f", {cancelled} cancelled" if cancelled else ""
        rest += f", {counted(unloadable, 'result')} that could not be loaded" if unloadable else ""
        exceptions = (*outcome.exceptions, *outcome.unloadable)[:EXCEPTIONS_KEPT]
        message = f"pipeline {report.pipeline!r}: {counted(dead, 'dead letter')}{rest}"
        raise JobsFailed(message, exceptions, report)
    return report
