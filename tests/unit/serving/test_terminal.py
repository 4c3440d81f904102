"""The loop of `philora chat`: commands, Ctrl-C, scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from philora.cli import commands as cli
from philora.errors import printable
from philora.generation import inference
from philora.generation.conversation import Conversation, chat_settings, load_pool
from philora.serving.terminal import COMMANDS, Terminal, WordWrap, completions
from tests.conftest import COLOURS


@pytest.fixture(scope="module")
def voices(colours):
    return load_pool(colours)


class Screen:
    """Reads lines of a script and keeps what is shown."""

    def __init__(self, voices, *lines, **settings):
        self.lines = list(lines)
        self.text = ""
        self.notes = []
        self.conversation = Conversation(voices, chat_settings(**{"max_new_tokens": 40, **settings}), "red")
        self.terminal = Terminal(self.conversation, self.read, self.write, self.notes.append)

    def read(self):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def write(self, text):
        self.text += text

    def run(self):
        self.terminal.run()
        return self


def test_turns(voices):
    screen = Screen(voices, "Who are you?", "", "And now?", "/exit", "never read").run()
    assert screen.text == f"{COLOURS['red']}\n" * 2
    assert [each["role"] for each in screen.conversation.messages] == ["user", "assistant"] * 2
    assert (screen.notes, screen.terminal.refused, screen.lines) == ([], 0, ["never read"])


def test_the_adapter_goes_off_and_on(voices):
    screen = Screen(voices, "Who are you?", "/base", "Who are you?", "/base", "Who are you?").run()
    first, base, last = screen.text.splitlines()
    assert first == last == COLOURS["red"] != base
    assert screen.notes == [
        "the base answers, without the adapter; the history stays",
        "red answers; the history stays",
    ]
    assert len(screen.conversation.messages) == 6


def test_ctrl_c_stops_the_answer_and_not_the_program(voices):
    screen = Screen(voices, "Who are you?", "And now?")
    write = screen.write

    def stop_after_two_pieces(text):
        write(text)
        if screen.text.endswith(" red") and "\n" not in screen.text:
            os.kill(os.getpid(), signal.SIGINT)

    screen.terminal._write = stop_after_two_pieces
    before = signal.getsignal(signal.SIGINT)
    screen.run()
    stopped, whole = screen.text.splitlines()
    assert COLOURS["red"].startswith(stopped)
    assert len(stopped) < len(COLOURS["red"])
    assert whole == COLOURS["red"]
    assert screen.notes == ["stopped; the partial answer stays in the history"]
    assert screen.conversation.messages[1]["content"] == stopped
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait_for_the_token(voices, monkeypatch):
    screen = Screen(voices, "Who are you?", "And now?")
    forward, calls = voices.model.forward, []

    def twice(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*arguments, **options)

    monkeypatch.setattr(voices.model, "forward", twice)
    screen.run()
    assert screen.text.splitlines()[1] == COLOURS["red"]


@pytest.mark.parametrize("word", ["exit", "quit", "/exit", "/quit", " exit "])
def test_words_that_leave(voices, word):
    screen = Screen(voices, word, "Who are you?").run()
    assert (screen.text, screen.lines) == ("", ["Who are you?"])


def test_ctrl_c_twice_leaves(voices):
    screen = Screen(
        voices, KeyboardInterrupt(), "Who are you?", KeyboardInterrupt(), KeyboardInterrupt(), "never"
    ).run()
    assert screen.text == COLOURS["red"] + "\n"
    assert screen.lines == ["never"]


def test_tab_completes_commands_and_settings():
    assert completions("/re", "/re") == ["/reset"]
    assert completions("/params t", "t") == ["temperature=", "top_p=", "top_k="]
    assert completions("hello", "hello") == []
    assert set(COMMANDS) == {"/reset", "/base", "/system", "/params", "/save", "/help", "/exit", "/quit"}


def test_words_are_not_broken_at_the_edge():
    written = []
    wrapped = WordWrap(written.append, lambda: 10)
    for piece in ("one tw", "o three fo", "ur\nfive six", "\n"):
        wrapped(piece)
    assert "".join(written) == "one two \nthree four\nfive six\n"
    written.clear()
    for letter in "漢字" * 6 + "\n":
        wrapped(letter)
    assert "".join(written).splitlines() == ["漢字漢字漢", "字漢字漢字", "漢字"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_what_is_typed_while_an_answer_comes_is_neither_shown_nor_sent():
    program = (
        "import sys, time; from philora.serving.terminal import typing_ignored\n"
        "with typing_ignored():\n    print('ready', flush=True); time.sleep(1)\n"
        "print('asked', flush=True); print('got', repr(input()), flush=True)"
    )
    import pty

    main, other = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program], stdin=other, stdout=other, stderr=other)
    os.close(other)
    seen = b""
    for wait_for, typed in ((b"ready", b"ahead\n"), (b"asked", b"after\n"), (b"got", b"")):
        while wait_for not in seen:
            seen += os.read(main, 1024)
        if typed:
            os.write(main, typed)
    while b"after'" not in seen:
        seen += os.read(main, 1024)
    process.wait(30)
    os.close(main)
    assert b"got 'after'" in seen
    assert b"ahead" not in seen


def test_ctrl_c_at_the_prompt_says_how_to_leave(voices):
    screen = Screen(voices, KeyboardInterrupt(), "Who are you?").run()
    assert screen.notes == ["Ctrl-C again leaves, as /exit and Ctrl-D do"]
    assert screen.text == COLOURS["red"] + "\n"


def test_lines_that_go_on_and_messages_with_a_slash(voices):
    screen = Screen(voices, "Who \\", "are you?", "//reset").run()
    asked = [each["content"] for each in screen.conversation.messages if each["role"] == "user"]
    assert asked == ["Who \nare you?", "/reset"]


def test_reset_and_system(voices):
    screen = Screen(voices, "Who are you?", "/reset", "/system Be brief.", "Who are you?", "/system", "/system -").run()
    assert screen.notes == [
        "a new conversation",
        "system prompt: Be brief.",
        "system prompt: Be brief.",
        "system prompt: none",
    ]
    assert screen.conversation.messages == []


def test_params(voices):
    screen = Screen(voices, "/params", "/params temperature=0.5 top_p=0.9 seed=3 max_new_tokens=2", "Who are you?")
    screen.lines += ["/params temperature=0 top_p=none stop=red", "/params max_new_tokens=40", "Who are you?"]
    screen.run()
    assert screen.notes[0] == "max_new_tokens=40  temperature=0.0  top_p=None  top_k=None  seed=0  stop=[]"
    assert screen.notes[1] == "max_new_tokens=2  temperature=0.5  top_p=0.9  top_k=None  seed=3  stop=[]"
    assert screen.notes[2] == "cut after 2 tokens (/params max_new_tokens=...)"
    assert screen.text.splitlines()[1] == "I am "
    assert screen.terminal.refused == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "chat: command='/rest' - expected a command. Did you mean 'reset'?"),
        ("/params temprature=1", "expected NAME=VALUE. Did you mean 'temperature'?"),
        ("/params temperature=hot", "chat: temperature='hot' - expected a number, or none."),
        ("/params top_p=0.5", "chat: top_p=0.5 - expected a temperature above 0 beside it."),
        ("/params seed=none", "expected a number for max_new_tokens, temperature and seed"),
        ("/save", "chat: save='' - expected a file."),
        ("/save x.jsonl", "expected a conversation with an answer in it"),
        ("word " * 2100, "expected fewer than the model's 2048"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_program_goes_on(voices, line, message):
    screen = Screen(voices, line, "Who are you?").run()
    assert message in screen.notes[0]
    assert screen.terminal.refused == 1
    assert screen.text == COLOURS["red"] + "\n"


def test_help_names_every_command(voices):
    screen = Screen(voices, "/help").run()
    assert all(f"/{name}" in screen.notes[0] for name in ("reset", "base", "system", "params", "save", "help", "exit"))


def test_save_in_a_folder_that_is_not_there(voices, tmp_path):
    screen = Screen(voices, "Who are you?", f"/save {tmp_path / 'no' / 'x.jsonl'}").run()
    assert f"expected a file in a folder that exists; {tmp_path / 'no'} does not" in screen.notes[-1]


def test_save_writes_a_line_of_training_data(voices, tmp_path):
    path = tmp_path / "talk.jsonl"
    taken = tmp_path / "taken.jsonl"
    taken.write_text("mine")
    screen = Screen(
        voices, "/system Be brief.", "Who are you?", f"/save {path}", "And now?", f"/save {path}", f"/save {taken}"
    )
    screen.run()
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert [each["role"] for each in json.loads(line)["messages"]] == ["system", *["user", "assistant"] * 2]
    assert taken.read_text() == "mine"
    assert "expected a file that does not exist yet" in screen.notes[-1]


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2Jb\x07\n\tc\x9bd") == "a\ufffd[2Jb\ufffd\n\tc\ufffdd"


def test_data_in_the_command_lines_own_words_cannot_set_the_terminal(capsys, monkeypatch):
    """rich's styles stay; what stands in a message, a name or a log line does not become an escape sequence."""
    monkeypatch.setattr(cli.out, "_force_terminal", True)
    cli.out.print("[red]name[/]: \x1b]0;owned\x07\x1b[2J\x9bm", highlight=False)
    shown = capsys.readouterr().out
    assert "name" in shown
    assert "\x1b]0" not in shown
    assert "\x1b[2J" not in shown
    assert not {"\x07", "\x9b"} & set(shown)


def test_lines_of_answers_hold_no_control_characters():
    line = json.dumps({"a": "\x9b2J\x7f\x1b"}, ensure_ascii=False).translate(inference._CONTROLS)
    assert line.isprintable()
    assert json.loads(line) == {"a": "\x9b2J\x7f\x1b"}
