"""Compute answers in one thread, a token of every answer in turn.

waiting jobs -> as many active ones as memory allows -> a step of every adapter's answers -> events
"""

from __future__ import annotations

import contextlib
import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from philora.errors import PhiloraError
from philora.generation.conversation import AdapterPool, Reply
from philora.kernels.memory import out_of_memory
from philora.serving.chat_requests import ApiError

logger = logging.getLogger(__name__)

GROW_AFTER_STEPS = 128
"""Steps without an out-of-memory error after which one more answer is computed at a time."""

STOP_SECONDS = 5.0
"""Time limit for the end of a step when the server stops."""


class Event(NamedTuple):
    """An event of an answer, `choice` of its request: a piece of text, the end (`reply`), or a failure (`error`)."""

    choice: int
    piece: str = ""
    reply: Reply | None = None
    error: ApiError | None = None


class Job:
    """One answer to be computed."""

    def __init__(self, choice: int, reply: Reply, tell: Callable[[Event], None]) -> None:
        self.choice = choice
        self.reply = reply
        self.cancelled = False
        self._tell = tell

    def tell(self, event: Event) -> None:
        """Pass on an event, unless its reader has closed the event loop."""
        with contextlib.suppress(RuntimeError):
            self._tell(event)


class Scheduler:
    """Compute answers in a separate thread, a token of every answer in turn.

    Attributes:
        pool: The model and its adapters.
        parallel: Answers that are computed at a time; each keeps the keys and values of its conversation. It is halved
            after an out-of-memory error, and raised by one after `GROW_AFTER_STEPS` steps without one.
        most_parallel: The initial value of `parallel`.
        limit: The most answers that are computed or waiting.
    """

    def __init__(self, pool: AdapterPool, parallel: int = 8, limit: int = 32) -> None:
        self.pool = pool
        self.parallel = parallel
        self.most_parallel = parallel
        self.limit = limit
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._changed = threading.Condition()
        self._good_steps = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        """Start computing."""
        self._thread.start()

    def end_answers(self) -> None:
        """Accept no more jobs, and end all unfinished answers with an error."""
        with self._changed:
            self._stopped = True
            jobs = [*self._active, *self._waiting]
            self._active, self._waiting = [], deque()
            self._changed.notify()
        for job in jobs:
            job.tell(Event(job.choice, error=stopping()))

    def stop(self) -> None:
        """End unfinished answers, and the thread after its step."""
        self.end_answers()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Accept the answers of a request, all or none.

        Raises:
            ApiError: 429 if there would be more than `limit`; 503 if the server is stopping.
        """
        with self._changed:
            if self._stopped:
                raise stopping()
            if len(self._waiting) + len(self._active) + len(jobs) > self.limit:
                text = f"Too many requests: {self.limit} answers are computed or waiting. Try again later."
                raise ApiError(429, text, type="requests", code="rate_limit_exceeded", headers={"Retry-After": "1"})
            self._waiting.extend(jobs)
            self._changed.notify()

    @property
    def load(self) -> int:
        """Return the number of answers that are computed or waiting."""
        with self._changed:
            return len(self._waiting) + len(self._active)

    def _run(self) -> None:
        worked = False
        while True:
            with self._changed:
                # After the last answer one more round, without any: it frees the memory of their keys and values.
                while not (worked or self._waiting or self._active or self._stopped):
                    self._changed.wait()
                if self._stopped:
                    return
            worked = self._round()

    def _round(self) -> bool:
        """Take a step of every active answer; return whether there was one."""
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            self._active = [job for job in self._active if not job.cancelled]
            if self._waiting and self._good_steps >= GROW_AFTER_STEPS and self.parallel < self.most_parallel:
                self.parallel += 1
                self._good_steps = 0
            while self._waiting and len(self._active) < self.parallel:
                self._active.append(self._waiting.popleft())
            worked = bool(self._active)
        self._good_steps += 1
        names = (*self.pool.adapters, None)
        for adapter in names:
            if not self._jobs_of(adapter):
                self.pool.step(adapter, [])  # frees its memory before others need it
        for adapter in names:
            self._step(adapter)
        return worked

    def _jobs_of(self, adapter: str | None) -> list[Job]:
        """Return an adapter's active answers; another adapter's step may have moved some back to the queue."""
        with self._changed:
            return [job for job in self._active if job.reply.adapter == adapter]

    def _step(self, adapter: str | None) -> None:
        """Take a step of an adapter's answers. An error in one ends that one only."""
        jobs = self._jobs_of(adapter)
        if not jobs:
            return
        try:
            found = self.pool.step(adapter, [job.reply for job in jobs])
        except Exception as error:  # noqa: BLE001 - the other adapters' answers continue, and the server lives
            found = [error] * len(jobs)
        failed = [(job, item) for job, item in zip(jobs, found, strict=True) if isinstance(item, BaseException)]
        # After an out-of-memory error an answer is unchanged: it continues together with fewer others.
        if any(out_of_memory(item) for _, item in failed) and self._fewer():
            failed = [(job, item) for job, item in failed if not out_of_memory(item)]
        ended = [job for job, item in failed]
        for job, fails in failed:
            self._fail(job, fails)
        for job, piece in zip(jobs, found, strict=True):
            if isinstance(piece, BaseException):
                continue
            if piece:
                job.tell(Event(job.choice, piece))
            if job.reply.finish is not None:
                job.tell(Event(job.choice, reply=job.reply))
                ended.append(job)
        if ended:
            with self._changed:
                self._active = [job for job in self._active if job not in ended]
                self._waiting = deque(job for job in self._waiting if job not in ended)

    def _fail(self, job: Job, error: BaseException) -> None:
        told = str(error) if isinstance(error, PhiloraError) else "".join(traceback.format_exception(error))
        logger.error("an answer failed: %s", told)
        text = "The server had an error while computing this answer; see its log."
        job.tell(Event(job.choice, error=ApiError(500, text, type="server_error", code="internal_error")))

    def _fewer(self) -> bool:
        """Move half of the answers back to the queue; return False if there is only one."""
        with self._changed:
            self._good_steps = 0
            if len(self._active) < 2:
                return False
            self.parallel = len(self._active) // 2
            self._waiting.extendleft(reversed(self._active[self.parallel :]))
            del self._active[self.parallel :]
        logger.warning("out of memory: continuing with %d answers at a time", self.parallel)
        return True


def stopping() -> ApiError:
    """Return the error for clients of a server that stops."""
    text = "The server is stopping; try again later."
    return ApiError(503, text, type="server_error", code="server_stopping", headers={"Retry-After": "5"})
