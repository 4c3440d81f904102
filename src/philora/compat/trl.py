"""Import TRL without wandb, and give private names of its trainer public ones.

TRL's trainer imports wandb if it is installed, although only a run that reports to it needs it, and `import wandb`
creates two temporary folders that remain if the process is killed. So wandb appears not to be installed while TRL is
imported, and TRL's modules import it when they use it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import accelerate.utils
import transformers
import transformers.integrations

from philora.compat.private_names import PrivateName, require
from philora.compat.transformers import TrainerHooks

_OWNERS = (transformers, transformers.integrations, accelerate.utils)
"""The modules from which TRL's import `is_wandb_available`."""
_really_available = transformers.integrations.is_wandb_available


def wandb_in_use() -> bool:
    """Return whether this process has imported wandb and can use it."""
    return "wandb" in sys.modules and bool(_really_available())


class _Wandb(ModuleType):
    """A module that imports wandb when one of its names is read."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("wandb"), name)


@contextmanager
def without_wandb() -> Iterator[None]:
    """Import TRL inside the block without importing wandb; modules that were imported before do not change."""
    kept = [(owner, owner.is_wandb_available) for owner in _OWNERS]
    for owner in _OWNERS:
        owner.is_wandb_available = wandb_in_use
    try:
        yield
    finally:
        for owner, available in kept:
            owner.is_wandb_available = available
        for name, module in list(sys.modules.items()):
            if name.startswith("trl.") and vars(module).get("is_wandb_available") is wandb_in_use:
                vars(module).setdefault("wandb", _Wandb("wandb"))


with without_wandb():
    import trl
    from trl import SFTTrainer  # TRL imports its modules lazily
    from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

_NO_METRICS = "TRL's metrics are counted by its compute_loss and logged by its log, with nothing in between"

PRIVATE = (
    PrivateName("trl.SFTTrainer._prepare_dataset", "counts rows without labels", "there is no hook around it"),
    PrivateName("trl.SFTTrainer._metrics", "resumes and reads metrics", _NO_METRICS),
    PrivateName("trl.SFTTrainer._total_train_tokens", "resumes the count of tokens", _NO_METRICS),
    PrivateName("trl.SFTTrainer._tp_size", "tokens under tensor parallelism", _NO_METRICS),
    PrivateName("trl.SFTTrainer._skip_prepare_dataset", "whether rows are tokenised", "dataset_kwargs has it raw"),
    PrivateName("trl.trainer.utils.FusedCausalLMOutput", "the output of the fused loss", "TRL does not export it"),
    PrivateName("trl.trainer.utils.maybe_gather_lm_head_ctx", "the head under ZeRO-3", "TRL does not export it"),
    PrivateName("trl.trainer.base_trainer.is_wandb_available", "wandb is imported when used", "TRL has no switch"),
)


class SFTTrainerHooks(TrainerHooks, SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` with the hooks of `TrainerHooks`, and public names for its metrics."""

    _total_train_tokens: Any

    def prepare_rows(
        self, dataset: Any, name: str, max_length: int | None, joined: bool, prepare: Callable[[], Any]
    ) -> Any:
        """Run the preparation of a dataset and return its rows; `joined`: they are cut from one stream of tokens."""
        return prepare()

    @property
    def rows_are_prepared(self) -> bool:
        """Return whether the rows were given as tokens and labels."""
        return bool(self._skip_prepare_dataset)

    @property
    def pending_metrics(self) -> dict[str, dict[str, list[Any]]]:
        """Return the metrics of the next log entry, by "train" or "eval" and by name, with an entry per micro-batch."""
        return cast("dict[str, dict[str, list[Any]]]", self._metrics)

    @property
    def counted_tokens(self) -> Any:
        """Return the number of trained tokens; a tensor until it is read."""
        return self._total_train_tokens

    @counted_tokens.setter
    def counted_tokens(self, count: Any) -> None:
        self._total_train_tokens = count

    @property
    def tensor_parallel_size(self) -> int:
        """Return the number of processes that share each tensor."""
        return int(self._tp_size)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        given = (dataset, processing_class, args, packing, formatting_func, dataset_name)
        prepare = functools.partial(super()._prepare_dataset, *given)
        joined = packing and args.packing_strategy == "wrapped"
        return self.prepare_rows(dataset, dataset_name, args.max_length, joined, prepare)


require(entry for entry in PRIVATE if "SFTTrainer." in entry.name)

__all__ = ["FusedCausalLMOutput", "SFTTrainerHooks", "maybe_gather_lm_head_ctx", "trl"]
