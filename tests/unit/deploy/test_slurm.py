"""The Slurm example against the settings and options that really exist."""

import re
import subprocess
from pathlib import Path

from deploy.cli import parser
from deploy.config import KEYS, variable

SCRIPT = Path(__file__).parents[3] / "deploy/slurm/headrace.sbatch"


def test_it_is_a_script_that_bash_can_read() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=30)


def test_every_variable_that_it_sets_is_a_setting() -> None:
    named = set(re.findall(r"HEADRACE_[A-Z_]+", SCRIPT.read_text()))
    assert len(named) > 5
    assert named - {variable(key) for key in KEYS} == set()


def test_every_role_is_started_with_options_that_it_has() -> None:
    lines = re.findall(r"headrace (gateway|prefill|decode) (.*)$", SCRIPT.read_text(), re.MULTILINE)
    assert {role for role, _ in lines} == {"gateway", "prefill", "decode"}
    for role, options in lines:
        chosen = parser().parse_args([role, *re.sub(r'["()]|\$', "", options).split()[:2]])
        assert chosen.verb == role
        for key in re.findall(r"--set \"?([a-z_.]+)=", options):
            assert key in KEYS
