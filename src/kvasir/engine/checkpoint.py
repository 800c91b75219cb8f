"""What the house must know of a checkpoint: read from its JSON files and safetensors headers, without torch.

The file is longer than most because every way in which a directory can be wrong has its own one-line error here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Literal

from kvasir.core.errors import ModelError
from kvasir.costs.shape import ModelShape
from kvasir.engine.interface import ModelSpec

LEAN_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures with a forward of our own; any other decoder-only one runs through transformers."""

_DECODER_SUFFIXES = ("ForCausalLM", "LMHeadModel")
_SUPPORTED = f"supported: {', '.join(LEAN_ARCHITECTURES)} and, through transformers, other decoder-only *ForCausalLM"
_DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
_FLOATS = ("F16", "BF16", "F32", "F64")
_NOT_PARAMETERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")
_NOT_IDENTITY = ("_name_or_path", "transformers_version")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]

_WHOLE_FILE_BYTES = 16 << 20  # a smaller weight file is hashed whole: milliseconds
_EDGE_BYTES = 64 << 10
_SAMPLE_BYTES = 4 << 10

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file; its bytes are [start, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file and what its header says."""

    path: Path
    num_bytes: int
    tensors: tuple[TensorInfo, ...]


def read_spec(
    path: str | Path,
    *,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    block_tokens: int,
    name: str | None = None,
    max_model_len: int | None = None,
) -> ModelSpec:
    """The spec of the checkpoint in directory `path`, or of the Hugging Face hub's repository of that name.

    `dtype` auto takes the checkpoint's own (float16 becomes bfloat16). Raises ModelError, in one line, for anything
    that could not be served.
    """
    directory = resolve(path)
    config = _read_json(directory / "config.json")
    architecture = _architecture(config, directory)
    files = weight_files(directory)
    chosen = _dtype(config, files, dtype)
    return ModelSpec(
        name=name or directory.name,
        path=str(directory),
        identity=_identity(config, files),
        architecture=architecture,
        shape=_shape(config, files, dtype_bytes=_DTYPE_BYTES[chosen]),
        dtype=chosen,
        layout=kv_layout_name(chosen),
        block_tokens=block_tokens,
        max_model_len=_max_model_len(config, max_model_len),
        eos_token_ids=_eos_token_ids(config, directory),
    )


def kv_layout_name(dtype: str) -> str:
    """How a slot's bytes lie (`kernels.layout.KvLayout`); part of the block keys, so a new packing needs a new name."""
    return "slot-v1/float32" if dtype == "float32" else "slot-v1/pairs"


def resolve(path: str | Path) -> Path:
    """The checkpoint's directory; a name that is no local directory is fetched from the Hugging Face hub."""
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory.resolve()
    text = str(path)
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelError(f"model {text}: no such directory; give a directory with config.json and *.safetensors")
    return _from_hub(text)


def weight_files(directory: Path) -> tuple[WeightFile, ...]:
    """The checkpoint's safetensors files, in order of their names, with complete headers."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ModelError(f"model {directory}: {index.name} names {missing[0]}, which is not there; download it again")
        return tuple(_read_header(directory / name) for name in names)
    paths = sorted(directory.glob("*.safetensors"))
    if paths:
        return tuple(_read_header(path) for path in paths)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise ModelError(f"model {directory}: has pickled weights (*.bin) only; convert them to safetensors (save_pretrained)")
    raise ModelError(f"model {directory}: no *.safetensors file; download the checkpoint with its weights")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError, HFValidationError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {name}: no such directory, and the Hugging Face hub did not give it ({reason}); "
            "download it elsewhere and give its directory"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"model {path.parent}: no {path.name}; expected a Hugging Face checkpoint directory") from None
    except ValueError as error:
        raise ModelError(f"model {path.parent}: {path.name} is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"model {path.parent}: {path.name} is not a JSON object; download it again")
    return value


def _read_header(path: Path) -> WeightFile:
    """Parse and check a safetensors header: 8 bytes of length, JSON, then the tensors' bytes to the very end."""
    num_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= num_bytes - 8 else None
        if header is None:
            raise ValueError("the header is cut off")
        data_start = 8 + length
        tensors = tuple(
            TensorInfo(name, t["dtype"], tuple(t["shape"]), *(data_start + offset for offset in t["data_offsets"]))
            for name, t in sorted(header.items())
            if name != "__metadata__"
        )
        expected = max((t.end for t in tensors), default=data_start)
        if expected != num_bytes:
            raise ValueError(f"expected {expected} bytes, got {num_bytes}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model {path.parent}: {path.name} is truncated or corrupt ({error}); download it again") from None
    return WeightFile(path, num_bytes, tensors)


def _architecture(config: Json, directory: Path) -> str:
    names = config.get("architectures") or []
    name = str(names[0]) if names else f"model_type {config.get('model_type', 'unknown')}"
    if config.get("is_encoder_decoder") or not name.endswith(_DECODER_SUFFIXES):
        raise ModelError(f"model {directory}: {name} is not a decoder-only causal language model; {_SUPPORTED}")
    if config.get("quantization_config"):
        raise ModelError(f"model {directory}: quantised checkpoints are not supported; give the bfloat16 or float32 one")
    return name


def _dtype(config: Json, files: tuple[WeightFile, ...], asked: str) -> str:
    if asked in _DTYPE_BYTES:
        return asked
    if asked != "auto":
        raise ModelError(f"dtype {asked!r}: expected auto, bfloat16 or float32")
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored is None and files[0].tensors:
        stored = "float32" if files[0].tensors[0].dtype == "F32" else "bfloat16"
    return "float32" if stored == "float32" else "bfloat16"


def _shape(config: Json, files: tuple[WeightFile, ...], *, dtype_bytes: int) -> ModelShape:
    hidden = _size(config, "hidden_size", "n_embd", "d_model")
    heads = _size(config, "num_attention_heads", "n_head")
    head_dim = config.get("head_dim") or (128 if config.get("model_type") == "qwen3" else hidden // heads)
    return ModelShape(
        num_layers=_size(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(head_dim),
        intermediate=int(config.get("intermediate_size") or config.get("n_inner") or 4 * hidden),
        vocab=_size(config, "vocab_size"),
        num_params=_count_params(config, files),
        dtype_bytes=dtype_bytes,
    )


def _size(config: Json, *names: str) -> int:
    """The first of these keys that is a positive integer."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise ModelError(f"config.json: expected a positive {names[0]}, got {config.get(names[0])!r}")


def _count_params(config: Json, files: tuple[WeightFile, ...]) -> int:
    """Every weight once: a tied lm_head that is stored beside the embedding does not count."""
    tensors = [t for file in files for t in file.tensors if not t.name.endswith(_NOT_PARAMETERS)]
    unusual = next((t for t in tensors if t.dtype not in _FLOATS), None)
    if unusual is not None:
        raise ModelError(f"weights: {unusual.name} is {unusual.dtype}; expected floating point (quantised is not supported)")
    tied = bool(config.get("tie_word_embeddings"))
    return sum(prod(t.shape) for t in tensors if not (tied and t.name == "lm_head.weight"))


def _max_model_len(config: Json, asked: int | None) -> int:
    limit = _size(config, "max_position_embeddings", "n_positions", "n_ctx")
    if asked is None:
        return limit
    if not 0 < asked <= limit:
        raise ModelError(f"max_model_len {asked}: expected 1 to {limit}, the model's max_position_embeddings")
    return asked


def _eos_token_ids(config: Json, directory: Path) -> tuple[int, ...]:
    """End-of-sequence tokens, those of generation_config.json first."""
    generation = directory / "generation_config.json"
    sources = [_read_json(generation)] if generation.exists() else []
    found: dict[int, None] = {}
    for source in (*sources, config):
        value = source.get("eos_token_id")
        found.update(dict.fromkeys(value if isinstance(value, list) else [] if value is None else [value]))
    return tuple(found)


def _identity(config: Json, files: tuple[WeightFile, ...]) -> str:
    """A hash over the configuration and each weight file's name, size, header and a sample of every tensor's content."""
    relevant = {key: value for key, value in config.items() if key not in _NOT_IDENTITY}
    digest = sha256(json.dumps(relevant, sort_keys=True).encode())
    for file in files:
        digest.update(f"\0{file.path.name}\0{file.num_bytes}\0{file.tensors}\0".encode())
        for piece in _sample(file):
            digest.update(piece)
    return digest.hexdigest()[:32]


def _sample(file: WeightFile) -> Iterator[bytes]:
    """The whole of a small file; of a large one both ends and the middle of every tensor."""
    with file.path.open("rb") as raw:
        if file.num_bytes <= _WHOLE_FILE_BYTES:
            yield raw.read()
            return
        yield raw.read(_EDGE_BYTES)
        for tensor in file.tensors:
            raw.seek(max(tensor.start, (tensor.start + tensor.end - _SAMPLE_BYTES) // 2))
            yield raw.read(min(_SAMPLE_BYTES, tensor.end - tensor.start))
        raw.seek(-_EDGE_BYTES, 2)
        yield raw.read(_EDGE_BYTES)
