"""Values between processes: of any size, and a failure is said of the process that failed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from philora.runtime import processes
from philora.runtime.signals import StopOnSignal

SCRIPT = """
from philora.runtime import processes
from philora.errors import RunError

large = bytes([processes.rank()]) * (21 << 20) + b"end"
found = processes.gathered(large)
assert [len(each) for each in found] == [len(large)] * 2, [len(each) for each in found]
assert [each[0] for each in found] == [0, 1] and all(each.endswith(b"end") for each in found)
assert processes.on_main(lambda: large) == found[0]
assert processes.gathered({"rank": processes.rank()}) == [{"rank": 0}, {"rank": 1}]
assert processes.gathered("") == ["", ""]

def fail():
    raise RunError("planted")

try:
    processes.on_main(fail)
except processes.Elsewhere as error:
    assert processes.rank() == 1
    print(error)
except RunError:
    assert processes.rank() == 0
if processes.is_main():
    processes._wait("read")  # the first process holds the store
else:
    processes._shared().set("read", b"")
"""


@pytest.mark.slow
def test_values_of_any_size_reach_every_process():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    given = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**given, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [each.communicate(timeout=240) for each in started]
    assert [each.returncode for each in started] == [0, 0], results
    assert results[1][0] == "run: process=1 - expected process 0 to continue. Its message has the reason.\n"


class Store(dict):
    """A launcher's store that refuses what PyTorch's refuses."""

    def set(self, key, value):
        assert len(value) <= 8 << 20
        self[key] = value.encode() if isinstance(value, str) else value

    def get(self, key):
        return self[key]

    def check(self, keys):
        return all(each in self for each in keys)


@pytest.mark.parametrize("size", [0, 1, processes.PART_BYTES, processes.PART_BYTES + 1, 9 << 20])
def test_parts_make_the_whole(monkeypatch, size):
    monkeypatch.setattr(processes, "_store", Store())
    value = os.urandom(size)
    processes._give("key", value)
    assert processes._take("key", 0) == value
    assert len(processes._store) >= 1 + size // processes.PART_BYTES


def test_the_process_that_failed_is_named(monkeypatch):
    store = Store()
    monkeypatch.setattr(processes, "_store", store)
    store.set("key", processes._FAILED)
    with pytest.raises(processes.Elsewhere, match="expected process 5 to continue"):
        processes._take("key", 5)


def test_a_lost_process_is_the_reason_also_if_the_launcher_ends_this_one_at_once(monkeypatch):
    """The launcher sends SIGTERM to all others as soon as one has ended."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(processes, "count", lambda: 2)
    stop = StopOnSignal("in the test", "philora train x")
    stop.saved = lambda: True

    def run():
        with stop:
            try:
                with stop.finishing():
                    raise RuntimeError("Connection closed by peer")
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.raises(RuntimeError, match="closed by peer"):
            run()
        os.kill(os.getpid(), signal.SIGTERM)  # until the process ends
    finally:
        signal.signal(signal.SIGTERM, before)
