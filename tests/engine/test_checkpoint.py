"""Reading a checkpoint: what it says, and a one-line error for each way in which it can be broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvasir.core.errors import ModelError
from kvasir.engine import checkpoint as module
from kvasir.engine.checkpoint import kv_layout_name, read_spec
from tests.engine.conftest import MakeCheckpoint


@pytest.fixture
def broken(checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of a small checkpoint, to be broken."""
    return Path(shutil.copytree(checkpoint(family="llama", dtype="bfloat16"), tmp_path / "copy"))


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_spec_says_what_the_checkpoint_is(checkpoint: MakeCheckpoint) -> None:
    path = checkpoint(family="llama", dtype="bfloat16")
    spec = read_spec(path, block_tokens=32)
    assert spec.name == path.name
    assert spec.architecture == "LlamaForCausalLM"
    assert (spec.dtype, spec.layout, spec.max_model_len) == ("bfloat16", "slot-v1/pairs", 1024)
    assert spec.eos_token_ids == (0,)
    shape = spec.shape
    assert (shape.num_layers, shape.hidden, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (3, 64, 4, 2, 16)
    assert shape.num_params == sum(t.numel() for t in load_file(path / "model.safetensors").values())
    assert spec.slot_bytes == 32 * 2 * 3 * 2 * 16 * 2


@pytest.mark.parametrize(("size", "millions", "kv_bytes"), [("tiny", 56, 8 * 1024), ("small", 415, 12 * 1024)])
def test_the_benchmarks_models_have_their_sizes(size: str, millions: int, kv_bytes: int) -> None:
    from kvasir.engine.random_model import SIZES

    s = SIZES[size]
    attention = s["hidden_size"] * s["head_dim"] * 2 * (s["num_attention_heads"] + s["num_key_value_heads"])
    layer = attention + 3 * s["hidden_size"] * s["intermediate_size"] + 2 * s["hidden_size"]
    params = s["num_hidden_layers"] * layer + (2 * s["vocab_size"] + 1) * s["hidden_size"]
    assert round(params / 1e6) == millions
    assert 2 * s["num_hidden_layers"] * s["num_key_value_heads"] * s["head_dim"] * 2 == kv_bytes


def test_a_tied_embedding_counts_once(checkpoint: MakeCheckpoint) -> None:
    tied = read_spec(checkpoint(family="llama", tie=True), block_tokens=16).shape.num_params
    untied = read_spec(checkpoint(family="llama"), block_tokens=16).shape.num_params
    assert untied - tied == 384 * 64


def test_the_identity_is_of_content_not_of_place(checkpoint: MakeCheckpoint, broken: Path) -> None:
    path = checkpoint(family="llama", dtype="bfloat16")
    assert read_spec(path, block_tokens=16).identity == read_spec(broken, block_tokens=64).identity


def test_other_weights_with_the_same_header_are_another_identity(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a file is too large to be hashed whole: one changed tensor shows in its sample."""
    before = read_spec(broken, block_tokens=16).identity
    monkeypatch.setattr(module, "_WHOLE_FILE_BYTES", 0)
    monkeypatch.setattr(module, "_EDGE_BYTES", 64)
    sampled_before = read_spec(broken, block_tokens=16).identity
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.5
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert read_spec(broken, block_tokens=16).identity not in (before, sampled_before)


def test_another_configuration_is_another_identity(broken: Path) -> None:
    before = read_spec(broken, block_tokens=16).identity
    edit_json(broken / "config.json", rms_norm_eps=1e-5)
    assert read_spec(broken, block_tokens=16).identity != before


def test_sharded_weights_are_read_through_their_index(checkpoint: MakeCheckpoint) -> None:
    whole = read_spec(checkpoint(family="llama"), block_tokens=16)
    path = checkpoint(family="llama", shards=3)
    assert len(list(path.glob("*.safetensors"))) >= 3
    assert read_spec(path, block_tokens=16).shape == whole.shape


def test_the_dtype_can_be_chosen(checkpoint: MakeCheckpoint) -> None:
    spec = read_spec(checkpoint(family="llama", dtype="bfloat16"), dtype="float32", block_tokens=16)
    assert (spec.dtype, spec.shape.dtype_bytes, spec.layout) == ("float32", 4, "slot-v1/float32")


def test_end_of_sequence_tokens_come_from_both_files(broken: Path) -> None:
    edit_json(broken / "generation_config.json", eos_token_id=[7, 0])
    assert read_spec(broken, block_tokens=16).eos_token_ids == (7, 0)


def test_the_layouts_name_tells_the_packings_apart() -> None:
    from kvasir.engine.torch.kernels import KvLayout

    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        assert KvLayout(1, 1, 16, 16, dtype).is_packed == ("pairs" in kv_layout_name(name))


def test_reading_a_spec_imports_neither_torch_nor_transformers(checkpoint: MakeCheckpoint) -> None:
    code = (
        "import sys; from kvasir.engine.checkpoint import read_spec;"
        f"read_spec({str(checkpoint(family='llama'))!r}, block_tokens=16);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def remove(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).unlink()


def config(**fields: Any) -> Callable[[Path], object]:
    return lambda path: edit_json(path / "config.json", **fields)


def truncate(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickle_only(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def index_of_missing_shard(path: Path) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))


def integer_weights(path: Path) -> None:
    save_file({"w": torch.zeros(4, dtype=torch.int8)}, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (
            config(architectures=["T5ForConditionalGeneration"]),
            "T5ForCond.* is not a decoder-only .* supported:",
        ),
        (config(is_encoder_decoder=True), "not a decoder-only"),
        (config(architectures=None), "model_type llama is not a decoder-only"),
        (config(quantization_config={"bits": 4}), "quantised"),
        (config(hidden_size=None), "expected a positive hidden_size"),
        (remove("model.safetensors"), r"no \*.safetensors file"),
        (pickle_only, r"pickled weights \(\*.bin\) only"),
        (truncate, "model.safetensors is truncated or corrupt"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "model.safetensors is truncated or corrupt"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 4096), "model.safetensors is truncated or corrupt"),
        (index_of_missing_shard, "names model-00002-of-00002.safetensors, which is not there"),
        (integer_weights, "w is I8"),
    ],
)
def test_a_broken_checkpoint_is_named_in_one_line(broken: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(broken)
    with pytest.raises(ModelError, match=message) as raised:
        read_spec(broken, block_tokens=16)
    assert "\n" not in str(raised.value)


def test_a_directory_that_is_not_there_is_said_so() -> None:
    with pytest.raises(ModelError, match="/nowhere/model: no such directory"):
        read_spec("/nowhere/model", block_tokens=16)


def test_a_name_without_a_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"org/name: no such directory, and .* \(no network\); download it") as raised:
        read_spec("org/name", block_tokens=16)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("asked", [0, 1025])
def test_a_length_beyond_the_models_is_refused(checkpoint: MakeCheckpoint, asked: int) -> None:
    with pytest.raises(ModelError, match="expected 1 to 1024"):
        read_spec(checkpoint(family="llama"), block_tokens=16, max_model_len=asked)
