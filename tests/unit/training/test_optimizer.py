"""LoRA+ through the trainer: B in groups of its own, for every optimizer, over resumption, as PEFT's own function."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import logging

import pytest
import torch
import trl
from accelerate.utils.deepspeed import DummyOptim
from datasets import Dataset
from peft import LoraConfig
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoTokenizer, HfArgumentParser

import philora
from philora.configuration.config import load_config
from philora.configuration.fields import ONE_RATE_OPTIMIZERS
from philora.errors import ConfigError
from philora.lora.state import loraplus_fast_parameters
from philora.models.loading import local_path
from tests.quick import quick

RATIO = 16
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(local_path("nano"))


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (16, 12), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": each, "labels": each} for each in ids])


def lora(**changes):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": TARGETS} | changes))


@pytest.fixture
def build(phi3, tokenizer, rows, tmp_path):
    """Makes a trainer on a tiny model; keyword arguments go to SFTConfig, those named here to SFTTrainer."""

    def make(adapter=None, model=None, trainer=philora.SFTTrainer, folder="run", given=None, **settings):
        args = philora.SFTConfig(
            str(tmp_path / folder),
            **{
                "max_steps": 3,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-3,
                "weight_decay": 0.1,
                "logging_steps": 1,
                "report_to": "none",
                "bf16": False,
                "seed": 3,
                "gradient_checkpointing": False,
                "save_strategy": "no",
                "disable_tqdm": True,
                "optim": "adamw_torch",
            }
            | settings,
        )
        if model is None and adapter is None:
            adapter = lora()
        return trainer(
            phi3() if model is None else model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=adapter,
            **(given or {}),
        )

    return make


def trained(trainer):
    trainer.train()
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


# ------------------------------------------------------------------------------------------------ the setting


def test_the_field_survives_every_form_of_the_arguments(tmp_path):
    args = philora.SFTConfig(str(tmp_path), loraplus_lr_ratio=RATIO, report_to="none")
    assert args.to_dict()["loraplus_lr_ratio"] == RATIO
    assert json.loads(args.to_json_string())["loraplus_lr_ratio"] == RATIO
    assert args.to_sanitized_dict()["loraplus_lr_ratio"] == RATIO
    assert f"loraplus_lr_ratio={RATIO}" in repr(args)
    torch.save(args, tmp_path / "training_args.bin")
    for again in (
        torch.load(tmp_path / "training_args.bin", weights_only=False),
        philora.SFTConfig(**{key: value for key, value in args.to_dict().items() if value is not None}),
        dataclasses.replace(args, learning_rate=1e-4),
        copy.deepcopy(args),
        HfArgumentParser(philora.SFTConfig).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--loraplus_lr_ratio", "16", "--report_to", "none", "--use_cpu"]
        )[0],
    ):
        assert isinstance(again, philora.SFTConfig)
        assert again.loraplus_lr_ratio == RATIO
    assert philora.SFTConfig(str(tmp_path)).loraplus_lr_ratio is None


def test_it_stays_beside_older_keywords_of_the_trainer(build, tokenizer, rows, phi3, tmp_path):
    args = philora.SFTConfig(str(tmp_path), loraplus_lr_ratio=RATIO, report_to="none", bf16=False)
    trainer = philora.SFTTrainer(
        phi3(), args=args, train_dataset=rows, tokenizer=tokenizer, max_seq_length=32, peft_config=lora()
    )
    assert (trainer.args.max_length, trainer.args.loraplus_lr_ratio) == (32, RATIO)
    assert max(rates(trainer.create_optimizer())) == pytest.approx(RATIO * args.learning_rate)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "16"])
def test_what_is_no_ratio_is_refused(value, tmp_path):
    with pytest.raises(ConfigError, match=r"SFTConfig: loraplus_lr_ratio=.* - expected a finite number above 0 or nul"):
        philora.SFTConfig(str(tmp_path), loraplus_lr_ratio=value)


def test_all_faults_of_the_arguments_come_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        philora.SFTConfig(str(tmp_path), loraplus_lr_ratio=0, loraplus_ratio=16)
    assert str(caught.value).startswith("2 faults:")
    assert "Did you mean 'loraplus_lr_ratio'?" in str(caught.value)


@pytest.mark.parametrize("optim", ONE_RATE_OPTIMIZERS)
def test_an_optimizer_of_one_rate_is_refused(optim, tmp_path):
    from transformers.training_args import OptimizerNames

    assert optim in {each.value for each in OptimizerNames}
    with pytest.raises(ConfigError, match=rf"loraplus_lr_ratio=16 - expected None, because optim='{optim}' has one"):
        philora.SFTConfig(str(tmp_path), loraplus_lr_ratio=16, optim=optim)
    with pytest.raises(ConfigError, match=rf"loraplus_lr_ratio=16 - expected null, because optim='{optim}' has one"):
        load_config({"data": {"train": "helpdesk"}, "training_config": {"loraplus_lr_ratio": 16, "optim": optim}})


def test_the_key_of_a_configuration():
    assert load_config({"data": {"train": "helpdesk"}}).training_config["loraplus_lr_ratio"] is None
    config = load_config({"data": {"train": "helpdesk"}}, ["training_config.loraplus_lr_ratio=16"])
    assert config.training_config["loraplus_lr_ratio"] == RATIO
    with pytest.raises(ConfigError, match=r"training_config.loraplus_lr_ratio=0 - expected a finite number above 0 or"):
        load_config({"data": {"train": "helpdesk"}}, ["training_config.loraplus_lr_ratio=0"])


# ------------------------------------------------------------------------------------------------- the groups

BITSANDBYTES = ["adamw_8bit", "paged_adamw_32bit", "lion_8bit"] if importlib.util.find_spec("bitsandbytes") else []


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    "optim",
    quick(
        ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad", *BITSANDBYTES],
        ["adamw_torch", "adafactor", *BITSANDBYTES[:1]],
    ),
)
def test_every_optimizer_has_b_in_groups_of_its_own(build, optim):
    trainer = build(lora(lora_bias=True), optim=optim, loraplus_lr_ratio=RATIO, max_steps=2, learning_rate=1e-4)
    names = {id(each): name for name, each in trainer.model.named_parameters()}
    before = {name: each.detach().clone() for name, each in trainer.model.named_parameters()}
    optimizer = trainer.create_optimizer()
    groups = [
        ({names[id(each)] for each in group["params"]}, group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]
    down = {name for name in before if "lora_A" in name}
    up = {name for name in before if "lora_B" in name and name.endswith("weight")}
    bias = {name for name in before if "lora_B" in name and name.endswith("bias")}
    assert down
    assert bias
    fast = pytest.approx(RATIO * 1e-4)
    assert groups == [(down, 1e-4, 0.1), (set(), 1e-4, 0.0), (up, fast, 0.1), (bias, fast, 0.0)]
    assert {key for group in optimizer.param_groups for key in group} == set(optimizer.param_groups[0])
    trainer.train()
    moved = {name for name, each in trainer.model.named_parameters() if not torch.equal(each, before[name])}
    assert up | bias <= moved <= down | up | bias
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[0] == pytest.approx(1e-4), "what is logged is A's rate"


def test_only_b_is_fast(phi3):
    model = philora.get_peft_model(
        phi3(), lora(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], bias="lora_only")
    )
    assert any("lora_embedding_B" in name for name, _ in model.named_parameters())
    names = set(loraplus_fast_parameters(model))
    prefix = "base_model.model.model.layers"
    assert names == {f"{prefix}.{index}.self_attn.qkv_proj.lora_B.default.weight" for index in (0, 1)}
    dora = philora.get_peft_model(phi3(), lora(use_dora=True, target_modules=["o_proj"]))
    assert {name.split(".")[-3] for name in loraplus_fast_parameters(dora)} == {"lora_B"}
    dora.requires_grad_(False)
    assert not loraplus_fast_parameters(dora)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("polynomial", {"lr_end": 1e-5}),
        ("cosine_with_min_lr", {"min_lr": 1e-5}),
        ("warmup_stable_decay", {"num_decay_steps": 4}),
        ("reduce_lr_on_plateau", {"patience": 0, "factor": 0.5}),
    ],
)
def test_schedulers_scale_both_rates(build, rows, name, options):
    trainer = build(
        loraplus_lr_ratio=RATIO,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=options,
        warmup_steps=2,
        eval_strategy="steps",  # which the one that follows a metric asks for
        given={"eval_dataset": rows},
    )
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10)
    seen = []
    for _ in range(8):
        optimizer.step()
        scheduler.step(*([1.0] if name == "reduce_lr_on_plateau" else []))
        slow, _, fast = rates(optimizer)
        assert fast == pytest.approx(RATIO * slow)
        assert trainer._get_learning_rate() == slow
        seen.append(slow)
    assert len(set(seen)) > 2, "the rate never changed, so the comparison could not fail"


@pytest.mark.slow
def test_a_run_from_a_configuration_has_the_two_rates(tmp_path, jsonl):
    turns = [("When does the shop open?", "At nine."), ("And on Sundays?", "It stays closed.")]
    records = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in turns * 4
    ]
    settings = {
        "data": {"train": str(jsonl(records)), "eval": None},
        "training_config": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "save_steps": 2,
            "loraplus_lr_ratio": RATIO,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 2,
        },
    }
    result = philora.train(settings)
    checkpoint = result.folder / "checkpoints" / "checkpoint-2"
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([2.4e-3, 2.4e-3, RATIO * 2.4e-3])  # of 256 columns
    assert load_config(result.folder / "config.yaml").training_config["loraplus_lr_ratio"] == RATIO


# ---------------------------------------------------------------------------------------------- PEFT's function


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(TARGETS, marks=pytest.mark.slow),
        ["q_proj", "v_proj", "gate_proj"],
        pytest.param(["qkv_proj", "embed_tokens"], marks=pytest.mark.slow),
    ],
)
def test_three_steps_equal_pefts_optimizer(build, phi3, targets):
    def model():
        torch.manual_seed(7)
        return philora.get_peft_model(phi3(), lora(target_modules=targets))

    def oracle(ratio):
        adapted = model()
        optimizer = create_loraplus_optimizer(
            adapted,
            torch.optim.AdamW,
            lr=1e-3,
            loraplus_lr_ratio=ratio,
            loraplus_weight_decay=0.1,
            loraplus_lr_embedding=1e-3,  # PEFT would train an embedding at 1e-6; here it is one of the slow ones
        )
        return trained(build(model=adapted, given={"optimizers": (optimizer, None)}))

    theirs = oracle(RATIO)
    assert equal(trained(build(model=model(), loraplus_lr_ratio=RATIO)), theirs)
    # Negative controls: no ratio, and another one, end elsewhere; and without a ratio both are plain LoRA.
    plain = trained(build(model=model()))
    assert not equal(plain, theirs)
    assert not equal(trained(build(model=model(), loraplus_lr_ratio=RATIO + 1)), theirs)
    assert equal(plain, oracle(1))
    assert equal(plain, trained(build(model=model(), loraplus_lr_ratio=1)))


def test_the_groups_of_ones_own_models_train_alike(phi3):
    """The function for models of one's own and the trainer's agree on what is fast."""
    model = philora.get_peft_model(phi3(), lora(target_modules=["q_proj", "embed_tokens"]))
    slow, fast = philora.lora.loraplus_parameter_groups(model, 1e-3, RATIO)
    assert {id(each) for each in fast["params"]} == {id(each) for each in loraplus_fast_parameters(model).values()}
    assert len(slow["params"]) + len(fast["params"]) == sum(each.requires_grad for each in model.parameters())


# ------------------------------------------------------------------------------------------- going on, refusing


@pytest.mark.slow
def test_a_resumed_run_has_the_same_groups_rates_and_weights(build, tmp_path):
    settings = {
        "loraplus_lr_ratio": RATIO,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
    }
    torch.manual_seed(7)
    whole = build(folder="whole", **settings)
    expected = trained(whole)
    torch.manual_seed(7)
    part = build(folder="whole", **settings)
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert equal({name: each for name, each in part.model.named_parameters() if each.requires_grad}, expected)
    assert rates(part.optimizer) == rates(whole.optimizer)
    assert [len(group["params"]) for group in part.optimizer.param_groups] == [8, 0, 8]

    def logged(trainer):
        return {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry}

    assert logged(part) == logged(whole)
    assert len(set(logged(whole).values())) > 2
    args = torch.load(tmp_path / "whole" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert args.loraplus_lr_ratio == RATIO
    saved = torch.load(tmp_path / "whole" / "checkpoint-2" / "optimizer.pt", weights_only=True)["param_groups"]
    assert saved[2]["lr"] == pytest.approx(RATIO * saved[0]["lr"])
    torch.manual_seed(7)  # negative control: resumed without the ratio, the groups do not fit
    other = build(folder="whole", **(settings | {"loraplus_lr_ratio": None}))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_training_again_does_not_split_again(build):
    trainer = build(loraplus_lr_ratio=RATIO, max_steps=1, lr_scheduler_type="constant")
    for _ in range(2):
        trainer.train()
        assert rates(trainer.optimizer) == [1e-3, 1e-3, pytest.approx(RATIO * 1e-3)]


def test_an_optimizer_that_is_given_is_left_alone_with_one_notice(build, phi3, caplog):
    model = philora.get_peft_model(phi3(), lora())
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    trainer = build(model=model, given={"optimizers": (optimizer, None)}, loraplus_lr_ratio=RATIO, max_steps=1)
    with caplog.at_level(logging.WARNING, "philora"):
        trainer.train()
        trainer.train()
    notices = [each for each in caplog.messages if "loraplus_lr_ratio" in each]
    assert len(notices) == 1
    assert "loraplus_lr_ratio=16 is not applied to the SGD that was given" in notices[0]
    assert len(optimizer.param_groups) == 1


def test_an_optimizer_of_deepspeeds_configuration_is_left_alone(build, caplog):
    """transformers puts a placeholder where DeepSpeed will make the optimizer, before it asks for one."""
    trainer = build(loraplus_lr_ratio=RATIO)
    placeholder = DummyOptim([each for each in trainer.model.parameters() if each.requires_grad])
    trainer.optimizer = placeholder
    with caplog.at_level(logging.WARNING, "philora"):
        assert trainer.create_optimizer() is placeholder
    assert "is not applied to the DummyOptim that was given" in caplog.text


def test_a_model_without_b_is_refused(build, phi3):
    with pytest.raises(ConfigError, match=r"SFTTrainer: loraplus_lr_ratio=16 - expected an adapter with a trainable B"):
        build(model=phi3(), loraplus_lr_ratio=RATIO)


class OnlyA:
    """An optimizer factory, as transformers takes them, that leaves B out."""

    def __call__(self, model, **options):
        return torch.optim.SGD([each for name, each in model.named_parameters() if "lora_A" in name], **options)


def test_an_optimizer_without_every_b_is_refused(build):
    trainer = build(loraplus_lr_ratio=RATIO, given={"optimizer_cls_and_kwargs": (OnlyA, {"lr": 1e-3})})
    message = r"loraplus_lr_ratio=16 - expected every B in the groups of SGD, which lacks 8 of 8\. Choose another"
    with pytest.raises(ConfigError, match=message):
        trainer.create_optimizer()


def test_trls_own_arguments_still_do(phi3, tokenizer, rows, tmp_path):
    args = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    trainer = philora.SFTTrainer(phi3(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora())
    assert len(trainer.create_optimizer().param_groups) == 2
