"""Prefill worker and decode rank together, against generation by transformers."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.backends import alone
from engine.collectives import ExpertGroup, StepGroup
from protocol.messages import Prefill, RequestFailed
from tests.cluster.pair import BLOCK_TOKENS, PEER, WAIT_S, running_pair

NEW_TOKENS = 24
Checkpoints = Callable[[str], Path]


def prompts(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]


def reference(folder: Path, prompt: list[int], max_tokens: int) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_greedy_tokens_are_those_of_the_reference(
    tiny_checkpoint: Checkpoints, kind: str, transport: str
) -> None:
    folder = tiny_checkpoint(kind)
    with running_pair(folder, transport=transport) as pair:
        asked = prompts(pair.model.config.vocab_size, [5, 16, 33, 150])
        refs = [pair.start(pair.a_request(prompt, NEW_TOKENS)) for prompt in asked]
        got = pair.finish(*refs)
        assert got == [reference(folder, prompt, NEW_TOKENS) for prompt in asked]
        pair.assert_nothing_is_held()


def test_kv_that_goes_through_host_copies_on_both_sides_gives_the_same_tokens(
    tiny_checkpoint: Checkpoints,
) -> None:
    folder = tiny_checkpoint("deepseek_v3")
    with running_pair(folder, mirrored=True) as pair:
        (prompt,) = prompts(pair.model.config.vocab_size, [150])
        (got,) = pair.finish(pair.start(pair.a_request(prompt, NEW_TOKENS)))
        assert got == reference(folder, prompt, NEW_TOKENS)


def test_dense_layers_split_into_experts_give_the_same_tokens(tiny_checkpoint: Checkpoints) -> None:
    folder = tiny_checkpoint("llama")
    with running_pair(folder, split_dense_experts=4) as pair:
        (prompt,) = prompts(pair.model.config.vocab_size, [40])
        (got,) = pair.finish(pair.start(pair.a_request(prompt, NEW_TOKENS)))
        assert got == reference(folder, prompt, NEW_TOKENS)


def test_a_second_prompt_with_the_same_beginning_computes_only_the_rest(
    tiny_checkpoint: Checkpoints,
) -> None:
    folder = tiny_checkpoint("llama")
    with running_pair(folder) as pair:
        (prompt,) = prompts(pair.model.config.vocab_size, [70])
        first = pair.start(pair.a_request(prompt, NEW_TOKENS))
        expected = pair.finish(first)
        again = pair.start(pair.a_request(prompt, NEW_TOKENS))
        assert pair.finish(again) == expected
        assert pair.gateway.cached[first] == 0
        assert pair.gateway.cached[again] == 70 // BLOCK_TOKENS * BLOCK_TOKENS


def test_requests_that_outgrow_the_blocks_are_preempted_and_still_right(
    tiny_checkpoint: Checkpoints,
) -> None:
    folder = tiny_checkpoint("llama")
    with running_pair(folder, decode_blocks=9) as pair:
        asked = prompts(pair.model.config.vocab_size, [20, 24, 28])
        refs = [pair.start(pair.a_request(prompt, 60)) for prompt in asked]
        got = pair.finish(*refs)
        assert got == [reference(folder, prompt, 60) for prompt in asked]
        pair.assert_nothing_is_held()


def test_a_request_of_one_token_ends_at_prefill_and_frees_its_grant(
    tiny_checkpoint: Checkpoints,
) -> None:
    with running_pair(tiny_checkpoint("llama")) as pair:
        (prompt,) = prompts(pair.model.config.vocab_size, [20])
        ref = pair.start(pair.a_request(prompt, 1))
        assert len(pair.finish(ref)[0]) == 1
        assert pair.gateway.finished[ref] == "length"
        pair.assert_nothing_is_held()


class Regrouping:
    """The meetings of a rank alone, which are when the test wants one."""

    def __init__(self) -> None:
        self._group = ExpertGroup.single(torch.device("cpu"))
        self._epoch = 0
        self._missed: int | None = None

    def again(self, *, missed: int) -> None:
        """``missed``: how many groups there have been meanwhile without this rank."""
        self._missed = missed

    @property
    def newcomers(self) -> bool:
        return self._missed is not None

    def form(
        self, given_up: Callable[[], bool], leaving: Collection[int], *, briefly: bool
    ) -> StepGroup:
        missed, self._missed = self._missed or 0, None
        self._epoch += 1 + missed
        return StepGroup(self._group, epoch=self._epoch, members=(0,), connection=alone())

    def close(self) -> None:
        pass


@pytest.mark.parametrize("missed", [0, 1])
def test_requests_go_on_in_the_next_group_unless_there_was_one_without_this_rank(
    tiny_checkpoint: Checkpoints, missed: int
) -> None:
    meeting = Regrouping()
    with running_pair(tiny_checkpoint("llama"), meeting=meeting) as pair:
        (prompt,) = prompts(pair.model.config.vocab_size, [20])
        ref = pair.start(pair.a_request(prompt, 400))
        waiting = pair.a_request(prompt, 4)
        pair.reserve(waiting)
        pair.gateway.wait_for(lambda gateway: len(gateway.tokens[ref]) > 2)
        meeting.again(missed=missed)
        if missed:
            pair.gateway.wait_for(lambda gateway: len(gateway.failed) == 2)
            assert pair.gateway.failed == {ref: "worker_lost", waiting.ref: "worker_lost"}
            assert ref not in pair.gateway.finished
        else:
            pair.finish(ref)
            assert not pair.gateway.failed
            pair.cancel(waiting.ref)
        pair.assert_nothing_is_held()


def test_a_cancel_at_any_moment_frees_everything(tiny_checkpoint: Checkpoints) -> None:
    with running_pair(tiny_checkpoint("llama")) as pair:
        (prompt,) = prompts(pair.model.config.vocab_size, [300])
        granted_only = pair.reserve(pair.a_request(prompt, 50)).ref
        pair.cancel(granted_only)
        in_prefill = pair.start(pair.a_request(prompt, 50))
        pair.cancel(in_prefill)
        decoding = pair.start(pair.a_request(prompt, 200))
        pair.gateway.wait_for(lambda g: len(g.tokens[decoding]) > 3)
        pair.cancel(decoding)
        pair.assert_nothing_is_held()


def test_who_leaves_a_full_queue_for_another_caller_is_told_and_holds_nothing(
    tiny_checkpoint: Checkpoints,
) -> None:
    with running_pair(tiny_checkpoint("llama"), max_queued_requests=2) as pair:
        (prompt,) = prompts(pair.model.config.vocab_size, [40])
        flood = [pair.a_request(prompt, 2, caller="flood") for _ in range(8)]
        quiet = pair.a_request(prompt, 2, caller="quiet")
        grants = [pair.reserve(request) for request in (*flood, quiet)]
        for request, grant in zip((*flood, quiet), grants, strict=True):
            pair.prefill.post(PEER, Prefill(request=request, grant=grant, remaining_s=WAIT_S))
        pair.finish(quiet.ref)
        pair.gateway.wait_for(lambda g: len(g.failed) + len(g.finished) == len(grants))
        told = {
            message.ref
            for message in pair.gateway.messages
            if isinstance(message, RequestFailed) and message.error.code == "overloaded"
        }
        assert told == set(pair.gateway.failed)
        for ref in pair.gateway.failed:
            pair.cancel(ref)
        pair.assert_nothing_is_held()


def test_a_prompt_that_the_engine_must_not_see_is_refused_and_nothing_is_held(
    tiny_checkpoint: Checkpoints,
) -> None:
    with running_pair(tiny_checkpoint("llama")) as pair:
        ref = pair.start(pair.a_request([1, 10**6], 4))
        pair.gateway.wait_for(lambda g: ref in g.failed)
        assert pair.gateway.failed[ref] == "invalid_value"
        pair.cancel(ref)
        pair.assert_nothing_is_held()
