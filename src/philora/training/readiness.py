"""Check everything that a run needs before any weight is loaded, for `train` and `philora check`."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from philora.adapters.statistics import Coverage, coverage
from philora.configuration.config import load_config
from philora.configuration.fields import OWN_TRAINING_KEYS
from philora.configuration.sections import Config, ModelConfig
from philora.dataset import SourceReport, length_notices, prepare, preview
from philora.dataset.held_out import held_out_bytes
from philora.dataset.ids import check_rows, vocabulary_of
from philora.decoder_stack.choice import DeviceFacts, ModelFacts
from philora.decoder_stack.facts import facts_of_device
from philora.decoder_stack.graphs import LARGEST_TOKENS, GraphFacts
from philora.decoder_stack.graphs import against as graphs_against
from philora.decoder_stack.model import facts_for
from philora.errors import ConfigError, ModelError, RunError, fault, one_per_line
from philora.families import generic_notice
from philora.files import checkpoint
from philora.kernels.attention import facts_of_attention
from philora.kernels.attention_choice import attention_for
from philora.kernels.elementwise_choice import elementwise_for
from philora.kernels.liger import facts_of_elementwise
from philora.kernels.switches import graph_switch
from philora.models import loading as models
from philora.models.spare_rows import notice, stored_embedding, untrained_tokens
from philora.planning import outlook, requirements
from philora.planning import plan as planning
from philora.planning.footprint import KEPT
from philora.runtime import hub, process_state, processes
from philora.training import resume
from philora.training.arguments import OWN_SETTINGS, SFTConfig
from philora.training.checkpoints import checkpoint_bytes


@dataclass(frozen=True)
class Hardware:
    """Describe the device of a run, and how it computes.

    Attributes:
        device: Its name, with the compute capability of a GPU.
        memory_bytes: Its memory; for a CPU the memory that a run can use.
        decoder_layers: `stack`, `modules` or `plain`; see `decoder_stack.choice`.
        reasons: The reasons for that.
        attention: How the documents of packed rows attend where the stack does not run; see
            `kernels.attention_choice`.
        attention_reason: The reason for that.
        elementwise: How norms and SwiGLU are computed where the stack does not run, and why; see
            `kernels.elementwise_choice`. Empty on a CPU.
        answers: How answers are generated on a GPU, and why; empty on a CPU.
        graphs: Whether training runs in CUDA graphs, and why; empty where the stack does not run.
    """

    device: str
    memory_bytes: int
    decoder_layers: str
    reasons: tuple[str, ...]
    attention: str
    attention_reason: str
    elementwise: str = ""
    answers: str = ""
    graphs: str = ""

    def __str__(self) -> str:
        why = "; ".join(self.reasons)
        layers = f"decoder layers: {self.decoder_layers} ({why})"
        attention = f"attention: {self.attention} ({self.attention_reason})"
        elementwise = f"; norms and SwiGLU: {self.elementwise}" if self.elementwise else ""
        answers = f"; answers: {self.answers}" if self.answers else ""
        graphs = f"; CUDA graphs in training: {self.graphs}" if self.graphs else ""
        return f"{self.device}, {self.memory_bytes / 1e9:,.1f} GB; {layers}; {attention}{elementwise}{graphs}{answers}"


@dataclass(frozen=True)
class Preflight:
    """The result of `philora check`."""

    model: str
    hardware: Hardware
    stop_tokens: list[str]
    padding_token: str
    data: dict[str, dict[str, Any]]
    notices: list[str]
    preview: list[tuple[str, bool]]
    coverage: Coverage
    plan: planning.Plan
    sources: dict[str, list[SourceReport]]
    problems: tuple[str, ...] = ()
    """Problems that would stop the run; they are among the notices too."""

    def verdict(self, command: str) -> str:
        """Return whether the run can start, its figures, and the command that starts it."""
        plan, rows = self.plan, self.data["train"]["rows"]
        time = "" if plan.seconds is None else f", about {planning.rough_duration(plan.seconds)}"
        steps = "an unlimited number of steps" if plan.steps is None else f"{plan.steps:,} steps"
        figures = f"{rows:,} conversations, {steps}{time}, {plan.estimate.peak / 1e9:.1f} GB"
        if self.problems:
            reasons = "problem above" if len(self.problems) == 1 else f"{len(self.problems)} problems above"
            return f"Not ready ({figures}): see the {reasons}."
        return f"Ready: {figures}. Start: {command}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        covered = asdict(self.coverage) | {"rows": [row._asdict() for row in self.coverage.rows]}
        return {**asdict(self), "coverage": covered, "plan": self.plan.to_dict(), "ready": not self.problems}


def preflight(source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = ()) -> Preflight:
    """Check configuration, data, template, stop tokens, labels, targets, memory and time, on a model without weights.

    Raises:
        ConfigError, DataError, ModelError, TargetError, AdapterError, RunError: As `train` would raise them.
    """
    config = load_config(source, overrides)
    require(config)
    tokenizer = models.load_tokenizer(config.model, config.tokenizer)
    skeleton = models.load_skeleton(config.model)
    config = planning.with_learning_rate(config, skeleton.config)
    max_length = models.max_length_of(config, skeleton.config)
    stops = models.stop_token_ids(tokenizer, getattr(skeleton.generation_config, "eos_token_id", None))
    adapted = planning.weightless(config, skeleton)  # a wrong target is an error here, before data is read
    seed = int(config.training_config.get("seed", 42))
    prepared = prepare(config.data, tokenizer, max_length=max_length, seed=seed, stop_token_ids=stops)
    check_rows({"data.train": prepared.train, "data.eval": prepared.eval}, vocabulary_of(skeleton))
    covered = coverage(adapted)
    dtype = str(models.resolve_dtype(config.model.dtype)).removeprefix("torch.")
    plan = planning.plan(config, adapted, prepared.report, max_length=max_length)
    folder = Path(config.training_config["output_dir"]).expanduser()
    rows_bytes = held_out_bytes(prepared) if config.data.keep_held_out else 0
    require_space(folder, checkpoint_bytes(adapted), config.training_config.get("save_total_limit"), rows_bytes)
    outlook.check(config, plan)
    splits = prepared.report.to_dict()
    idle = processes.idle_gpus_notice(config.training_config, config.model.device_map)
    refused = processes.not_here(config.training_config, config.source)
    problems = [*filter(None, [plan.warning, _taken(folder, config.source)])]
    problems += [f"a run here would be refused: {entry}" for entry in refused]
    return Preflight(
        model=f"{config.model.name_or_path}, {plan.parameters / 1e6:,.1f} M parameters, {dtype}",
        hardware=_hardware(config.model, adapted, dtype, plan),
        stop_tokens=list(map(str, tokenizer.convert_ids_to_tokens(stops))),
        padding_token=str(tokenizer.pad_token),
        data={name: splits[name] for name in ("train", "eval") if splits.get(name)},
        notices=[
            *config.notices,
            *_notices(config, tokenizer, stops, covered),
            *filter(None, [generic_notice(skeleton.config), _spare_rows(config, tokenizer, skeleton)]),
            *prepared.report.notices,
            *length_notices(skeleton.config, {"train": prepared.train, "eval": prepared.eval}),
            *plan.notices,
            *filter(None, [idle]),
            *outlook.notices(config, plan),
            *problems,
        ],
        preview=preview(tokenizer, next(iter(prepared.train))),
        coverage=covered,
        plan=plan,
        sources=prepared.report.sources,
        problems=tuple(problems),
    )


# Prefixes of `optim`, and the modules that transformers imports for them.
_OPTIMIZERS = {
    "galore_": "galore_torch", "apollo_": "apollo_torch", "lomo": "lomo_optim", "adalomo": "lomo_optim",
    "grokadamw": "grokadamw", "schedule_free_": "schedulefree", "stable_adamw": "optimi",
    "adamw_anyprecision": "torchdistx", "adamw_apex_fused": "apex", "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao", "adamw_torch_xla": "torch_xla", "adamw_torch_npu_fused": "torch_npu",
    "adamw_bnb_8bit": "bitsandbytes", "adamw_8bit": "bitsandbytes", "paged_": "bitsandbytes", "lion": "bitsandbytes",
    "ademamix": "bitsandbytes", "rmsprop_bnb": "bitsandbytes",
}  # fmt: skip
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def require(config: Config) -> None:
    """Check that everything the run will load and import exists: packages, weights, a token for the Hub.

    Raises:
        ConfigError: A package is missing, the run folder cannot be written to, or the adapter could not be pushed.
        ModelError: The base has no weights, or a file of them is damaged.
    """
    given = config.training_config
    folder = Path(given["output_dir"]).expanduser()
    faults = [*requirements.faults(config), *_missing_packages(given, config.source)]
    if not faults:
        _require_arguments(config)
    refused = checkpoint.unwritable(folder)
    if refused is not None:
        faults.append(checkpoint.not_writable(config.source, "training_config.output_dir", folder, refused))
    if faults:
        raise ConfigError(one_per_line(faults))
    if given.get("push_to_hub"):
        hub.require_token(config.source, given.get("hub_token"))
    _require_weights(config.model)


def arguments(config: Config, **decided: Any) -> SFTConfig:
    """Return TRL's arguments for a run.

    Args:
        config: The configuration; `training_config` is copied, because transformers changes dicts in its arguments.
        decided: Values that replace those of the section; a remaining `auto` becomes TRL's default.

    Raises:
        ConfigError: TRL or transformers refuse a value, or its package is missing.
    """
    left_out = set(OWN_TRAINING_KEYS).difference(OWN_SETTINGS)
    given = {key: copy.deepcopy(value) for key, value in config.training_config.items() if key not in left_out}
    # transformers would push each checkpoint and store the token in its training_args.bin; the run pushes its adapter
    # at its end.
    given |= {"push_to_hub": False, "hub_token": None} | decided
    given = {key: value for key, value in given.items() if value != "auto"}
    given.setdefault("disable_tqdm", not sys.stderr.isatty())
    if config.data.eval is None:
        given["eval_strategy"] = "no"
    if given.get("log_level") == "info":
        given["log_level"] = "warning"  # transformers' own lines would bury philora's
    try:
        return SFTConfig(**given)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise ConfigError(f"{config.source}: training_config - {' '.join(str(error).split())}") from error


def _require_arguments(config: Config) -> None:
    """Make TRL's arguments once, with what is known before the model is loaded, to find wrong values.

    This is left out where it would start something that all processes of a run have to start together.

    Raises:
        ConfigError: As `arguments`.
    """
    given = config.training_config
    if processes.count() > 1 or given.get("deepspeed") or given.get("fsdp"):
        return
    with process_state.quiet_libraries():
        arguments(config)


def _missing_packages(given: Mapping[str, Any], source: str) -> Iterator[str]:
    """Yield a message for every missing package that training would import only at its start."""
    optim = str(given.get("optim") or "")
    needed = [("optim", optim, module) for start, module in _OPTIMIZERS.items() if optim.startswith(start)]
    if given.get("use_liger_kernel"):
        needed.append(("use_liger_kernel", "true", "liger_kernel"))
    for key, value, module in needed:
        if importlib.util.find_spec(module) is None:
            expected = f"the package {module} for it, which is not installed"
            yield fault(source, f"training_config.{key}", value, expected, "Install it, or choose another value")


def _require_weights(settings: ModelConfig) -> None:
    """Check that the base has weights, and that the files of a local base have valid headers.

    Raises:
        ModelError: There are none, or a file is damaged.
    """
    name = settings.name_or_path
    models.refuse_adapter(name, settings.revision)
    folder = Path(models.local_path(name))
    expected = f"a model with its weights: {SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and the files it names"
    if not folder.is_dir():
        # Where not even its configuration is found, loading gives the reason.
        if models.has_file(settings, ("config.json",)) and not models.has_file(settings, _WEIGHTS):
            raise ModelError(fault("model", "name_or_path", name, expected, "Download the complete model"))
        return
    there = next((entry for entry in _WEIGHTS if (folder / entry).is_file()), None)
    if there is None:
        raise ModelError(fault("model", "name_or_path", name, expected, "Copy the complete model into the folder"))
    shards = checkpoint.indexed_files(folder / there) if there.endswith(".index.json") else [there]
    for shard in shards:
        if not shard.endswith(".safetensors"):
            continue
        try:
            with safe_open(folder / shard, framework="pt"):  # reads the header and checks the file's length
                pass
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            expected, todo = "a complete safetensors file", "Copy the model again"
            raise ModelError(fault(str(folder / shard), "content", str(error), expected, todo)) from error


def require_space(folder: Path, size: int, limit: int | None, rows_bytes: int = 0) -> None:
    """Check that all checkpoints that exist at the same time, the adapter and the held-out rows fit on the disk.

    Args:
        folder, size: The run folder, and the bytes of a checkpoint.
        limit: The number of checkpoints that are kept; None for all, of which a run needs at least two.
        rows_bytes: Bytes of the held-out rows that the run keeps.

    Raises:
        RunError: They do not.
    """
    there = [checkpoint.bytes_in(path) for path in (folder / "checkpoints").glob("checkpoint-*")]
    # While a checkpoint is written, the kept ones exist too.
    needed = size * (1 + max(1, limit or 1)) + size + rows_bytes - sum(there)
    missing = checkpoint.missing_bytes(folder, needed)
    if missing:
        expected = f"free space for about {needed:,} bytes: checkpoints of {size:,} bytes, adapter and held-out rows"
        todo = f"Free {missing:,} bytes, or give another training_config.output_dir"
        raise RunError(fault("run", "output_dir", str(folder), expected, todo))


def _taken(folder: Path, source: str) -> str | None:
    """Return why a new run cannot start in the folder; None if it can. With `--resume` a run continues there."""
    try:
        resume.open_fresh(folder, source)
    except ConfigError as error:
        return f"a run here would be refused: {error}"
    return None


def _training_graphs(settings: ModelConfig, adapted: PeftModel, plan: planning.Plan, device: DeviceFacts) -> str:
    """Return whether training runs in CUDA graphs, and why not; an empty text where the decoder stack does not run."""
    if plan.decoder_layers.path != "stack" or device.kind != "cuda":
        return ""
    facts = facts_for(adapted) or ModelFacts()
    base, dtype = planning.base_kind(settings, adapted), str(models.resolve_dtype(settings.dtype))
    keep, switch = KEPT[plan.recomputation], graph_switch()
    made = GraphFacts(switch, device.kind, base, dtype.removeprefix("torch."), keep, facts.devices)
    against = graphs_against(made)
    return f"no ({'; '.join(against)})" if against else f"yes, up to {LARGEST_TOKENS[base]:,} tokens"


def _hardware(settings: ModelConfig, adapted: PeftModel, dtype: str, plan: planning.Plan) -> Hardware:
    """Return the device of the run and how it would compute the decoder layers, by the model without weights."""
    device = facts_of_device(torch.device(plan.device))
    facts = facts_for(adapted) or ModelFacts(architecture=type(adapted).__name__)
    capability = "" if device.capability is None else f", compute capability {'.'.join(map(str, device.capability))}"
    reasons = plan.decoder_layers.reasons
    reasons = reasons if device.problem is None else (f"the GPU cannot be used: {device.problem}",)
    head = torch.empty(1, 1, 1, facts.head_size, dtype=getattr(torch, dtype), device=device.kind)
    attention, why = attention_for(facts_of_attention(head, facts.attention_dropout))
    shape = cast(Any, adapted).config.get_text_config()
    columns = int(getattr(shape, "intermediate_size", None) or shape.hidden_size)
    way, reason = elementwise_for(facts_of_elementwise(head.device, head.dtype, columns))
    elementwise = "" if device.kind == "cpu" else f"{way} ({reason})"
    name = f"{device.name}{capability}"
    path, graphs = plan.decoder_layers.path, _training_graphs(settings, adapted, plan, device)
    return Hardware(name, device.memory_bytes, path, reasons, attention, why, elementwise, plan.answers, graphs)


def _spare_rows(config: Config, tokenizer: PreTrainedTokenizerBase, skeleton: PreTrainedModel) -> str | None:
    """Return a notice of tokens without a trained row, by the files of a local model or by their ids alone."""
    folder = Path(models.local_path(config.model.name_or_path))
    weight = stored_embedding(folder, skeleton) if folder.is_dir() else None
    rows = int(cast(Any, skeleton.get_input_embeddings()).weight.shape[0])
    found = untrained_tokens(tokenizer, rows, skeleton.config, weight)
    return notice(found, rows, config.peft_config)


def _notices(
    config: Config, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], covered: Coverage
) -> Iterator[str]:
    """Yield notices of settings that have another effect here than in other libraries."""
    origins = config.origins
    sections = {
        section: any(key.startswith(section) and origin != "default" for key, origin in origins.items())
        for section in ("training_config.", "peft_config.")
    }
    if sections["training_config."] and not sections["peft_config."] and config.model.adapter is None:
        yield (
            f"peft_config is not given. Without one a script of TRL or transformers trains every weight of the model; "
            f"philora trains LoRA with r={config.peft_config['r']} on {config.peft_config['target_modules']}: "
            f"{covered.trainable_parameters:,} of {covered.total_parameters:,} parameters."
        )
    brought = str(tokenizer.init_kwargs.get("pad_token"))
    if brought != tokenizer.pad_token and tokenizer.get_vocab().get(brought) in stops:
        yield (
            f"the model's tokenizer pads with {brought}, which is a stop token: {tokenizer.pad_token} is used instead, "
            f"so that the end of an answer keeps its label."
        )
    slices = {row.slice: row.module.rpartition(".")[2] for row in covered.rows if row.slice}
    if slices:
        whole = {row.module.rpartition(".")[2]: row for row in covered.rows if not row.slice}
        alone = sum(row.parameters for row in covered.rows if not row.slice)
        yield (
            f"{', '.join(slices)} are slices of {' and '.join(dict.fromkeys(slices.values()))}, and each gets a rank "
            f"of its own: {covered.trainable_parameters:,} parameters train. PEFT alone would "
            + (f"silently adapt {' and '.join(whole)} only: {alone:,}." if whole else "find none of these names.")
        )
