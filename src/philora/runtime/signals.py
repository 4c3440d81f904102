"""Stop a run on SIGINT or SIGTERM: at once if nothing would be lost, else after the step.

This module loads without torch, so that a command handles signals from its start.
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
    """A signal stopped the run. The message names the command to continue.

    `exit_code` is 3 if `--resume` can continue from a checkpoint, else 128 plus the signal's number, as in shells.
    """

    def __init__(self, text: str, exit_code: int = 3) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class Signalled(KeyboardInterrupt):
    """Raised where a signal arrived or was checked for. It is a KeyboardInterrupt, so libraries do not catch it."""


class StopOnSignal:
    """Raise `Interrupted` on the first SIGINT or SIGTERM in this block; a second one kills the process at once.

    Attributes:
        stopped_by: The name of the signal, once one has arrived.
        doing: The current work, for the message.
        command: The command that starts the run, for the message.
        saved: Returns whether the run can be resumed from the disk; called when the message is written.
    """

    def __init__(self, doing: str, command: str) -> None:
        self.doing, self.command = doing, command
        self.saved: Callable[[], bool] = lambda: False
        self.stopped_by: str | None = None
        self._finishing = False
        self._other_lost = False
        self._received_at = 0.0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._received)
            except ValueError:  # not the main thread, which handles the signals
                return self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        for number, handler in self._previous.items():
            if number != signal.SIGTERM or not self._other_lost:
                signal.signal(number, handler)
        self._previous.clear()
        if isinstance(error, Signalled) and self.stopped_by is not None:
            raise self.interrupted() from None

    def interrupted(self) -> Interrupted:
        """Return the error that tells where the run stopped and how to continue."""
        what = f"{self.stopped_by}: stopped {self.doing}."
        if self.saved():
            resume = self.command if "--resume" in self.command else f"{self.command} --resume"
            return Interrupted(f"{what} Continue with: {resume}")
        code = 128 + int(signal.Signals[str(self.stopped_by)])
        return Interrupted(f"{what} Nothing was saved; start it again with: {self.command}", code)

    def check(self) -> None:
        """Raise if a signal has arrived; a destructor may have swallowed the handler's exception."""
        if self.stopped_by is not None and not self._finishing:
            raise Signalled

    def agreed(self) -> bool:
        """Return whether a signal has arrived in any of the run's processes. All of them must call it together."""
        number = processes.agreed(0 if self.stopped_by is None else int(signal.Signals[self.stopped_by]))
        if number and self.stopped_by is None:
            self.stopped_by = signal.Signals(number).name
        return number > 0

    def check_together(self) -> None:
        """Raise if a signal has arrived in any of the run's processes, for work that can be repeated."""
        if self.agreed():
            raise Signalled

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Record a signal in this block without raising; the code inside checks `stopped_by` and ends cleanly."""
        self.check()
        self._finishing = True
        try:
            yield
        except RuntimeError as error:
            if processes.lost(error) and signal.SIGTERM in self._previous:
                # The launcher now sends SIGTERM to the remaining processes, which is not why the run ends.
                self._other_lost = True
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise
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
