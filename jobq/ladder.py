"""
Who hears Ctrl-C, SIGTERM and SIGHUP: every run in progress in this process, each on a ladder of its own.

There may be several (streams that are read in turn), and they need not end in the order in which they began.
So there is one handler for all, set by the first and put back by the last.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from jobq.report import Report

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ladder:
    """
    Takes the stop signals in a ``with``, from before its run is made until it is concluded.

    One that is ignored stays so (``nohup``). Only the main thread may set handlers: in another, signals stay
    the program's own business.
    """

    def __init__(self) -> None:
        self._early: list[int] = []
        self._climb: Callable[[int], bool] | None = None

    def __enter__(self) -> Self:
        _process.join(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _process.leave(self)
        if self._early and kind is not KeyboardInterrupt:  # no run was made that could have heard it
            signal.raise_signal(self._early[0])

    def lead(self, climb: Callable[[int], bool]) -> None:
        """Have *climb* hear every signal, also those that came before; see `hear`."""
        self._climb = climb
        while self._early:
            climb(self._early.pop(0))

    def hear(self, number: int) -> bool:
        """Take a signal; return whether the program itself is to be interrupted."""
        if self._climb is not None:
            return self._climb(number)
        self._early.append(number)
        return len(self._early) > 1


class _Process:
    """This process's handlers of the stop signals, while there is a ladder."""

    def __init__(self) -> None:
        self._ladders: list[Ladder] = []
        self._before: dict[int, Any] = {}

    def join(self, ladder: Ladder) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._ladders.append(ladder)
        for number in STOP_SIGNALS if not self._before else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self.hear)

    def leave(self, ladder: Ladder) -> None:
        if ladder not in self._ladders:
            return
        self._ladders.remove(ladder)
        # A stream may be closed by another thread, or be collected there: then the next signal puts back.
        if not self._ladders and threading.current_thread() is threading.main_thread():
            self._put_back()

    def _put_back(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # the handler's form
        """Tell every ladder; the program too if one of them says so."""
        if not self._ladders:
            self._put_back()
            signal.raise_signal(number)
        elif any([ladder.hear(number) for ladder in tuple(self._ladders)]):  # noqa: C419  # all shall hear
            raise KeyboardInterrupt


_process = _Process()


@contextlib.contextmanager
def waking(descriptor: int) -> Iterator[None]:
    """
    Have a signal end a wait of this thread for *descriptor*, inside the ``with``.

    The handler alone would not do: a signal that comes between the interpreter's last look and its wait only
    sets a flag.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)


def hand_on(number: int, report: Report | None, *, unfinished: bool) -> None:
    """
    Let the program hear of a stop signal that a run took: by its own handler, else by an `interruption`.

    Where work was left *unfinished* that is raised in any case. Where another run in progress has heard the
    signal too, it will say so at its end.
    """
    handler = signal.getsignal(number)
    if handler == _process.hear:
        if not unfinished:
            return
    elif callable(handler) and handler is not signal.default_int_handler:
        signal.raise_signal(number)  # not called here: this may be another thread than the main one
        if not unfinished:
            return
    raise interruption(report)


def interruption(report: Report | None) -> KeyboardInterrupt:
    """Return a `KeyboardInterrupt` whose ``report`` says what had been done."""
    error = KeyboardInterrupt()
    error.report = report  # type: ignore[attr-defined]  # as `RunFailed` has one
    return error


def interrupt_later() -> None:
    """
    Do to the main thread what Ctrl-C does, once it has left our caller and the finalizer that called it.

    An exception that is raised in a finalizer is lost.
    """
    callers = {sys._getframe(1).f_code, sys._getframe(2).f_code}
    if threading.current_thread() is threading.main_thread():
        threading.Thread(target=_interrupt, args=(callers,), name="jobq-interrupt", daemon=True).start()


def _interrupt(after: set[CodeType]) -> None:
    main = threading.main_thread().ident
    while main is not None and _is_in(sys._current_frames().get(main), after):
        time.sleep(0.001)
    _thread.interrupt_main()


def _is_in(frame: FrameType | None, codes: set[CodeType]) -> bool:
    while frame is not None:
        if frame.f_code in codes:
            return True
        frame = frame.f_back
    return False
