"""What was declared: a function, what it takes and gives, and the options it was declared with."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from jobq.errors import PipelineError
from jobq.options import suggest, wrong_values

Function: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of the work a producer's worker is to do: number ``index`` of ``count``."""

    index: int
    count: int


class Job:
    """
    What a job may know of itself, given to a parameter annotated `Job`.

    ``attempt`` and ``delivery`` count from 1: an attempt is a call, a delivery is a worker that had the
    job in hand. ``log`` is a structlog logger bound with run, stage, worker, job and attempt.
    """

    __slots__ = ("_log", "_make_log", "_note", "_stopping", "attempt", "delivery", "id", "key", "stage")

    def __init__(
        self,
        *,
        id: str,  # noqa: A002  # the contract's name
        stage: str,
        attempt: int,
        delivery: int,
        key: str | None,
        log: Callable[[], Any],
        note: Callable[[float | None, float | None], None],
        stopping: Callable[[], bool],
    ) -> None:
        self.id = id
        self.stage = stage
        self.attempt = attempt
        self.delivery = delivery
        self.key = key
        self._make_log = log
        self._log: Any = None
        self._note = note
        self._stopping = stopping

    @property
    def log(self) -> Any:  # Any: a bound logger has whatever methods its wrapper gives it
        """The job's logger, made when it is first asked for."""
        if self._log is None:
            self._log = self._make_log()
        return self._log

    def total(self, n: float) -> None:
        """Say how many items this producer will give."""
        self._note(None, n)

    def progress(self, done: float, total: float | None = None) -> None:
        """Say how far this job is."""
        self._note(done, total)

    @property
    def stopping(self) -> bool:
        """Whether the run is being stopped: a long job may end early."""
        return self._stopping()


class Options(BaseModel):
    """Options of one declaration: unknown names and wrong values are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class ProducerOptions(Options):
    """Options of ``@pipeline.producer``."""

    workers: int = Field(default=1, ge=1)
    params: dict[str, Any] = Field(default_factory=dict)


class ConsumerOptions(Options):
    """
    Options of ``@pipeline.consumer``; times in seconds, sizes in items and bytes.

    ``workers="auto"``: as many as the stage can use of the cores, changed as the run shows (`jobq.shares`).
    ``max_tasks_per_worker``: a worker is replaced after so many jobs (or batches). ``max_memory``: so is a
    process that has more resident bytes, what it shares with its program included, after the job in hand;
    threads have no memory of their own, and are not.
    """

    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    concurrency: int = Field(default=1, ge=1)
    batch: int | None = Field(default=None, ge=1)
    batch_timeout: float = Field(default=1.0, ge=0)
    max_retries: int = Field(default=0, ge=0)
    min_backoff: float = Field(default=0.1, ge=0)
    max_backoff: float = Field(default=60.0, ge=0)
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    max_deliveries: int = Field(default=3, ge=1)
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    queue_size: int = Field(default=1000, ge=1)
    queue_bytes: int = Field(default=64 * 1024 * 1024, ge=1)
    ordered: bool = False
    key: Callable[[Any], str] | None = None
    validate_items: bool = Field(default=True, alias="validate")
    daemon: bool = True
    max_tasks_per_worker: int | None = Field(default=None, ge=1)
    max_memory: int | None = Field(default=None, ge=1)
    params: dict[str, Any] = Field(default_factory=dict)

    @field_validator("retry_on", mode="before")
    @classmethod
    def _one_type_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, type) else value


class ResourceOptions(Options):
    """Options of ``@pipeline.resource``."""

    scope: Literal["worker", "run"] = "worker"


StageOptions: TypeAlias = ProducerOptions | ConsumerOptions


@dataclass(frozen=True, slots=True)
class Stage:
    """A producer or a consumer as declared. ``source`` is as given: functions or names."""

    name: str
    kind: Literal["producer", "consumer"]
    function: Function
    options: StageOptions
    source: tuple[str | Function, ...] = ()
    location: str = ""

    @property
    def consumer(self) -> ConsumerOptions:
        """The options of a consumer."""
        assert isinstance(self.options, ConsumerOptions)
        return self.options


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource as declared: opened once per worker, before its first job, or once for the run."""

    name: str
    function: Function
    options: ResourceOptions = field(default_factory=ResourceOptions)
    location: str = ""


def locate(function: Function) -> str:
    """Return ``file.py:line`` of *function*, the path as short as it can be from the current folder."""
    try:
        code = inspect.unwrap(function).__code__
    except AttributeError:
        return "?"
    path = os.path.relpath(code.co_filename)
    return f"{code.co_filename if path.startswith('..') else path}:{code.co_firstlineno}"


def describe(stage: Stage | Resource) -> str:
    """Return how messages name a stage: ``store() (pipeline.py:21)``."""
    return f"{stage.name}() ({stage.location})"


#: Begin the note on an error that came while a resource was opened or closed; the end of a sentence.
OPENING, CLOSING = "while opening the resource ", "while closing the resource "


def read_options(
    model: type[Options], what: str, given: dict[str, Any], *, others: tuple[str, ...] = ("name",)
) -> Any:
    """
    Return *given* as a *model*; *what* names the declaration, *others* are its options that were read.

    Raises `PipelineError` that lists every unknown option and wrong value.
    """
    try:
        return model(**given)
    except ValidationError as error:
        known = sorted([*others, *(field.alias or key for key, field in model.model_fields.items())])
        problems = [
            f"{what}: option {name}={value!r}: {message}."
            if name.partition(".")[0] in known
            else f"{what} has no option {name!r}{suggest(name, known)}; it has {', '.join(known)}."
            for name, value, message in wrong_values(error)
        ]
        raise PipelineError(*problems) from None
