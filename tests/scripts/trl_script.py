"""A script for today's TRL; its one import is changed to philora's."""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig

from philora import SFTTrainer

model, data, out = sys.argv[1:]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=out,
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        assistant_only_loss=True,
        model_init_kwargs={"dtype": "bfloat16"},
    ),
    train_dataset=load_dataset("json", data_files=data, split="train[:40]"),
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(out)
