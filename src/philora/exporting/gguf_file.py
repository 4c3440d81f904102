"""Write models and adapters of the Phi-3 architecture as GGUF, and read them back.

Names of tensors and fields are the `gguf` package's. Their meaning is from llama.cpp's sources (models/phi3.cpp,
llama-model.cpp, llama-adapter.cpp): one tensor for q, k, v and one for gate and up, in the order of transformers' rows;
LongRoPE's factors as two tensors, the long ones for contexts beyond the original window; the factor on cosine and sine
as `rope.scaling.attn_factor`; rotation of the first `rope.dimension_count` columns of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from philora.errors import AdapterError, ModelError, fault, one_per_line
from philora.exporting.adapter import Adapter, plain_number
from philora.exporting.vocabulary import Vocabulary

ARCHITECTURE: Final = gguf.MODEL_ARCH.PHI3
_NAME: Final = gguf.MODEL_ARCH_NAMES[ARCHITECTURE]

FILE_TYPES: Final[Mapping[str, tuple[gguf.LlamaFileType, gguf.GGMLQuantizationType]]] = {
    "f32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
    "f16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
    "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0),
}
"""Types of weights: the value of the file's field, and the type of matrices. Vectors are always fp32."""

_ROPE_LONG, _ROPE_SHORT = (
    f"{gguf.TENSOR_NAMES[entry]}.weight"
    for entry in (gguf.MODEL_TENSOR.ROPE_FACTORS_LONG, gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT)
)


def check_architecture(config: Any) -> None:
    """Refuse a model that llama.cpp's `phi3` does not support.

    Raises:
        ModelError: It is not supported; all reasons are reported at once.
    """
    where, faults = "export to gguf", []
    found = getattr(config, "model_type", None)
    if found != "phi3":
        todo = "Merge it (philora merge) and convert the folder with llama.cpp's own script"
        raise ModelError(fault(where, "model_type", found, "phi3: Phi-3, Phi-3.5, Phi-4 or Phi-4-mini", todo))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head * config.num_attention_heads != config.hidden_size:
        faults.append(fault(where, "head_dim", head, "hidden_size over the number of heads"))
    if config.hidden_act != "silu":
        faults.append(fault(where, "hidden_act", config.hidden_act, "silu"))
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "longrope"):
        faults.append(fault(where, "rope_type", rope, "default or longrope"))
    if faults:
        raise ModelError(one_per_line(faults))


def tensor_name(name: str, blocks: int) -> str | None:
    """Return GGUF's name of a parameter of transformers, or None if there is none."""
    module, _, leaf = name.rpartition(".")
    found = gguf.get_tensor_name_map(ARCHITECTURE, blocks).get_name(module)
    return None if found is None else f"{found}.{leaf}"


def write_model(
    model: PreTrainedModel,
    file: Path,
    vocabulary: Vocabulary,
    *,
    file_type: str,
    name: str,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write a model. Its weights are converted one after another.

    Args:
        model, vocabulary, file: A Phi3ForCausalLM, its tokenizer, and the file to write.
        file_type: Type of the matrices: `f32`, `f16` or `q8_0`. A matrix whose row length is not a multiple of 32 is
            written in f16 instead of q8_0.
        name: The model's name; a tokenizer may require a prefix, see `Vocabulary.model_name`.
        facts: `license` and `base_model`, if known.

    Raises:
        ModelError: GGUF's `phi3` does not support a tensor or setting of the model, or the type cannot represent a
            weight.
    """
    check_architecture(model.config)
    tensors = model_tensors(model)
    writer = gguf.GGUFWriter(file, _NAME)
    writer.add_type(gguf.GGUFType.MODEL)
    _write_facts(writer, vocabulary.model_name(name), facts or {})
    writer.add_file_type(FILE_TYPES[file_type][0])
    if file_type == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_config(writer, model.config)
    vocabulary.write(writer)
    _write_tensors(writer, {key: (tensor, type_of(tensor, file_type)) for key, tensor in tensors.items()})


def write_lora(
    adapter: Adapter,
    model: PreTrainedModel,
    file: Path,
    *,
    file_type: str,
    name: str,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter with one rank and one scaling, as from `for_server`.

    llama.cpp multiplies every update by `adapter.lora.alpha` divided by the rank of its tensors.

    Args:
        adapter, model, file: The adapter, its base, and the file to write.
        file_type: `f32`; with any other value A and B are written in f16, not quantised.
        name: The adapter's name.
        facts: As in `write_model`.

    Raises:
        AdapterError: GGUF has no name for a module, or there are several ranks or scalings.
    """
    check_architecture(model.config)
    blocks = int(model.config.num_hidden_layers)
    ranks = {update.rank for update in adapter.updates.values()}
    scalings = {update.scaling for update in adapter.updates.values()}
    if len(ranks) != 1 or len(scalings) != 1:
        expected = "one rank and one scaling for all modules, as in the server layout"
        raise AdapterError(fault("export to gguf", "ranks, scalings", (ranks, scalings), expected))
    kind = FILE_TYPES["f32" if file_type == "f32" else "f16"]
    tensors: dict[str, tuple[Tensor, gguf.GGMLQuantizationType]] = {}
    faults = []
    for module, update in adapter.updates.items():
        own = tensor_name(f"{module}.weight", blocks)
        if own is None or (module == "lm_head" and model.config.tie_word_embeddings):
            expected = "modules that llama.cpp can adapt by themselves"
            faults.append(fault("export to gguf", "module", module, expected, "Merge it: --layout merged"))
            continue
        tensors[f"{own}.lora_a"] = update.lora_A, kind[1]
        tensors[f"{own}.lora_b"] = update.lora_B, kind[1]
    if faults:
        raise AdapterError(one_per_line(faults))
    writer = gguf.GGUFWriter(file, _NAME)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(plain_number(scalings.pop() * ranks.pop())))
    _write_facts(writer, name, facts or {})
    writer.add_file_type(kind[0])
    _write_tensors(writer, tensors)


def model_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the model's tensors by GGUF's names, without an output embedding that is the input's."""
    blocks = int(model.config.num_hidden_layers)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    tensors: dict[str, Tensor] = {}
    faults = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if tied and name == "lm_head.weight":
            continue
        own = tensor_name(name, blocks)
        if own is None or own.endswith(".bias"):
            faults.append(fault("export to gguf", "tensor", name, "a tensor that llama.cpp's phi3 has"))
        else:
            tensors[own] = parameter.detach()
    if faults:
        raise ModelError(one_per_line(faults))
    rope = model.config.rope_parameters
    if rope["rope_type"] == "longrope":
        tensors[_ROPE_LONG] = torch.tensor(rope["long_factor"], dtype=torch.float32)
        tensors[_ROPE_SHORT] = torch.tensor(rope["short_factor"], dtype=torch.float32)
    return tensors


def type_of(tensor: Tensor, file_type: str) -> gguf.GGMLQuantizationType:
    """Return the type that a tensor is written in."""
    if tensor.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    kind = FILE_TYPES[file_type][1]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _write_tensors(writer: gguf.GGUFWriter, tensors: Mapping[str, tuple[Tensor, gguf.GGMLQuantizationType]]) -> None:
    """Write the header, then one tensor after the other, so that only one is held in its new type."""
    try:
        for name, (tensor, kind) in tensors.items():
            block, size = gguf.GGML_QUANT_SIZES[kind]
            nbytes = tensor.numel() // block * size
            plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(kind)
            writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(plain or np.float32), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (tensor, kind) in tensors.items():
            data = gguf.quantize(tensor.to(dtype=torch.float32, device="cpu").contiguous().numpy(), kind)
            if kind is gguf.GGMLQuantizationType.F16 and not np.isfinite(data).all():
                todo = "Write it in another type: --dtype f32, or q8_0"
                raise ModelError(fault("export to gguf", name, "infinite in f16", "values up to 65504", todo))
            writer.write_tensor_data(data)
    finally:
        writer.close()


def _write_facts(writer: gguf.GGUFWriter, name: str, facts: Mapping[str, str]) -> None:
    writer.add_name(name)
    if facts.get("license"):
        writer.add_license(facts["license"])
    base = facts.get("base_model")
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base.rpartition("/")[2])
        if base.count("/") == 1:
            writer.add_base_model_organization(0, base.partition("/")[0])
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")


def _write_config(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    head = config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(attention_factor(config))


def attention_factor(config: Any) -> float:
    """Return what LongRoPE multiplies cosine and sine with.

    Source: transformers 5.23, `modeling_rope_utils._compute_longrope_parameters`.
    """
    rope = config.rope_parameters
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


class GGUFFile:
    """A memory-mapped GGUF file: its fields, and its tensors, which are read when they are used.

    Raises:
        ModelError: It cannot be read.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._reader = gguf.GGUFReader(file)
        except (OSError, ValueError, IndexError) as error:
            raise ModelError(fault(str(file), "content", str(error), "a complete GGUF file")) from error
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def field(self, key: str, default: Any = None) -> Any:
        """Return the value of a field; `{arch}` in its name is the architecture's."""
        found = self._reader.get_field(key.format(arch=_NAME))
        return default if found is None else found.contents()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> Iterator[str]:
        """Return the names of the tensors in the order of the file."""
        return iter(self._tensors)

    def size(self, name: str) -> int:
        """Return the number of a tensor's elements."""
        return int(self._tensors[name].n_elements)

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in fp32, in torch's order of dimensions."""
        found = self._tensors[name]
        values = gguf.dequantize(found.data, found.tensor_type)
        shape = tuple(int(entry) for entry in reversed(found.shape.tolist()))
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))


def read_config(file: GGUFFile) -> Phi3Config:
    """Return the configuration that a file of the phi3 architecture describes."""
    keys = gguf.Keys
    field = file.field
    heads, width = field(keys.Attention.HEAD_COUNT), field(keys.LLM.EMBEDDING_LENGTH)
    rope: dict[str, Any] = {
        "rope_type": field(keys.Rope.SCALING_TYPE, "default"),
        "rope_theta": field(keys.Rope.FREQ_BASE),
        "partial_rotary_factor": field(keys.Rope.DIMENSION_COUNT) / (width // heads),
    }
    original = field(keys.Rope.SCALING_ORIG_CTX_LEN, field(keys.LLM.CONTEXT_LENGTH))
    if rope["rope_type"] == "longrope":
        rope["long_factor"] = file.tensor(_ROPE_LONG).tolist()
        rope["short_factor"] = file.tensor(_ROPE_SHORT).tolist()
        rope["original_max_position_embeddings"] = original
        rope["attention_factor"] = field(keys.Rope.SCALING_ATTN_FACTOR)
    return Phi3Config(
        vocab_size=field(keys.LLM.VOCAB_SIZE),
        hidden_size=width,
        intermediate_size=field(keys.LLM.FEED_FORWARD_LENGTH),
        num_hidden_layers=field(keys.LLM.BLOCK_COUNT),
        num_attention_heads=heads,
        num_key_value_heads=field(keys.Attention.HEAD_COUNT_KV),
        max_position_embeddings=field(keys.LLM.CONTEXT_LENGTH),
        original_max_position_embeddings=original,
        rms_norm_eps=field(keys.Attention.LAYERNORM_RMS_EPS),
        sliding_window=field(keys.Attention.SLIDING_WINDOW),
        tie_word_embeddings=f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.OUTPUT]}.weight" not in file,
        rope_parameters=rope,
        bos_token_id=field(keys.Tokenizer.BOS_ID),
        eos_token_id=field(keys.Tokenizer.EOS_ID),
        pad_token_id=field(keys.Tokenizer.PAD_ID),
    )


def read_model(file: GGUFFile, lora: GGUFFile | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model of a file in transformers, dequantised; with an adapter's file added to its weights.

    Raises:
        ModelError: A tensor is missing, of another shape, or one too many.
    """
    config = read_config(file)
    blocks = int(config.num_hidden_layers)
    with torch.device("meta"):
        model = Phi3ForCausalLM(config)
    unused = set(file.names()) - {_ROPE_LONG, _ROPE_SHORT}
    adapted = set() if lora is None else set(lora.names())
    state: dict[str, Tensor] = {}
    faults = []
    for name, parameter in model.named_parameters():
        own = cast(str, tensor_name(name, blocks))
        if own not in file:
            faults.append(fault("gguf", own, "missing", "a tensor for every parameter"))
            continue
        unused.discard(own)
        value = file.tensor(own)
        if lora is not None and f"{own}.lora_a" in lora:
            adapted -= {f"{own}.lora_a", f"{own}.lora_b"}
            down, up = lora.tensor(f"{own}.lora_a"), lora.tensor(f"{own}.lora_b")
            value += up @ down * (lora.field(gguf.Keys.Adapter.LORA_ALPHA) / down.shape[0])
        if value.shape != parameter.shape:
            faults.append(fault("gguf", own, tuple(value.shape), f"shape {tuple(parameter.shape)}"))
        state[name] = value.to(dtype)
    faults += [fault("gguf", name, "unexpected", "tensors of the model only") for name in sorted(unused | adapted)]
    if faults:
        raise ModelError(one_per_line(faults))
    with torch.device("cpu"):
        model = model.to_empty(device="cpu").to(dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # no state dict has its buffers
    model.tie_weights()
    return model.eval()
