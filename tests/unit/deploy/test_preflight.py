import json
import socket
import struct
from pathlib import Path

import pytest

from deploy.demo import demo_weights
from deploy.preflight import HeldPorts, check_model
from protocol.errors import ConfigError


def a_checkpoint(folder: Path) -> Path:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_whole_checkpoint_passes(tmp_path: Path) -> None:
    check_model(str(a_checkpoint(tmp_path)))


def test_the_demo_passes() -> None:
    check_model(str(demo_weights()))


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    (a_checkpoint(tmp_path) / missing).unlink()
    with pytest.raises(ConfigError, match=missing.removeprefix("model")):
        check_model(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (a_checkpoint(tmp_path) / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"model-1\.safetensors: the checkpoint is incomplete"):
        check_model(str(tmp_path))


def test_a_download_that_stopped_is_told_in_bytes(tmp_path: Path) -> None:
    file = a_checkpoint(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(ConfigError, match=f"{len(whole) - 3} bytes instead of {len(whole)}"):
        check_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 64),
        ("model.safetensors", struct.pack("<Q", 2) + b"[]"),
        ("config.json", b"{"),
        ("model.safetensors.index.json", b"[]"),
    ],
    ids=["empty", "huge header", "header is a list", "broken json", "index is a list"],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (a_checkpoint(tmp_path) / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name} is damaged"):
        check_model(str(tmp_path))


def test_a_gguf_that_was_cut_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with demo_weights().open("rb") as whole:
        file.write_bytes(whole.read(3_000_000))
    with pytest.raises(ConfigError, match="is truncated"):
        check_model(str(file))


def test_another_file_is_not_taken_for_a_gguf(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK" * 20)
    with pytest.raises(ConfigError, match="is not a GGUF file"):
        check_model(str(file))


def test_a_path_that_does_not_exist_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match="no model at /nowhere: give a checkpoint directory"):
        check_model("/nowhere")


def test_a_port_where_somebody_listens_is_refused() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        HeldPorts() as ports,
        pytest.raises(ConfigError, match="choose another with --port"),
    ):
        ports.take(port=other.getsockname()[1])


def test_a_held_port_is_for_who_knows_it() -> None:
    with HeldPorts() as ports:
        held = {ports.take() for _ in range(50)}
        assert len(held) == 50
        others = [socket.create_server(("127.0.0.1", 0)) for _ in range(200)]
        assert held.isdisjoint(other.getsockname()[1] for other in others)
        for port in held:  # create_server sets SO_REUSEADDR
            others.append(socket.create_server(("127.0.0.1", port)))
        for other in others:
            other.close()


def test_an_address_of_another_machine_is_refused() -> None:
    with HeldPorts() as ports, pytest.raises(ConfigError, match="cannot listen on"):
        ports.take("203.0.113.7", 8000)
