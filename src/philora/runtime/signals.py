"""SIGINT and SIGTERM stop a run in good order: at once where nothing would be lost, else after the step.

Loads without torch, so that a signal is heard from the first moment of a command.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from philora.errors import RunError
from philora.runtime import processes

REPEAT_SECONDS = 5.0
"""Ctrl-C in a terminal reaches each of several processes twice, from the terminal and from the launcher."""


class Interrupted(RunError):
    """A signal stopped the run; the message says how to continue.

    `exit_code` is 3 where something is saved for `--resume` to continue, else 128 and the signal's number, as shells
    have it.
    """

    def __init__(self, text: str, exit_code: int = 3) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Signalled(KeyboardInterrupt):
    """Raised where the signal arrived, or by who looked for one: no library takes it for an error of its own."""


class StopOnSignal:
    """In this block the first SIGINT or SIGTERM ends in `Interrupted`; a second one kills the process at once.

    Attributes:
        stopped_by: The name of the signal, once one has come.
        doing: What is going on, for the message.
        command: What starts the run, for the message.
        saved: Whether there is something on the disk that a run resumes from; asked when the message is written.
    """

    def __init__(self, doing: str, command: str) -> None:
        self.doing, self.command = doing, command
        self.saved: Callable[[], bool] = lambda: False
        self.stopped_by: str | None = None
        self._finishing = False
        self._received_at = 0.0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._received)
            except ValueError:  # not the main thread: signals are somebody else's there
                return self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
        if isinstance(error, Signalled) and self.stopped_by is not None:
            raise self.interrupted() from None

    def interrupted(self) -> Interrupted:
        """The error that says where the run stopped and how it continues."""
        what = f"{self.stopped_by}: stopped {self.doing}."
        if self.saved():
            resume = self.command if "--resume" in self.command else f"{self.command} --resume"
            return Interrupted(f"{what} Continue with: {resume}")
        code = 128 + int(signal.Signals[str(self.stopped_by)])
        return Interrupted(f"{what} Nothing was saved; start it again with: {self.command}", code)

    def check(self) -> None:
        """Raise if a signal has come; a destructor may have swallowed what the handler raised."""
        if self.stopped_by is not None and not self._finishing:
            raise Signalled

    def agreed(self) -> bool:
        """Return whether a signal has come to any of the run's processes; all of them ask at the same place."""
        number = processes.agreed(0 if self.stopped_by is None else int(signal.Signals[self.stopped_by]))
        if number and self.stopped_by is None:
            self.stopped_by = signal.Signals(number).name
        return number > 0

    def check_together(self) -> None:
        """Raise if a signal has come to any of the run's processes, for work that can be left and done again."""
        if self.agreed():
            raise Signalled

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """In this block a signal is only noted: whoever runs inside looks at `stopped_by` and ends in good order."""
        self.check()
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False

    def _received(self, number: int, frame: FrameType | None) -> None:
        repeated = self.stopped_by is not None and time.monotonic() - self._received_at < REPEAT_SECONDS
        if repeated and os.getpid() == self._process and processes.count() > 1:
            return
        if self.stopped_by is not None or os.getpid() != self._process:  # a second one, or a forked worker
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received_at = time.monotonic()
        self.stopped_by = signal.Signals(number).name
        if not self._finishing:
            raise Signalled
