"""Define the requests that OpenAI's clients may send, and the errors they get.

A field whose value asks for nothing is accepted. An unknown field is logged and ignored. A field that asks for what is
not supported is refused by its name.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse

from philora.errors import nearest, shorten
from philora.generation.batches import GenerationSettings
from philora.generation.conversation import chat_settings

logger = logging.getLogger(__name__)

NAMES_LOGGED = 100
"""Most unknown fields that are logged; each is logged once."""

_NOTHING: tuple[Any, ...] = (None, "", [], {})
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": (), "logprobs": (False,), "top_logprobs": (0,),
    "tools": (), "tool_choice": ("none", "auto"), "functions": (), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "web_search_options": (), "reasoning_effort": ("none",), "verbosity": ("medium",), "moderation": (),
    # of other servers: vLLM's, llama.cpp's, SGLang's
    "repetition_penalty": (1,), "repeat_penalty": (1,), "no_repeat_ngram_size": (0,), "min_p": (0,), "typical_p": (1,),
    "top_a": (0,), "mirostat": (0,), "min_tokens": (0,), "length_penalty": (1,), "best_of": (1,),
    "use_beam_search": (False,), "ignore_eos": (False,), "echo": (False,), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "skip_special_tokens": (True,), "include_stop_str_in_output": (False,),
    "stop_token_ids": (), "bad_words": (), "allowed_token_ids": (), "prompt_logprobs": (0,), "n_probs": (0,),
    "documents": (), "chat_template": (), "chat_template_kwargs": (), "guided_json": (), "guided_regex": (),
    "guided_choice": (), "guided_grammar": (), "structured_outputs": (), "grammar": (), "json_schema": (),
    "regex": (), "ebnf": (),
}  # fmt: skip
"""Fields that ask for what this endpoint does not do, with their values that ask for nothing (besides `_NOTHING`)."""

_MESSAGE_UNSUPPORTED = ("tool_calls", "function_call", "tool_call_id", "audio", "refusal")
_MESSAGE_IGNORED = ("annotations",)
"""A further field in `message.model_dump()` of OpenAI's client; it asks for nothing."""


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
        """Return the response with the error."""
        return JSONResponse(self.body, self.status, self.headers)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return role and text for a chat template; `developer` is a newer name of `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore", strict=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(BaseModel):
    """`POST /v1/chat/completions`.

    Source: OpenAI's API reference, chat completions, as in the types of openai 3.54.
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    model: Annotated[str, Field(max_length=512)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # not OpenAI's; vLLM's and llama.cpp's servers take it too
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # accepted without effect
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None

    @classmethod
    def read(cls, body: Any) -> ChatRequest:
        """Return the request of a body.

        Raises:
            ApiError: A value cannot be used, or a field asks for what this endpoint does not do.
        """
        if isinstance(body, dict):
            for name, neutral in _UNSUPPORTED.items():
                _refuse_request(name, body.get(name), neutral)
            _note_unknown("", body, (*cls.model_fields, *_UNSUPPORTED))
            _check_messages("messages", body.get("messages"))
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise explain(error) from error

    def settings(self, defaults: GenerationSettings, choice: int) -> GenerationSettings:
        """Return the generation settings of a choice.

        Raises:
            ConfigError: A value is out of its bounds.
        """
        length = self.max_completion_tokens or self.max_tokens or defaults.max_new_tokens
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        top_k = None if self.top_k is None or self.top_k < 1 else self.top_k  # 0 and -1 are other servers' "all"
        temperature = self.temperature
        if temperature is None:  # another sampling setting asks for sampling
            temperature = 0.0 if self.top_p in (None, 1) and top_k is None else 1.0
            temperature = defaults.temperature or temperature
        if temperature == 0 or self.top_p == 0:
            return chat_settings(length, stop=stop)
        # Any integer is a seed; each choice gets its own.
        seed = secrets.randbits(62) if self.seed is None else self.seed % 2**62
        top_p = defaults.top_p if self.top_p is None else self.top_p
        top_k = defaults.top_k if top_k is None else top_k
        return chat_settings(length, temperature, top_p, top_k, seed + choice, stop)


class Judgement(BaseModel):
    """A person's judgement of two answers to one conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]

    @classmethod
    def read(cls, body: Any) -> Self:
        """Return the judgement in a body.

        Raises:
            ApiError: It is not a judgement.
        """
        if isinstance(body, dict):
            _check_messages("prompt", body.get("prompt"))
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise explain(error) from error


class Vote(Judgement):
    """`POST /votes`: which of two answers to one conversation is better."""

    chosen: Annotated[str, Field(min_length=1)]
    rejected: Annotated[str, Field(min_length=1)]
    chosen_model: str
    rejected_model: str

    def record(self) -> dict[str, Any]:
        """Return a preference pair as TRL's DPOTrainer takes it, with the models that answered."""
        return {
            "prompt": [turn.plain() for turn in self.prompt],
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
            "chosen_model": self.chosen_model,
            "rejected_model": self.rejected_model,
        }


class Rating(Judgement):
    """`POST /ratings`: two answers are both good or both bad."""

    answers: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=2)]
    models: Annotated[list[str], Field(min_length=2, max_length=2)]
    good: bool

    def records(self) -> list[dict[str, Any]]:
        """Return a rating of every answer as TRL's KTOTrainer takes it, with the model that answered."""
        return [
            {
                "prompt": [message.plain() for message in self.prompt],
                "completion": [{"role": "assistant", "content": text}],
                "label": self.good,
                "model": model,
            }
            for text, model in zip(self.answers, self.models, strict=True)
        ]


def _refuse_request(place: str, value: Any, neutral: tuple[Any, ...] = ()) -> None:
    if value not in _NOTHING and value not in neutral:
        text = f"'{place}': this endpoint does not support it; leave it out."
        raise ApiError(400, text, param=place, code="unsupported_parameter")


def _check_messages(name: str, messages: Any) -> None:
    """Refuse fields of messages that ask for more than text, and log unknown ones."""
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            for field in _MESSAGE_UNSUPPORTED:
                _refuse_request(f"{name}[{index}].{field}", message.get(field))
            _note_unknown("message.", message, (*ChatMessage.model_fields, *_MESSAGE_UNSUPPORTED, *_MESSAGE_IGNORED))


_logged: set[str] = set()


def _note_unknown(prefix: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if len(given) > NAMES_LOGGED and len(_logged) >= NAMES_LOGGED:
        return
    for name in set(given).difference(known):
        shown = prefix + shorten(name)
        if shown in _logged or given[name] in _NOTHING or len(_logged) >= NAMES_LOGGED:
            continue
        _logged.add(shown)
        hint = nearest(name, known) if len(name) <= 64 else ""
        logger.warning("requests have the field %s, which is unknown and ignored. %s", shown, hint)


def explain(error: ValidationError) -> ApiError:
    """Return the fault of a request as an error with OpenAI's code."""
    found = max(error.errors(), key=lambda item: len(item["loc"]))  # inside a union, the fault of the nearest form
    where = [str(item) for item in found["loc"] if not str(item).startswith(("str", "list["))]
    place = "".join(f"[{item}]" if item.isdigit() else f".{item}" for item in where).lstrip(".")[:200] or None
    if place is None:
        return ApiError(400, "The body is not a JSON object.", code="invalid_value")
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{place}'.", param=place, code="unknown_parameter")
    if found["type"] == "missing":
        text = f"Missing required parameter: '{place}'."
        return ApiError(400, text, param=place, code="missing_required_parameter")
    return ApiError(400, f"Invalid value for '{place}': {found['msg']}.", param=place, code="invalid_value")
