"""Define the endpoint for OpenAI's clients, and the chat page that uses it.

    request -> Guard (host, origin, key, type of body) -> ChatRequest -> Scheduler (a bound on requests)
            -> one thread that computes a token of every answer in turn -> JSON, or a stream of events

Answers share the model. Answers of one adapter share each forward pass, with a row and a random generator for each. A
bounded number is computed at a time and the others wait; beyond the limit a request is refused with 429.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from philora import __version__
from philora.errors import ConfigError, DataError
from philora.generation.batches import GenerationSettings
from philora.generation.conversation import AdapterPool, ContextError, Reply, known
from philora.generation.inference import with_system
from philora.serving.chat_requests import ApiError, ChatRequest, Rating, Vote
from philora.serving.scheduler import Event, Job, Scheduler
from philora.serving.votes import append_lines, download, ratings_file, tally

MAX_BODY_BYTES = 4 * 2**20
BODY_SECONDS = 60.0
"""From the end of a request's header to the end of its body."""

READ_AT_ONCE = 2
"""Requests that are parsed and tokenised at a time; the others wait."""

_Asked = TypeVar("_Asked")
WEB = Path(__file__).parent / "web"
PAGE = {
    "/": ("chat.html", "text/html"),
    "/chat.css": ("chat.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
}
SAFE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


# -- access


class Guard:
    """Refuse requests with a wrong host, origin or key before anything else handles them.

    On loopback the Host must be a name of this machine: with DNS rebinding, a page of another site still sends that
    site's name. An Origin must be the server's own, and no header allows another origin to read answers. A body must be
    declared as JSON, which a form of another page cannot do.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, key: str | None) -> None:
        self.app = app
        self.hosts = hosts
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refused request with its error; pass others to the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        fault_found = self._fault(request)
        if fault_found is not None:
            await fault_found.response()(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in SAFE_HEADERS.items()]
            await send(message)

        await self.app(scope, receive, send_safely)

    def _fault(self, request: Request) -> ApiError | None:
        host = request.headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self.hosts is not None and name.lower() not in self.hosts:
            return ApiError(403, f"The host {name!r} is not served here.", code="host_not_allowed")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return ApiError(403, f"Pages of {origin!r} may not use this server.", code="origin_not_allowed")
        if self.key is not None and not (request.method == "GET" and request.scope["path"] in PAGE):
            given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not secrets.compare_digest(given.encode(), self.key.encode()):
                text = "Incorrect API key provided." if given else "You didn't provide an API key."
                return ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if request.method == "POST":
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return ApiError(415, f"Content-Type is {kind!r}, not application/json.", code="unsupported_media_type")
        return None


# -- the application


def build_app(
    pool: AdapterPool,
    *,
    defaults: GenerationSettings | None = None,
    scheduler: Scheduler | None = None,
    key: str | None = None,
    hosts: frozenset[str] | None = None,
    votes: Path | None = None,
    questions: Sequence[str] = (),
) -> Guard:
    """Return the endpoint; with `votes` also the page.

    Args:
        pool: The model and its adapters.
        defaults: Settings where a request gives none; greedy and up to 512 tokens when None.
        scheduler: Computes the answers.
        key: The key that requests must send as `Authorization: Bearer`; None for no key.
        hosts: Names that the Host header may have; None for any.
        votes: File that the page's votes are added to.
        questions: Held-out questions that the page suggests.
    """
    defaults = defaults or GenerationSettings(max_new_tokens=512)
    scheduler = scheduler or Scheduler(pool)
    endpoint = _Endpoint(pool, defaults, scheduler)
    routes = endpoint.routes()
    if votes is not None:
        routes += _page_routes(endpoint, votes, questions)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.stop)

    handlers: dict[Any, Any] = {ApiError: _refused, HTTPException: _not_found, Exception: _failed}
    return Guard(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), hosts, key)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.scope['path']}: {error.detail}."
    return ApiError(error.status_code, text, code="unknown_url", headers=error.headers).response()


async def _failed(request: Request, error: Exception) -> Response:
    text = "The server had an error; see its log."
    return ApiError(500, text, type="server_error", code="internal_error").response()


def _page_routes(endpoint: _Endpoint, votes: Path, suggested: Sequence[str]) -> list[Route]:
    """Return the routes of the page: its files, the held-out questions, votes, their tally and their download."""

    async def page(request: Request) -> Response:
        name, kind = PAGE[request.scope["path"]]
        return FileResponse(WEB / name, media_type=kind, headers={"Cache-Control": "no-cache"})

    async def questions(request: Request) -> Response:
        return JSONResponse({"questions": list(suggested)})

    async def store(file: Path, records: Sequence[Mapping[str, Any]]) -> Response:
        try:
            await asyncio.to_thread(append_lines, file, records)
        except OSError as error:
            text = f"The vote is not stored: {error.strerror or error}."
            raise ApiError(500, text, type="server_error", code="vote_not_stored") from error
        return JSONResponse({"file": str(file)})

    async def vote(request: Request) -> Response:
        return await store(votes, [(await endpoint.read(request, Vote.read)).record()])

    async def rate(request: Request) -> Response:
        return await store(ratings_file(votes), (await endpoint.read(request, Rating.read)).records())

    async def counted(request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(tally, votes))

    async def downloaded(request: Request) -> Response:
        return Response(await asyncio.to_thread(download, votes), media_type="application/jsonl")

    return [
        *(Route(path, page) for path in PAGE),
        Route("/questions", questions),
        Route("/votes", vote, methods=["POST"]),
        Route("/votes", counted, methods=["GET"]),
        Route("/votes/download", downloaded),
        Route("/ratings", rate, methods=["POST"]),
    ]


async def _body(request: Request) -> bytes:
    """Return the body, of a bounded size and within a bounded time.

    Raises:
        ApiError: It is larger, takes longer, or the client has disconnected.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", code="request_too_large")
    except TimeoutError as error:
        headers = {"Connection": "close"}
        raise ApiError(408, "The body did not arrive in time.", code="request_timeout", headers=headers) from error
    except ClientDisconnect as error:
        raise ApiError(499, "The client has disconnected.", code="client_closed_request") from error
    return bytes(body)


def _parsed(body: bytes) -> Any:
    """Return the JSON of a body.

    Raises:
        ApiError: It is not JSON, or contains text that is not valid Unicode.
    """
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # an unpaired surrogate, which UTF-8 cannot encode
        text = f"The body has text that is not valid Unicode: {error.reason}."
        raise ApiError(400, text, code="invalid_value") from error
    except (ValueError, RecursionError) as error:
        text = f"The body is not valid JSON: {str(error)[:200]}"
        raise ApiError(400, text, code="invalid_json") from error
    return content


class _Endpoint:
    """`POST /v1/chat/completions`."""

    def __init__(self, pool: AdapterPool, defaults: GenerationSettings, scheduler: Scheduler) -> None:
        self.pool = pool
        self.defaults = defaults
        self.scheduler = scheduler
        self.created = int(time.time())
        self._reading = asyncio.Semaphore(READ_AT_ONCE)

    def routes(self) -> list[Route]:
        """Return the routes of the endpoint."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
        ]

    def _described(self, name: str) -> dict[str, Any]:
        pool = self.pool
        parent = pool.base if name != pool.base else None
        found = {"id": name, "object": "model", "created": self.created, "owned_by": "philora", "parent": parent}
        return found | ({"system": pool.systems[name].text} if name in pool.systems else {})

    async def models(self, request: Request) -> Response:
        """List the models."""
        names = (*self.pool.adapters, self.pool.base)
        return JSONResponse({"object": "list", "data": [self._described(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        return JSONResponse(self._described(self.known_model(request.path_params["name"])))

    async def health(self, request: Request) -> Response:
        """Return that the server is running, and its load."""
        return JSONResponse({"status": "ok", "version": __version__, "answers": self.scheduler.load})

    async def read(self, request: Request, read: Callable[[Any], _Asked]) -> _Asked:
        """Return the parsed body of a request; it is parsed in a thread, beside the event loop.

        Raises:
            ApiError: It cannot be read.
        """
        body = await _body(request)
        async with self._reading:
            return await asyncio.to_thread(lambda: read(_parsed(body)))

    def known_model(self, name: str) -> str:
        """Return the name if there is such a model.

        Raises:
            ApiError: 404 if there is not.
        """
        names = (*self.pool.adapters, self.pool.base)
        if name not in names:
            text = f"The model '{name}' does not exist. {known(name, names)}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return name

    def _asked(self, body: Any) -> ChatRequest:
        """Return the request in a body; refuse one with more messages than the model has positions unread."""
        messages = body.get("messages") if isinstance(body, dict) else None
        window = self.pool.window
        if window is not None and isinstance(messages, list) and len(messages) >= window:
            raise _too_long(ContextError(len(messages), window, exact=False))
        return ChatRequest.read(body)

    def _messages(self, asked: ChatRequest, adapter: str | None) -> list[dict[str, str]]:
        """Return the conversation of a request; without a system turn it gets that of the adapter, if there is one.

        An empty system turn counts as none, so that a client can leave it out.
        """
        messages = [message.plain() for message in asked.messages]
        if not self.pool.systems:
            return messages
        if adapter is not None and adapter in self.pool.systems:
            messages = with_system(messages, self.pool.systems[adapter].text)
        return [message for message in messages if message["role"] != "system" or message["content"]]

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, in one response or as a stream of events."""
        asked = await self.read(request, self._asked)
        name = self.known_model(asked.model)
        adapter = None if name == self.pool.base else name
        try:
            async with self._reading:
                prompt = await asyncio.to_thread(self.pool.prompt, self._messages(asked, adapter))
            settings = [asked.settings(self.defaults, choice) for choice in range(asked.n or 1)]
        except ContextError as error:
            raise _too_long(error) from error
        except DataError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_value") from error

        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        replies = [self.pool.answer(prompt, setting, adapter) for setting in settings]
        jobs = [Job(choice, reply, tell) for choice, reply in enumerate(replies)]
        self.scheduler.submit(jobs)
        answer = _Answer(name, len(prompt), jobs, events)
        if asked.stream:
            usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            return _Stream(answer, answer.stream(request, usage))
        try:
            return await answer.whole(request)
        finally:
            answer.give_up()


def _too_long(error: ContextError) -> ApiError:
    text = (
        f"This model's maximum context length is {error.window} tokens. However, your messages resulted in "
        f"{error.count}. Please reduce the length of the messages."
    )
    return ApiError(400, text, param="messages", code="context_length_exceeded")


class _Answer:
    """The choices of one request while they are computed."""

    def __init__(self, model: str, prompt_tokens: int, jobs: Sequence[Job], events: asyncio.Queue[Event]) -> None:
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.prompt_tokens = prompt_tokens
        self.jobs = jobs
        self.events = events

    def give_up(self) -> None:
        """Stop computing the choices that have not ended."""
        for job in self.jobs:
            job.cancelled = True

    async def _events(self, request: Request) -> AsyncIterator[Event]:
        """Yield events of all choices until they have ended or the client has disconnected."""
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            open_choices = len(self.jobs)
            while open_choices:
                waiting = asyncio.ensure_future(self.events.get())
                await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    waiting.cancel()
                    return
                event = waiting.result()
                open_choices -= event.reply is not None or event.error is not None
                yield event
        finally:
            gone.cancel()

    async def whole(self, request: Request) -> Response:
        texts = ["" for _ in self.jobs]
        replies: list[Reply | None] = [None for _ in self.jobs]
        async for event in self._events(request):
            if event.error is not None:
                raise event.error
            texts[event.choice] += event.piece
            replies[event.choice] = event.reply or replies[event.choice]
        if not all(replies):
            return Response(status_code=499)  # the client has disconnected
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": reply.finish,
            }
            for index, (text, reply) in enumerate(zip(texts, replies, strict=True))
            if reply is not None
        ]
        return JSONResponse(
            {**self.head, "object": "chat.completion", "choices": choices, "usage": self._usage(replies)}
        )

    async def stream(self, request: Request, with_usage: bool) -> AsyncIterator[str]:
        """Yield server-sent events as OpenAI's: the role, pieces of text, the end of every choice, `[DONE]`."""

        def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
            body = {**self.head, "object": "chat.completion.chunk", "choices": choices}
            return f"data: {json.dumps({**body, **more}, ensure_ascii=False)}\n\n"

        def choice(index: int, delta: Mapping[str, str], finish: str | None = None) -> list[dict[str, Any]]:
            return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}]

        more = {"usage": None} if with_usage else {}
        replies: list[Reply | None] = [None for _ in self.jobs]
        for job in self.jobs:
            yield chunk(choice(job.choice, {"role": "assistant", "content": ""}), **more)
        async for event in self._events(request):
            if event.error is not None:
                yield f"data: {json.dumps(event.error.body)}\n\n"
                return
            if event.piece:
                yield chunk(choice(event.choice, {"content": event.piece}), **more)
            if event.reply is not None:
                replies[event.choice] = event.reply
                yield chunk(choice(event.choice, {}, event.reply.finish), **more)
        if with_usage and all(replies):
            yield chunk([], usage=self._usage(replies))
        yield "data: [DONE]\n\n"

    def _usage(self, replies: Sequence[Reply | None]) -> dict[str, int]:
        generated = sum(reply.tokens for reply in replies if reply is not None)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }


class _Stream(StreamingResponse):
    """A stream of events. It may never start, if the client has disconnected before."""

    def __init__(self, answer: _Answer, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; stop computing when the client disconnects."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.give_up()


async def _disconnected(request: Request) -> None:
    """Wait until the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
