"""The endpoint that OpenAI's clients speak to, and the page that speaks to it.

    request -> Guard (host, origin, key, type of body) -> ChatRequest -> Scheduler (a bound on requests)
            -> one thread, a token of every answer at a time -> JSON, or events as they come

Answers share the model: those of one adapter share each forward pass, in rows of their own, and each is drawn with its
own generator. Some answers are made at a time, the others wait; past the bound a request is refused with 429.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import secrets
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import uvicorn
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from philora import __version__
from philora.conversation import ContextError, Reply, Voices, chat_settings, known
from philora.errors import ConfigError, DataError, fault, nearest
from philora.generation import GenerationSettings
from philora.kernels.memory import out_of_memory

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 2**20
WEB = Path(__file__).parent / "web"
PAGE = {
    "/": ("chat.html", "text/html"),
    "/chat.css": ("chat.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
}
SAFE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class ApiError(Exception):
    """An error in the form that OpenAI's clients read."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """What the client gets."""
        return JSONResponse(self.body, self.status, self.headers)


# -- what a request may hold


def _neutral(*allowed: Any) -> AfterValidator:
    """For what OpenAI's clients may send and this endpoint does not do: values that ask for nothing are let through."""

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise ValueError("this endpoint does not support it; leave it out")
        return value

    return AfterValidator(check)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them; `developer` is a newer word for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What the stream tells beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(BaseModel):
    """`POST /v1/chat/completions`. Unknown names are refused, as OpenAI refuses them.

    Source: OpenAI's API reference, chat completions, as in the types of openai 3.54.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None  # not OpenAI's; vLLM's and llama.cpp's servers take it too
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # taken and of no effect here
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None

    # refused when they ask for something
    frequency_penalty: Annotated[float | None, _neutral(0)] = None
    presence_penalty: Annotated[float | None, _neutral(0)] = None
    logit_bias: Annotated[dict[str, float] | None, _neutral({})] = None
    logprobs: Annotated[bool | None, _neutral(False)] = None
    top_logprobs: Annotated[int | None, _neutral(0)] = None
    tools: Annotated[list[Any] | None, _neutral([])] = None
    tool_choice: Annotated[Any, _neutral("none", "auto")] = None
    functions: Annotated[list[Any] | None, _neutral([])] = None
    function_call: Annotated[Any, _neutral("none", "auto")] = None
    response_format: Annotated[Any, _neutral({"type": "text"})] = None
    modalities: Annotated[list[Any] | None, _neutral(["text"])] = None
    audio: Annotated[Any, _neutral()] = None
    prediction: Annotated[Any, _neutral()] = None
    web_search_options: Annotated[Any, _neutral()] = None
    reasoning_effort: Annotated[Any, _neutral("none")] = None
    verbosity: Annotated[Any, _neutral("medium")] = None

    def settings(self, defaults: GenerationSettings, choice: int) -> GenerationSettings:
        """How the answer of a choice is made.

        Raises:
            ConfigError: A value is out of its bounds.
        """
        length = self.max_completion_tokens or self.max_tokens or defaults.max_new_tokens
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        temperature = self.temperature
        if temperature is None:  # whoever names another value of sampling means to sample
            temperature = 0.0 if self.top_p is None and self.top_k is None else 1.0
            temperature = defaults.temperature or temperature
        if temperature == 0 or self.top_p == 0:
            return chat_settings(length, stop=stop)
        # Any whole number is a seed; each choice has a number of its own.
        seed = secrets.randbits(62) if self.seed is None else self.seed % 2**62
        top_p = defaults.top_p if self.top_p is None else self.top_p
        top_k = defaults.top_k if self.top_k is None else self.top_k
        return chat_settings(length, temperature, top_p, top_k, seed + choice, stop)


class Vote(BaseModel):
    """`POST /votes`: which of two answers to one conversation is better."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: Annotated[list[ChatMessage], Field(min_length=1)]
    chosen: Annotated[str, Field(min_length=1)]
    rejected: Annotated[str, Field(min_length=1)]
    chosen_model: str
    rejected_model: str

    def record(self) -> dict[str, Any]:
        """A preference pair as TRL's DPOTrainer takes it, and who said what."""
        return {
            "prompt": [each.plain() for each in self.prompt],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
            "chosen_model": self.chosen_model,
            "rejected_model": self.rejected_model,
        }


def _explain(error: ValidationError) -> ApiError:
    """The fault of a request, in OpenAI's words for its code."""
    found = max(error.errors(), key=lambda each: len(each["loc"]))  # inside a union, the fault of the nearest form
    where = [str(each) for each in found["loc"] if each not in ("str", "list[TextPart]")]
    place = "".join(f"[{each}]" if each.isdigit() else f".{each}" for each in where).lstrip(".") or None
    if place is None:
        return ApiError(400, "The body is no JSON object.", code="invalid_value")
    if found["type"] == "extra_forbidden":
        hint = nearest(where[-1], ChatRequest.model_fields)
        return ApiError(400, f"Unknown parameter: '{place}'. {hint}".strip(), param=place, code="unknown_parameter")
    if found["type"] == "missing":
        text = f"Missing required parameter: '{place}'."
        return ApiError(400, text, param=place, code="missing_required_parameter")
    if found["type"] == "value_error" and "does not support" in found["msg"]:
        return ApiError(400, f"'{place}': {found['ctx']['error']}.", param=place, code="unsupported_parameter")
    return ApiError(400, f"Invalid value for '{place}': {found['msg']}.", param=place, code="invalid_value")


# -- the thread that computes


class Event(NamedTuple):
    """What an answer has to say: a piece of text, its end, or a failure.

    Attributes:
        choice: Which answer of the request.
        piece: Text.
        reply: Set at the end.
        error: Set where the answer failed.
    """

    choice: int
    piece: str = ""
    reply: Reply | None = None
    error: str | None = None


class Job:
    """One answer to be computed."""

    def __init__(self, choice: int, reply: Reply, tell: Callable[[Event], None]) -> None:
        self.choice = choice
        self.reply = reply
        self.tell = tell
        self.cancelled = False


class Scheduler:
    """Computes answers in a thread of its own, a token of each at a time.

    Attributes:
        voices: Who answers.
        parallel: Answers in the making at a time; each holds keys and values of its conversation. Halved by itself
            where memory does not suffice.
        limit: Answers in the making and waiting.
    """

    def __init__(self, voices: Voices, parallel: int = 8, limit: int = 32) -> None:
        self.voices = voices
        self.parallel = parallel
        self.limit = limit
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def stop(self) -> None:
        """Give up what is not finished, and end the thread after its step."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take the answers of a request, all or none.

        Raises:
            ApiError: 429, there is no room for them.
        """
        with self._changed:
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
        working: list[Job] = []
        while True:
            with self._changed:
                # After the last answer one more round, with none: the model lets go of what it held for them.
                while not (working or self._waiting or self._active or self._stopped):
                    self._changed.wait()
                if self._stopped:
                    return
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                self._active = [job for job in self._active if not job.cancelled]
                while self._waiting and len(self._active) < self.parallel:
                    self._active.append(self._waiting.popleft())
                working = list(self._active)
            for adapter in (*self.voices.adapters, None):
                self._step(adapter, [job for job in working if job.reply.adapter == adapter])

    def _step(self, adapter: str | None, jobs: Sequence[Job]) -> None:
        """A token of each of an adapter's answers."""
        try:
            pieces = self.voices.step(adapter, [job.reply for job in jobs])
        except Exception as error:  # noqa: BLE001 - the other answers go on, and the server lives
            if out_of_memory(error) and self._fewer():
                return
            logger.error("%d answers failed:\n%s", len(jobs), traceback.format_exc())
            text = "The server had an error while making this answer; its log says more."
            for job in jobs:
                job.tell(Event(job.choice, error=text))
            ended = list(jobs)
        else:
            for job, piece in zip(jobs, pieces, strict=True):
                if piece:
                    job.tell(Event(job.choice, piece))
            ended = [job for job in jobs if job.reply.finish is not None]
            for job in ended:
                job.tell(Event(job.choice, reply=job.reply))
        if ended:
            with self._changed:
                self._active = [job for job in self._active if job not in ended]

    def _fewer(self) -> bool:
        """Let half of the answers wait until others have ended; False where there is only one."""
        with self._changed:
            if len(self._active) < 2:
                return False
            self.parallel = len(self._active) // 2
            self._waiting.extendleft(reversed(self._active[self.parallel :]))
            del self._active[self.parallel :]
        logger.warning("out of memory: going on with %d answers at a time", self.parallel)
        return True


# -- who may ask


class Guard:
    """Refuses what does not come from where it should, before anything else sees it.

    On loopback the Host must be this machine's: a page elsewhere whose name was made to point here (DNS rebinding)
    still sends its own name. An Origin must be the server's own; no header allows another to read answers. A body must
    be declared as JSON, which a form of another page cannot do.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, key: str | None) -> None:
        self.app = app
        self.hosts = hosts
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused, else hand it on."""
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
        if self.key is not None and not (request.method == "GET" and request.url.path in PAGE):
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
    voices: Voices,
    *,
    defaults: GenerationSettings | None = None,
    scheduler: Scheduler | None = None,
    key: str | None = None,
    hosts: frozenset[str] | None = None,
    votes: Path | None = None,
) -> Guard:
    """The endpoint, and the page where `votes` is given.

    Args:
        voices: The model and its adapters.
        defaults: For what a request does not say; greedy and up to 512 tokens when None.
        scheduler: Who computes.
        key: What requests must bring as `Authorization: Bearer`; None: nothing.
        hosts: Names in the Host header that are served; None: any.
        votes: File that the page's votes are added to.
    """
    defaults = defaults or GenerationSettings(max_new_tokens=512)
    scheduler = scheduler or Scheduler(voices)
    created = int(time.time())
    endpoint = _Endpoint(voices, defaults, scheduler)

    def described(name: str) -> dict[str, Any]:
        parent = voices.base if name != voices.base else None
        return {"id": name, "object": "model", "created": created, "owned_by": "philora", "parent": parent}

    names = (*voices.adapters, voices.base)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [described(name) for name in names]})

    async def model(request: Request) -> Response:
        return JSONResponse(described(endpoint.known_model(request.path_params["name"])))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": __version__, "answers": scheduler.load})

    async def page(request: Request) -> Response:
        name, kind = PAGE[request.url.path]
        return FileResponse(WEB / name, media_type=kind, headers={"Cache-Control": "no-cache"})

    async def vote(request: Request) -> Response:
        try:
            record = Vote.model_validate(await _json_body(request)).record()
        except ValidationError as error:
            raise _explain(error) from error
        assert votes is not None
        await asyncio.to_thread(_append, votes, record)
        return JSONResponse({"file": str(votes)})

    routes = [
        Route("/v1/chat/completions", endpoint.chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
    ]
    if votes is not None:
        routes += [Route(path, page) for path in PAGE]
        routes += [Route("/votes", vote, methods=["POST"])]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        scheduler.start()
        yield
        await asyncio.to_thread(scheduler.stop)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def not_there(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = f"{request.method} {request.url.path}: {error.detail}."
        return ApiError(error.status_code, text, code="unknown_url", headers=error.headers).response()

    async def failed(request: Request, error: Exception) -> Response:
        text = "The server had an error; its log says more."
        return ApiError(500, text, type="server_error", code="internal_error").response()

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={ApiError: refused, HTTPException: not_there, Exception: failed},
    )
    return Guard(app, hosts, key)


async def _json_body(request: Request) -> Any:
    """The body, of a bounded size.

    Raises:
        ApiError: It is larger, or no JSON.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", code="request_too_large")
    try:
        content = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        text = f"The body is no JSON that can be read: {str(error)[:200]}"
        raise ApiError(400, text, code="invalid_json") from error
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which neither an answer nor a file can hold
        raise ApiError(400, f"The body holds text that is no Unicode: {error.reason}.", code="invalid_value") from error
    return content


_votes_lock = threading.Lock()


def _append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file, whole and on the disk when this returns."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    with _votes_lock:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


class _Endpoint:
    """`POST /v1/chat/completions`."""

    def __init__(self, voices: Voices, defaults: GenerationSettings, scheduler: Scheduler) -> None:
        self.voices = voices
        self.defaults = defaults
        self.scheduler = scheduler

    def known_model(self, name: str) -> str:
        """The name, if it is one.

        Raises:
            ApiError: 404.
        """
        names = (*self.voices.adapters, self.voices.base)
        if name not in names:
            text = f"The model '{name}' does not exist. {known(name, names)}"
            raise ApiError(404, text, param="model", code="model_not_found")
        return name

    async def chat(self, request: Request) -> Response:
        """Answer a conversation, in one piece or as events."""
        try:
            asked = ChatRequest.model_validate(await _json_body(request))
        except ValidationError as error:
            raise _explain(error) from error
        name = self.known_model(asked.model)
        adapter = None if name == self.voices.base else name
        try:
            prompt = await asyncio.to_thread(self.voices.prompt, [each.plain() for each in asked.messages])
            settings = [asked.settings(self.defaults, choice) for choice in range(asked.n or 1)]
        except ContextError as error:
            text = (
                f"This model's maximum context length is {error.window} tokens. However, your messages resulted in "
                f"{error.tokens} tokens. Please reduce the length of the messages."
            )
            raise ApiError(400, text, param="messages", code="context_length_exceeded") from error
        except DataError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        except ConfigError as error:
            raise ApiError(400, str(error), code="invalid_value") from error

        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        replies = [self.voices.answer(prompt, each, adapter) for each in settings]
        jobs = [Job(choice, reply, tell) for choice, reply in enumerate(replies)]
        self.scheduler.submit(jobs)
        answer = _Answer(name, len(prompt), jobs, events)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return _Stream(answer, answer.stream(request, usage))
        try:
            return await answer.whole(request)
        finally:
            answer.give_up()


class _Answer:
    """The choices of one request on their way to the client."""

    def __init__(self, model: str, prompt_tokens: int, jobs: Sequence[Job], events: asyncio.Queue[Event]) -> None:
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.prompt_tokens = prompt_tokens
        self.jobs = jobs
        self.events = events

    def give_up(self) -> None:
        """Compute no further; of no effect on what has ended."""
        for job in self.jobs:
            job.cancelled = True

    async def _events(self, request: Request) -> AsyncIterator[Event]:
        """Events of all choices until each has ended, or the client has hung up."""
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
                raise ApiError(500, event.error, type="server_error", code="internal_error")
            texts[event.choice] += event.piece
            replies[event.choice] = event.reply or replies[event.choice]
        if not all(replies):
            return Response(status_code=499)  # nobody is there to read it
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
        """Events of server-sent events, as OpenAI's: the role, pieces of text, the end of each choice, `[DONE]`."""

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
                error = ApiError(500, event.error, type="server_error", code="internal_error")
                yield f"data: {json.dumps(error.body)}\n\n"
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
        generated = sum(each.tokens for each in replies if each is not None)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }


class _Stream(StreamingResponse):
    """Events to a client. They may never begin, when it has hung up before."""

    def __init__(self, answer: _Answer, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them; whoever hangs up ends the computation."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.give_up()


async def _disconnected(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# -- a server of it


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; taken before any weight is loaded, so that a port in use is told at once.

    Raises:
        ConfigError: The port is in use, or there is no such address.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        expected = "an address of this machine and a port that is free"
        todo = "Give another --port, or 0 for any that is free"
        raise ConfigError(fault("server", "address", f"{host}:{port}", expected, f"{error}. {todo}")) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The address as people type it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hosts_of(host: str) -> frozenset[str] | None:
    """Names in the Host header that are served: on loopback those of this machine, elsewhere any (there is a key)."""
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower()}) if is_loopback(host) else None


def check_key(host: str, key: str | None) -> None:
    """Whoever reaches the server can use the machine, so beyond loopback it needs a key.

    Raises:
        ConfigError: There is none, or it is one that a header cannot hold.
    """
    if key is not None and (not key.isascii() or not key.isprintable() or not key.strip() == key or not key):
        raise ConfigError(fault("server", "api_key", "...", "printable ASCII characters, without spaces around them"))
    if key is None and not is_loopback(host):
        todo = "Set --api-key or PHILORA_API_KEY, or leave --host out"
        raise ConfigError(fault("server", "host", host, "a key where other machines reach the server", todo))


def run(app: ASGIApp, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; answers in the making have a few seconds to end."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=3, server_header=False
    )
    uvicorn.Server(config).run(sockets=[bound])
