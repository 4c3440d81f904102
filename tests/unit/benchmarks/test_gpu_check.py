"""`make gpu` as far as a CPU can run it, and the list of what to carry to a machine without a network."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_check
from tools import gpu_carry

REPOSITORY = Path(__file__).parents[3]
TEXT = gpu_carry.LIST.read_text(encoding="utf-8")


def faults(text):
    return list(gpu_carry.faults(gpu_carry.read(text), gpu_carry.own_dependencies()))


def test_nothing_is_missing_in_what_is_carried():
    pinned = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not {f"{name}=={version(name)}" for name in ("transformers", "peft", "datasets")} <= set(pinned):
        pytest.skip("this environment does not have the versions of constraints.txt, for which the list is made")
    assert faults(TEXT) == []


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (("xxhash==4.1.0\n", ""), "xxhash is missing - datasets declares xxhash"),
        (("httpcore2==2.16.2\n", ""), "httpcore2 is missing - httpx2 declares httpcore2"),
        ((" pyarrow", ""), "pyarrow is missing - philora declares pyarrow>=24"),
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


def test_more_than_can_be_carried_is_refused(tmp_path):
    wheel, own = tmp_path / "a-1.whl", tmp_path / "file.py"
    wheel.write_bytes(b"0" * 600)
    own.write_bytes(b"0" * 400)
    assert gpu_carry.too_large([wheel], [own], 1000) is None
    assert gpu_carry.too_large([wheel], [own, own], 1000).endswith("The largest wheels: a-1.whl 0.0.")


def test_the_wheel_in_a_folder_is_replaced_by_the_one_with_one_build(tmp_path):
    wheel = tmp_path / "bitsandbytes-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for each in ("cuda126", "cuda130"):
            archive.writestr(f"bitsandbytes/libbitsandbytes_{each}.so", each)
    gpu_carry.keep_one_build(tmp_path, "130")
    assert [each.name for each in tmp_path.iterdir()] == [wheel.name]
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == ["bitsandbytes/libbitsandbytes_cuda130.so"]


def test_the_parts_take_less_than_six_minutes_and_every_part_has_a_command():
    assert sum(gpu_check.SECONDS.values()) < 360
    assert gpu_check.commands("cuda", False, 60.0).keys() == gpu_check.SECONDS.keys()
    parity = gpu_check.commands("cuda", False, 60.0)["parity"]
    assert parity[parity.index("-m", 3) + 1] == "gpu and not slow"
    assert parity[-len(gpu_check.test_files()) :] == gpu_check.test_files()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("@pytest.mark.gpu\ndef test_a(): ...", True),
        ("pytestmark = [pytest.mark.gpu]", True),
        ("@pytest.mark.usefixtures('device')\ndef test_a(): ...", True),
        ("def test_a(device): ...", True),
        ("@pytest.fixture\ndef kernels(device): ...", True),
        ("def helper(device): ...", False),
        ("@pytest.mark.parametrize(('device', 'said'), [])\ndef test_a(device, said): ...", False),
        ("@pytest.mark.slow\ndef test_a(tmp_path): ...", False),
    ],
)
def test_files_with_tests_for_a_card_are_found(source, expected):
    assert gpu_check.has_gpu_tests(source) is expected


def collected(*options, plugins=()):
    """What pytest collects in a process of its own, without plugins that happen to be installed."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += [word for each in plugins for word in ("-p", each)]
    paths = [str(REPOSITORY / "src"), str(REPOSITORY)]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": os.pathsep.join(paths)}
    ended = subprocess.run(
        [*command, *options], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.slow
def test_the_files_that_parity_runs_are_those_that_hold_tests_for_a_card():
    code, said = collected("-m", "gpu", "--ignore=tests/unit/benchmarks", "tests/unit")
    assert code == 0, said
    files = {line.partition("::")[0] for line in said.splitlines() if "::" in line}
    # Some files mark all of their tests where there is a card.
    assert files <= set(gpu_check.test_files())
    assert len(files) > 10


@pytest.mark.slow
def test_what_parity_runs_is_collected_with_the_packages_of_the_machine_alone():
    code, said = collected(*gpu_check.test_files(), plugins=["tests.hidden_packages"])
    assert code == 0, said[-3000:]
    code, said = collected("tests/unit/lora/test_layers.py", "tests/parity", plugins=["tests.hidden_packages"])
    assert code != 0, "negative control: these need loralib"
    assert "No module named 'loralib'" in said


def test_speed_gets_the_time_that_other_parts_left():
    parts = list(gpu_check.SECONDS)
    later = parts[parts.index("speed") + 1 :]
    reserved = sum(gpu_check.SECONDS[each] for each in later)
    assert gpu_check.allowance("speed", 300.0, later) == 300.0 - reserved
    assert gpu_check.allowance("speed", 300.0, []) == 300.0
    assert gpu_check.allowance("speed", 10.0, later) == 1.0
    assert gpu_check.allowance("parity", 300.0, later) == gpu_check.SECONDS["parity"]
    assert gpu_check.allowance("parity", 300.0, later, 0.5) == gpu_check.SECONDS["parity"] / 2
    assert gpu_check.allowance("profile", 5.0, []) == 5.0


def test_speed_begins_with_philora_over_every_base():
    groups = gpu.arguments(["--only", gpu_check.SPEED]).groups
    assert [each.name.removesuffix("/keep") for each in groups[0]] == [
        f"philora/{base}/{tokens}" for base in ("bf16", "fp8", "nf4") for tokens in (2048, 8192)
    ]
    assert [cases[0].contestant for cases in groups] == ["philora", "trl", "liger", "philora", "unsloth"]
    assert [(each.dropout, each.graphs, each.kept) for each in groups[3]] == [
        (0.05, False, "keep"),
        (0.0, True, "keep"),
        (0.0, False, "host"),
    ]
    assert sum(map(len, groups)) == len(gpu_check.SPEED.split(",")), "every pattern is one case"


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_the_main_job_takes_the_stack_on_a_card(tmp_path, monkeypatch, base):
    """By the facts of its model and of a card; on another adapter the same choice says no."""
    from peft import LoraConfig

    import philora
    from philora.configuration.config import load_config
    from philora.decoder_stack.choice import BatchFacts, DeviceFacts, stack_for
    from philora.decoder_stack.model import facts_for
    from philora.models.loading import load_model

    pytest.importorskip("bitsandbytes")
    given = gpu_check.settings(tmp_path, base, "cuda")
    given["training_config"]["use_cpu"] = True
    config = load_config(given)
    model = philora.get_peft_model(load_model(config.model), LoraConfig(**config.peft_config))
    facts = facts_for(model)
    assert stack_for(facts, BatchFacts(), DeviceFacts()).path == "stack", stack_for(facts, BatchFacts(), DeviceFacts())
    assert facts.base == ("plain" if base == "bf16" else base)
    assert stack_for(facts, BatchFacts(), DeviceFacts(disagreement="wrong")).path == "modules"


def test_a_card_compiles_kernels_and_a_cpu_interprets_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; print(os.environ['TRITON_INTERPRET'])"
    for device, said in (("cuda", "0"), ("cpu", "1")):
        assert gpu_check.run_part("parity", [sys.executable, "-c", code], 60.0, tmp_path, device).said == said


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
    assert "one step of 256 tokens by modules" in rows["profile"]["said"]
