"""Start the endpoint for OpenAI's clients from Python; it answers in a thread until it is closed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from philora.errors import ConfigError, fault
from philora.generation.conversation import chat_settings, load_named
from philora.interface.answers import quiet

if TYPE_CHECKING:
    from philora.serving.connections import Server as Listener


class Server:
    """An endpoint that answers until `close`, or until the end of its `with` block.

    Attributes:
        address: Its URL, such as `http://127.0.0.1:8000`.
        models: Names of the models: the adapters, then the base.
    """

    def __init__(self, listener: Listener, bound: socket.socket, address: str, models: Sequence[str]) -> None:
        """Start answering on a socket."""
        self.address = address
        self.models = list(models)
        self._listener = listener
        self._thread = threading.Thread(target=listener.run, kwargs={"sockets": [bound]}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Return the `base_url` for OpenAI's client."""
        return f"{self.address}/v1"

    def close(self) -> None:
        """Stop; unfinished answers end with an error."""
        self._listener.should_exit = True
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{self.url}  models: {', '.join(self.models)}"


def serve(
    *sources: str | Path,
    base: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    api_key: str | None = None,
    max_requests: int = 32,
    max_new_tokens: int = 512,
) -> Server:
    """Serve adapters of one base to OpenAI's clients, and return at once.

    Args:
        sources: Run folders, adapter folders or hub ids; `NAME=SOURCE` gives one a name.
        base: Base model; default: the one that the adapters name.
        host: Address to listen on; one that other machines can reach needs a key.
        port: Port to listen on; 0 takes a free one.
        api_key: Key that every request must carry.
        max_requests: Requests in progress or waiting at a time; further ones are refused.
        max_new_tokens: Length limit of an answer in tokens, for requests that give none.

    Raises:
        ConfigError: A package is missing, or the address cannot be used.
        AdapterError, ModelError: An adapter or its base cannot be loaded.

    Example:
        >>> with serve("runs/helpdesk") as server:  # doctest: +SKIP
        ...     client = openai.OpenAI(base_url=server.url, api_key="none")
    """
    try:
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        todo = "Install them: pip install 'philora[serve]'"
        raise ConfigError(fault("philora", "serve", error.name, "uvicorn and starlette", todo)) from error
    from philora.serving import app, connections
    from philora.serving.scheduler import Scheduler

    connections.check_key(host, api_key)
    bound = connections.listen(host, port)
    try:
        with quiet():
            loaded = load_named([str(source) for source in sources], base)
        scheduler = Scheduler(loaded, limit=max_requests)
        defaults, hosts = chat_settings(max_new_tokens), connections.hosts_of(host)
        served = app.build_app(loaded, defaults=defaults, scheduler=scheduler, key=api_key, hosts=hosts)
    except BaseException:
        bound.close()
        raise
    models = (*loaded.adapters, loaded.base)
    return Server(connections.Server(served, scheduler), bound, connections.address_of(bound), models)
