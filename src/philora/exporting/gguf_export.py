"""Write GGUF files of an adapter for llama.cpp and Ollama, and verify them against the trained model."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from philora.adapters.peft_models import load_adapter
from philora.configuration.sections import ModelConfig
from philora.errors import AdapterError, ModelError, fault, one_per_line
from philora.exporting import held_out, llama
from philora.exporting.adapter import Adapter, Update, check_updates, for_server
from philora.exporting.conversion import fits_in_fp32, load_base, read_adapter, restored
from philora.exporting.gguf_file import (
    FILE_TYPES,
    GGUFFile,
    check_architecture,
    model_tensors,
    read_model,
    tensor_name,
    type_of,
    write_lora,
    write_model,
)
from philora.exporting.merging import merge
from philora.exporting.ollama import context_tokens, write_modelfile
from philora.exporting.peft_folder import write_peft
from philora.exporting.vocabulary import vocabulary
from philora.families import longrope_switch_tokens
from philora.files.checkpoint import write_text
from philora.kernels.quantization import dequantize_
from philora.models.base_files import base_folder, load_trained_over, read_trained_over
from philora.models.loading import load_skeleton
from philora.models.locate import AdapterSource, licence
from philora.models.run_folder import SystemTurn, TrainedRun, example_messages
from philora.models.tokenizer_files import Companions
from philora.models.verify import DIVERGENCE, Divergence, divergence, row_logits

logger = logging.getLogger(__name__)

# Largest error of a matrix relative to its norm: half a unit in the last place in f16. In q8_0 the error of each of 32
# values is at most half of 1/127 of the largest, which is below 1.3% of their norm.
_ROUNDED = {"f32": 1e-7, "f16": 1e-3, "q8_0": 2e-2}


class Compared(NamedTuple):
    """The comparison of the written files with the trained model.

    Attributes:
        read_back: Comparison with the files read by the `gguf` package and computed by transformers.
        llama: Comparison with llama.cpp; None if it could not be run.
        llama_failure: Why it could not be run.
    """

    read_back: Divergence
    llama: Divergence | None = None
    llama_failure: str | None = None


class _Prompts(NamedTuple):
    texts: list[str]
    rows: list[list[int]]
    chat: bool


def write_gguf(
    found: AdapterSource, folder: Path, *, layout: str, file_type: str, name: str, base_name: str, ollama: bool,
    lora_alpha: float | None = None,
) -> Compared:  # fmt: skip
    """Write and verify; the caller gives the folder its final name.

    Args:
        found, folder: The adapter and its base, and where to write.
        layout: `merged`: one model. `adapter`: the LoRA alone. `base+adapter`: both files of llama.cpp's `--lora`.
        file_type: `f32`, `f16` or `q8_0`.
        name, base_name: What the files call the model and its base.
        ollama: Whether to write a Modelfile as well.
        lora_alpha: Of a loralib file that lacks it.

    Raises:
        ModelError: The model or tokenizer is of a kind that llama.cpp's `phi3` does not compute, or llama.cpp reads
            something else than was written.
        AdapterError: The adapter has parts that the layout cannot hold, or what was written is not what was trained.
    """
    base = base_folder(cast(str, found.base), found.revision)
    config = load_skeleton(ModelConfig(name_or_path=str(base))).config
    check_architecture(config)
    companions = Companions(found.path, base, config)
    if companions.tokenizer is None:
        expected = "a tokenizer in the adapter's or the base's folder"
        raise ModelError(fault("export to gguf", "tokenizer", None, expected, "Save it there: save_pretrained"))
    words = vocabulary(companions.tokenizer, config.vocab_size, companions.stops)
    prompts = _prompts(found, companions.tokenizer, config)

    facts = {"base_model": base_name, "license": licence(str(base)) or licence(base_name) or ""}
    source = _Source(found, base, lora_alpha)
    write = _write_merged if layout == "merged" else _write_base_and_adapter
    files, reference, plain = write(source, folder, words, prompts.rows, file_type, name, facts)
    gc.collect()  # the model, before what was written is loaded
    compared = _compare(folder, files, file_type, prompts, reference, plain)
    if layout == "adapter":
        (folder / files[0]).unlink()
        files = files[1:]
    companions.write(folder, files=False)
    system = None if found.run is None else TrainedRun(found.run).system
    if ollama:
        write_modelfile(folder, files, companions, config, adds_bos=words.add_bos, system=system)
    readme = _readme(name, base_name, files, layout, companions, context_tokens(config), ollama, system)
    write_text(folder / "README.md", readme)
    return compared


class _Source(NamedTuple):
    """The adapter that is written, the folder of its base, and the alpha of a loralib file that lacks it."""

    found: AdapterSource
    base: Path
    lora_alpha: float | None


_Written = tuple[tuple[str, ...], list[Tensor], list[Tensor]]
"""The files, and the logits of the model with the adapter and of the base alone."""


def _write_merged(
    source: _Source, folder: Path, words: Any, rows: Any, file_type: str, name: str, facts: dict[str, str]
) -> _Written:
    """Write one model with the adapter in its weights."""
    model = _base_as_trained(source.found, source.base)
    plain = row_logits(model, rows)
    file = f"model-{file_type}.gguf"
    model, reference = _merged(model, source.found, rows, source.lora_alpha)
    write_model(model, folder / file, words, file_type=file_type, name=name, facts=facts)
    _check_tensors(model, folder / file, file_type)
    return (file,), reference, plain


def _write_base_and_adapter(
    source: _Source, folder: Path, words: Any, rows: Any, file_type: str, name: str, facts: dict[str, str]
) -> _Written:
    """Write the base, and the adapter in a separate file."""
    model = _base_as_trained(source.found, source.base)
    plain = row_logits(model, rows)
    files = (f"base-{file_type}.gguf", "adapter.gguf")
    license_fact, base_name = {"license": facts["license"]}, facts["base_model"]
    write_model(model, folder / files[0], words, file_type=file_type, name=base_name, facts=license_fact)
    _check_tensors(model, folder / files[0], file_type)
    with restored(model):
        applied, adapter = read_adapter(model, source.found, source.lora_alpha)
        reference = row_logits(applied, rows)
        served = for_server(adapter, model)
    write_lora(served, model, folder / files[1], file_type=file_type, name=name, facts=facts)
    _check_lora(served, model, folder / files[1])
    return files, reference, plain


def _prompts(found: AdapterSource, tokenizer: PreTrainedTokenizerBase, config: Any) -> _Prompts:
    """Return rows within what llama.cpp computes alike: the attention window, and LongRoPE's short factors."""
    windows = (config.max_position_embeddings, config.sliding_window, longrope_switch_tokens(config))
    limit = min(held_out.TOKENS, *(window for window in windows if window))
    written = held_out.texts(found.run, tokenizer)
    return _Prompts(written, held_out.token_rows(written, tokenizer, limit), tokenizer.chat_template is not None)


def _base_as_trained(found: AdapterSource, base: Path) -> PreTrainedModel:
    """Load the base with the weights that the adapter was trained over, in fp32 if there is memory for it."""
    trained_over = read_trained_over(base, cast(str, found.base), found.path, fresh_base=False)
    if trained_over is not None:
        model = load_trained_over(base, trained_over)
        dequantize_(model)
        return model.float().eval() if fits_in_fp32(model.num_parameters()) else model.eval()
    return load_base(str(base))


def _merged(
    model: PreTrainedModel, found: AdapterSource, rows: Sequence[Sequence[int]], lora_alpha: float | None
) -> tuple[PreTrainedModel, list[Tensor]]:
    """Merge the adapter into the base, which is used up; return it with the logits of what was trained."""
    with tempfile.TemporaryDirectory() as temporary:
        source = found.path
        if source.is_file():
            with restored(model):
                adapter = read_adapter(model, found, lora_alpha)[1]
            source = Path(temporary)
            write_peft(adapter, model, source, "")
        adapted = load_adapter(model, source)
        reference = row_logits(adapted, rows)
        return cast(PreTrainedModel, merge(adapted)), reference


def _check_tensors(model: PreTrainedModel, file: Path, file_type: str) -> None:
    """Check that every tensor of the file is the model's, within the rounding of its type."""
    written, faults = GGUFFile(file), []
    for name, tensor in model_tensors(model).items():
        want, got = tensor.float().cpu(), written.tensor(name)
        kind = next(key for key, (_, entry) in FILE_TYPES.items() if entry is type_of(tensor, file_type))
        difference = float((got - want).norm() / want.norm().clamp(min=1e-30)) if got.shape == want.shape else torch.inf
        if not difference <= _ROUNDED[kind]:
            faults.append(fault(file.name, name, difference, f"the model's tensor within {_ROUNDED[kind]:g}"))
    if faults:
        raise AdapterError(one_per_line(faults))


def _check_lora(served: Adapter, model: PreTrainedModel, file: Path) -> None:
    """Check that every update of the file is the adapter's, with the multiplier that llama.cpp applies."""
    written = GGUFFile(file)
    alpha = float(written.field("adapter.lora.alpha"))
    blocks = int(model.config.num_hidden_layers)
    updates = {}
    for name in served.updates:
        own = tensor_name(f"{name}.weight", blocks)
        down, up = written.tensor(f"{own}.lora_a"), written.tensor(f"{own}.lora_b")
        updates[name] = Update(down, up, alpha / down.shape[0])
    # Compared as f16's rounding allows, whatever the adapter's own dtype.
    wanted = {
        name: Update(update.lora_A.half(), update.lora_B.half(), update.scaling)
        for name, update in served.updates.items()
    }
    check_updates(Adapter(wanted), Adapter(updates))


def _compare(
    folder: Path,
    files: tuple[str, ...],
    file_type: str,
    prompts: _Prompts,
    reference: list[Tensor],
    plain: list[Tensor],
) -> Compared:
    """Compare the distributions of what was written with those of what was trained, through both readers."""
    model_file = folder / files[0]
    lora_file = folder / files[1] if len(files) > 1 else None
    written = GGUFFile(model_file)
    dtype = torch.float32 if fits_in_fp32(sum(map(written.size, written.names()))) else torch.bfloat16
    model = read_model(written, GGUFFile(lora_file) if lora_file else None, dtype)
    where, bound = "export to gguf", DIVERGENCE[file_type]
    read_back = divergence(where, "read back", reference, row_logits(model, prompts.rows), plain, bound)
    del model
    gc.collect()
    if read_back.mean > read_back.effect / 2 > 0:
        logger.warning(
            "export: %s moves the model by %.1e nats and the adapter by %.1e: little of the training is left",
            file_type,
            read_back.mean,
            read_back.effect,
        )
    if not llama.available():
        return Compared(read_back)
    try:
        reading = llama.read(model_file, lora_file, prompts.texts, prompts.rows, add_bos=not prompts.chat)
    except llama.Unreadable as error:
        logger.warning("export: the file was not read by llama.cpp. %s", error)
        return Compared(read_back, llama_failure=str(error))
    llama.check_tokens(reading.tokens, prompts.texts, prompts.rows)
    return Compared(read_back, divergence(where, llama.reader_name(), reference, reading.logits, plain, bound))


def _readme(
    name: str, base: str, files: Sequence[str], layout: str, companions: Companions, context: int, ollama: bool,
    system: SystemTurn | None,
) -> str:  # fmt: skip
    stops = ", ".join(f"`{stop_token}`" for stop_token in companions.stop_tokens)
    lora = layout != "merged"
    main = files[0] if layout != "adapter" else "BASE.gguf"
    flag = " --lora adapter.gguf" if lora else ""
    argument = f'"{main}", lora_path="adapter.gguf"' if lora else f'"{main}"'
    what = {
        "merged": f"`{files[0]}` is {base} with the adapter merged into its weights.",
        "adapter": f"`adapter.gguf` is the LoRA adapter; `BASE.gguf` stands for {base} as GGUF.",
        "base+adapter": f"`{files[0]}` is {base}, `adapter.gguf` the LoRA adapter.",
    }[layout]
    run_ollama = f"\n```\nollama create {_ollama_name(name)} -f Modelfile\nollama run {_ollama_name(name)}\n```\n"
    flag += f" -c {context} --jinja"
    return f"""# {name}

{what} An answer ends at {stops}; `stop_tokens.json` has them by id, and the files carry them.
{run_ollama if ollama else ""}
```
llama-cli -m {main}{flag} -cnv
llama-server -m {main}{flag} --port 8080
```

```python
from llama_cpp import Llama

model = Llama({argument}, n_ctx={context}, verbose=False)
messages = {example_messages(system)}
answer = model.create_chat_completion(messages, temperature=0.0, repeat_penalty=1.0, max_tokens=64)
print(answer["choices"][0]["message"]["content"])
```
"""


def _ollama_name(name: str) -> str:
    kept = "".join(entry if entry.isalnum() or entry in "._-" else "-" for entry in name.lower()).strip("._-")
    return kept or "model"
