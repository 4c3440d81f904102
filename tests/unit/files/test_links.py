"""Links in folders from outside are not followed: not read into a result, not published, not written through."""

from __future__ import annotations

import json
import shutil

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import philora
from philora.configuration.sections import SourceConfig
from philora.dataset.read import resolve
from philora.errors import AdapterError, DataError, ModelError
from philora.exporting.conversion import export
from philora.exporting.merged_folder import merge_to_folder
from philora.files.links import leads_out
from philora.models.loading import local_path
from philora.reporting.pushing import push

SECRET = "the content of a private file"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(local_path("nano"))
    config = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    philora.get_peft_model(model, config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(local_path("nano")).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(made, tmp_path):
    """An adapter folder of its own, and beside it a file that is nobody's business."""
    (tmp_path / "secret").write_text(SECRET)
    return shutil.copytree(made, tmp_path / "adapter")


@pytest.mark.parametrize("name", ["tokenizer.x", "chat_template.jinja", "vocab.txt"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_linked_file_is_not_copied(name, relative, adapter, tmp_path):
    (adapter / name).unlink(missing_ok=True)
    (adapter / name).symlink_to("../secret" if relative else tmp_path / "secret")
    ways = {
        "export": lambda: export(adapter, tmp_path / "out", base="nano"),
        "merge": lambda: merge_to_folder(adapter, tmp_path / "out", base="nano", verify=False),
        "push": lambda: push(adapter, "me/x", base="nano", dry_run=True),
    }
    for way, call in ways.items():
        with pytest.raises((AdapterError, ModelError), match=rf"link='{name}' - expected a file inside the folder"):
            call()
        assert not (tmp_path / "out").exists(), way
    # A link within the folder is a file of the folder.
    (adapter / name).unlink()
    (adapter / "original").write_text("{{ messages }}")
    (adapter / name).symlink_to("original")
    export(adapter, tmp_path / "out", base="nano")
    assert (tmp_path / "out" / name).read_text() == "{{ messages }}"


def test_a_snapshot_of_the_hubs_cache_is_a_folder_of_links(tmp_path):
    repository = tmp_path / "models--me--x"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1").write_text("weights")
    (tmp_path / "secret").write_text(SECRET)
    (snapshot / "a").symlink_to("../../blobs/1")
    (snapshot / "b").symlink_to("../../../secret")
    assert not leads_out(snapshot, snapshot / "a")
    assert leads_out(snapshot, snapshot / "b")
    shutil.rmtree(repository / "blobs")  # a folder that only has the name
    assert leads_out(snapshot, snapshot / "a")


def test_a_folder_may_itself_be_a_link(adapter, tmp_path):
    (tmp_path / "link").symlink_to(adapter)
    assert not leads_out(tmp_path / "link", tmp_path / "link" / "tokenizer.json")


def test_a_saved_dataset_names_its_own_files_only(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    for name in ("mine", "other"):
        Dataset.from_list(rows).save_to_disk(tmp_path / name)
    assert next(resolve(SourceConfig(path=str(tmp_path / "mine")), "train").open()).records
    state = tmp_path / "mine" / "state.json"
    content = json.loads(state.read_text())
    for named in ("../other/data-00000-of-00001.arrow", str(tmp_path / "other" / "data-00000-of-00001.arrow")):
        state.write_text(json.dumps({**content, "_data_files": [{"filename": named}]}))
        with pytest.raises(DataError, match=r"link='data-00000-of-00001.arrow' - expected a file inside the folder"):
            resolve(SourceConfig(path=str(tmp_path / "mine")), "train")
    state.write_text(json.dumps({**content, "_data_files": 7}))
    with pytest.raises(DataError, match=r"state.json: content='TypeError' - expected JSON as datasets"):
        resolve(SourceConfig(path=str(tmp_path / "mine")), "train")


@pytest.mark.parametrize("name", ["train.log", "metrics.jsonl", ".lock", "checkpoints", "config.yaml"])
def test_a_run_is_not_written_through_a_link(name, tmp_path, cli):
    """Neither a new run in a folder that only has the link, nor one that goes on."""
    outside = tmp_path / "outside"
    outside.write_text(SECRET)
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "a.yaml").write_text(
        f"data: {{train: helpdesk}}\ntraining_config: {{output_dir: {run}, max_steps: 1}}\n"
    )
    (run / name).symlink_to(outside)
    for option in ([], ["--resume"]):
        if name != "config.yaml" and option:
            (run / "config.yaml").write_bytes((tmp_path / "a.yaml").read_bytes())
            (run / "run.json").write_text("{}")
        result = cli("train", tmp_path / "a.yaml", *option)
        assert result.code == 2
        assert outside.read_text() == SECRET
    if name != "checkpoints":  # a file there is no folder that can be written to
        assert f"link='{name}' - expected a file inside the folder" in result.err
