"""A prefill worker of several ranks, through the whole system: tokens, and what a loss costs."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.local_system import LocalSystem
from deploy.demo import demo_weights
from deploy.link_status import LinkState, links_in
from tests.e2e.conftest import Start
from tests.e2e.test_faults import attempts_in_flight, eventually, ready
from tests.e2e.test_greedy_tokens import a_prompt, completion, greedy, token_ids

pytestmark = pytest.mark.timeout(300)
Checkpoints = Callable[[str], Path]
FLAGS = ("--dtype", "float32", "--kv-cache", "16MiB", "--set", "prefill.max_batch_tokens=64")
SHORT, LONG = 7, 150  # tokens; the long one takes three chunks
GONE = {httpx.codes.OK, httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE}


def expect_greedy_tokens(system: LocalSystem, kind: str, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    short, long = (a_prompt(n, model.config.vocab_size, seed=n) for n in (SHORT, LONG))
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda prompt: completion(system.url, kind, prompt), (short, long)))
    again = completion(system.url, kind, long)
    assert [token_ids(answer) for answer in answers] == [greedy(model, short), greedy(model, long)]
    assert token_ids(again) == greedy(model, long)
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 144}  # type: ignore[index]


@pytest.mark.parametrize(
    "case",
    [
        ("deepseek_v3", 4, 1, "tcp"),
        *(
            pytest.param((kind, prefill, decode, transport), marks=pytest.mark.slow)
            for kind in ("llama", "deepseek_v3", "qwen3_moe", "mixtral")
            for prefill in (1, 2, 4)
            for decode in (1, 2)
            for transport in ("shm", "tcp")
            if kind in ("llama", "deepseek_v3") or (decode, transport) == (2, "tcp")
        ),
    ],
    ids=lambda case: "{}, {} to {}, {}".format(*case),
)
def test_any_prefill_width_feeds_any_decode_width(
    start: Start,
    tiny_checkpoint: Checkpoints,
    case: tuple[str, int, int, str],
) -> None:
    kind, prefill_ranks, decode_ranks, transport = case
    folder = tiny_checkpoint(kind)
    widths = ("--prefill-ranks", str(prefill_ranks), "--decode-ranks", str(decode_ranks))
    system = start(folder, *FLAGS, "--name", kind, *widths, "--transport", transport)
    expect_greedy_tokens(system, kind, folder)


@pytest.mark.slow
def test_real_weights_on_three_prefill_ranks(start: Start) -> None:
    file = demo_weights()
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    system = start("smollm2", *FLAGS, "--prefill-ranks", "3", "--decode-ranks", "2")
    for length in (SHORT, LONG):
        prompt = a_prompt(length, model.config.vocab_size, seed=length)
        assert token_ids(completion(system.url, "smollm2", prompt)) == greedy(model, prompt)


@pytest.mark.parametrize(
    "case",
    [
        ("llama", 2, 2, "shm"),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
                ("deepseek_v3", 2, 2, "tcp"),
                ("deepseek_v3", 3, 3, "tcp"),
                ("deepseek_v3", 4, 2, "shm"),
                ("qwen3_moe", 4, 2, "tcp"),
                ("llama", 8, 2, "tcp"),
            )
        ),
    ],
    ids=lambda case: "{}, {} ranks in {} stages, {}".format(*case),
)
def test_stages_feed_two_decode_ranks(
    start: Start, tiny_checkpoint: Checkpoints, case: tuple[str, int, int, str]
) -> None:
    kind, ranks, stages, transport = case
    folder = tiny_checkpoint(kind)
    widths = ("--prefill-ranks", str(ranks), "--prefill-stages", str(stages))
    system = start(
        folder, *FLAGS, *widths, "--decode-ranks", "2", "--name", kind, "--transport", transport
    )
    expect_greedy_tokens(system, kind, folder)
    eventually(lambda: busy_blocks(system) == 0, "all blocks are back")


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)], ids="{} stages".format)
def pair(start: Start, tiny_checkpoint: Checkpoints, request: pytest.FixtureRequest) -> LocalSystem:
    """Two prefill ranks, two decode ranks; a rank that is frozen counts as lost after 2 s."""
    return start(
        tiny_checkpoint("llama"),
        *FLAGS,
        *("--name", "llama", "--prefill-ranks", "2", "--decode-ranks", "2"),
        *("--prefill-stages", str(request.param)),
        *("--set", "prefill.group.step_timeout_s=2"),
    )


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: Checkpoints) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"), dtype=torch.float32)


def prefill_rank(system: LocalSystem, rank: int) -> psutil.Process:
    """The living process of that rank."""
    found: list[psutil.Process] = []

    def look() -> bool:
        found[:] = [
            process
            for process in system.processes("prefill")
            if any(f"prefill.group.rank={rank}" in part for part in _arguments(process))
        ]
        return len(found) == 1

    eventually(look, f"prefill rank {rank} lives")
    return found[0]


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def busy_blocks(system: LocalSystem) -> float:
    """Of all workers, held by requests."""
    lines = httpx.get(f"{system.url}/metrics", timeout=5).text.splitlines()
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith("headrace_worker_blocks{")
        and any(f'state="{state}"' in line for state in ("active", "granted", "quarantined"))
    )


def expect_recovery(system: LocalSystem, model: PreTrainedModel, seed: int) -> None:
    """New requests get the right tokens, from blocks that all came back."""
    eventually(lambda: ready(system), "ready again")
    prompt = a_prompt(LONG, model.config.vocab_size, seed=seed)

    def served() -> bool:
        body = {"model": "llama", "prompt": prompt, "max_tokens": 20, "temperature": 0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        answer = httpx.post(f"{system.url}/v1/completions", json=body, timeout=60)
        return answer.is_success and token_ids(answer.json()) == greedy(model, prompt)

    eventually(served, "serving again")
    eventually(lambda: busy_blocks(system) == 0, "all blocks are back")


def test_two_prefill_ranks_feed_two_decode_ranks(
    pair: LocalSystem, tiny_checkpoint: Checkpoints
) -> None:
    expect_greedy_tokens(pair, "llama", tiny_checkpoint("llama"))
    eventually(lambda: busy_blocks(pair) == 0, "all blocks are back")


def test_every_prefill_ranks_links_are_shown(
    pair: LocalSystem, tiny_checkpoint: Checkpoints
) -> None:
    def links() -> dict[str, LinkState]:
        return links_in(httpx.get(f"{pair.url}/metrics", timeout=10).text)

    expect_greedy_tokens(pair, "llama", tiny_checkpoint("llama"))
    eventually(
        lambda: {"prefill-0", "prefill-0/1"} == {pair_of.split(" > ")[0] for pair_of in links()},
        "both ranks' links",
    )
    eventually(
        lambda: all(link.transport and link.bytes for link in links().values()), "their figures"
    )


def test_a_prompts_own_probabilities_are_those_of_the_reference(
    pair: LocalSystem, llama: PreTrainedModel
) -> None:
    prompt = a_prompt(100, llama.config.vocab_size, seed=11)
    answer = completion(pair.url, "llama", prompt, max_tokens=1, prompt_logprobs=0)
    told = answer["choices"][0]["prompt_logprobs"]  # type: ignore[index]
    with torch.inference_mode():
        wanted = llama(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for position in range(1, len(prompt)):
        got = told[position][str(prompt[position])]["logprob"]
        assert got == pytest.approx(wanted[position - 1, prompt[position]].item(), abs=1e-3)


def test_a_client_that_hangs_up_frees_the_blocks_of_every_rank_and_warns_nobody(
    pair: LocalSystem, llama: PreTrainedModel
) -> None:
    for seed in range(8):
        body = {"model": "llama", "prompt": a_prompt(400, llama.config.vocab_size, seed=seed)}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{pair.url}/v1/completions", json=body, timeout=0.004 * (seed + 1))
    eventually(lambda: busy_blocks(pair) == 0, "all blocks are back")
    expect_recovery(pair, llama, seed=21)
    assert "a share of a push failed" not in pair.output()


@pytest.mark.parametrize("rank", [1, 0], ids=["follower", "leader"])
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_prefill_rank_lost_in_the_middle_of_a_prompt_costs_only_time(
    pair: LocalSystem, llama: PreTrainedModel, rank: int, how: str
) -> None:
    partings = pair.output().count("have parted")
    victim = prefill_rank(pair, rank)
    other = prefill_rank(pair, 1 - rank)
    victim.send_signal(signal.SIGSTOP)  # what is asked now is under way when it dies
    body = {"model": "llama", "prompt": a_prompt(400, llama.config.vocab_size, seed=31 + rank)}
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{pair.url}/v1/completions", json=body, timeout=120))

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: attempts_in_flight(pair) > 0, "the prompt is with the workers")
    if how == "killed":
        victim.send_signal(signal.SIGKILL)
    else:
        eventually(
            lambda: pair.output().count("have parted") > partings, "the other rank gives it up"
        )
        victim.send_signal(signal.SIGCONT)
    asking.join(120)
    assert answers[0].status_code in GONE
    expect_recovery(pair, llama, seed=40 + rank)
    assert other.is_running(), "the other rank has met its successor"


@pytest.mark.slow
def test_a_drained_worker_comes_back_with_all_its_ranks(
    pair: LocalSystem, llama: PreTrainedModel
) -> None:
    before = {prefill_rank(pair, rank).pid for rank in (0, 1)}
    prefill_rank(pair, 1).send_signal(signal.SIGTERM)  # told to one, meant for the worker
    eventually(
        lambda: not before & {process.pid for process in pair.processes("prefill")}, "both ended"
    )
    expect_recovery(pair, llama, seed=51)


@pytest.mark.slow
def test_heads_that_do_not_divide_are_refused_at_once_with_the_rule_and_the_fix() -> None:
    command = [sys.executable, "-m", "deploy.cli", "up", "smollm2", "--port", "0"]
    ended = subprocess.run(
        [*command, "--prefill-ranks", "2"], check=False, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert "prefill.group.ranks is 2: the model's 9 attention heads cannot be split" in ended.stderr
    assert "use a number of ranks that divides them" in ended.stderr
