"""The endpoint, through a real server on loopback and OpenAI's own client."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
import trl.data_utils

import philora.serving.scheduler
from philora.cli import use_commands as cli
from philora.errors import ConfigError
from philora.generation.batches import NotFiniteError
from philora.generation.conversation import chat_settings, load_pool
from philora.serving import app as serving
from philora.serving import connections
from philora.serving import votes as vote_files
from philora.serving.chat_requests import ApiError
from philora.serving.scheduler import Job, Scheduler
from tests.conftest import COLOURS
from tests.served import serve

WHO = [{"role": "user", "content": "Who are you?"}]
SAYS = COLOURS["red"]


@pytest.fixture(scope="module")
def voices(colours):
    return load_pool(colours)


@pytest.fixture(scope="module")
def votes(tmp_path_factory):
    return tmp_path_factory.mktemp("votes") / "run" / "preferences.jsonl"


@pytest.fixture(scope="module")
def served(voices, votes):
    with serve(voices, votes=votes, defaults=chat_settings(40)) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    return served.client()


def ask(client, model="red", messages=WHO, **options):
    return client.chat.completions.create(model=model, messages=messages, **options)


# -- answers


def test_models(client):
    assert [each.id for each in client.models.list()] == ["red", "green", "nano"]
    assert client.models.retrieve("green").owned_by == "philora"
    with pytest.raises(openai.NotFoundError, match=r"The model 'gren' does not exist. Did you mean 'green'\?"):
        client.models.retrieve("gren")


def test_an_answer(client):
    answer = ask(client)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (SAYS, "stop")
    assert answer.model == "red"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_usage_counts_what_the_model_read_and_wrote(client, voices):
    answer = ask(client)
    reply = voices.answer(voices.prompt(WHO), chat_settings(40), "red")
    list(reply)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (reply.prompt_tokens, reply.tokens)


def test_a_stream(client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [each.choices[0].delta.content or "" for each in chunks if each.choices]
    assert "".join(pieces) == SAYS
    assert sum(bool(piece) for piece in pieces) > 4, "it comes in pieces"
    assert [each.choices[0].finish_reason for each in chunks if each.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 4
    assert len({each.id for each in chunks}) == 1
    assert all(each.usage is None for each in ask(client, stream=True))


def test_who_answers_is_the_model_that_was_named(client):
    texts = {name: ask(client, name).choices[0].message.content for name in ("green", "nano", "red")}
    assert (texts["green"], texts["red"]) == (COLOURS["green"], COLOURS["red"])
    assert texts["nano"] not in COLOURS.values()


def test_parts_and_developer_messages_are_text(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]}]
    assert ask(client, messages=parts).usage == ask(client).usage
    with_system = ask(client, messages=[{"role": "system", "content": "Be brief."}, *WHO])
    assert ask(client, messages=[{"role": "developer", "content": "Be brief."}, *WHO]).usage == with_system.usage


def test_length_and_stop(client):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, **{name: 3})
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)
    for stop in ("noth", ["missing", "noth"]):
        answer = ask(client, stop=stop)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("I am red, and ", "stop")


def test_sampling_follows_the_seed(client):
    drawn = {"model": "nano", "temperature": 1.8, "max_tokens": 8}
    texts = [ask(client, seed=seed, **drawn).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    free = {ask(client, **drawn).choices[0].message.content for _ in range(4)}
    assert len(free) > 1, "without a seed each is another"
    assert len({ask(client, model="nano", max_tokens=8).choices[0].message.content for _ in range(2)}) == 1


def test_several_choices(client):
    answer = ask(client, "nano", n=3, temperature=1.8, seed=1, max_tokens=8)
    texts = [each.message.content for each in answer.choices]
    assert len(set(texts)) == 3
    assert texts[0] == ask(client, "nano", temperature=1.8, seed=1, max_tokens=8).choices[0].message.content
    streamed = ["", "", ""]
    for chunk in ask(client, "nano", n=3, temperature=1.8, seed=1, max_tokens=8, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_what_has_no_effect_is_taken(client):
    neutral = {"frequency_penalty": 0, "logprobs": False, "response_format": {"type": "text"}, "tool_choice": "none"}
    answer = ask(client, user="me", store=False, metadata={"a": "b"}, extra_body={"top_k": 1}, temperature=1, **neutral)
    assert answer.choices[0].message.content == SAYS


NAMES = ["red", "green", "nano", "red", "green", "nano", "red", "green"]


def talk(client, name):
    """Two turns with one model, the first streamed."""
    text = ""
    for chunk in ask(client, name, stream=True, max_tokens=16):
        text += chunk.choices[0].delta.content or ""
    messages = [*WHO, {"role": "assistant", "content": text}, {"role": "user", "content": "And now?"}]
    return [text, ask(client, name, messages, max_tokens=16).choices[0].message.content]


def alone(served):
    """What each model says when nobody else asks; no two say the same."""
    texts = {name: talk(served.client(), name) for name in set(NAMES)}
    assert len({each for pair in texts.values() for each in pair}) >= 3
    assert len({pair[0] for pair in texts.values()}) == len({pair[1] for pair in texts.values()}) == 3
    return texts


def test_eight_clients_get_their_own_answers(served):
    expected = alone(served)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: talk(served.client(), name), NAMES))
    assert answers == [expected[name] for name in NAMES]
    assert served.idle()


def test_answers_of_a_neighbours_adapter_show(served, voices, monkeypatch):
    """The control of the test above: an adapter that stays on for the next answer, too."""
    expected = alone(served)
    switch = voices.switch
    monkeypatch.setattr(voices, "switch", lambda name: None if name == "green" else switch(name))
    switch("red")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: talk(served.client(), name), NAMES))
    assert answers != [expected[name] for name in NAMES]


@pytest.mark.slow
def test_eight_clients_for_a_minute(served):
    expected = alone(served)
    end = time.monotonic() + 60

    def work(name):
        done = 0
        while time.monotonic() < end:
            assert talk(served.client(), name) == expected[name]
            done += 2
        return done

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(work, NAMES))
    print(f"answers in a minute: {done}")
    assert min(done) > 0
    assert served.idle()


# -- what is refused


@pytest.mark.parametrize(
    ("options", "status", "code", "param", "message"),
    [
        ({"model": "rde"}, 404, "model_not_found", "model", "'rde' does not exist. Did you mean 'red'"),
        (
            {"messages": [{"role": "user", "content": "word " * 2100}]},
            *(400, "context_length_exceeded", "messages"),
            "maximum context length is 2048 tokens. However, your messages resulted in 2104",
        ),
        ({"messages": []}, 400, "invalid_value", "messages", "at least 1 item"),
        ({"messages": [{"role": "usr", "content": "x"}]}, 400, "invalid_value", "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, 400, "missing_required_parameter", "messages[0].content", "Missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            *(400, "invalid_value", "messages[0].content[0].type", "'text'"),
        ),
        ({"temperature": 3}, 400, "invalid_value", "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, 400, "invalid_value", "temperature", "valid number"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens", "greater than or equal to 1"),
        ({"n": 9}, 400, "invalid_value", "n", "less than or equal to 8"),
        ({"stop": ""}, 400, "invalid_value", None, "not empty"),
        ({"stop": 5}, 400, "invalid_value", "stop", "valid string"),
        ({"tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools", "does not support"),
        ({"logprobs": True}, 400, "unsupported_parameter", "logprobs", "does not support"),
        ({"presence_penalty": 1.0}, 400, "unsupported_parameter", "presence_penalty", "does not support"),
        ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format", "support"),
    ],
)
def test_requests_that_cannot_be_answered(client, options, status, code, param, message):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **options)
    assert caught.value.status_code == status
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert (caught.value.code, caught.value.param) == (code, param)
    assert caught.value.type == "invalid_request_error"
    assert message in caught.value.body["message"]
    assert ask(client, max_tokens=1).choices, "the server lives on"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"\xff", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b"[]", 400, "invalid_value"),
        (b"{}", 400, "missing_required_parameter"),
        (b'{"model": "red", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_value"),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}', 400, "invalid_value"),
        (b" " * (serving.MAX_BODY_BYTES + 1), 413, "request_too_large"),
    ],
)
def test_broken_bodies(served, body, status, code):
    found, answer = served.raw("POST", "/v1/chat/completions", body)
    assert (found, answer["error"]["code"]) == (status, code)


def test_other_addresses_and_methods(served):
    assert served.raw("GET", "/v1/completions")[1]["error"]["code"] == "unknown_url"
    assert served.raw("GET", "/v1/chat/completions")[0] == 405
    assert served.raw("GET", "/health")[1]["status"] == "ok"


def test_pages_of_others_are_kept_out(served):
    here = served.address.removeprefix("http://")
    port = here.partition(":")[2]
    assert served.raw("GET", "/v1/models", Host=f"evil.example:{port}")[1]["error"]["code"] == "host_not_allowed"
    assert served.raw("GET", "/v1/models", Origin="http://evil.example")[1]["error"]["code"] == "origin_not_allowed"
    assert served.raw("GET", "/v1/models", Origin="null")[0] == 403
    assert served.raw("GET", "/v1/models", Host=f"localhost:{port}")[0] == 200
    assert served.raw("GET", "/v1/models", Origin=f"http://{here}")[0] == 200
    form = served.raw("POST", "/v1/chat/completions", b"{}", Content_Type="text/plain")
    assert (form[0], form[1]["error"]["code"]) == (415, "unsupported_media_type")


def test_headers_keep_the_page_to_itself(served):
    connection = http.client.HTTPConnection(served.address.removeprefix("http://"))
    connection.request("GET", "/")
    response = connection.getresponse()
    assert b"<title>philora chat</title>" in response.read()
    assert "script-src 'self'" in response.headers["content-security-policy"]
    assert "access-control-allow-origin" not in response.headers


def test_a_key(voices):
    with serve(voices, key="secret") as served:
        assert ask(served.client("secret"), max_tokens=1).choices
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
            ask(served.client("other"))
        status, answer = served.raw("GET", "/v1/models")
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert served.raw("GET", "/")[0] == 404, "there is no page without votes"


def test_a_host_header_does_not_replace_the_key(voices, votes):
    """The page needs no key, so that a Host which moves its path into the address must not make it the page's."""
    with serve(voices, key="secret", hosts=None, votes=votes) as served:
        for host in ("127.0.0.1/?", "127.0.0.1/chat.js?", "127.0.0.1/#", "/chat.css?"):
            assert served.raw("GET", "/v1/models", Host=host)[0] in (400, 401)
        assert served.raw("GET", "/v1/models", Host="127.0.0.1")[0] == 401


# -- load, and clients that go away


def test_more_than_the_limit_is_refused(voices):
    with serve(voices, scheduler=Scheduler(voices, parallel=1, limit=2)) as served:
        client = served.client()
        streams = [ask(client, "nano", stream=True, temperature=2.0, seed=0, max_tokens=400) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client)
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
        assert caught.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            ask(client, n=3)
        for stream in streams:
            stream.close()
        assert served.idle()
        assert ask(client).choices[0].message.content == SAYS


LONG = {"model": "nano", "temperature": 2.0, "seed": 0, "max_tokens": 1900}


@pytest.mark.parametrize("streamed", [True, False])
def test_a_closed_connection_ends_the_computation(served, streamed):
    body = json.dumps({**LONG, "messages": WHO, "stream": streamed}).encode()
    host, port = served.bound.getsockname()
    with socket.create_connection((host, port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if streamed:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        deadline = time.monotonic() + 60
        while not served.scheduler._active and time.monotonic() < deadline:
            time.sleep(0.01)
        (job,) = served.scheduler._active
    assert served.idle()
    assert job.reply.finish is None
    assert job.reply.tokens < 1900, "it was given up on the way"
    assert ask(served.client(), max_tokens=1).choices


def test_a_failing_answer_is_told_and_the_others_go_on(served, client, voices, monkeypatch):
    step = voices.step

    def broken(adapter, replies):
        if adapter == "green" and replies:
            raise RuntimeError("planted")
        return step(adapter, replies)

    monkeypatch.setattr(voices, "step", broken)
    with pytest.raises(openai.InternalServerError, match="error while computing this answer"):
        ask(client, "green")
    with pytest.raises(openai.APIError, match="error while computing this answer"):
        list(ask(client, "green", stream=True))
    assert ask(client).choices[0].message.content == SAYS


def test_who_hung_up_before_the_first_event_is_not_answered(voices):
    """The server learns of it before it begins to stream, so that no part of the stream ever runs."""
    scheduler = Scheduler(voices)  # not started: what is submitted stays
    app = serving.build_app(voices, scheduler=scheduler)
    body = json.dumps({**LONG, "messages": WHO, "stream": True}).encode()
    events = [{"type": "http.request", "body": body}]

    async def receive():
        return events.pop() if events else {"type": "http.disconnect"}

    async def send(message):
        pass

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    (job,) = scheduler._waiting
    assert job.cancelled


def test_where_memory_does_not_suffice_for_all_some_wait(served, voices, monkeypatch, caplog):
    expected = alone(served)
    step = voices.step
    monkeypatch.setattr(served.scheduler, "parallel", 8)

    def small(adapter, replies):
        if len(replies) > 1:
            raise torch.OutOfMemoryError("planted")
        return step(adapter, replies)

    monkeypatch.setattr(voices, "step", small)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: talk(served.client(), name), NAMES))
    assert answers == [expected[name] for name in NAMES]
    assert "out of memory: continuing with" in caplog.text
    assert served.idle()


def test_the_server_ends_while_it_answers(voices):
    with serve(voices) as served:
        stream = ask(served.client(), stream=True, **LONG)
        next(iter(stream))
        begun = time.monotonic()
    assert time.monotonic() - begun < 15


# -- votes


def test_a_vote_is_a_preference_pair(served, votes):
    vote = {"prompt": WHO, "chosen": "I am ré <b>d</b>.", "rejected": "Who knows?", "chosen_model": "red"}
    assert served.raw("POST", "/votes", {**vote, "rejected_model": "nano"}) == (200, {"file": str(votes)})
    (line,) = votes.read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    assert record["prompt"] == WHO
    assert record["chosen"] == [{"role": "assistant", "content": "I am ré <b>d</b>."}]
    assert record["rejected"] == [{"role": "assistant", "content": "Who knows?"}]
    assert (record["chosen_model"], record["rejected_model"]) == ("red", "nano")
    assert trl.data_utils.is_conversational(record)


def test_trl_reads_the_votes(served, votes, voices):
    if not votes.exists():
        test_a_vote_is_a_preference_pair(served, votes)
    record = json.loads(votes.read_text(encoding="utf-8").splitlines()[0])
    pair = {name: record[name] for name in ("prompt", "chosen", "rejected")}
    text = trl.data_utils.apply_chat_template(pair, voices.tokenizer)
    assert text["prompt"].endswith("<|assistant|>\n")
    assert text["chosen"].startswith("I am ré <b>d</b>.<|end|>")


@pytest.mark.slow
def test_dpo_trains_on_the_votes(served, votes, voices, tmp_path):
    if not votes.exists():
        test_a_vote_is_a_preference_pair(served, votes)
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from philora.models.loading import load_model
    from tests.adapters_of_nano import NANO

    arguments = DPOConfig(output_dir=str(tmp_path), max_steps=1, report_to=[], bf16=False, use_cpu=True)
    trainer = DPOTrainer(
        model=load_model(NANO, voices.tokenizer),
        args=arguments,
        train_dataset=load_dataset("json", data_files=str(votes), split="train", cache_dir=str(tmp_path / "cache")),
        processing_class=voices.tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    # Before the first update policy and reference are the same, and the loss is that of a coin.
    assert trainer.train().training_loss == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"chosen": ""}, "invalid_value"),
        ({"chosen": "\ud800"}, "invalid_value"),
        ({"prompt": []}, "invalid_value"),
        ({"more": 1}, "unknown_parameter"),
    ],
)
def test_a_vote_that_is_none(served, votes, change, code):
    vote = {"prompt": WHO, "chosen": "a", "rejected": "b", "chosen_model": "red", "rejected_model": "nano"}
    before = votes.read_bytes() if votes.exists() else b""
    status, answer = served.raw("POST", "/votes", vote | change)
    assert (status, answer["error"]["code"]) == (400, code)
    assert (votes.read_bytes() if votes.exists() else b"") == before


# -- where it listens


def test_a_port_in_use_and_an_address_that_is_none():
    with connections.listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"server: address='127.0.0.1:{port}' - .* free port.*in use"):
            connections.listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="expected an address of this machine"):
        connections.listen("203.0.113.1", 0)


def test_a_server_leaves_the_log_handlers_of_the_process_open(tmp_path, voices):
    """uvicorn's own logging configuration closes every handler that the process has, and with them its streams."""
    own = logging.FileHandler(tmp_path / "own.log", encoding="utf-8")
    connections.Server(lambda *_: None, Scheduler(voices))
    assert own.stream is not None
    assert not own.stream.closed
    own.close()


def test_beyond_this_machine_a_key_is_needed():
    connections.check_key("127.0.0.1", None)
    connections.check_key("0.0.0.0", "secret")
    with pytest.raises(ConfigError, match=r"host='0.0.0.0' - expected a key where other machines reach the server"):
        connections.check_key("0.0.0.0", None)
    with pytest.raises(ConfigError, match="expected printable ASCII"):
        connections.check_key("127.0.0.1", "gehéim")
    assert connections.hosts_of("0.0.0.0") is None
    assert "localhost" in connections.hosts_of("::1")


# -- what a request's own fault ends


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1, "top_p": 1e-46},
        {"temperature": 1e-40},
        {"temperature": 5e-324, "top_p": 1e-300},
        {"temperature": 1, "top_p": 1e-46, "extra_body": {"top_k": 10**40}, "seed": 10**60},
        {"temperature": 1e-40, "seed": -(10**60), "max_tokens": 10**40},
    ],
)
def test_extreme_sampling_tends_to_greedy(client, options):
    """The adapter is sure of its sentence; at its extreme each of these draws the likeliest token."""
    answer = ask(client, **{"max_tokens": 40} | options)
    assert answer.choices[0].message.content == SAYS


def test_the_fault_of_one_ends_that_one_alone(served, voices, monkeypatch):
    """Answers of one adapter share each forward pass; logits of one row are NaN, and a sampler of another raises."""
    expected = alone(served)
    replies = [voices.answer(voices.prompt(WHO), chat_settings(16), "red") for _ in range(3)]

    def broken(logits, randoms):
        raise ValueError("planted")

    broken.greedy = True
    replies[0]._sampler = broken
    take = replies[1].take
    monkeypatch.setattr(replies[1], "take", lambda logits: take(logits * math.nan))
    found = voices.step("red", replies)
    assert isinstance(found[0], ValueError)
    assert isinstance(found[1], NotFiniteError)
    while replies[2].finish is None:
        (piece,) = voices.step("red", replies[2:])
        assert isinstance(piece, str)
    assert replies[2].text == expected["red"][0]


def test_a_shared_step_that_fails_is_taken_one_by_one(voices, monkeypatch):
    """Whose fault it is shows alone: the others get the token that they would have got."""
    replies = [voices.answer(voices.prompt(WHO), chat_settings(16), "red") for _ in range(3)]
    logits = voices._logits_shared

    def broken(adapter, given):
        if replies[1] in given:
            raise ValueError("planted")
        return logits(adapter, given)

    monkeypatch.setattr(voices, "_logits_shared", broken)
    while not all(each.finish for each in (replies[0], replies[2])):
        found = voices.step("red", [each for each in replies if each.finish is None])
        assert sum(isinstance(each, ValueError) for each in found) == 1
    assert replies[0].text == replies[2].text
    assert replies[0].text
    assert SAYS.startswith(replies[0].text.strip())
    assert replies[1].tokens == 0


# -- memory that does not suffice


def queued(voices, names, settings=None):
    """A scheduler with answers that nobody computes yet, and what each was told."""
    scheduler = Scheduler(voices)
    told = [[] for _ in names]
    jobs = []
    for index, name in enumerate(names):
        reply = voices.answer(voices.prompt(WHO), settings or chat_settings(16), None if name == "nano" else name)
        jobs.append(Job(0, reply, told[index].append))
    scheduler.submit(jobs)
    return scheduler, jobs, told


def test_each_adapters_step_knows_how_many_there_may_be(voices, monkeypatch):
    """Where one at a time fits, all are answered, whichever adapter runs out first; and later more are tried again."""
    names = ["red", "green", "nano"] * 2
    expected, jobs, _ = queued(voices, names)
    while expected._round():
        pass
    want = [job.reply.text for job in jobs]
    step = voices.step

    def small(adapter, replies):
        if len(replies) > 1:
            raise torch.OutOfMemoryError("planted")
        return step(adapter, replies)

    monkeypatch.setattr(voices, "step", small)
    scheduler, jobs, told = queued(voices, names)
    while scheduler._round():
        assert len(scheduler._active) <= max(scheduler.parallel, 1)
    assert [job.reply.text for job in jobs] == want
    assert all("".join(event.piece for event in events) == text for events, text in zip(told, want, strict=True))
    assert not any(event.error for events in told for event in events)
    assert 1 <= scheduler.parallel <= 3


def test_more_answers_are_tried_again_after_good_steps(voices, monkeypatch):
    monkeypatch.setattr(philora.serving.scheduler, "GROW_AFTER_STEPS", 4)
    scheduler, jobs, told = queued(voices, ["red"] * 4)
    scheduler.parallel = 1
    for _ in range(4):
        scheduler._round()
    assert scheduler.parallel == 1
    seen = set()
    while scheduler._round():
        seen.add(scheduler.parallel)
    assert max(seen) > 1
    assert len({job.reply.text for job in jobs}) == 1
    assert all("".join(event.piece for event in each) == jobs[0].reply.text for each in told)


def test_a_long_answers_token_survives_the_others_lack_of_memory(voices, monkeypatch):
    """An answer beyond the shared length is computed alone; what it got is told though the shared step failed."""
    scheduler, jobs, told = queued(voices, ["red", "red", "red"])
    monkeypatch.setattr(voices, "_shared_tokens", jobs[0].reply.limit_tokens - 1)
    jobs[0].reply.limit_tokens += 1  # alone; the other two share
    for job in jobs[1:]:
        job.reply.limit_tokens -= 1
    logits = voices._logits_shared
    failures = []

    def small(adapter, replies):
        if not failures:
            failures.append(len(replies))
            raise torch.OutOfMemoryError("planted")
        return logits(adapter, replies)

    monkeypatch.setattr(voices, "_logits_shared", small)
    while scheduler._round():
        pass
    assert failures
    for job, events in zip(jobs, told, strict=True):
        assert "".join(event.piece for event in events) == job.reply.text
        assert not any(event.error for event in events)
        assert job.reply.text
        assert SAYS.startswith(job.reply.text.strip())


# -- fields


def test_a_message_of_openais_client_is_history(client):
    first = ask(client, max_tokens=4).choices[0].message
    messages = [*WHO, first.model_dump(), {"role": "user", "content": "And now?"}]
    plain = [*WHO, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And now?"}]
    assert ask(client, messages=messages).usage == ask(client, messages=plain).usage


NOTHING = {
    "top_k": 0,
    "repetition_penalty": 1,
    "min_p": 0.0,
    "frequency_penalty": None,
    "logit_bias": {},
    "tools": [],
    "tool_choice": None,
    "response_format": None,
    "best_of": 1,
    "ignore_eos": False,
    "guided_json": None,
    "stop_token_ids": [],
}


def test_what_asks_for_nothing_is_taken(client):
    answer = ask(client, extra_body=NOTHING, top_p=1)
    assert answer.choices[0].message.content == SAYS


def test_an_unknown_field_is_logged_and_left_out(client, caplog):
    for _ in range(2):
        assert ask(client, extra_body={"temprature": 1}).choices[0].message.content == SAYS
    lines = [each for each in caplog.messages if "temprature" in each]
    assert len(lines) == 1
    assert "Did you mean 'temperature'?" in lines[0]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"min_p": 0.1}, "min_p"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"messages": [*WHO, {"role": "assistant", "content": "a", "tool_calls": [CALL]}]}, "messages[1].tool_calls"),
        ({"messages": [{"role": "user", "content": "a", "refusal": "no"}]}, "messages[0].refusal"),
    ],
)
def test_what_is_asked_for_and_not_there_is_refused_by_name(served, change, param):
    status, answer = served.raw("POST", "/v1/chat/completions", {"model": "red", "messages": WHO} | change)
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["code"] == "unsupported_parameter"


# -- bodies that cost


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([1] * 1_000_000, "context_length_exceeded"),
        ([{"role": "user", "content": ""}] * 100_000, "context_length_exceeded"),
        ([{"role": "user", "content": "a" * 3_900_000}], "context_length_exceeded"),
        ([{"role": "user", "content": "<|end|>" * 500_000}], "context_length_exceeded"),
        ([{"role": "user", "content": [1] * 1_000_000}], "invalid_value"),
    ],
)
def test_a_body_below_the_limit_costs_little(served, voices, monkeypatch, messages, code):
    """Counted in what is tokenised, not in seconds: no more than some times the model's window."""
    read = []
    ids = voices.arrangement._ids
    monkeypatch.setattr(voices.arrangement, "_ids", lambda text: read.append(len(text)) or ids(text))
    status, answer = served.raw("POST", "/v1/chat/completions", {"model": "red", "messages": messages})
    assert (status, answer["error"]["code"]) == (400, code)
    assert sum(read) <= 2**17
    assert len(json.dumps(answer)) < 1000


def test_reading_a_body_leaves_the_server_free(served, voices, monkeypatch):
    """While one request is being tokenised, another is answered."""
    begun, go_on = threading.Event(), threading.Event()
    prompt = voices.prompt

    def slow(messages):
        if messages[0]["content"] == "slow":
            begun.set()
            assert go_on.wait(60)
        return prompt(messages)

    monkeypatch.setattr(voices, "prompt", slow)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(ask, served.client(), messages=[{"role": "user", "content": "slow"}], max_tokens=1)
        assert begun.wait(60)
        assert served.raw("GET", "/health")[0] == 200
        go_on.set()
        assert waits.result(60).choices


# -- connections


def opened(served, data=b""):
    connection = socket.create_connection(served.bound.getsockname(), timeout=60)
    connection.sendall(data)
    return connection


def test_connections_are_bounded_and_headers_have_a_deadline(voices, caplog):
    with serve(voices, limits={"connections": 3, "header_seconds": 600.0}) as served:
        silent = [opened(served, data) for data in (b"", b"GET / HT", b"GET /health HTTP/1.1\r\nHost: ")]
        deadline = time.monotonic() + 60
        while len(served.server.server_state.connections) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(5):
            with opened(served) as refused:
                assert b"too_many_connections" in refused.recv(1000)
        assert sum("connections are open" in each for each in caplog.messages) == 1, "said once"
        while len(served.server.server_state.connections) > 3 and time.monotonic() < deadline:
            time.sleep(0.01)  # until those that were refused are gone
        taken = list(served.server.server_state.connections)
        assert len(taken) == 3
        for each in taken:
            assert each._late is not None
            each.loop.call_soon_threadsafe(each._too_late)
        assert [b"request_timeout" in each.recv(1000) for each in silent] == [True] * 3
        for each in silent:
            each.close()
        while served.server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        assert served.raw("GET", "/health")[0] == 200


def test_there_are_fewer_connections_than_descriptors(monkeypatch):
    import resource

    for soft in (256, 1024, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, soft))
        found = connections.most_connections()
        assert 4 <= found <= connections.MOST_CONNECTIONS
        if soft == 1024:
            assert found < 1024 - 64


def test_a_body_has_a_deadline(served, monkeypatch):
    monkeypatch.setattr(serving, "BODY_SECONDS", 0.05)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with opened(served, f"{head}Content-Length: 100\r\n\r\n{{".encode()) as connection:
        answer = b""
        while part := connection.recv(4000):  # the header may come alone
            answer += part
    assert b"request_timeout" in answer


# -- the end of the server


def uploading(cycle):
    """Whether a request's header has come, and its body has not."""
    return cycle is not None and cycle.more_body and not cycle.response_started


def test_the_end_of_the_server_is_told_to_everybody(voices, caplog):
    scheduler = Scheduler(voices, parallel=1)
    with serve(voices, scheduler=scheduler) as served, ThreadPoolExecutor(2) as pool:
        stream = iter(ask(served.client(), stream=True, **LONG))
        next(stream)
        waits = pool.submit(ask, served.client())
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        halfway = opened(served, f"{head}Content-Length: 100\r\n\r\n{{".encode())
        deadline = time.monotonic() + 60
        cycles = [each.cycle for each in served.server.server_state.connections]
        while (scheduler.load < 2 or not any(map(uploading, cycles))) and time.monotonic() < deadline:
            time.sleep(0.01)
            cycles = [each.cycle for each in list(served.server.server_state.connections)]
        served.server.should_exit = True
        with pytest.raises(openai.APIError, match="server is stopping"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            waits.result(60)
        assert (caught.value.status_code, caught.value.code) == (503, "server_stopping")
        assert b"server_stopping" in halfway.recv(1000)
        halfway.close()
    assert not [each for each in caplog.messages if "Traceback" in each or "Cancel" in each]
    with pytest.raises(ApiError, match="server is stopping"):
        scheduler.submit([])


# -- votes that are kept


def test_a_vote_that_finds_no_room_leaves_nothing_behind(tmp_path):
    """The limit on a file's size stands for a full disk: what was there stays, and the next vote is whole."""
    import resource

    path = tmp_path / "votes.jsonl"
    vote_files.append_lines(path, [{"a": 1}])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            vote_files.append_lines(path, [{"b": "x" * 100}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    path.write_bytes(before + b'{"torn')  # as a power cut leaves it
    vote_files.append_lines(path, [{"c": 3}])
    assert path.read_text().splitlines() == ['{"a": 1}', '{"torn', '{"c": 3}']


def test_a_vote_that_cannot_be_stored_is_said(voices):
    with serve(voices, votes=Path("/dev/full")) as served:
        vote = {"prompt": WHO, "chosen": "a", "rejected": "b", "chosen_model": "red", "rejected_model": "nano"}
        status, answer = served.raw("POST", "/votes", vote)
    assert (status, answer["error"]["code"]) == (500, "vote_not_stored")


def test_votes_that_cannot_be_written_are_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "votes.jsonl"):
        with pytest.raises(ConfigError, match=r"chat: votes=.* - expected a file that lines can be appended to"):
            vote_files.check_votes(path)
    vote_files.check_votes(tmp_path / "new" / "votes.jsonl")
    assert not (tmp_path / "new" / "votes.jsonl").exists()


# -- memory of compiled products

PRODUCTS = """
import psutil, torch
weights = [torch.randn(n, 64) for n in (64, 96, 160, 224)]
packed = [torch.ops.mkldnn._reorder_linear_weight(each, 8) for each in weights]
before = 0
with torch.inference_mode():
    for rows in range(1, 400):
        for each in packed:
            torch.ops.mkldnn._linear_pointwise(torch.randn(rows, 64), each, None, "none", [], "")
        before = before or psutil.Process().memory_info().rss
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.slow
def test_the_variety_of_lengths_takes_a_bounded_amount_of_memory():
    """What `philora serve` sets for oneDNN and PyTorch; without it each length of a prompt stays in memory."""

    def grown(kept):
        env = os.environ | (dict.fromkeys(cli.PRODUCT_CACHES, kept) if kept else {})
        done = subprocess.run([sys.executable, "-c", PRODUCTS], env=env, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert grown(str(cli.PRODUCTS_KEPT)) < grown(None) / 2
