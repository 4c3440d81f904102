"""The endpoint and its page on a port of this machine, in a thread of the test's process."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

from philora.generation.conversation import AdapterPool
from philora.serving import app as serving
from philora.serving import connections
from philora.serving.scheduler import Scheduler


class Served:
    """A server in a thread of this process."""

    def __init__(self, voices: AdapterPool, limits: Any = None, **options: Any) -> None:
        self.bound = connections.listen("127.0.0.1", 0)
        self.address = connections.address_of(self.bound)
        self.scheduler = options.setdefault("scheduler", Scheduler(voices))
        options.setdefault("hosts", connections.hosts_of("127.0.0.1"))
        app = serving.build_app(voices, **options)
        self.server = connections.Server(app, self.scheduler, **(limits or {}))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.bound]})

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60)

    def raw(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a plain request; an underscore in a header's name is a hyphen."""
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=60)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        connection.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def idle(self, seconds: float = 60.0) -> bool:
        """Whether the model has nothing to do before the time is over."""
        deadline = time.monotonic() + seconds
        while self.scheduler.load and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.scheduler.load == 0


@contextmanager
def serve(voices: AdapterPool, **options: Any) -> Iterator[Served]:
    """A server for the time of the block."""
    served = Served(voices, **options)
    served.thread.start()
    while not served.server.started:
        time.sleep(0.01)
    try:
        yield served
    finally:
        served.server.should_exit = True
        served.thread.join(30)
        assert not served.thread.is_alive()
