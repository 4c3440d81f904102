"""Rows packed by TRL as a run packs them: the loss of the packs is the loss of the rows."""

from pathlib import Path

import pytest
import torch
import trl
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import philora
from philora.configuration.sections import DataConfig, SourceConfig
from philora.dataset import IGNORED, prepare

MODEL = Path(philora.__file__).parent / "nano" / "model"
LENGTH = 256


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    stops = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    config = DataConfig(
        train=(SourceConfig("helpdesk", limit=40),), eval=None, cache_dir=str(tmp_path_factory.mktemp("cache"))
    )
    return prepare(config, tokenizer, max_length=LENGTH, seed=0, stop_token_ids=stops).train


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        attn_implementation="sdpa",
        # Large weights, so that what a token attends to shows in its loss.
        initializer_range=0.2,
    )
    return Phi3ForCausalLM(config).eval()


def summed_loss(model, input_ids, labels, position_ids=None):
    with torch.no_grad():
        logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return cross_entropy(logits[0, :-1].double(), labels[0, 1:], ignore_index=IGNORED, reduction="sum")


def packed_loss(model, rows, restart=True):
    packs = trl.pack_dataset(rows, LENGTH, "bfd")
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    loss, labels, kept = 0.0, 0, 0
    for pack in packs:
        batch = collate([pack])
        if not restart:
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        loss += summed_loss(model, batch["input_ids"], batch["labels"], batch["position_ids"])
        labels += int((batch["labels"] != IGNORED).sum())
        kept += len(pack["seq_lengths"])
    assert kept == len(rows)
    return float(loss / labels), labels


def test_packed_loss_is_unpacked_loss(rows, model):
    loss, labels = 0.0, 0
    for row in rows:
        targets = torch.tensor([row["labels"]])
        loss += summed_loss(model, torch.tensor([row["input_ids"]]), targets)
        labels += int((targets[:, 1:] != IGNORED).sum())
    alone = float(loss / labels)
    packed, packed_labels = packed_loss(model, rows)
    assert packed_labels == labels
    assert packed == pytest.approx(alone, rel=1e-6)
    # Without restarting positions the rows of a pack see each other, and the loss says so.
    leaking, _ = packed_loss(model, rows, restart=False)
    assert abs(leaking - alone) > 1e-3 * alone


def test_packs_hold_every_token_and_label_once(rows):
    packs = trl.pack_dataset(rows, LENGTH, "bfd")
    assert len(packs) < len(rows) / 3
    assert max(map(len, packs["input_ids"])) <= LENGTH
    for name in ("input_ids", "labels"):
        assert sorted(value for row in packs[name] for value in row) == sorted(
            value for row in rows[name] for value in row
        )
