"""
From declarations to edges: who takes what each stage gives, and everything that is wrong with that.

The one rule: for each type that a stage gives, the consumers that name the stage in ``source=`` and accept
the type take it; if none does, the first consumer without ``source=`` declared below it that accepts the
type; if there is none, it is a result.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobq.annotations import EMPTY, Binding, Signature, accepts, contained, read_signature, spell
from jobq.errors import PipelineError
from jobq.options import RunOptions, closest, suggest
from jobq.stage import ProducerOptions, Resource, Stage, describe
from jobq.validation import read_parameter


@dataclass(frozen=True, slots=True)
class Edge:
    """Items go from ``source`` to ``target``; None: they are results."""

    source: str
    target: str | None


@dataclass(frozen=True, slots=True)
class Route:
    """The stages that take an item together; none: it is a result."""

    takers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """
    A stage in its place.

    ``member_routes`` holds, for each declared output type, the index of its route. ``resources`` and
    ``parameters`` (of the run) are those that the function's own parameters name.
    """

    stage: Stage
    signature: Signature
    routes: tuple[Route, ...] = ()
    member_routes: tuple[int, ...] = ()
    resources: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    on_cycle: bool = False


@dataclass(frozen=True, slots=True)
class ResourceNode:
    """A resource and what it needs itself."""

    resource: Resource
    signature: Signature
    resources: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Graph:
    """A pipeline that was found to be right. ``loops`` are the edges by which items can come back."""

    nodes: dict[str, Node]
    resources: dict[str, ResourceNode] = field(default_factory=dict)
    edges: tuple[Edge, ...] = ()
    loops: frozenset[tuple[str, str]] = frozenset()
    name: str = ""

    def producers(self) -> list[Node]:
        """Return the producers in order of declaration."""
        return [node for node in self.nodes.values() if node.stage.kind == "producer"]

    def consumers(self) -> list[Node]:
        """Return the consumers in order of declaration."""
        return [node for node in self.nodes.values() if node.stage.kind == "consumer"]

    def sources_of(self, name: str) -> list[str]:
        """Return the stages whose items *name* takes."""
        return [edge.source for edge in self.edges if edge.target == name]

    def targets_of(self, name: str) -> list[str]:
        """Return the stages that take items of *name*."""
        return [edge.target for edge in self.edges if edge.source == name and edge.target is not None]

    def opening_order(self, name: str) -> list[str]:
        """Return the resources that stage *name* needs, those that others need first."""
        ordered: list[str] = []

        def visit(resource: str) -> None:
            for needed in self.resources[resource].resources:
                visit(needed)
            if resource not in ordered:
                ordered.append(resource)

        for resource in self.nodes[name].resources:
            visit(resource)
        return ordered


def build_graph(
    stages: Sequence[Stage],
    resources: Sequence[Resource] = (),
    *,
    pipeline: str = "",
    given: Mapping[str, Any] | None = None,
    need_producer: bool = False,
) -> Graph:
    """
    Return how *stages*, in order of declaration, are connected.

    *given* are the parameters of the run; None: there is no run yet, so a producer's may still be missing.
    Raises one `PipelineError` that lists everything that is wrong.
    """
    check = _Check(stages, resources, given)
    graph = check.graph(pipeline)
    if need_producer and not graph.producers():
        check.problems.append(
            f"pipeline {pipeline!r} has no producer: declare one with @pipeline.producer, "
            f"or feed it by pipeline.open()."
        )
    if check.problems:
        raise PipelineError(*dict.fromkeys(check.problems))
    return graph


class _Check:
    """One look at all the declarations; ``problems`` fills as it goes on."""

    def __init__(
        self, stages: Sequence[Stage], resources: Sequence[Resource], given: Mapping[str, Any] | None
    ) -> None:
        self.problems: list[str] = []
        self.stages = stages
        self.given = given
        self.resources = {resource.name: resource for resource in resources}
        self.signatures = {stage.name: read_signature(stage) for stage in stages}
        self.resource_signatures = {resource.name: read_signature(resource) for resource in resources}
        self._names(stages, "stages")
        self._names(resources, "resources")
        for declared, signature in self._all():
            self.problems += [f"{describe(declared)}: {problem}." for problem in signature.problems]
        self.sources = {stage.name: self._sources(stage) for stage in stages}

    def graph(self, pipeline: str) -> Graph:
        """Return the graph, and find what is wrong with it."""
        takers = {stage.name: self._takers(stage) for stage in self.stages}
        edges = tuple(dict.fromkeys(_edges(takers)))
        reach = _reach(edges)
        self._unreached(edges, reach)
        nodes = {stage.name: self._node(stage, takers[stage.name], reach) for stage in self.stages}
        inner = {
            name: ResourceNode(resource, self.resource_signatures[name], *self._needs(resource))
            for name, resource in self.resources.items()
        }
        self._resource_cycles(inner)
        self.problems += _unequal_scopes(inner)
        self.problems += _unfit_for_all(inner)
        for node in nodes.values():
            self.problems += _contradictions(node)
            self.problems += _unawaited(node, inner)
        loops = frozenset(
            (edge.source, edge.target)
            for edge in edges
            if edge.target is not None and edge.source in reach.get(edge.target, ())
        )
        return Graph(nodes, inner, edges, loops, pipeline)

    def _all(self) -> Iterator[tuple[Stage | Resource, Signature]]:
        for stage in self.stages:
            yield stage, self.signatures[stage.name]
        for resource in self.resources.values():
            yield resource, self.resource_signatures[resource.name]

    # ── names ──

    def _names(self, declared: Sequence[Stage] | Sequence[Resource], what: str) -> None:
        seen: dict[str, Stage | Resource] = {}
        for one in declared:
            if one.name in seen:
                self.problems.append(
                    f"two {what} are called {one.name!r}: {describe(seen[one.name])} and {describe(one)}. "
                    f"Give one of them another name=."
                )
            seen.setdefault(one.name, one)

    def _sources(self, stage: Stage) -> set[str] | None:
        """Return the names of the stages in ``source=``, None if it isn't given."""
        if not stage.source:
            return None
        named: set[str] = set()
        for source in stage.source:
            by = [s.name for s in self.stages if source in (s.name, s.function)]
            if not by:
                self.problems.append(self._unknown_source(stage, source))
            named.update(by)
        return named

    def _unknown_source(self, stage: Stage, source: Any) -> str:
        names = [other.name for other in self.stages]
        if isinstance(source, str):
            return (
                f"{describe(stage)}: source={source!r} names no stage{suggest(source, names)}; "
                f"there are {', '.join(names)}."
            )
        text = getattr(source, "__qualname__", repr(source))
        return (
            f"{describe(stage)}: source={text} is no stage: "
            f"declare it with @pipeline.producer or @pipeline.consumer, or name one of {', '.join(names)}."
        )

    # ── the rule ──

    def _takers(self, stage: Stage) -> list[tuple[str, ...]]:
        """Return, for each type that *stage* gives, who takes it."""
        return [self._takers_of(stage, given) for given in self.signatures[stage.name].outputs]

    def _takers_of(self, stage: Stage, given: Any) -> tuple[str, ...]:
        willing = [taker for taker in self.stages if self._takes(taker, given)]
        naming = [taker.name for taker in willing if stage.name in (self.sources[taker.name] or ())]
        if naming:
            return tuple(naming)
        below = self.stages[self.stages.index(stage) + 1 :]
        first = next((s.name for s in below if s in willing and self.sources[s.name] is None), None)
        return () if first is None else (first,)

    def _takes(self, taker: Stage, given: Any) -> bool:
        signature = self.signatures[taker.name]
        if taker.kind != "consumer" or not signature.item_known:
            return False
        return accepts(signature.item_type, given)

    # ── what nothing reaches ──

    def _unreached(self, edges: Sequence[Edge], reach: Mapping[str, set[str]]) -> None:
        producers = [stage.name for stage in self.stages if stage.kind == "producer"]
        reached = {name for producer in producers for name in reach.get(producer, ())}
        if not producers:  # a pipeline that is fed by open(): whoever names no source can be fed
            fed = [stage.name for stage in self.stages if self.sources[stage.name] is None]
            reached = {*fed, *(name for entry in fed for name in reach.get(entry, ()))}
        missed = [s for s in self.stages if s.kind == "consumer" and s.name not in reached]
        names = {stage.name for stage in missed}
        feeders = {
            stage.name: {e.source for e in edges if e.target == stage.name} & names - {stage.name}
            for stage in missed
        }
        first = {name for name in names if not feeders[name]}
        behind = {name for one in first for name in reach.get(one, ())}
        for stage in missed:
            if stage.name in first or stage.name not in behind:
                self._explain_unreached(stage, looping=bool(feeders[stage.name]))

    def _explain_unreached(self, stage: Stage, looping: bool) -> None:
        signature = self.signatures[stage.name]
        if not signature.item_known:
            return  # that was told already
        wanted, named = spell(signature.item_type), self.sources[stage.name]
        above = self.stages[: self.stages.index(stage)]
        giving = [s for s in self.stages if s.name in named] if named is not None else above
        if (named is not None and not named) or any(_gives_unknown(self.signatures[s.name]) for s in giving):
            return  # what is wrong there was told already, and may be all
        who = describe(stage)
        if looping:
            self.problems.append(
                f"{who} is reached only from a loop that no producer leads into: "
                f"let a producer give {_a(wanted)}."
            )
        elif (instead := self._taken_instead(stage, giving)) is not None:
            giver, taker = instead
            self.problems.append(
                f"nothing reaches {who}: "
                f"the {wanted} that {describe(giver)} gives goes to {describe(taker)}.\n"
                f"  Name the source to get them too: source={giver.name!r} on both."
            )
        else:
            self.problems.append(self._nothing_gives(stage, wanted, giving, named is not None))

    def _taken_instead(self, stage: Stage, giving: Sequence[Stage]) -> tuple[Stage, Stage] | None:
        for giver in giving:
            for given in self.signatures[giver.name].outputs:
                if self._takes(stage, given) and (takers := self._takers_of(giver, given)):
                    return giver, next(s for s in self.stages if s.name == takers[0])
        return None

    def _nothing_gives(self, stage: Stage, wanted: str, giving: Sequence[Stage], named: bool) -> str:
        signature = self.signatures[stage.name]
        given = "; ".join(f"{describe(s)} gives {_given(self.signatures[s.name])}" for s in giving)
        whole = next(filter(None, (self._given_whole(s, stage) for s in reversed(giving))), None)
        others = [s for s in self.stages if s not in giving and s is not stage and self._gives(s, stage)]
        if named:
            other = f" {others[0].name}() does: name it." if others else ""
            fix = whole or f"Let {giving[0].name}() return {wanted}, or name another stage in source=.{other}"
            return f"no source of {describe(stage)} gives {_a(wanted)}; {given}.\n  {fix}"
        text = f"nothing above {describe(stage)} gives {_a(wanted)}" + (f"; {given}." if given else ".")
        if whole is not None:
            return f"{text}\n  {whole}"
        if others:
            below = others[0]
            return (
                f"{text}\n  {describe(below)} gives it: "
                f"name it with @pipeline.consumer(source={below.name!r})."
            )
        if signature.item in self.resources:
            return (
                f"{text}\n  Its first parameter, {signature.item}, is its item: put the resource behind it."
            )
        fix = "name the stage that gives it: @pipeline.consumer(source=...)."
        return f"{text}\n  " + (
            f"Let {giving[-1].name}() return {wanted}, or {fix}" if giving else fix.capitalize()
        )

    def _given_whole(self, giver: Stage, taker: Stage) -> str | None:
        """Return what to do if *taker* takes what is in a container that *giver* gives as one item."""
        signature = self.signatures[giver.name]
        for given in signature.outputs:
            inside = contained(given)
            if inside is EMPTY or not self._takes(taker, inside):
                continue
            how = f"-> Iterator[{spell(self.signatures[taker.name].item_type if inside is Any else inside)}]"
            fix = f"yield what is in it, {how}" if signature.many else f"annotate it {how} to give each item"
            return f"{giver.name}() gives one {spell(given)}: {fix}."
        return None

    def _gives(self, giver: Stage, taker: Stage) -> bool:
        return any(self._takes(taker, given) for given in self.signatures[giver.name].outputs)

    # ── parameters ──

    def _node(self, stage: Stage, takers: list[tuple[str, ...]], reach: Mapping[str, set[str]]) -> Node:
        distinct = list(dict.fromkeys(takers))
        return Node(
            stage,
            self.signatures[stage.name],
            tuple(map(Route, distinct)),
            tuple(distinct.index(one) for one in takers),
            *self._needs(stage),
            on_cycle=stage.name in reach.get(stage.name, ()),
        )

    def _needs(self, declared: Stage | Resource) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the resources and the run parameters that *declared* needs."""
        own = declared.name if isinstance(declared, Resource) else None
        signature = self.resource_signatures[declared.name] if own else self.signatures[declared.name]
        bound = _bound(declared)
        self.problems += _wrong_params(declared, signature, bound)
        free = [b for b in signature.bindings if b.kind == "free" and b.name not in bound]
        resources = tuple(b.name for b in free if b.name in self.resources and b.name != own)
        rest = [b for b in free if b.name not in resources]
        for binding in rest:
            if binding.default is EMPTY and not self._available(declared, binding.name):
                self.problems.append(self._unavailable(declared, binding.name))
        return resources, tuple(b.name for b in rest)

    def _available(self, declared: Stage | Resource, name: str) -> bool:
        if isinstance(declared, Stage) and declared.kind == "producer":
            return True  # `bind` asks for it, when a producer is to run
        return name in (self.given or ()) or any(
            binding.name == name and binding.kind == "free" and name not in _bound(stage)
            for stage in self.stages
            if stage.kind == "producer"
            for binding in self.signatures[stage.name].bindings
        )

    def _unavailable(self, declared: Stage | Resource, name: str) -> str:
        known = [*self.resources, *(self.given or ())]
        text = (
            f"{describe(declared)}: its parameter {name} is neither a resource nor a parameter of the run, "
            f"and has no default{suggest(name, known)}"
        )
        if self.given is not None:
            return (
                f"{text}: run with {name}=... (jobq run -p {name}=...), "
                f"or declare @pipeline.resource def {name}()."
            )
        return (
            f"{text}: declare @pipeline.resource def {name}(), or give it a default.\n"
            f"  Is every run to give {name}=...? Let a producer take it, too: its parameters are the run's."
        )

    def _resource_cycles(self, resources: Mapping[str, ResourceNode]) -> None:
        reach = _reach([Edge(name, needed) for name, node in resources.items() for needed in node.resources])
        looping = [name for name in resources if name in reach.get(name, ())]
        if looping:
            who = ", ".join(describe(resources[name].resource) for name in looping)
            self.problems.append(
                f"resources need each other in a circle: {who}. Let one be built without the other."
            )


def _gives_unknown(signature: Signature) -> bool:
    return signature.gives and not signature.outputs


def _given(signature: Signature) -> str:
    return " | ".join(map(spell, signature.outputs)) or "nothing"


def _a(word: str) -> str:
    return f"{'an' if word[:1].lower() in 'aeio' else 'a'} {word}"


def _edges(takers: Mapping[str, list[tuple[str, ...]]]) -> Iterator[Edge]:
    for source, by_type in takers.items():
        for targets in by_type:
            for target in targets or (None,):
                yield Edge(source, target)


def _reach(edges: Iterable[Edge]) -> dict[str, set[str]]:
    """Return, for each stage, those that its items can come to."""
    after: dict[str, set[str]] = {}
    for edge in edges:
        if edge.target is not None:
            after.setdefault(edge.source, set()).add(edge.target)
    reach: dict[str, set[str]] = {}
    for start in after:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = after.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        reach[start] = seen
    return reach


def _contradictions(node: Node) -> Iterator[str]:
    stage, who = node.stage, describe(node.stage)
    sharded = any(binding.kind == "shard" for binding in node.signature.bindings)
    if isinstance(stage.options, ProducerOptions):
        if stage.options.workers > 1 and not sharded:
            yield (
                f"{who}: workers={stage.options.workers}, so each worker would give all the items: "
                f"let it take a parameter annotated Shard and give its part, or remove workers=."
            )
        return
    if sharded:
        yield f"{who}: only a producer has a Shard, a consumer's workers share its items: remove it."
    options = stage.consumer
    if options.ordered and node.on_cycle:
        yield f"{who}: ordered=True in a loop, where there is no last item to wait for: remove ordered=."
    if "batch_timeout" in options.model_fields_set and options.batch is None:
        yield f"{who}: batch_timeout= without batch=: say how many items make a batch, or remove it."
    if {
        "min_backoff",
        "max_backoff",
    } <= options.model_fields_set and options.min_backoff > options.max_backoff:
        yield f"{who}: min_backoff={options.min_backoff} is more than max_backoff={options.max_backoff}."


# ── the run's parameters ─────────────────────────────────────────────────────


def graph_parameters(graph: Graph) -> dict[str, list[tuple[str, Any, Any]]]:
    """Return the parameters of a run: who takes each, as ``(description, annotation, default)``."""
    found: dict[str, list[tuple[str, Any, Any]]] = {}
    for _, declared, names, signature in _owners(graph):
        for binding in signature.bindings:
            if binding.name in names:
                found.setdefault(binding.name, []).append(
                    (describe(declared), binding.annotation, binding.default)
                )
    return found


def bind(
    graph: Graph, given: Mapping[str, Any], texts: bool = False, *, producers: bool = True
) -> dict[str, dict[str, Any]]:
    """
    Return the run parameters of each stage, and of each resource as ``resource:NAME``, by name.

    A declaration's own ``params=`` bind first; parameters that were not given are left to their defaults, or
    have a producer's, whose parameters are the run's, where they have none of their own.
    *texts*: the values are strings of the command line. *producers*: they are to run, so they need theirs.
    Raises `PipelineError` that lists every name that nobody takes, every value missing and every wrong one.
    """
    known = graph_parameters(graph)
    # A keyword that nothing takes may be a misspelt option; on the command line these stand apart.
    options = () if texts else tuple(RunOptions.model_fields)
    problems = [_untaken(graph, name, known, options) for name in given if name not in known]
    bound: dict[str, dict[str, Any]] = {}
    for key, declared, names, signature in _owners(graph):
        values = bound[key] = _read_params(declared, signature)
        needed = producers or not isinstance(declared, Stage) or declared.kind == "consumer"
        for binding in signature.bindings:
            if binding.name not in names:
                continue
            if binding.name in given:
                try:
                    values[binding.name] = read_parameter(binding.annotation, given[binding.name], texts)
                except ValueError as error:
                    problems.append(_wrong_value(declared, binding, given[binding.name], error))
            elif binding.default is EMPTY and needed:
                default = _default_of_the_run(graph, binding.name)
                if default is EMPTY:
                    problems.append(
                        f"{describe(declared)} needs the parameter {binding.name}: "
                        f"run with {binding.name}=... (jobq run -p {binding.name}=...), or give it a default."
                    )
                else:
                    values[binding.name] = default
    if problems:
        raise PipelineError(*problems)
    return bound


def _default_of_the_run(graph: Graph, name: str) -> Any:
    """Return the default that a producer has for a parameter, `EMPTY` if none has one."""
    defaults = [
        binding.default
        for node in graph.producers()
        for binding in node.signature.bindings
        if binding.name == name and name in node.parameters and binding.default is not EMPTY
    ]
    return defaults[0] if defaults else EMPTY


def _owners(graph: Graph) -> Iterator[tuple[str, Stage | Resource, tuple[str, ...], Signature]]:
    for name, node in graph.nodes.items():
        yield name, node.stage, node.parameters, node.signature
    for name, inner in graph.resources.items():
        yield f"resource:{name}", inner.resource, inner.parameters, inner.signature


def _untaken(graph: Graph, name: str, known: Iterable[str], options: Iterable[str]) -> str:
    if name in graph.resources:
        return (
            f"{name} is a resource ({describe(graph.resources[name].resource)}), not a parameter of the run."
        )
    names = list(known)
    there = f"there are {', '.join(names)}" if names else "this pipeline has no parameters"
    close = closest(name, [*names, *options])
    kind = "" if close in names else "the run option "
    meant = "" if close is None else f" (did you mean {kind}{close!r}?)"
    return f"nothing takes a parameter {name!r}{meant}; {there}."


def _wrong_value(declared: Stage | Resource, binding: Binding, value: Any, error: ValueError) -> str:
    kind = spell(binding.annotation)
    return f"parameter {binding.name}={value!r} of {describe(declared)} is no {kind}: {error}."


def _unequal_scopes(resources: Mapping[str, ResourceNode]) -> Iterator[str]:
    for node in resources.values():
        for name in node.resources:
            who, needed = node.resource, resources[name].resource
            if who.options.scope == "run" and needed.options.scope == "worker":
                yield (
                    f"{describe(who)}: there is one for the run, but it needs {describe(needed)}, of which "
                    f'every worker has its own: let that be @pipeline.resource(scope="run"), too.'
                )


def _unfit_for_all(resources: Mapping[str, ResourceNode]) -> Iterator[str]:
    """Yield what a resource that there is once for the run can't be, or ask for."""
    for node in resources.values():
        if node.resource.options.scope == "run":
            if node.signature.is_async:
                yield f"{describe(node.resource)}: one for the run can't be async: make it a plain function."
            if node.signature.job_names:
                yield f"{describe(node.resource)}: one for the run has no Job: ask for it in the stage."


def _unawaited(node: Node, resources: Mapping[str, ResourceNode]) -> Iterator[str]:
    """Yield which async resources a stage needs, itself or through others, that has no event loop."""
    front, seen = list(node.resources), set[str]()
    while front and not node.signature.is_async:
        name = front.pop()
        if name in seen:
            continue
        seen.add(name)
        if resources[name].signature.is_async:
            yield (
                f"{describe(node.stage)} needs the async resource {describe(resources[name].resource)}, and "
                "is not async itself: make the stage async def, or the resource a plain function."
            )
        front += resources[name].resources


def _bound(declared: Stage | Resource) -> Mapping[str, Any]:
    return declared.options.params if isinstance(declared, Stage) else {}


def _read_params(declared: Stage | Resource, signature: Signature) -> dict[str, Any]:
    bound = _bound(declared)
    return {
        b.name: read_parameter(b.annotation, bound[b.name], False)
        for b in signature.bindings
        if b.name in bound
    }


def _wrong_params(
    declared: Stage | Resource, signature: Signature, bound: Mapping[str, Any]
) -> Iterator[str]:
    free = {binding.name: binding for binding in signature.bindings if binding.kind == "free"}
    for name, value in bound.items():
        if name not in free:
            has = f"; it has {', '.join(free)}" if free else ""
            close = suggest(name, free)
            yield f"{describe(declared)}: params= names {name!r}, which is no parameter of it{close}{has}."
            continue
        try:
            read_parameter(free[name].annotation, value, False)
        except ValueError as error:
            yield _wrong_value(declared, free[name], value, error)


# ── functions that another process must find ─────────────────────────────────


def find_by_name_problems(graph: Graph, asked: str, start_method: str) -> list[str]:
    """
    Return a text for each function that a worker could not find by its name.

    It is started by *start_method*, which is what the one *asked* for means here and now.
    """
    if start_method not in ("spawn", "forkserver"):
        return []
    problems = []
    for _, declared, _, _ in _owners(graph):
        things = {"its function": declared.function}
        if isinstance(declared, Stage) and declared.kind == "consumer" and declared.consumer.key is not None:
            things["its key="] = declared.consumer.key
        for what, thing in things.items():
            try:
                pickle.dumps(thing)
                _refuse_unnamed_main(thing)
            except Exception as error:  # pickle raises several kinds, and runs user code
                problems.append(
                    f"{describe(declared)}: {what} can't be found by name in a worker under "
                    f"start_method={start_method!r} ({error}){_why(asked)}: move it to the top level of a "
                    f"module, or use start_method='fork'."
                )
    return problems


def _why(asked: str) -> str:
    """Return, as a part of a sentence, why "auto" is not a fork."""
    others = [one.name for one in threading.enumerate() if one is not threading.current_thread()]
    if asked != "auto" or not others:
        return ""
    return f", which 'auto' means while other threads run (here {', '.join(others)})"


def _refuse_unnamed_main(thing: Any) -> None:
    """Raise if *thing* is of a ``__main__`` that no child can load (``python -c``, standard input)."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if getattr(thing, "__module__", None) == "__main__" and not (file and os.path.exists(file)):  # noqa: PTH110
        raise pickle.PicklingError("the main program is not a file")
