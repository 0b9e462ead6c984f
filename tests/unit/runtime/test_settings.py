"""What a launcher leaves in the environment of its children."""

import pytest

from runtime.settings import child_environment


def test_a_child_keeps_its_memory_in_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    found = child_environment(report_fd=3, parent_fd=4)
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_what_the_operator_tunes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    found = child_environment(report_fd=3, parent_fd=4)
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2"
    assert found["TORCH_CPP_LOG_LEVEL"] == "INFO"
