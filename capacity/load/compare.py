"""Two runs against each other, with intervals instead of impressions.

For each measure the ratio B / A and its 95 % interval by the bootstrap: requests (for throughput,
seconds) are drawn again with replacement. An interval that comes within one percent of 1 shows no
difference. It tells what chance did within the two runs, not what changed on the machines between
them.
Source: B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from capacity.load.errors import WrongOption
from capacity.load.figures import NEEDED, in_window
from capacity.load.page import render
from capacity.load.records import Record
from capacity.load.report import cdf
from capacity.load.stage import StageResult
from capacity.load.summary import Summary, read_summary
from capacity.load.table import aligned, milliseconds

SECOND = 1_000_000_000
REQUESTS_FILE = "requests.jsonl"
HTML_FILE = "compare.html"
_RESAMPLES = 1000
_MOST_DRAWN = 1 << 21  # values held at a time
_INTERVAL = (2.5, 97.5)
_NEGLIGIBLE = 0.01
_IGNORED = {"url", "out", "slo", "api-key-file"}
Sample = npt.NDArray[np.float64]
_LATENCIES: dict[str, Callable[[Record], float | None]] = {
    "TTFT": lambda record: record.ttft_ns,
    "TPOT": lambda record: record.tpot_ns,
    "E2E": lambda record: record.end_to_end_ns,
}


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """A run read back: ``stages`` with the successful requests of their windows."""

    folder: str
    summary: Summary
    stages: list[tuple[StageResult, list[Record]]]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """``better`` is None when the interval of the ratio comes within one percent of 1."""

    stage: str
    measure: str
    unit: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    better: bool | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    a: str
    b: str
    differences: list[Difference]
    warnings: list[str]


def load_run(folder: Path) -> Loaded:
    """
    Raises:
        WrongOption: it is no folder that a load test has written.
    """
    summary = read_summary(folder)
    decode = msgspec.json.Decoder(Record).decode
    try:
        with (folder / REQUESTS_FILE).open("rb") as lines:
            records = [decode(line) for line in lines]
    except OSError as error:
        raise WrongOption(f"{folder / REQUESTS_FILE}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise WrongOption(f"{folder / REQUESTS_FILE}: {error}") from None
    stages = []
    for stage in summary.stages:
        own = [record for record in records if record.stage == stage.number]
        within = in_window(own, stage.window_begin_ns, stage.window_end_ns)
        stages.append((stage, [record for record in within if record.succeeded]))
    return Loaded(folder=str(folder), summary=summary, stages=stages)


def compare(a: Loaded, b: Loaded, *, seed: int = 0) -> Comparison:
    """Stage by stage, by their labels; two runs of one stage each are compared whatever they say.

    Raises:
        WrongOption: they have no stage in common.
    """
    pairs = _pairs(a, b)
    if not pairs:
        raise WrongOption(f"{a.folder} and {b.folder} have no stage of the same load")
    source = np.random.default_rng(seed)
    differences: list[Difference] = []
    for (stage_a, done_a), (stage_b, done_b) in pairs:
        same = stage_a.label == stage_b.label
        label = stage_a.label if same else f"{stage_a.label} / {stage_b.label}"
        rates = _per_second(stage_a, done_a), _per_second(stage_b, done_b)
        if min(map(len, rates)) > 1:
            differences.append(
                _difference(
                    stage=label,
                    measure="output",
                    unit="tokens/s",
                    samples=rates,
                    statistic=np.mean,
                    source=source,
                    more=True,
                )
            )
        for name, of in _LATENCIES.items():
            samples = _sample(done_a, of), _sample(done_b, of)
            for quantile, needed in NEEDED.items():
                if min(map(len, samples)) >= needed:
                    differences.append(
                        _difference(
                            stage=label,
                            measure=f"{name} {quantile}",
                            unit="ms",
                            samples=samples,
                            statistic=_percentile(float(quantile[1:])),
                            source=source,
                            more=False,
                        )
                    )
    return Comparison(a=a.folder, b=b.folder, differences=differences, warnings=_warnings(a, b))


def lines_of(comparison: Comparison) -> list[str]:
    head = ("stage", "measure", "A", "B", "B / A", "95 % interval", "")
    rows = [
        (
            found.stage,
            found.measure,
            f"{milliseconds(found.a)} {found.unit}",
            f"{milliseconds(found.b)} {found.unit}",
            f"{found.ratio:.3f}",
            f"{found.low:.3f} to {found.high:.3f}",
            _word(found),
        )
        for found in comparison.differences
    ]
    told = [f"A: {comparison.a}", f"B: {comparison.b}", "", *aligned([head, *rows])]
    return [*told, *(f"note: {warning}" for warning in comparison.warnings)]


def write_page(comparison: Comparison, a: Loaded, b: Loaded, folder: Path) -> None:
    """``compare.html`` in ``folder``."""
    stages: list[dict[str, Any]] = []
    for (stage_a, done_a), (_, done_b) in _pairs(a, b):
        own = [found for found in comparison.differences if found.stage.startswith(stage_a.label)]
        stages.append(
            {
                "label": own[0].stage if own else stage_a.label,
                "rows": [
                    {
                        "name": found.measure,
                        "low": found.low,
                        "middle": found.ratio,
                        "high": found.high,
                        "better": found.better,
                    }
                    for found in own
                ],
                "cdfs": {
                    name: [cdf(of(r) for r in done_a), cdf(of(r) for r in done_b)]
                    for name, of in _LATENCIES.items()
                },
            }
        )
    better = sum(found.better is True for found in comparison.differences)
    worse = sum(found.better is False for found in comparison.differences)
    page = render(
        title="Two load tests compared",
        subtitle=f"A: {comparison.a} · B: {comparison.b}",
        script="compare.js",
        data={
            "verdict": f"Of {len(comparison.differences)} measures B is better in {better} and "
            f"worse in {worse}",
            "worse": worse > better,
            "warnings": comparison.warnings,
            "stages": stages,
            "table": [
                [
                    found.stage,
                    found.measure,
                    f"{milliseconds(found.a)} {found.unit}",
                    f"{milliseconds(found.b)} {found.unit}",
                    f"{found.ratio:.3f}",
                    f"{found.low:.3f} to {found.high:.3f}",
                    _word(found),
                ]
                for found in comparison.differences
            ],
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HTML_FILE).write_text(page, encoding="utf-8")


def _pairs(
    a: Loaded, b: Loaded
) -> list[tuple[tuple[StageResult, list[Record]], tuple[StageResult, list[Record]]]]:
    if len(a.stages) == len(b.stages) == 1:
        return [(a.stages[0], b.stages[0])]
    by_label = {stage.label: (stage, done) for stage, done in b.stages}
    return [(of_a, by_label[of_a[0].label]) for of_a in a.stages if of_a[0].label in by_label]


def _difference(
    *,
    stage: str,
    measure: str,
    unit: str,
    samples: tuple[Sample, Sample],
    statistic: Callable[..., Any],
    source: np.random.Generator,
    more: bool,
) -> Difference:
    """``more``: whether more of it is better."""
    a, b = samples
    at_a, at_b = float(statistic(a)), float(statistic(b))
    below = _resampled(a, statistic, source)
    ratios = _resampled(b, statistic, source)[below > 0] / below[below > 0]
    if not ratios.size:
        ratios = np.ones(1)
    low, high = (float(value) for value in np.percentile(ratios, _INTERVAL))
    same = low <= 1 + _NEGLIGIBLE and high >= 1 - _NEGLIGIBLE
    better = None if same else (low > 1) == more
    return Difference(
        stage=stage,
        measure=measure,
        unit=unit,
        a=at_a,
        b=at_b,
        ratio=_ratio(at_b, at_a),
        low=low,
        high=high,
        better=better,
    )


def _resampled(
    sample: Sample, statistic: Callable[..., Any], source: np.random.Generator
) -> Sample:
    """The statistic of each resample, as many at a time as fit into some megabytes."""
    at_once = max(1, _MOST_DRAWN // sample.size)
    found: list[Sample] = []
    for first in range(0, _RESAMPLES, at_once):
        count = min(at_once, _RESAMPLES - first)
        drawn = sample[source.integers(0, sample.size, (count, sample.size))]
        found.append(np.asarray(statistic(drawn, axis=1), dtype=np.float64))
    return np.concatenate(found)


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else 1.0


def _percentile(quantile: float) -> Callable[..., Any]:
    return partial(np.percentile, q=quantile)


def _sample(records: Sequence[Record], of: Callable[[Record], float | None]) -> Sample:
    known = (of(record) for record in records)
    return np.fromiter((value for value in known if value is not None), dtype=np.float64) / 1e6


def _per_second(stage: StageResult, done: Sequence[Record]) -> Sample:
    """Output tokens that arrived in each whole second of the window."""
    seconds = (stage.window_end_ns - stage.window_begin_ns) // SECOND
    counts = np.zeros(int(seconds), dtype=np.float64)
    for record in done:
        for at in record.chunks_ns:
            second = (at - stage.window_begin_ns) // SECOND
            if 0 <= second < seconds:
                counts[second] += (record.output_tokens or 0) / len(record.chunks_ns)
    return counts


def _warnings(a: Loaded, b: Loaded) -> list[str]:
    warnings = []
    for name, run in (("A", a), ("B", b)):
        if not run.summary.verdict.valid:
            warnings.append(f"{name} is invalid: {'; '.join(run.summary.verdict.invalid)}")
        if run.summary.partial:
            warnings.append(f"{name} was stopped before its end")
    mine, other = a.summary.settings, b.summary.settings
    for key in sorted((mine.keys() | other.keys()) - _IGNORED):
        if mine.get(key) != other.get(key):
            warnings.append(f"{key} differs: {mine.get(key, 'none')} and {other.get(key, 'none')}")
    if a.summary.environment != b.summary.environment:
        warnings.append("the runs were made on different machines or versions")
    return warnings


def _word(found: Difference) -> str:
    return {None: "no difference shown", True: "better", False: "worse"}[found.better]
