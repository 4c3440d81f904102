"""Chat in the terminal or over a pipe: lines in, answers out as they are generated.

Functions to read and write are passed in, so that a person, a script and a test use the same loop.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from philora.errors import ConfigError, PhiloraError, fault, printable
from philora.files.checkpoint import write_text
from philora.generation.conversation import Conversation, chat_settings, known

HELP = """\
/reset            start a new conversation
/base             switch the adapter off, and on again
/system [TEXT]    show the system prompt, or set it and start a new conversation (/system - removes it)
/params [K=V ...] show or set max_new_tokens, temperature, top_p, top_k, seed, stop
/save FILE        write the conversation as a line of training data
/help             show this list
/exit             leave; so do exit, quit, Ctrl-D, and Ctrl-C twice
Tab completes a command. Ctrl-C stops an answer. A line that ends in \\ continues in the next.
// at the start sends a message that starts with one /."""

COMMANDS = ("/reset", "/base", "/system", "/params", "/save", "/help", "/exit", "/quit")
BREAKS = r"(\s|[\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef])"
"""Where a line may be broken: at a space, and after every character of scripts without spaces between words."""

LEAVE = ("/exit", "/quit", "exit", "quit")

SETTINGS: dict[str, Callable[[str], Any]] = {
    "max_new_tokens": int, "temperature": float, "top_p": float, "top_k": int, "seed": int, "stop": str,
}  # fmt: skip


class Terminal:
    """The loop of `philora chat`.

    Attributes:
        refused: How many messages and commands failed.
    """

    def __init__(
        self,
        conversation: Conversation,
        read: Callable[[], str],
        write: Callable[[str], None],
        note: Callable[[str], None],
        guard: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Prepare the loop.

        Args:
            conversation: The conversation.
            read: Returns the next line; raises EOFError at the end, and KeyboardInterrupt for Ctrl-C.
            write: Shows a piece of an answer at once.
            note: Shows a line about the conversation.
            guard: Entered while an answer is generated; `typing_ignored` on a terminal.
        """
        self.conversation = conversation
        self.refused = 0
        self._read = read
        self._write = write
        self._note = note
        self._guard = guard
        self._adapter = conversation.adapter
        self._saved: set[Path] = set()

    def run(self) -> None:
        """Read and answer until the end of input, an exit command, or the second Ctrl-C in a row."""
        interrupted = False
        while True:
            try:
                line = self._line()
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted:
                    return
                interrupted = True
                self._note("Ctrl-C again leaves, as /exit and Ctrl-D do")
                continue
            interrupted = False
            if line.strip() in LEAVE:
                return
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                elif line.strip():
                    self._answer(line[1:] if line.startswith("//") else line)
            except (PhiloraError, OSError) as error:
                self.refused += 1
                self._note(str(error))

    def _line(self) -> str:
        line = self._read()
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{self._read()}"
        return line

    def _answer(self, text: str) -> None:
        reply, forgotten = self.conversation.ask(text)
        if forgotten:
            window = self.conversation.pool.window
            self._note(f"the history no longer fits {window} tokens: the oldest {forgotten} messages are left out")
        with self._guard(), contextlib.suppress(KeyboardInterrupt), stoppable() as stopped:
            for piece in reply:
                self._write(printable(piece))
                if stopped.is_set():
                    break
        self._write("\n")
        self.conversation.keep(text, reply, forgotten)
        if reply.finish is None:
            kept = "the partial answer stays in the history" if reply.text else "the message is removed"
            self._note(f"stopped; {kept}")
        elif reply.finish == "length":
            self._note(f"cut after {reply.tokens} tokens (/params max_new_tokens=...)")

    # -- commands

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset,
            "base": self._base,
            "system": self._system,
            "params": self._params,
            "save": self._save,
            "help": lambda _: self._note(HELP),
        }
        if name not in commands:
            names = [*commands, "exit"]
            raise ConfigError(fault("chat", "command", f"/{name}", "a command", known(name, names)))
        commands[name](rest.strip())

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self._note("a new conversation")

    def _base(self, _: str) -> None:
        conversation = self.conversation
        conversation.adapter = self._adapter if conversation.adapter is None else None
        who = f"{conversation.adapter} answers" if conversation.adapter else "the base answers, without the adapter"
        self._note(f"{who}; the history stays")

    def _system(self, text: str) -> None:
        conversation = self.conversation
        if text:
            conversation.system = None if text == "-" else text
            conversation.reset()
        self._note(f"system prompt: {conversation.system or 'none'}")

    def _params(self, text: str) -> None:
        conversation = self.conversation
        settings = conversation.settings
        values = {name: getattr(settings, "stop_strings" if name == "stop" else name) for name in SETTINGS}
        values["temperature"] = values["temperature"] or 0.0
        for part in text.split():
            name, equals, value = part.partition("=")
            if name not in SETTINGS or not equals:
                raise ConfigError(fault("chat", "params", part, "NAME=VALUE", known(name, list(SETTINGS))))
            try:
                values[name] = None if value in ("", "none", "null") else SETTINGS[name](value)
            except ValueError as error:
                raise ConfigError(fault("chat", name, value, "a number, or none")) from error
        if values["temperature"] is None or values["max_new_tokens"] is None or values["seed"] is None:
            raise ConfigError(fault("chat", "params", text, "a number for max_new_tokens, temperature and seed"))
        stop = values["stop"] or ()
        values["stop"] = (stop,) if isinstance(stop, str) else stop
        conversation.settings = chat_settings(**values)
        shown = {name: list(value) if name == "stop" else value for name, value in values.items()}
        self._note("  ".join(f"{name}={value}" for name, value in shown.items()))

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError(fault("chat", "save", name, "a file", "Such as: /save conversation.jsonl"))
        if not self.conversation.messages:
            raise ConfigError(fault("chat", "save", name, "a conversation with an answer in it"))
        path = Path(name).expanduser().absolute()
        if path.exists() and path not in self._saved:
            raise ConfigError(fault("chat", "save", name, "a file that does not exist yet", "Give another name"))
        if not path.parent.is_dir():
            raise ConfigError(fault("chat", "save", name, f"a file in a folder that exists; {path.parent} does not"))
        write_text(path, json.dumps(self.conversation.record(), ensure_ascii=False) + "\n")
        self._saved.add(path)
        self._note(f"saved {len(self.conversation.messages)} messages in {path}")


@contextlib.contextmanager
def typing_ignored() -> Iterator[None]:
    """Ignore what is typed while an answer is generated, so that it is not shown or sent; Ctrl-C still works.

    Nothing changes if standard input is not a terminal, or on a system without termios (Windows).
    """
    try:
        import termios

        before = termios.tcgetattr(sys.stdin)
    except (ImportError, OSError, ValueError, io.UnsupportedOperation):
        yield
        return
    quiet = list(before)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcflush(sys.stdin, termios.TCIFLUSH)
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def complete_commands() -> bool:
    """Let Tab complete commands and setting names at the prompt; return whether the terminal supports it.

    The console of Windows has its own line editor, without completion.
    """
    try:
        import readline
    except ModuleNotFoundError:
        return False
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, state: [*completions(readline.get_line_buffer(), text), None][state])
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    return True


def completions(line: str, word: str) -> list[str]:
    """Return the completions of the word at the cursor, in a line as typed so far."""
    if line.lstrip().startswith("/params "):
        return [f"{name}=" for name in SETTINGS if name.startswith(word)]
    if not line.startswith("/") or " " in line:
        return []
    return [command for command in COMMANDS if command.startswith(word)]


class WordWrap:
    """Write text that arrives in pieces, and break lines between words.

    A word is held back until it is complete. The terminal breaks a word that is longer than a line.
    """

    def __init__(self, write: Callable[[str], None], columns: Callable[[], int]) -> None:
        """Start at the beginning of a line; `columns` returns the current width of the terminal."""
        self._write = write
        self._columns = columns
        self._column = 0
        self._held = ""

    def __call__(self, piece: str) -> None:
        """Add a piece; its last word is held back until a space or a line break ends it."""
        for part in re.split(BREAKS, piece):
            if part == "\n":
                self._flush()
                self._write("\n")
                self._column = 0
            elif part.isspace():
                self._flush()
                if 0 < self._column < self._columns():
                    self._write(part)
                    self._column += 1
            else:
                self._held += part
                if re.fullmatch(BREAKS, part):
                    self._flush()

    def _flush(self) -> None:
        width = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in self._held)
        if self._column and self._column + width > self._columns():
            self._write("\n")
            self._column = 0
        if self._held:
            self._write(self._held)
            self._column += width
            self._held = ""


@contextlib.contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Let SIGINT set the event, so that an answer ends between two tokens; a second SIGINT interrupts at once."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
