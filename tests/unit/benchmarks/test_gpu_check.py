"""`make gpu` as far as a CPU can run it, and the list of what to carry to a machine without a network."""

from __future__ import annotations

import csv
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_check
from tools import gpu_carry

REPOSITORY = Path(__file__).parents[3]
TEXT = gpu_carry.LIST.read_text(encoding="utf-8")


def faults(text):
    return list(gpu_carry.faults(gpu_carry.read(text), gpu_carry.own_dependencies()))


def test_nothing_is_missing_in_what_is_carried():
    assert faults(TEXT) == []


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (("xxhash==4.1.0\n", ""), "xxhash is missing - datasets declares xxhash"),
        (("httpcore2==2.16.2\n", ""), "httpcore2 is missing - httpx2 declares httpcore2"),
        ((" pyarrow", ""), "pyarrow is missing - philora declares pyarrow>=21"),
        (("peft==0.21.2", "peft==0.20.0"), "peft==0.20.0 - expected"),
        (("huggingface-hub==2.4.0", "huggingface-hub==1.3.0"), "huggingface-hub==1.3.0 - expected"),
    ],
)
def test_a_planted_fault_is_found(planted, said):
    assert planted[0] in TEXT
    assert any(each.startswith(said) for each in faults(TEXT.replace(*planted)))


def test_a_line_without_a_version_is_refused():
    with pytest.raises(ValueError, match=r"gpu_carry.txt:1: line='peft' - expected NAME==VERSION"):
        gpu_carry.read("peft\n")


def test_one_build_of_bitsandbytes_is_enough(tmp_path):
    wheel = tmp_path / "bitsandbytes-0-py3-none-any.whl"
    names = [f"bitsandbytes/libbitsandbytes_{each}.so" for each in ("cpu", "cuda126", "cuda130")]
    with zipfile.ZipFile(wheel, "w") as archive:
        for each in [*names, "bitsandbytes/__init__.py"]:
            archive.writestr(each, each)
        archive.writestr("bitsandbytes-0.dist-info/RECORD", "".join(f"{each},sha256=0,1\n" for each in names))
    with zipfile.ZipFile(gpu_carry.slim(wheel, "130")) as archive:
        kept = archive.namelist()
        assert kept == [names[2], "bitsandbytes/__init__.py", "bitsandbytes-0.dist-info/RECORD"]
        assert archive.read(kept[2]).decode() == f"{names[2]},sha256=0,1\n"
    with pytest.raises(ValueError, match=r"--cuda=99 - expected one of cpu, cuda126, cuda130"):
        gpu_carry.slim(wheel, "99")


def test_the_parts_take_less_than_six_minutes_and_every_part_has_a_command():
    assert sum(gpu_check.SECONDS.values()) < 360
    assert gpu_check.commands("cuda", False, 60.0).keys() == gpu_check.SECONDS.keys()
    assert "gpu" in gpu_check.commands("cuda", False, 60.0)["parity"]


def test_a_part_that_fails_or_hangs_costs_its_own_time_only(tmp_path):
    def run(code, seconds=60.0):
        return gpu_check.run_part("parity", [sys.executable, "-c", code], seconds, tmp_path)

    assert run("print('done')")[:2] == ("parity", "ok")
    failed = run("print('the reason'); raise SystemExit(1)")
    assert (failed.status, failed.said) == ("failed", "the reason")
    assert run("import time; time.sleep(60)", 0.5).status == "too slow"


@pytest.mark.slow
def test_the_whole_command_on_a_cpu(tmp_path):
    """Each part with a tiny model: a resumed run has its bits, and rows are written without a card."""
    pytest.importorskip("bitsandbytes")
    table = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--quick", "--device", "cpu", "--minutes", "30"]
    ended = subprocess.run(
        [*command, "--results", str(table)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    with table.open(newline="", encoding="utf-8") as stream:
        rows = {row["part"]: row for row in csv.DictReader(stream)}
    assert rows.keys() == gpu_check.SECONDS.keys()
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["resume"]["said"] == "the resumed run has the same adapter, bit for bit"
    assert "one step of 256 tokens" in rows["profile"]["said"]
