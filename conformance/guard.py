"""Around somebody else's function: a limit of time, no warnings, and whatever it raises."""

from __future__ import annotations

import contextlib
import signal
import threading
import warnings
from collections.abc import Iterator
from types import FrameType

SECONDS = 300
"""What one question may take. A target that needs longer hangs."""

RAISABLE = (Exception, SystemExit)
"""What a target may raise without ending the check; sys.exit(0) in it must not pass for "right"."""


class WrongAnswerError(AssertionError):
    """What a target answered is wrong, in words. Its own assertions are plain AssertionErrors."""


def require(good: bool, what: str) -> None:
    """WrongAnswerError unless good."""
    if not good:
        raise WrongAnswerError(what)


def told(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within it a call is quiet, since warnings would come by the hundred, and has `SECONDS`."""
    with warnings.catch_warnings(), _at_most(SECONDS):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """TimeoutError after that, where the system can interrupt: in the main thread, not inside C code."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
