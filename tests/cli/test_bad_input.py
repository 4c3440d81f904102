"""Bad input: exit code 2, a message that says where, what and what to do, and nothing written."""

from __future__ import annotations

import json
import re

import pytest

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def refused(cli, config, tmp_path):
    """Runs `train` and expects it to be refused before anything is written."""

    def run(path, message, *overrides):
        answer = cli("train", path, *overrides)
        assert answer.code == 2, answer
        assert re.search(message, " ".join(answer.err.split())), answer.err
        assert "Traceback" not in answer.err
        assert not (tmp_path / "run").exists()

    return run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training_config.learning_rate=.nan", r"learning_rate=nan - expected"),
        ("training_config.learning_rate=0", r"learning_rate=0 - expected"),
        ("training_config.learning_rate=-1.0e-4", r"learning_rate=-0.0001 - expected"),
        ("peft_config.r=0", r"peft_config.r=0 - expected a whole number of at least 1"),
        ("peft_config.r=-4", r"peft_config.r=-4 - expected a whole number of at least 1"),
        ("training_config.learning_rte=1", r"learning_rte.*Did you mean .*learning_rate"),
        ("modle.dtype=float32", r"modle.*Did you mean 'model'\?"),
        ("peft_config.target_modules=[qkv_prj]", r"target_modules='qkv_prj' - expected .*Did you mean 'qkv_proj'\?"),
        (
            "peft_config={r: 4, target_modules: [q_proj, k_proj], rank_pattern: {q_proj: 8}}",
            r"rank_pattern=\{'q_proj': 8, 'k_proj': 4\} - expected one value for all slices of qkv_proj",
        ),
        ("peft_config.target_modules=[lm_head]", r"target_modules='lm_head' - expected no adapter on the output head"),
        ("training_config.max_length=4096", r"max_length=4096 - expected at most 2048, the context of the model"),
        ("nonsense", r"command line: .*nonsense.* - expected"),
        ("model.quantization=nf5", r"model.quantization='nf5' - expected"),
    ],
)
def test_settings(refused, config, override, message):
    refused(config(), message, override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"data.jsonl.* - expected"),
        (json.dumps(GOOD).encode() + b"\n{broken\n", r"data.jsonl:2: .*JSON"),
        (json.dumps({"messages": [turn("user", "hi")]}).encode(), r"data.jsonl:1: .* - expected .*assistant"),
        (
            json.dumps({"messages": [turn("usr", "hi"), turn("assistant", "x")]}).encode(),
            r"data.jsonl:1: .*'usr'.*user",
        ),
        (
            json.dumps({"messages": [turn("user", "hi"), turn("assistant", " ")]}).encode(),
            r"data.jsonl:1: messages\[1\].content=' ' - expected an answer that is not empty",
        ),
        (json.dumps({"messages": [turn("user", "hi"), {"role": "assistant"}]}).encode(), r"data.jsonl:1: .*content"),
        ('{"messages": "\xe9"}'.encode("latin-1"), r"data.jsonl:1: .*UTF-8"),
    ],
)
def test_records(refused, config, tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    refused(config(data={"train": str(path), "eval": None}), message)


def test_all_faults_of_a_file_come_at_once_and_without_torch(config, tmp_path):
    import subprocess
    import sys
    import time

    path = config(training_config__learning_rate=-1, peft_config__r=0, model__dtype="bf16")
    code = (
        "import sys; sys.argv = ['philora', 'train', sys.argv[1]]\n"
        "from philora import cli\n"
        "try: cli.main()\n"
        "finally: print('torch' in sys.modules)"
    )
    begun = time.process_time()
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    assert all(each in done.stderr for each in ("learning_rate=-1", "peft_config.r=0", "model.dtype='bf16'"))
    assert time.process_time() - begun < 5


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["train", "missing.yaml"]])
def test_help_and_a_configuration_error_cost_little_more_than_their_libraries(arguments):
    """CPU time of the process beside that of importing typer, rich and PyYAML, so that the machine does not count."""
    import resource
    import subprocess
    import sys

    def seconds(*command):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    libraries = "import typer, pydantic, rich.table, yaml"
    pairs = [(seconds("-m", "philora", *arguments), seconds("-c", libraries)) for _ in range(3)]
    # Measured 2.5 times; importing torch alone costs 8 times.
    assert min(own for own, _ in pairs) < 4 * max(theirs for _, theirs in pairs)


def test_a_folder_with_another_run_is_refused(cli, config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    answer = cli("train", config())
    assert answer.code == 2
    assert "expected a new or empty folder; this one holds another run" in " ".join(answer.err.split())
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_model_that_is_not_local_without_a_network(refused, config):
    path = config(model__name_or_path="microsoft/Phi-3-mini-4k-instruct")
    refused(
        path, r"name_or_path='microsoft/Phi-3-mini-4k-instruct' - expected a local folder.*no connection to the hub"
    )


def test_usage_errors(cli):
    assert cli("train").code == 2
    assert cli("nonsense").code == 2
    assert cli("train", "missing.yaml").code == 2
    assert cli("--version").code == 0


def test_conversations_in_the_place_of_settings(jsonl):
    from philora.configuration.config import load_config
    from philora.errors import ConfigError

    with pytest.raises(ConfigError, match=r"not the conversations themselves\. Write one: philora init chats.jsonl"):
        load_config(jsonl([GOOD], "chats.jsonl"))


def test_resume_without_a_run(refused, config):
    refused(config(), r"expected a folder with a run to resume. Start it without --resume", "--resume")
