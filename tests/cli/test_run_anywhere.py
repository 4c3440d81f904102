"""A trained run needs its folder and its base, and nothing else: not its data, its place or its training settings."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml

import philora
from philora.errors import AdapterError, ConfigError, DataError, ModelError
from philora.generation.inference import load
from philora.models.locate import find_adapter
from philora.models.run_folder import TrainedRun, is_run, run_of

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("torture_for_runs", ROOT / "tools" / "torture.py")
torture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torture)

TALKS = [
    [{"role": "user", "content": f"Say {index}."}, {"role": "assistant", "content": f"It is {index}, and no other."}]
    for index in range(24)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project with a base, data and a run, all by relative paths, trained by the command line in it."""
    project = tmp_path_factory.mktemp("project")
    torture.make_model(project / "models" / "tiny")
    (project / "talks.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in TALKS))
    settings = {
        "model": {"name_or_path": "models/tiny", "dtype": "float32"},
        "data": {"train": "talks.jsonl", "eval": 0.2},
        "evaluation": {"generate": 2, "max_new_tokens": 4, "samples": 1},
        "training_config": {
            "output_dir": "runs/first", "max_steps": 12, "save_steps": 3, "save_total_limit": 4, "max_length": 64,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "seed": 3,
            "eval_strategy": "no",
        },
        "peft_config": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    }  # fmt: skip
    (project / "first.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        philora.train("first.yaml")
    return project


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    """A copy of the project at another place, in a process that stands at a third one."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    trained.rename(trained.with_name("moved-away"))  # nothing may come from the old place
    yield copy
    trained.with_name("moved-away").rename(trained)


def losses(folder):
    results = json.loads((folder / "results.json").read_text())
    return results["before"]["loss"], results["after"]["loss"]


def test_every_command_works_without_data_on_a_copy(cli, project):
    run = project / "runs" / "first"
    (project / "talks.jsonl").unlink()
    Path("prompts.txt").write_text("Say 4.\n")
    for words in (
        ("generate", run, "--prompts", "prompts.txt", "--max-new-tokens", "2"),
        ("evaluate", run, "--no-forgetting"),
        ("merge", run, "--out", "merged"),
        ("export", run, "--out", "exported"),
        ("push", run, "me/first", "--dry-run"),
        ("report", run),
    ):
        done = cli(*words)
        assert done.code == 0, (words, done.err)
    assert losses(run / "evaluation") == losses(run)


def test_the_kept_rows_score_as_the_data_itself_does(project, caplog):
    run = project / "runs" / "first"
    kept = philora.evaluate(run, forgetting=False, metrics=[])
    examples = (kept.folder / "examples.jsonl").read_bytes()
    (run / "held_out.jsonl").unlink()
    read = philora.evaluate(run, forgetting=False, metrics=[])
    assert "its rows are taken from its data again" in caplog.text
    assert (read.folder / "examples.jsonl").read_bytes() == examples
    varying = ("seconds",)
    assert {k: v for k, v in read.results.items() if k not in varying} == {
        k: v for k, v in kept.results.items() if k not in varying
    }
    (project / "talks.jsonl").unlink()
    with pytest.raises(DataError, match=r"expected held_out.jsonl in the run folder, or the data .*--data FILE"):
        philora.evaluate(run, forgetting=False)


@pytest.mark.slow
def test_a_base_that_moved_is_named_with_what_was_tried(cli, project, tmp_path):
    run = project / "runs" / "first"
    shutil.move(project / "models" / "tiny", tmp_path / "other")
    Path("prompts.txt").write_text("Say 4.\n")
    commands = (
        ("generate", run, "--prompts", "prompts.txt", "--max-new-tokens", "2"),
        ("evaluate", run, "--no-forgetting"),
        ("merge", run, "--out", "merged"),
        ("export", run, "--out", "exported"),
        ("push", run, "me/first", "--merged", "--dry-run"),
        ("chat", run),
    )
    for words in commands:
        done = cli(*words)
        assert done.code == 2, words
        assert str(project / "models" / "tiny") in done.err, done.err
        assert "--base FOLDER" in done.err
    for words in commands[:-1]:
        done = cli(*words, "--base", tmp_path / "other")
        assert done.code == 0, (words, done.err)
    with pytest.raises(ModelError, match="the folder of the base model; there is none at"):
        load(run)
    assert load(run, base=str(tmp_path / "other")).base == str(tmp_path / "other")


def changed(run, **sections):
    """Write other values into a run's configuration."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))


def test_what_a_command_does_not_use_cannot_stop_it(project, caplog):
    run = project / "runs" / "first"
    changed(run, training_config={"optim": "paged_lion_9bit", "gone": 1}, data={"train": 7, "shape": "new"},
            peft_config={"r": "many"}, hints={"a": 1}, model={"base_products": "fp8", "future": 1})  # fmt: skip
    philora.evaluate(run, forgetting=False)
    assert "config.yaml: model.future is " in caplog.text
    changed(run, model={"dtype": "float23"})
    with pytest.raises(ConfigError, match=r"config.yaml: model.dtype='float23' - expected one of auto, float32"):
        load(run)
    changed(run, model={"dtype": "float32"}, evaluation={"generate": "all"})
    load(run)
    with pytest.raises(ConfigError, match=r"evaluation.generate='all'"):
        philora.evaluate(run, forgetting=False)


def test_only_the_files_of_a_run_make_a_run(project, tmp_path):
    run, adapter = project / "runs" / "first", project / "runs" / "first" / "adapter"
    assert run_of(adapter) == run
    assert run_of(run / "checkpoints" / "checkpoint-12") == run
    own = tmp_path / "own" / "models" / "mine"
    shutil.copytree(adapter, own)
    for folder in (own.parent, own.parent.parent):
        (folder / "config.yaml").write_text("title: a project of mine\n")
    assert run_of(own) is None
    assert load(own, base=str(project / "models" / "tiny")).run is None
    beside = tmp_path / "beside"
    shutil.copytree(adapter, beside / "adapter")
    (beside / "config.yaml").write_text("data: {train: gone.jsonl}\n")
    assert not is_run(beside)
    assert load(beside, base=str(project / "models" / "tiny")).run is None


def unfinished(run):
    for name in ("adapter", "results.json", "trainer_state.json", "train_results.json"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return run


def test_a_run_that_has_not_ended_is_used_by_its_newest_checkpoint(cli, project):
    run = unfinished(project / "runs" / "first")
    assert find_adapter(run).path.name == "checkpoint-12"  # not the last by its name, checkpoint-9
    (run / "checkpoints" / "checkpoint-12" / "adapter_model.safetensors").write_bytes(b"torn")
    Path("prompts.txt").write_text("Say 4.\n")
    done = cli("generate", run, "--prompts", "prompts.txt", "--max-new-tokens", "2")
    assert done.code == 0, done.err
    notice = f"{run} has not ended: its newest complete checkpoint checkpoint-9 is used; philora train {run} --resume"
    assert done.err.count(notice) == 1
    refused = cli("push", run, "me/first", "--dry-run")
    assert refused.code == 2
    assert f"--resume; or name its newest complete checkpoint: {run / 'checkpoints' / 'checkpoint-9'}" in refused.err
    assert cli("push", run / "checkpoints" / "checkpoint-9", "me/first", "--dry-run").code == 0
    shutil.rmtree(run / "checkpoints")
    none = cli("generate", run, "--prompts", "prompts.txt")
    assert none.code == 2
    assert f"this run has not ended and has no complete checkpoint. Resume it: philora train {run}" in none.err


def test_votes_of_a_run_go_to_its_folder(project, monkeypatch):
    from philora.cli.use_commands import votes_folder

    run = project / "runs" / "first"
    for source in (run, run / "adapter", run / "checkpoints" / "checkpoint-12"):
        assert votes_folder(str(source)) == run
    assert votes_folder("me/adapters") == Path()


def test_a_card_is_written_without_what_cannot_be_read(project, cli):
    run = project / "runs" / "first"
    (run / "config.yaml").write_text("model: [\n")
    refused = cli("push", run, "me/first", "--dry-run")
    assert (refused.code, "config.yaml" in refused.err) == (2, True), refused.err
    done = cli("push", run, "me/first", "--dry-run", "--base", project / "models" / "tiny")
    assert done.code == 0, done.err
    assert "the card has no settings" in done.err


def test_a_hint_names_the_run(project):
    run = project / "runs" / "first"
    for folder in (project, project / "runs", run / "checkpoints"):
        with pytest.raises(AdapterError, match=rf"Did you mean {run}\?"):
            find_adapter(folder)
    for file in ("config.yaml", "report.html", "adapter/adapter_model.safetensors", "adapter/README.md"):
        with pytest.raises(AdapterError, match=rf"Did you mean {run}\?"):
            find_adapter(run / file)
    with pytest.raises(AdapterError, match=r"Did you mean .*/checkpoint-12\?"):
        find_adapter(run / "checkpoints" / "checkpoint-12" / "adapter_model.safetensors")
    loose = project / "loose"
    for step in (9, 10):
        shutil.copytree(run / "adapter", loose / f"checkpoint-{step}")
    with pytest.raises(AdapterError, match=r"Did you mean .*loose/checkpoint-10\?"):
        find_adapter(loose)


def test_an_evaluation_of_a_checkpoint_is_not_the_run_s(cli, project):
    run = project / "runs" / "first"
    assert cli("evaluate", run, "--no-forgetting").code == 0
    own = (run / "evaluation" / "results.json").read_bytes()
    done = cli("evaluate", run / "checkpoints" / "checkpoint-9", "--no-forgetting")
    assert done.code == 0, done.err
    assert (run / "evaluation" / "results.json").read_bytes() == own
    assert losses(run / "evaluation-checkpoint-9") != losses(run / "evaluation")
    assert json.loads((run / "evaluation-checkpoint-9" / "results.json").read_text())["adapter"] == (
        "checkpoints/checkpoint-9"
    )
    cli("report", run)
    page = (run / "report.html").read_text()
    older = json.loads(own) | {"source": str(run / "checkpoints" / "checkpoint-9"), "rows": 4321}
    del older["adapter"]
    (run / "evaluation" / "results.json").write_text(json.dumps(older))
    cli("report", run)
    assert "From philora evaluate" in page
    assert "4,321 rows" not in (run / "report.html").read_text()


def test_a_moved_run_goes_on_where_it_is_now(cli, project, monkeypatch):
    run = unfinished(project / "runs" / "first")
    shutil.rmtree(run / "checkpoints" / "checkpoint-12")
    monkeypatch.chdir(project)
    moved = run.with_name("moved")
    run.rename(moved)
    done = cli("train", moved, "--resume")
    assert done.code == 0, done.err + done.out
    assert (moved / "adapter" / "adapter_config.json").exists()
    assert not run.exists()
    record = json.loads((moved / "run.json").read_text())
    assert record["paths"]["talks.jsonl"] == {"absolute": str(project / "talks.jsonl"), "relative": "../../talks.jsonl"}


def test_a_run_goes_on_from_another_directory(cli, project):
    """The process stands elsewhere: the run's own record says where its data and base are."""
    run = unfinished(project / "runs" / "first")
    shutil.rmtree(run / "checkpoints" / "checkpoint-12")
    done = cli("train", run, "--resume")
    assert done.code == 0, done.err + done.out
    assert "step 12/12" in done.err
    assert "step 3/12" not in done.err
    assert cli("generate", run, "--prompt", "Say 1.").code == 0
    assert cli("train", run, "--resume").code == 0  # config.yaml and run.json fit each other again


def test_data_and_base_that_moved_are_given_to_a_resumed_run(cli, project, tmp_path):
    run = unfinished(project / "runs" / "first")
    shutil.rmtree(run / "checkpoints" / "checkpoint-12")
    (project / "talks.jsonl").rename(tmp_path / "here.jsonl")
    (project / "models" / "tiny").rename(tmp_path / "base")
    refused = cli("train", run, "--resume", "--model", tmp_path / "base")
    assert refused.code == 2
    assert str(project / "talks.jsonl") in refused.err
    assert "data.train=PATH" in refused.err
    refused = cli("train", run, "--resume", f"data.train={tmp_path / 'here.jsonl'}")
    assert refused.code == 2
    assert "model.name_or_path='models/tiny'" in refused.err
    assert str(project / "models" / "tiny") in refused.err
    given = ("--model", tmp_path / "base", f"data.train={tmp_path / 'here.jsonl'}")
    done = cli("train", run, "--resume", *given)
    assert done.code == 0, done.err + done.out
    record = json.loads((run / "run.json").read_text())
    assert {item["absolute"] for item in record["paths"].values()} == {
        str(tmp_path / "base"), str(tmp_path / "here.jsonl"),
    }  # fmt: skip


def test_other_data_at_another_place_is_refused(cli, project, tmp_path):
    run = unfinished(project / "runs" / "first")
    shutil.rmtree(run / "checkpoints" / "checkpoint-12")
    lines = (project / "talks.jsonl").read_text().splitlines(keepends=True)
    (project / "talks.jsonl").unlink()
    (tmp_path / "here.jsonl").write_text("".join(lines[:-1]))
    refused = cli("train", run, "--resume", f"data.train={tmp_path / 'here.jsonl'}")
    assert refused.code == 2
    assert "data.fingerprint" in refused.err


SHORT = ["data.keep_held_out=false", "training_config.output_dir=runs/second", "training_config.max_steps=2"]


def test_data_that_must_not_be_copied_is_not_kept(project, monkeypatch):
    monkeypatch.chdir(project)
    folder = philora.train("first.yaml", SHORT).folder
    assert not (folder / "held_out.jsonl").exists()
    assert "held_out" not in json.loads((folder / "run.json").read_text())
    assert TrainedRun(folder).holds_out
    second = philora.evaluate(folder, forgetting=False)
    assert losses(second.folder) == losses(folder)


@pytest.mark.slow
def test_a_second_stage_shows_base_start_and_result(cli, project, monkeypatch):
    monkeypatch.chdir(project)
    first = project / "runs" / "first"
    other = [{"messages": [each[0], {"role": "assistant", "content": "Nothing of the kind."}]} for each in TALKS]
    (project / "other.jsonl").write_text("".join(json.dumps(each) + "\n" for each in other))
    done = cli(
        "train", "first.yaml", "training_config.output_dir=runs/second", f"model.adapter={first / 'adapter'}",
        "data.train=other.jsonl", "data.eval=talks.jsonl", "training_config.learning_rate=0.5",
    )  # fmt: skip
    assert done.code == 0, done.err
    results = json.loads((project / "runs" / "second" / "results.json").read_text())
    assert results["before"]["loss"] > results["start"]["loss"] < results["after"]["loss"]
    assert [each["field"] for each in results["comparison_with_start"]][:1] == ["loss"]
    head = next(line for line in done.out.splitlines() if "base" in line and "start" in line)
    assert head.split("  ")[-1].strip() == "change from start"
    loss = next(line for line in done.out.splitlines() if line.strip().startswith("Loss"))
    shown = [f"{results[each]['loss']:.3f}" for each in ("before", "start", "after")]
    assert loss.split()[1:4] == shown
    assert "worse than the adapter that the run started from: Loss" in done.err + done.out
    page = (project / "runs" / "second" / "report.html").read_text()
    assert "Change from start" in page
    card = (project / "runs" / "second" / "adapter" / "README.md").read_text()
    assert "| Loss | " + " | ".join(shown) in card
    assert "the adapter it started from" in card
    assert cli("evaluate", project / "runs" / "second", "--no-forgetting").code == 0
    cli("report", project / "runs" / "second")
    page = (project / "runs" / "second" / "report.html").read_text()
    assert "Change from start" in page
    assert "From philora evaluate" in page
    assert "Change from start" not in (first / "report.html").read_text()
