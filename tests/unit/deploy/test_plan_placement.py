"""``headrace plan --placement``: what the models weigh, and that the documents say the same."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from capacity.expert_placement import placement_row
from capacity.model_shapes import MODELS
from deploy.cli import main

ROOT = Path(__file__).parents[3]
BY_NAME = {model.name: model for model in MODELS}


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["plan", "--placement", *options]) == 0
    return capsys.readouterr().out.strip()


# Published: 671 billion without the multi-token prediction layer (arXiv 2412.19437), "1 trillion",
# 116.8 (arXiv 2508.10925, table 1), and 675 with a vision encoder of 2.5.
@pytest.mark.parametrize(
    ("model", "billions"),
    [("DeepSeek-R1", 671), ("Kimi K2", 1026), ("gpt-oss-120b", 116.8), ("Mistral Large 3", 673)],
)
def test_models_weigh_what_is_published(model: str, billions: float) -> None:
    assert BY_NAME[model].weights / 1e9 == pytest.approx(billions, rel=0.002)


def test_gpt_oss_takes_the_bytes_of_its_checkpoint() -> None:
    """60.8 GiB (arXiv 2508.10925, table 1)."""
    model = BY_NAME["gpt-oss-120b"]
    whole = model.replicated_bytes + model.experts * model.expert_layers * model.expert_bytes
    assert whole / 2**30 == pytest.approx(60.8, rel=0.005)


def test_one_rank_holds_the_whole_model() -> None:
    for model in MODELS:
        row = placement_row(model, 1, redundant=0, memory_bytes=2e12, reserved=0.0)
        uniform = replace(model, format="bf16", expert_format="bf16")
        assert row.slots_per_rank == model.experts
        assert row.empty == row.replicas == 0
        whole = placement_row(uniform, 1, redundant=0, memory_bytes=4e12, reserved=0.0)
        assert whole.weight_bytes == 2 * model.weights


def test_bytes_and_room_add_up_to_the_memory() -> None:
    row = placement_row(BY_NAME["Kimi K2"], 72, redundant=32, memory_bytes=100e9, reserved=0.1)
    assert (row.slots_per_rank, row.replicas, row.empty) == (6, 32, 16)
    assert row.weight_bytes + row.kv_bytes == pytest.approx(90e9, abs=2)
    assert row.kv_tokens == row.kv_bytes // (61 * 576 * 2)


def test_what_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--only", "kimi k2", "--on", "4", "--gpu-memory", "141")
    assert "does not fit" in text
    (row,) = json.loads(
        printed(capsys, "--only", "Kimi K2", "--on", "4", "--gpu-memory", "141", "--json")
    )
    assert row["kv_bytes"] < 0
    assert row["kv_tokens"] == 0


def test_the_tables_in_the_documents_are_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert printed(capsys) in (ROOT / "docs" / "wide-ep.md").read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--only", "GPT-5"), "known are DeepSeek-R1"),
        (("--on", "8,x"), "write numbers with commas"),
        (("--on", "0"), "ranks must be at least 1"),
        (("--redundant", "-1"), "redundant at least 0"),
        (("--gpu-memory", "0"), "memory must be above 0"),
        (("--reserved", "1"), "below 1"),
    ],
)
def test_an_option_without_meaning_is_refused(
    options: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--placement", *options]) != 0
    assert reason in capsys.readouterr().err
