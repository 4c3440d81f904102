"""A fine-tuned model answers its help desk in chat, endpoint and page alike, and stops by itself."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from importlib import resources

import pytest
import yaml

import philora
from philora.generation.conversation import Conversation, chat_settings, load_pool
from tests.browser import page_of
from tests.served import serve

pytestmark = pytest.mark.slow

NANO = resources.files("philora") / "nano"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The demo's run with fewer epochs."""
    folder = tmp_path_factory.mktemp("helpdesk") / "run"
    settings = {
        "output_dir": folder,
        "num_train_epochs": 8,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    overrides = [f"training_config.{name}={value}" for name, value in settings.items()]
    philora.train(str(NANO / "demo.yaml"), [*overrides, "evaluation.generate=1"])
    # Answers are compared to the letter: the terminal computes each alone, the endpoint in rows, and in bf16 another
    # order of sums may choose otherwise between tokens that are all but equal.
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    saved["model"]["dtype"] = "float32"
    (folder / "config.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def voices(run):
    return load_pool({"helpdesk": run})


@pytest.fixture(scope="module")
def rows():
    """Question and reference of held-out rows with one question."""
    lines = (NANO / "helpdesk" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    return [(chat[0]["content"], chat[1]["content"]) for chat in chats if len(chat) == 2][:40]


@pytest.fixture(scope="module")
def spoken(voices, rows):
    """What the adapter answers in a conversation that begins with each question."""
    texts = []
    for question, _ in rows:
        talk = Conversation(voices, chat_settings(64), "helpdesk")
        reply, _ = talk.ask(question)
        list(reply)
        assert reply.finish == "stop", f"{question}: {reply.text}"
        texts.append(reply.text)
    return texts


def test_it_answers_and_the_base_does_not(voices, rows, spoken):
    right = sum(text == reference for text, (_, reference) in zip(spoken, rows, strict=True))
    print(f"{right} of {len(rows)} answers are those of the help desk")
    assert right >= len(rows) // 2
    base = []
    for question, _ in rows[:10]:
        reply = voices.answer(voices.prompt([{"role": "user", "content": question}]), chat_settings(64), None)
        list(reply)
        base.append(reply.text)
    assert not set(base) & {reference for _, reference in rows}


def test_the_endpoint_gives_the_same_answers(voices, rows, spoken):
    with serve(voices) as served:
        client = served.client()
        for (question, _), text in zip(rows[:20], spoken, strict=False):
            messages = [{"role": "user", "content": question}]
            answer = client.chat.completions.create(model="helpdesk", messages=messages, max_tokens=64)
            assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")


def test_the_page_gives_the_same_answers(voices, rows, spoken, tmp_path):
    with serve(voices, votes=tmp_path / "votes.jsonl") as served, page_of(served.address) as page:
        for (question, _), text in zip(rows[:4], spoken, strict=False):
            page.click("#new")
            page.fill("#text", question)
            page.keyboard.press("Enter")
            page.wait_for_selector("#send:visible", timeout=60_000)
            assert page.text_content(".turn:last-child .answer:nth-child(2) .words") == text
            assert "cut" not in page.text_content(".turn:last-child .answer:nth-child(2) .figures")


def of_a_terminal():
    """Take the terminal, and SIGINT as a shell gives it: who starts the tests in the background has it ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`philora` in a terminal of its own."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "philora", *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "dumb"},
            start_new_session=True,
            preexec_fn=of_a_terminal,
        )
        os.close(slave)
        self.text = ""

    def until(self, pattern, seconds=90):
        """What is shown up to a pattern."""
        deadline = time.monotonic() + seconds
        while (found := re.search(pattern, self.text)) is None:
            left = deadline - time.monotonic()
            shows, _, _ = select.select([self.master], [], [], max(0.0, left))
            assert shows, f"no {pattern!r} in: {self.text}"
            try:
                self.text += os.read(self.master, 4096).decode(errors="replace").replace("\r", "")
            except OSError:
                raise AssertionError(f"it ended: {self.text}") from None
        shown, self.text = self.text[: found.end()], self.text[found.end() :]
        return shown

    def type(self, text):
        os.write(self.master, text.encode())


def test_a_person_at_a_terminal(run, rows, spoken, tmp_path):
    terminal = Terminal("chat", run, "--max-new-tokens", "1900")
    try:
        terminal.until(r"/help lists the commands[^>]*> ")
        terminal.type(rows[0][0] + "\n")
        assert spoken[0] in " ".join(terminal.until(r"\n> ").split())
        terminal.type("/params temperature=2\n")
        terminal.until(r"temperature=2\.0[^>]*> ")
        terminal.type("/base\n")
        terminal.until(r"the base answers[^>]*> ")
        asked, shown = 0, ""
        while "stopped" not in shown:  # an answer may end by itself before it is stopped
            asked += 1
            assert asked < 6
            terminal.type("Say something.\n")
            terminal.until(r"Say something\.\n\S+")
            terminal.type("\x03")
            shown = terminal.until(r"(stopped; the partial answer stays in the history|leaves)[^>]*> ")
        time.sleep(1)  # Python sees a signal between the prompt and the read of a line with the next key only
        terminal.type("\x03")
        terminal.until(r"Ctrl-C again leaves[^>]*> ", 20)
        terminal.type(f"/save {tmp_path / 'talk.jsonl'}\n")
        terminal.until(rf"saved {2 + 2 * asked} messages")
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)
    assert len(json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"]) == 2 + 2 * asked


def test_a_server_of_its_own_process_ends_on_a_signal(run, rows, spoken):
    command = [sys.executable, "-m", "philora", "serve", f"desk={run}", "--port", "0", "--api-key", "secret"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == "models: desk, nano\n"
        address = server.stdout.readline().split()[1]
        import openai

        client = openai.OpenAI(base_url=address, api_key="secret", max_retries=20)
        messages = [{"role": "user", "content": rows[0][0]}]
        answer = client.chat.completions.create(model="desk", messages=messages)
        assert answer.choices[0].message.content == spoken[0]
        server.send_signal(2)
        assert server.wait(20) == 0
        assert "Traceback" not in server.stderr.read()
    finally:
        server.kill()
