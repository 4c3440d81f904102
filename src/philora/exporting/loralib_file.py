"""Read and write adapters in loralib's format: a `lora_state_dict`, and the arguments of its layers in `lora.json`."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from philora import lora
from philora.adapters.slices import Slices, slices_named
from philora.adapters.targets import Names
from philora.errors import AdapterError, ConfigError, fault, nearest, one_per_line
from philora.exporting.adapter import Adapter, Update, plain_number
from philora.files.checkpoint import write_json, write_text
from philora.lora.state import read_state

WEIGHTS_NAME, LAYERS_NAME = "lora.pt", "lora.json"


def read_loralib(model: PreTrainedModel, file: Path, lora_alpha: float | None) -> Adapter:
    """Replace the layers that a loralib file names, load the file, and return the updates."""
    state = read_state(file)
    beside = file.with_suffix(".json")
    if beside.is_file():
        layers = _layers_file(beside)
    else:
        layers = _layers_from_shapes(model, state, file, lora_alpha)
    _check_loralib(model, state, layers, file)
    lora.replace_layers(model, layers)
    for name in state:
        if not _is_update(name):  # so that the base's own tensor is not written to
            parent, _, own = name.rpartition(".")
            module = model.get_submodule(parent)
            module._parameters[own] = nn.Parameter(cast(Tensor, module._parameters[own]).detach().clone())
    lora.load_lora(model, state)
    updates = {}
    for name in layers:
        layer = cast(Any, model.get_submodule(name))
        down, up = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
        slices: Slices = ()
        if isinstance(layer, lora.MergedLinear):
            slices = _named_slices(layer, Names.of(model).rows.get(name, {}))
            up = _on_the_diagonal(up, slices, layer.out_features)
        updates[name] = Update(down, up, layer.scaling, slices, isinstance(layer, lora.Embedding))
    whole = {name: value for name, value in state.items() if not _is_update(name)}
    return Adapter(updates, whole)


def _is_update(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


def _layers_file(path: Path) -> dict[str, dict[str, Any]]:
    """Return the layers that `lora.json` describes."""
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        return {str(name): dict(arguments) for name, arguments in layers.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = "JSON with the arguments of every LoRA layer under `layers`"
        raise AdapterError(fault(str(path), "content", f"{type(error).__name__}: {error}", expected)) from error


def _layers_from_shapes(
    model: PreTrainedModel, state: Mapping[str, Any], file: Path, lora_alpha: float | None
) -> dict[str, dict[str, Any]]:
    """Return the arguments of a file's layers, as far as the shapes of A and B determine them."""
    if lora_alpha is None:
        expected = "the lora_alpha of the layers, which the file does not contain"
        raise ConfigError(fault(str(file), "lora_alpha", None, expected, "Give it: --lora-alpha NUMBER"))
    rows = Names.of(model).rows
    layers: dict[str, dict[str, Any]] = {}
    faults = []
    for name in [entry.removesuffix(".lora_A") for entry in state if entry.endswith(".lora_A")]:
        down, up = state[f"{name}.lora_A"], state.get(f"{name}.lora_B")
        if not isinstance(down, Tensor) or not isinstance(up, Tensor) or down.ndim != 2 or up.ndim != 2:
            faults.append(fault(str(file), f"{name}.lora_B", up, "lora_A and lora_B, both matrices"))
            continue
        r = up.shape[1]
        layers[name] = {"r": r, "lora_alpha": lora_alpha}
        sizes = [stop - start for start, stop in rows.get(name, {}).values()]
        if down.shape[0] == r and (not sizes or up.shape[0] == sum(sizes)):
            continue
        choices = [
            chosen
            for number in range(2 ** len(sizes))
            if sum(chosen := [bool(number >> place & 1) for place in range(len(sizes))]) * r == down.shape[0]
            and sum(size for size, used in zip(sizes, chosen, strict=True) if used) == up.shape[0]
        ]
        if len(choices) != 1:
            found = f"lora_A {tuple(down.shape)}, lora_B {tuple(up.shape)}"
            todo = f"Write {file.with_suffix('.json').name} beside it with enable_lora and slices of each layer"
            faults.append(fault(str(file), name, found, "shapes that tell which slices are adapted", todo))
            continue
        layers[name] |= {"enable_lora": choices[0], "slices": sizes}
    if faults:
        raise AdapterError(one_per_line(faults))
    return layers


def _check_loralib(
    model: PreTrainedModel, state: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]], file: Path
) -> None:
    """Check names, kinds of layer, tensors and their shapes before a layer is replaced; report all faults."""
    bare = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    faults = []
    expected: dict[str, tuple[int, ...]] = {}
    for name, arguments in layers.items():
        if name not in modules:
            faults.append(fault(str(file), name, "no such module", "a module of the base", nearest(name, modules)))
            continue
        leaf = name.rpartition(".")[2]
        holder = nn.ModuleDict({leaf: _without_weights(modules[name])})
        try:
            lora.replace_layers(holder, {leaf: arguments})
        except ConfigError as error:
            faults.append(f"{file}: {name}: {error}")
            continue
        for own, tensor in holder[leaf].named_parameters():
            if own.startswith("lora_"):
                expected[f"{name}.{own}"] = tuple(tensor.shape)
    absent = ((name, shape) for name, shape in expected.items() if name not in state)
    faults += [fault(str(file), name, "missing", f"a tensor of shape {shape}") for name, shape in absent]
    for name, value in state.items():
        known = expected.get(name, tuple(bare[name].shape) if name in bare else None)
        if known is None:
            if not any(name.startswith(f"{layer}.") for layer in layers if layer not in modules):
                todo = nearest(name, [*expected, *bare])
                faults.append(fault(str(file), name, "unexpected", "a tensor of the base or of its LoRA layers", todo))
        elif not isinstance(value, Tensor) or tuple(value.shape) != known:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            faults.append(fault(str(file), name, found, f"shape {known}"))
    if faults:
        raise AdapterError(one_per_line(faults))


def _without_weights(module: nn.Module) -> nn.Module:
    """Return a copy of a module on the meta device."""
    like = copy.copy(module)
    like._parameters = {
        name: value if value is None else nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
        for name, value in module._parameters.items()
    }
    return like


def _named_slices(layer: lora.MergedLinear, rows: Mapping[str, tuple[int, int]]) -> Slices:
    """Return the adapted slices of a layer; they are numbered if the family has no names for them."""
    names = {span: name for name, span in rows.items()}
    spans = itertools.pairwise(itertools.accumulate(layer.slices, initial=0))
    every = {names.get(span, str(index)): span for index, span in enumerate(spans)}
    adapted = list(itertools.compress(every, layer.enable_lora))
    return slices_named(adapted, every, layer.r)


def _on_the_diagonal(compact: Tensor, slices: Slices, out_features: int) -> Tensor:
    """Return loralib's B of the adapted slices, (rows, r), as a full-height block-diagonal one."""
    up = compact.new_zeros(out_features, slices[-1].rank_stop)
    row = 0
    for part in slices:
        height = part.row_stop - part.row_start
        up[part.row_start : part.row_stop, part.rank_start : part.rank_stop] = compact[row : row + height]
        row += height
    return up


def write_loralib(adapter: Adapter, model: PreTrainedModel, folder: Path, base: str) -> None:
    """Write `lora.pt`, the `lora_state_dict` of a model of LoRA layers, and their arguments in `lora.json`."""
    rows = Names.of(model).rows
    state: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name, update in adapter.updates.items():
        if update.slices:
            r = update.slices[0].rank_stop - update.slices[0].rank_start
            sizes, used = _all_slices(update, rows.get(name, {}))
            layers[name] = {"r": r, "enable_lora": used, "slices": sizes}
            blocks = [update.lora_B[s.row_start : s.row_stop, s.rank_start : s.rank_stop] for s in update.slices]
            up = torch.cat(blocks)
        else:
            r, up = update.rank, update.lora_B
            layers[name] = {"r": r}
        layers[name]["lora_alpha"] = plain_number(update.scaling * r)
        state[f"{name}.lora_A"], state[f"{name}.lora_B"] = update.lora_A.clone(), up.clone()
    state |= {name: value.clone() for name, value in adapter.whole.items()}
    torch.save(state, folder / WEIGHTS_NAME)
    write_json(folder / LAYERS_NAME, {"format": 1, "base_model": base, "layers": layers})
    write_text(folder / "README.md", _loralib_readme(base, bool(adapter.whole)))


def _all_slices(update: Update, rows: Mapping[str, tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Return the sizes of all slices of a module and which are adapted; what lies between adapted ones is one slice."""
    spans = sorted(rows.values())
    if not spans:
        edges = sorted({0, update.lora_B.shape[0], *(e for s in update.slices for e in (s.row_start, s.row_stop))})
        spans = list(itertools.pairwise(edges))
    adapted = {(part.row_start, part.row_stop) for part in update.slices}
    return [stop - start for start, stop in spans], [span in adapted for span in spans]


def _loralib_readme(base: str, whole: bool) -> str:
    also = " It also has complete tensors that were trained." if whole else ""
    return f"""# An adapter of {base} in loralib's layout

`{WEIGHTS_NAME}` is a `lora_state_dict`.{also} `{LAYERS_NAME}` has the arguments of every layer.

```python
import json
from philora import lora
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
lora.replace_layers(model, json.load(open("{LAYERS_NAME}"))["layers"])
lora.load_lora(model, "{WEIGHTS_NAME}")
model.eval()
```

loralib's own layers read the same file where all slices of a module are of one size.
"""
