"""
`simulate`: a pipeline run by the real scheduler and driver in a world of fake workers and fake time.

    from jobq.testing import simulate

    def test_every_page_is_stored_whatever_breaks():
        simulate(pipeline, seed=range(1000))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from signal import SIGINT
from typing import TYPE_CHECKING, Any, cast, overload

from jobq import backends
from jobq.errors import PipelineError
from jobq.graph import build_graph
from jobq.results import Collect
from jobq.running import Machine, prepare
from jobq.testing.fleet import Fleet
from jobq.testing.ledger import Ledger
from jobq.testing.world import Faults, Violation, Waiter, World

if TYPE_CHECKING:
    from jobq.backend import Backend
    from jobq.events import Event
    from jobq.pipeline import Pipeline
    from jobq.report import Report
    from jobq.running import Running

#: So many lines of what happened stand in the message of a failure; `SimulationFailed.trace` has all.
LINES_SHOWN = 25
#: Run options that mean something in a simulated run.
OPTIONS = frozenset({"backend", "start_method", "workers", "max_failures", "fail_fast", "shutdown_timeout"})


class SimulationFailed(AssertionError):
    """A promise was broken under the faults of ``seed``, which breaks it again; ``trace`` tells how."""

    def __init__(self, message: str, seed: int, trace: str) -> None:
        super().__init__(message)
        self.seed = seed
        self.trace = trace


@dataclass(frozen=True, slots=True)
class Simulation:
    """
    One simulated run that kept every promise.

    ``report`` is that of a run with ``collect=True, check=False``; ``seconds`` in it are the fake clock's.
    ``events`` are all that was told to observers, ``trace`` is what workers and driver did, a line each.
    ``late`` is how many answers came for jobs that had been taken back, ``waits`` how often the driver
    waited.
    """

    seed: int
    faults: Faults
    report: Report
    events: tuple[Event, ...]
    late: int
    waits: int
    told: list[tuple[Any, ...]] = field(repr=False)

    @property
    def trace(self) -> str:
        """What happened, a line each: when, who, what."""
        return "\n".join(_lines(self.told))


@overload
def simulate(
    pipeline: Pipeline, seed: int = 0, *, faults: Faults | None = None,
    invariant: Callable[[Simulation], object] | None = None, **given: Any,
) -> Simulation: ...  # fmt: skip
@overload
def simulate(
    pipeline: Pipeline, seed: Iterable[int], *, faults: Faults | None = None,
    invariant: Callable[[Simulation], object] | None = None, **given: Any,
) -> int: ...  # fmt: skip
def simulate(
    pipeline: Pipeline,
    seed: int | Iterable[int] = 0,
    *,
    faults: Faults | None = None,
    invariant: Callable[[Simulation], object] | None = None,
    **given: Any,
) -> Simulation | int:
    """
    Run *pipeline* under injected faults; return what happened, or of several seeds how many were run.

    Your functions run, in this thread; the workers that call them are fake, and so is the clock: they die,
    answer late and in odd orders, jobs fail and are taken back, signals come, all as *seed* draws it from
    *faults*. What must hold whatever happens is judged from outside: every item comes to one end and reaches
    each taker once, no job is in two places, ``ordered`` stages keep their order, attempts, deliveries and
    queues their limits, the books balance and the run ends. `SimulationFailed` says which promise broke, and
    the seed.

    *invariant* is called with each `Simulation`, for what must hold of yours; if it raises, a
    `SimulationFailed` names the seed. Other keywords are parameters of the run, or the run options
    ``workers``, ``max_failures``, ``fail_fast``, ``shutdown_timeout`` and ``backend`` (items are pickled as
    between processes, unless it is one whose workers are threads). Dead letters, of which there will be many,
    are in the report and raise nothing.

    Not simulated: what your functions wait for takes real time, jobs in one worker don't interleave, and the
    resources of a worker that dies are closed.
    """
    simulator = _Simulator(pipeline, faults if faults is not None else Faults(), given)
    if isinstance(seed, int):
        return cast("Simulation", simulator.run(seed, invariant))
    count = 0
    for one in seed:
        simulator.run(one, invariant, wanted=invariant is not None)
        count += 1
    return count


class _Simulator:
    """A pipeline made ready once, to be run under many seeds."""

    def __init__(self, pipeline: Pipeline, faults: Faults, given: dict[str, Any]) -> None:
        self._name = pipeline.name
        self._faults = faults
        self._options, self._parameters = pipeline._read(given)
        unused = [name for name in given if name in type(self._options).model_fields and name not in OPTIONS]
        if unused:
            raise PipelineError(
                *(f"simulate() has no use for {name}=: nothing is written." for name in unused)
            )
        self._options = self._options.model_copy(
            update={"dead_letters": None, "progress": False, "input": None}
        )
        self._graph = build_graph(
            pipeline._stages, pipeline._resources, pipeline=pipeline.name, given=dict(self._parameters)
        )
        chosen = backends.load(self._options.backend)
        self._by_reference = chosen.resolve(self._options.start_method) not in ("fork", "forkserver", "spawn")

    def run(
        self, seed: int, invariant: Callable[[Simulation], object] | None, *, wanted: bool = True
    ) -> Simulation | None:
        world = World(seed, self._faults)
        waiter = Waiter(world)
        told: list[Event] = []
        running: Running | None = None
        try:
            ledger = Ledger(self._graph, world)
            fleet = Fleet(world, ledger, by_reference=self._by_reference)
            machine = Machine(cast("type[Backend]", fleet), world, waiter, world.chance, f"sim-{seed}")
            running = prepare(
                self._graph, self._options, self._parameters, name=self._name, texts=False,
                observers=[told.append], sink=Collect(), machine=machine,
            )  # fmt: skip
            ledger.watch(running)
            _let_signals_come(world, running)
            running.driver.run()
            ledger.close()
        except PipelineError:
            raise
        except Violation as violation:
            raise self._failed(seed, str(violation), world) from None
        except Exception as error:  # of the scheduler or the driver: users' are their jobs' failures
            raise self._failed(seed, f"the driver raised {type(error).__name__}: {error}", world) from error
        finally:
            if running is not None:
                running.driver.close()
        if not wanted:
            return None
        report = running.conclude().report
        simulation = Simulation(
            seed, world.faults, report, tuple(told), ledger.late, waiter.waits, world.told
        )
        if invariant is not None:
            try:
                invariant(simulation)
            except Exception as error:
                what = f"the invariant does not hold: {type(error).__name__}: {error}"
                raise self._failed(seed, what, world) from error
        return simulation

    def _failed(self, seed: int, what: str, world: World) -> SimulationFailed:
        lines = list(_lines(world.told))
        shown = "\n  ".join(lines[-LINES_SHOWN:])
        faults = "" if self._faults == Faults() else f", faults={self._faults}"
        again = f"simulate({self._name}, seed={seed}{faults})"
        message = (
            f"{what}\n  Run it again: {again}\n  The last of {len(lines)} things that happened:\n  {shown}"
        )
        return SimulationFailed(message, seed, "\n".join(lines))


def _let_signals_come(world: World, running: Running) -> None:
    """Draw whether and when the run is stopped: by signals, or since nobody wants its results."""
    chance = world.chance
    if chance.random() >= world.faults.signals:
        return
    at = 0.0
    for _ in range(chance.choice((1, 1, 2, 3))):
        at += chance.expovariate(1 / (world.pace * 20))
        abandoned = chance.random() < 0.1

        def come(abandoned: bool = abandoned) -> None:
            world.tell("nobody wants the results" if abandoned else "a signal comes")
            world.woken = True
            if abandoned:
                running.driver.abandon()
            else:
                running.driver.request_stop(SIGINT)

        world.at(at, come)


def _lines(told: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    for now, what, *who in told:
        name, *rest = who or ("",)
        yield f"{now - 1000:12.6f}  {name} {what} {' '.join(map(str, rest))}".rstrip()


__all__ = ["Faults", "Simulation", "SimulationFailed", "simulate"]
