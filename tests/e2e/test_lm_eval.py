"""lm-evaluation-harness scores and generates through ``/v1/completions``, as its users do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.local_system import LocalSystem
from deploy.demo import demo_weights
from tests.e2e.conftest import Start
from tests.e2e.test_faults import FLAGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
QUESTIONS = [
    {"question": "The capital of France is", "answers": ["Paris", "purple"], "right": 0},
    {"question": "Two plus two is", "answers": ["a river", "four"], "right": 1},
    {"question": "Snow is", "answers": ["white", "a kind of music"], "right": 0},
    {"question": "Dogs and cats are", "answers": ["numbers", "animals"], "right": 1},
]
RUN_S = 300.0
TASKS = {
    "headrace_choice": """
task: headrace_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc}}]
""",
    "headrace_generate": """
task: headrace_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answers[right]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, temperature: 0}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture
def system(start: Start) -> LocalSystem:
    return start("smollm2", *FLAGS)


def test_multiple_choice_and_generation_run_and_make_sense(
    system: LocalSystem, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(task.format(data=data))
    model = {
        "model": "smollm2",
        "base_url": f"{system.url}/v1/completions",
        "tokenizer": saved_tokenizer(tmp_path),
        "num_concurrent": 2,
        "max_retries": 1,
    }
    arguments = {
        "--model": "local-completions",
        "--model_args": ",".join(f"{name}={value}" for name, value in model.items()),
        "--tasks": ",".join(TASKS),
        "--include_path": tmp_path,
        "--output_path": tmp_path / "out",
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--log_samples"]
    for name, value in arguments.items():
        command += [name, str(value)]
    ended = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        cwd=tmp_path,
        env=environment(tmp_path),
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found: dict[str, Any] = json.loads(results.read_text())["results"]
    assert found["headrace_choice"]["acc,none"] >= 0.75
    (samples,) = (tmp_path / "out").rglob("samples_headrace_generate_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == len(QUESTIONS)
    assert all(answers)
    assert not any("." in answer for answer in answers)


def environment(folder: Path) -> dict[str, str]:
    """Nothing is fetched, and nothing is kept outside ``folder``."""
    ours = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    return {**os.environ, **ours}


def saved_tokenizer(folder: Path) -> Path:
    """The demo's tokenizer as the harness reads one: it counts the tokens of contexts itself."""
    transformers = pytest.importorskip("transformers")
    weights = demo_weights()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        str(weights.parent), gguf_file=weights.name
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"
