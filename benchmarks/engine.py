"""Tokens per second of one rank's engine against transformers, on the same weights and cores.

    python -m benchmarks.engine [--json] [--quick] [--model smollm2|dsv3] [--peer URL]

Decode figures are of the decode phase alone: every sequence has a prompt of 128 tokens in its
cache. The two sides take turns within a round, and ratios are medians over rounds, so load from
elsewhere falls on both. The roofline is the time to read the weights that a step uses, and the KV
cache, at the copy bandwidth measured here. ``--peer`` measures any OpenAI server beside them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.engine_peer import measure_peer
from benchmarks.engine_subjects import Engine, Reference, Subject, deepseek_checkpoint
from benchmarks.report import Bar, Figure, print_report
from deploy.demo import demo_weights
from engine.layers.linear import Numerics
from engine.loading import DTYPES, DtypeChoice
from server.text.loading import load_model_text

PROMPT_TOKENS = 128
BATCHES = (1, 8, 32)
PROMPTS = (1024, 4096)
AGREEMENT_TOKENS = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    path: Callable[[], Path]
    decode_bars: tuple[float, float, float]  # times transformers, for each of BATCHES
    prefill_bar: float = 1.2


MODELS = {
    "smollm2": Model(path=demo_weights, decode_bars=(2.0, 3.0, 4.0)),
    "dsv3": Model(path=deepseek_checkpoint, decode_bars=(2.0, 3.0, 5.0)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    rounds: int
    decode_steps: int
    prefill_rounds: int
    prompts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    figures: dict[str, Figure]
    bars: list[Bar]


FULL = Effort(rounds=7, decode_steps=6, prefill_rounds=3, prompts=PROMPTS)
QUICK = Effort(rounds=3, decode_steps=3, prefill_rounds=1, prompts=PROMPTS[:1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    parser.add_argument("--quick", action="store_true", help="smollm2 alone, within a minute")
    parser.add_argument("--model", choices=MODELS, help="one model (default: both)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--numerics", choices=("exact", "fast"), default="exact")
    parser.add_argument("--threads", type=int, help="of both sides (default: torch's, all cores)")
    parser.add_argument("--peer", metavar="URL", help="an OpenAI server to measure as well")
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    effort = QUICK if chosen.quick else FULL
    names = [chosen.model] if chosen.model else ["smollm2"] if chosen.quick else list(MODELS)
    report = Report(
        figures={
            "threads": torch.get_num_threads(),
            "dtype": chosen.dtype,
            "numerics": chosen.numerics,
            "copy_gb_per_s": copy_bandwidth() / 1e9,
        },
        bars=[],
    )
    for name in names:
        measure_model(name, effort, report, dtype=chosen.dtype, numerics=chosen.numerics)
    if chosen.peer:
        tokens = effort.decode_steps * effort.rounds
        found = measure_peer(chosen.peer, BATCHES, effort.prompts, PROMPT_TOKENS, tokens=tokens)
        report.figures.update(found)
    return print_report("engine", report.figures, report.bars, only_json=chosen.json)


def measure_model(
    name: str, effort: Effort, report: Report, *, dtype: DtypeChoice, numerics: Numerics
) -> None:
    model, path = MODELS[name], MODELS[name].path()
    figures, bars, bandwidth = report.figures, report.bars, copy_bandwidth()
    steps = effort.decode_steps * (effort.rounds + 1) + 1
    most = max(BATCHES[-1] * (PROMPT_TOKENS + steps + 16), PROMPTS[-1])
    engine = Engine(path, dtype, numerics, max_tokens=most)
    reference = Reference(path, DTYPES[dtype])
    for batch, bar in zip(BATCHES, model.decode_bars, strict=True):
        case = f"{name}_decode_b{batch}"
        ours, theirs = time_decode(engine, reference, batch, effort)
        ratio = keep(figures, case, batch, ours, theirs)
        num_bytes = weight_bytes(reference, batch)
        num_bytes += batch * (PROMPT_TOKENS + steps // 2) * engine.bytes_per_token
        figures[f"{case}_roofline"] = num_bytes / bandwidth / statistics.median(ours)
        bars.append(Bar(f"{case} over transformers", ratio, at_least=bar))
    for length in effort.prompts:
        case = f"{name}_prefill_{length}"
        ratio = keep(figures, case, length, *time_prefill(engine, reference, length, effort))
        bars.append(Bar(f"{case} over transformers", ratio, at_least=model.prefill_bar))
    if effort is FULL:
        bars.append(compare_tokens(name, path, engine, reference, figures))


def time_decode(
    engine: Subject, reference: Subject, batch: int, effort: Effort
) -> tuple[list[float], list[float]]:
    """Seconds per step of each side, one per round."""
    prompts = random_prompts(batch, PROMPT_TOKENS)
    engine.prefill(prompts)
    reference.prefill(prompts)

    def seconds(subject: Subject) -> float:
        started = time.perf_counter()
        subject.decode(effort.decode_steps)
        return (time.perf_counter() - started) / effort.decode_steps

    seconds(engine), seconds(reference)  # to warm up
    rounds = [(seconds(engine), seconds(reference)) for _ in range(effort.rounds)]
    return [ours for ours, _ in rounds], [theirs for _, theirs in rounds]


def time_prefill(
    engine: Subject, reference: Subject, length: int, effort: Effort
) -> tuple[list[float], list[float]]:
    """Seconds per prompt of each side, one per round."""
    prompts = random_prompts(1, length)

    def seconds(subject: Subject) -> float:
        started = time.perf_counter()
        subject.prefill(prompts)
        return time.perf_counter() - started

    seconds(engine)  # to warm up: what is worked out once for a shape, and memory
    rounds = [(seconds(engine), seconds(reference)) for _ in range(effort.prefill_rounds)]
    return [ours for ours, _ in rounds], [theirs for _, theirs in rounds]


def keep(
    figures: dict[str, Figure], case: str, tokens: int, ours: list[float], theirs: list[float]
) -> float:
    """Note the case's figures; how many times faster the engine is than the reference."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    figures[f"{case}_tokens_per_s"] = tokens / statistics.median(ours)
    figures[f"{case}_transformers_tokens_per_s"] = tokens / statistics.median(theirs)
    figures[f"{case}_ratio"] = ratio
    print(f"{case}: {tokens / statistics.median(ours):.1f} tokens/s, {ratio:.2f}x", file=sys.stderr)
    return ratio


def compare_tokens(
    name: str, path: Path, engine: Engine, reference: Reference, figures: dict[str, Figure]
) -> Bar:
    """Does the dtype keep the greedy tokens as well as transformers does in the same dtype?

    Each side is fed what transformers in float32 writes, and asked for its own next token at every
    place; counted is how often that is the float32 one.
    """
    oracle = Reference(path, torch.float32)
    prompt = random_prompts(1, 16)[0] if name == "dsv3" else natural_prompt(path)
    written = [*oracle.prefill([prompt]), *(step[0] for step in oracle.decode(AGREEMENT_TOKENS))]
    tokens = [*prompt, *written]
    expected = oracle.argmax_everywhere(tokens)
    ours = (engine.argmax_everywhere(tokens) == expected).float().mean().item()
    theirs = (reference.argmax_everywhere(tokens) == expected).float().mean().item()
    figures[f"{name}_tokens_as_in_float32"] = ours
    figures[f"{name}_transformers_tokens_as_in_float32"] = theirs
    # Some hundred places: a few ties that fall the other way are noise.
    return Bar(f"{name} tokens as in float32, over transformers", ours / theirs, at_least=0.95)


def natural_prompt(path: Path) -> list[int]:
    question = {
        "role": "user",
        "content": "How does a hydropower plant work? Explain step by step.",
    }
    return load_model_text(path).chat_prompt([question]).token_ids


def weight_bytes(reference: Reference, batch: int) -> float:
    """What a decode step of ``batch`` tokens reads: of the experts those expected to be chosen."""
    config = reference.config
    active = 1.0
    if hasattr(config, "n_routed_experts"):
        active -= (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    total = 0.0
    for parameter_name, parameter in reference.parameters():
        if "embed_tokens" in parameter_name and not config.tie_word_embeddings:
            continue
        total += parameter.nbytes * (active if ".experts." in parameter_name else 1.0)
    return total


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy much larger than the caches."""
    source = torch.ones(256 * 2**20, dtype=torch.uint8)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(7):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def random_prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count * length)
    prompts: list[list[int]] = torch.randint(
        10, 40_000, (count, length), generator=generator
    ).tolist()
    return prompts


if __name__ == "__main__":
    raise SystemExit(main())
