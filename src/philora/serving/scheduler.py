"""One thread that computes answers, a token of every at a time.

jobs that wait -> as many in the making as memory allows -> a step of every adapter's answers -> events
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
"""Steps without a refusal of memory after which one more answer is tried at a time."""

STOP_SECONDS = 5.0
"""How long the end of a step is waited for when the server stops."""


class Event(NamedTuple):
    """Describe what an answer has to say: a piece of text, its end, or a failure.

    Attributes:
        choice: Which answer of the request.
        piece: Text.
        reply: Set at the end.
        error: Set where the answer failed.
    """

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
        """Hand an event on; whoever is not there any more has closed its event loop."""
        with contextlib.suppress(RuntimeError):
            self._tell(event)


class Scheduler:
    """Computes answers in a thread of its own, a token of every at a time.

    Attributes:
        pool: Who answers.
        parallel: Answers in the making at a time; each holds keys and values of its conversation. Halved where memory
            does not suffice, and raised by one again after `GROW_AFTER_STEPS` steps that it sufficed for.
        most_parallel: What `parallel` began with.
        limit: Answers in the making and waiting.
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
        """Begin to compute."""
        self._thread.start()

    def end_answers(self) -> None:
        """Take nothing more, and tell everybody who waits for an answer that there will be none."""
        with self._changed:
            self._stopped = True
            jobs = [*self._active, *self._waiting]
            self._active, self._waiting = [], deque()
            self._changed.notify()
        for job in jobs:
            job.tell(Event(job.choice, error=stopping()))

    def stop(self) -> None:
        """Give up what is not finished, and end the thread after its step."""
        self.end_answers()
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take the answers of a request, all or none.

        Raises:
            ApiError: 429, there is no room for them; 503, the server is stopping.
        """
        with self._changed:
            if self._stopped:
                raise stopping()
            if len(self._waiting) + len(self._active) + len(jobs) > self.limit:
                text = f"Too many requests: {self.limit} answers are being made or waiting. Try again later."
                raise ApiError(429, text, type="requests", code="rate_limit_exceeded", headers={"Retry-After": "1"})
            self._waiting.extend(jobs)
            self._changed.notify()

    @property
    def load(self) -> int:
        """Answers in the making and waiting."""
        with self._changed:
            return len(self._waiting) + len(self._active)

    def _run(self) -> None:
        worked = False
        while True:
            with self._changed:
                # After the last answer one more round, with none: the model lets go of what it held for them.
                while not (worked or self._waiting or self._active or self._stopped):
                    self._changed.wait()
                if self._stopped:
                    return
            worked = self._round()

    def _round(self) -> bool:
        """Take a step of every answer in the making; whether there was one."""
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
                self.pool.step(adapter, [])  # lets go of its memory, before others need it
        for adapter in names:
            self._step(adapter)
        return worked

    def _jobs_of(self, adapter: str | None) -> list[Job]:
        """An adapter's answers in the making, as it is now: a step of another adapter may have made some wait."""
        with self._changed:
            return [job for job in self._active if job.reply.adapter == adapter]

    def _step(self, adapter: str | None) -> None:
        """Take a step of an adapter's answers. What goes wrong with one ends that one alone."""
        jobs = self._jobs_of(adapter)
        if not jobs:
            return
        try:
            found = self.pool.step(adapter, [job.reply for job in jobs])
        except Exception as error:  # noqa: BLE001 - the other adapters' answers continue, and the server lives
            found = [error] * len(jobs)
        failed = [(job, item) for job, item in zip(jobs, found, strict=True) if isinstance(item, BaseException)]
        # Where memory was refused an answer has lost nothing: it continues with fewer beside it.
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
        text = "The server had an error while making this answer; its log says more."
        job.tell(Event(job.choice, error=ApiError(500, text, type="server_error", code="internal_error")))

    def _fewer(self) -> bool:
        """Let half of the answers wait until others have ended; False where there is only one."""
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
    """Return what a client is told when the server ends."""
    text = "The server is stopping; ask again when it is back."
    return ApiError(503, text, type="server_error", code="server_stopping", headers={"Retry-After": "5"})
