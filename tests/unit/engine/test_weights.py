import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.collectives import ExpertGroup
from engine.loading import load, read_config, resolve_dtype
from engine.weights.checkpoint import INDEX, SINGLE, Checkpoint
from engine.weights.gguf import GgufFile
from engine.weights.reader import WeightReader
from engine.weights.source import Part
from protocol.errors import ConfigError

CPU = torch.device("cpu")
MATRIX = torch.arange(24.0).view(4, 6)
HEADS = 2


def sharded(folder: Path) -> Path:
    save_file({"a": MATRIX}, folder / "one.safetensors")
    save_file({"b": MATRIX.to(torch.bfloat16)}, folder / "two.safetensors")
    files = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return folder


def small_gguf(path: Path) -> tuple[Path, np.ndarray]:
    """One plain and one quantised matrix, as llama.cpp names them."""
    values = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "é"])
    writer.add_tensor("blk.0.attn_q.weight", values)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_down.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)


def test_a_sharded_checkpoint_reads_tensors_whole_and_in_part(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path))
    assert torch.equal(checkpoint.read("a"), MATRIX)
    assert checkpoint.read("b").dtype == torch.bfloat16
    assert torch.equal(checkpoint.read("a", Part(rows=slice(1, 3))), MATRIX[1:3])
    assert torch.equal(checkpoint.read("a", Part(columns=slice(2, 4))), MATRIX[:, 2:4])
    assert checkpoint.shape("a") == (4, 6)
    assert checkpoint.shape("c") is None


def test_a_shard_that_no_needed_tensor_is_in_may_be_broken(tmp_path: Path) -> None:
    """Ranks read only their own files: the last bytes of another shard do not matter to them."""
    checkpoint = Checkpoint(sharded(tmp_path))
    (tmp_path / "two.safetensors").unlink()
    assert torch.equal(checkpoint.read("a"), MATRIX)


def test_the_digest_tells_checkpoints_of_equal_shape_apart(tmp_path: Path) -> None:
    before = Checkpoint(sharded(tmp_path)).digest()
    assert Checkpoint(tmp_path).digest() == before
    save_file({"a": MATRIX + 1}, tmp_path / "one.safetensors")
    assert Checkpoint(tmp_path).digest() != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
    ],
    ids=["cut at the end", "cut in the length", "empty", "huge header", "broken header"],
)
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = sharded(tmp_path) / "two.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"two\.safetensors"):
        Checkpoint(tmp_path).shape("b")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "two.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"two\.safetensors: cannot be read"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/passwd", "one.bin", 3])
def test_an_index_may_only_name_safetensors_files_beside_it(tmp_path: Path, name: object) -> None:
    (sharded(tmp_path) / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConfigError, match="tensor a is said to be in"):
        Checkpoint(tmp_path)


def test_an_index_that_promises_a_tensor_its_file_lacks_is_refused(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).write_text(json.dumps({"weight_map": {"b": "one.safetensors"}}))
    with pytest.raises(ConfigError, match=r"one\.safetensors: has no tensor b"):
        Checkpoint(tmp_path).shape("b")


def test_a_folder_with_other_weights_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ConfigError, match=r"has neither model\.safetensors nor"):
        Checkpoint(tmp_path)


def test_a_quantised_tensor_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"a": MATRIX.to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(ConfigError, match="tensor a is F8_E4M3"):
        Checkpoint(tmp_path).read("a")


def test_a_reader_checks_names_and_shapes_before_it_reads(tmp_path: Path) -> None:
    reader = WeightReader(Checkpoint(sharded(tmp_path)), device=CPU, dtype=torch.float32)
    with pytest.raises(ConfigError, match="tensor c is missing"):
        reader.want("c", 4, 6)
    with pytest.raises(ConfigError, match=r"tensor a has shape \[4, 6\], .* \[6, 4\]"):
        reader.want("a", 6, 4)
    wanted = reader.want("a", 4, 6, part=Part(columns=slice(0, 2)), dtype=torch.bfloat16)
    assert wanted.num_bytes == 4 * 2 * 2
    assert torch.equal(wanted.read(), MATRIX[:, :2].to(torch.bfloat16))


def test_gguf_values_and_parts_equal_the_packages(tmp_path: Path) -> None:
    path, wanted = small_gguf(tmp_path / "x.gguf")
    file, name = GgufFile(path), "model.layers.0.mlp.down_proj.weight"
    assert file.shape(name) == (8, 64)
    assert np.array_equal(file.read(name), wanted)
    assert np.array_equal(file.read(name, Part(rows=slice(2, 5))), wanted[2:5])
    for columns in (slice(32, 64), slice(5, 40), slice(40, 41)):
        assert np.array_equal(file.read(name, Part(columns=columns)), wanted[:, columns])


def test_gguf_queries_come_in_half_split_order(tmp_path: Path) -> None:
    path, _ = small_gguf(tmp_path / "x.gguf")
    rows = {entry.name: entry.data for entry in gguf.GGUFReader(path).tensors}
    stored = rows["blk.0.attn_q.weight"]
    got = GgufFile(path).read("model.layers.0.self_attn.q_proj.weight")
    assert np.array_equal(got, stored[[0, 2, 1, 3, 4, 6, 5, 7]])


def test_a_truncated_gguf_names_the_first_tensor_that_is_cut(tmp_path: Path) -> None:
    path, _ = small_gguf(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"x\.gguf: is truncated: tensor blk\.0\.ffn_down"):
        GgufFile(path)


@pytest.mark.parametrize("kept", [0, 3, 20, 60, 150, 200])
def test_a_gguf_header_cut_anywhere_is_refused(tmp_path: Path, kept: int) -> None:
    path, _ = small_gguf(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"x\.gguf"):
        GgufFile(path)


@pytest.mark.parametrize("at", range(8, 300, 7))
def test_a_gguf_with_a_wrong_byte_is_read_or_refused_but_never_crashes(
    tmp_path: Path, at: int
) -> None:
    path, _ = small_gguf(tmp_path / "x.gguf")
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    try:
        GgufFile(path)
    except ConfigError as error:
        assert "x.gguf" in str(error)  # noqa: PT017  either outcome is right


def test_loading_reports_bytes_up_to_the_total(tiny_checkpoint: Callable[[str], Path]) -> None:
    seen: list[tuple[int, int]] = []
    loaded = load(
        tiny_checkpoint("llama"),
        device=CPU,
        dtype="float32",
        numerics="fast",
        group=ExpertGroup.single(CPU),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]
    assert set(loaded.fingerprint) == {
        "protocol",
        "config",
        "weights",
        "tokenizer",
        "layout",
        "dtype",
    }


def test_a_rank_reads_its_own_experts_only(tiny_checkpoint: Callable[[str], Path]) -> None:
    def total_for(world_size: int) -> int:
        totals: list[int] = []
        load(
            tiny_checkpoint("mixtral"),
            device=CPU,
            dtype="float32",
            numerics="fast",
            group=ExpertGroup(seat=1, num_seats=world_size, device=CPU),
            progress=lambda _, total: totals.append(total),
        )
        return totals[-1]

    expert_bytes = 3 * 64 * 64 * 4
    layers, fewer = 3, 6 // 2 - 6 // 3
    assert total_for(2) - total_for(3) == layers * fewer * expert_bytes


def test_a_checkpoint_without_a_needed_tensor_fails_before_anything_is_read(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    for file in tiny_checkpoint("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((tmp_path / INDEX).read_text())
    name = "model.layers.2.mlp.down_proj.weight"
    del index["weight_map"][name]
    (tmp_path / INDEX).write_text(json.dumps(index))
    read: list[int] = []
    with pytest.raises(ConfigError, match=f"tensor {name} is missing"):
        load(
            tmp_path,
            device=CPU,
            dtype="float32",
            numerics="fast",
            group=ExpertGroup.single(CPU),
            progress=lambda done, _: read.append(done),
        )
    assert not read


def test_dense_and_split_workers_of_one_checkpoint_have_one_fingerprint(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    """A prefill worker may run densely what decode ranks serve as experts."""
    dense, split = (
        load(
            tiny_checkpoint("llama"),
            device=CPU,
            dtype="float32",
            numerics="fast",
            group=ExpertGroup.single(CPU),
            split_dense_experts=count,
        ).fingerprint
        for count in (0, 8)
    )
    assert dense == split


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere", "there is no such"), ("model.bin", "must be a folder")]
)
def test_a_path_that_is_no_model_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=words):
        read_config(tmp_path / name)


def test_a_chosen_dtype_is_kept_and_a_gpu_gets_bfloat16() -> None:
    assert resolve_dtype("float32", torch.device("cuda")) == "float32"
    assert resolve_dtype("auto", torch.device("cuda")) == "bfloat16"
    assert resolve_dtype("auto", CPU) in ("float32", "bfloat16")
