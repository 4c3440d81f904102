"""philora as a library: each command as a function, a run as an object, a cell that is run twice."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import warnings

import pytest
import typer

import philora
from philora.cli.commands import app
from philora.errors import ConfigError, DataError

FUNCTIONS = {"config": "load_config", "data": "describe_data"}
"""Functions that are called otherwise than their command."""


def settings(folder, **training):
    return {
        "model": {"name_or_path": "nano", "dtype": "float32"},
        "data": {
            "train": {"path": "helpdesk", "limit": 24}, "eval": {"path": "helpdesk", "limit": 4},
            "cache_dir": str(folder / "cache"),
        },
        "evaluation": {"generate": 2, "max_new_tokens": 4, "samples": 1},
        "training_config": {
            "max_steps": 3, "logging_steps": 1, "max_length": 64, "tokens_per_step": 128, **training,
        },
        "peft_config": {"r": 2, "target_modules": ["o_proj"]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    return philora.train(settings(folder, output_dir=str(folder / "runs" / "x")), quiet=True)


def test_every_command_is_a_function():
    commands = typer.main.get_command(app).commands
    missing = [name for name in commands if not callable(getattr(philora, FUNCTIONS.get(name, name), None))]
    assert not missing
    assert all(inspect.getdoc(getattr(philora, name)) for name in philora.__all__)


def test_a_run_has_its_results_and_losses(run):
    assert run.status == "done"
    assert run.base == "nano"
    assert json.loads(json.dumps(run.results)) == philora.load(run.folder).results
    assert run.after.loss == run.results["after"]["loss"]
    assert [point.step for point in run.losses] == [1, 2, 3]
    assert run.held_out_losses[-1].loss > 0
    assert run.comparison[0].title == "Loss"
    assert run.samples[0].prompt[-1]["role"] == "user"
    assert run.config.peft_config["r"] == 2
    assert (run.adapter / "adapter_model.safetensors").is_file()


def test_a_run_is_plain_in_a_terminal_and_a_table_with_a_curve_in_a_notebook(run):
    plain, page = repr(run), run._repr_html_()
    assert "<" not in plain
    assert f"{run.before.loss:.3f} → {run.after.loss:.3f}" in plain
    assert page.startswith("<table>")
    assert page.count("<polyline") == 2


def test_names_from_files_are_escaped_in_a_notebook(run, tmp_path):
    other = tmp_path / "<img src=x>"
    other.symlink_to(run.folder)
    assert "<img" not in philora.load(other)._repr_html_()


def test_a_question_and_the_next_keep_the_model_loaded(run):
    opened = philora.load(run.folder)
    first = opened.chat("How do I reset my password?", max_new_tokens=6)
    loaded = opened.model
    assert opened.chat("How do I reset my password?", max_new_tokens=6) == first
    second = opened.chat("And then?", after=first, max_new_tokens=6)
    assert [message["role"] for message in second.messages] == ["user", "assistant", "user", "assistant"]
    assert opened.model is loaded
    assert philora.chat(run.folder, "How do I reset my password?", max_new_tokens=6) == first
    opened.free()
    assert opened._loaded is None
    assert opened.chat("How do I reset my password?", max_new_tokens=6) == first


def test_many_prompts_give_the_answers_of_one_at_a_time(run):
    asked = ["How do I reset my password?", [{"role": "user", "content": "Which formats are read?"}]]
    found = run.generate(asked, max_new_tokens=5)
    assert found == [run.chat(asked[0], max_new_tokens=5), run.chat(asked[1][0]["content"], max_new_tokens=5)]
    assert philora.generate(run.folder, asked, max_new_tokens=5) == found
    assert run.generate(asked[0], max_new_tokens=5, adapter=False)[0].tokens > 0
    assert "white-space" in found[0]._repr_html_()


@pytest.mark.parametrize("given", [{"top_p": 0.9}, {"top_k": 5}])
def test_drawing_without_a_temperature_is_refused_as_on_the_command_line(run, given):
    with pytest.raises(ConfigError, match=r"expected a temperature above 0 beside it"):
        run.chat("Who are you?", **given)


def test_a_system_prompt_in_the_middle_is_refused(run):
    answer = run.chat("Hello", max_new_tokens=2)
    with pytest.raises(ConfigError, match="system="):
        run.chat("And then?", after=answer, system="Be kind")


@pytest.mark.slow
def test_a_run_is_evaluated_reported_merged_and_exported_twice(run):
    found = run.evaluate(answers=1, limit=4, metrics=[], forgetting=False)
    assert "Loss" in repr(found)
    assert "<table>" in found._repr_html_()
    assert run.report() == run.folder / "report.html"
    assert philora.report(run, run.folder, out=run.folder.parent / "both.html").is_file()
    merged = [run.merge(verify=False).folder.name for _ in range(2)]
    assert merged == ["x-merged", "x-merged-2"]
    exported = [run.export("loralib").folder.name for _ in range(2)]
    assert exported == ["x-loralib", "x-loralib-2"]
    (file,) = (run.folder.parent / exported[0]).glob("*.pt")
    brought = philora.import_adapter(file, run.folder.parent / "brought", base="nano")
    assert (brought.folder / "adapter_config.json").is_file()


def test_the_runs_of_a_folder_are_a_table(run):
    found = philora.runs(run.folder.parent)
    assert [each.name for each in found] == ["x"]
    assert "x" in repr(found)
    assert "<table>" in found._repr_html_()


@pytest.mark.slow
def test_without_a_named_folder_a_cell_can_be_run_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = settings(tmp_path, max_steps=2, eval_strategy="no")
    given["evaluation"]["generate"] = 0
    first, second = (philora.train(given, quiet=True) for _ in range(2))
    assert second.folder.name == f"{first.folder.name}-2"


def test_a_named_folder_is_not_overwritten_and_the_message_says_how_to_open_it(run, tmp_path):
    given = settings(tmp_path, output_dir=str(run.folder))
    with pytest.raises(ConfigError, match=r"philora\.load\("):
        philora.train(given, quiet=True)


def test_data_alone_is_trained_with_short_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "support.jsonl"
    data.write_text(
        "".join(f'{{"prompt": "Where is order {n}?", "completion": "Order {n} is on its way."}}\n' for n in range(30)),
        encoding="utf-8",
    )
    small = ["training_config.max_steps=3", "training_config.eval_strategy=no", "evaluation.generate=0"]
    checked = philora.check(data, small, model="nano", rank=4)
    assert "Ready" in repr(checked)
    made = philora.train(data, small, model="nano", rank=4, quiet=True)
    assert made.folder.as_posix() == "runs/support"
    assert made.config.peft_config["r"] == 4
    assert philora.init(data, model="nano").read_text().count("nano") >= 1
    with pytest.raises(ConfigError, match="Did you mean 'rank'"):
        philora.train(data, rnk=4)


def test_a_run_that_did_not_end_says_how_to_resume(tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {name_or_path: nano}\n")
    (folder / "run.json").write_text("{}")
    half = philora.load(folder)
    assert "stopped" in repr(half)
    assert "stopped" in half._repr_html_()
    with pytest.raises(DataError, match="resume=True"):
        _ = half.results


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        philora.load(tmp_path)


def test_an_endpoint_answers_openai_s_client_and_is_closed(run):
    openai = pytest.importorskip("openai")
    with philora.serve(f"desk={run.folder}") as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")
        assert [model.id for model in client.models.list()] == server.models == ["desk", "nano"]
        made = client.chat.completions.create(
            model="desk", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
        )
        assert made.choices[0].message.content is not None
    with pytest.raises(openai.APIConnectionError):
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0).models.list()


@pytest.mark.slow
def test_a_quiet_script_shows_notices_and_nothing_else(tmp_path):
    program = (
        "import pathlib, sys, philora\n"
        "from tests.unit.interface.test_functions import settings\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "philora.train(settings(folder, output_dir=str(folder / 'run')), quiet=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert any(line.startswith("the run makes 3 optimizer steps") for line in lines)
    assert "the plan" not in done.stderr


def test_no_warnings_of_releases_to_come(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        philora.load(run.folder).chat("Hello", max_new_tokens=2)


def test_importing_philora_loads_no_torch():
    program = "import philora, sys; print('torch' in sys.modules, 'philora.interface' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
