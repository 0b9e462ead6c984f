"""Nothing that a peer, a client or a checkpoint sends may be run as code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "protocol",
    "runtime",
    "engine",
    "kvtransfer",
    "server",
    "prefill",
    "decode",
    "capacity",
    "deploy",
)
MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
}


def faults_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS:
                yield name
            for keyword in node.keywords:
                switch = getattr(keyword.value, "value", None)
                if (keyword.arg, switch) in {("shell", True), ("allow_pickle", True)}:
                    yield f"{name}({keyword.arg}=True)"


def test_no_code_runs_what_it_reads() -> None:
    found = {
        (str(path.relative_to(ROOT)), fault)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for fault in faults_in(path.read_text())
    }
    assert found == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(file)",
        "subprocess.run(line, shell=True)",
        "numpy.load(file, allow_pickle=True)",
    ],
)
def test_the_check_sees(source: str) -> None:
    assert list(faults_in(source)) != []
