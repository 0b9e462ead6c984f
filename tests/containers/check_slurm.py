"""Runs deploy/slurm/headrace.sbatch on a real Slurm of three nodes, which are network namespaces.

    python3 -m tests.containers.check_slurm

The job starts a gateway with a prefill worker on one node and a decode rank on each of the others.
A completion with the key that the script made must come, and `scancel` must leave no process. Needs
root and Debian's slurmctld, slurmd, slurm-client and munge; takes a minute or two.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from tests.containers.two_hosts import Host, network

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy/slurm/headrace.sbatch"
DEADLINE_S = 180.0
CONFIGURATION = """
ClusterName=check
SlurmctldHost=node0({first})
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    def __init__(self, hosts: Sequence[Host], folder: Path) -> None:
        self._hosts = hosts
        self._folder = folder
        self._environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "KEYS": str(folder / "keys"),
            "OMP_NUM_THREADS": "1",
            "HEADRACE_PREFILL_KV_CACHE_BYTES": "64MiB",
            "HEADRACE_DECODE_KV_CACHE_BYTES": "64MiB",
        }

    def run(self, node: int, *command: str) -> str:
        """What the command prints on that node."""
        done = subprocess.run(
            self._on(node, *command),
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.stdout

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A controller on the first node and a daemon on each."""
        self._configure()
        with contextlib.ExitStack() as stack:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            stack.enter_context(_daemon(["runuser", "-u", "munge", "--", "munged", "-F"], None))
            for host in self._hosts:
                own = Path("/etc/netns") / host.namespace  # ip shows it as the namespace's /etc
                own.mkdir(parents=True)
                stack.callback(shutil.rmtree, own)
                (own / "hosts").write_text(
                    "127.0.0.1 localhost\n"
                    + "".join(f"{h.address} node{n}\n" for n, h in enumerate(self._hosts))
                )
            until("munged", lambda: Path("/run/munge/munge.socket.2").exists())
            stack.enter_context(_daemon(self._on(0, "slurmctld", "-D"), self._environment))
            until("a controller", lambda: "node" in self.run(0, "sinfo", "-h"))
            for node in range(len(self._hosts)):
                stack.enter_context(_daemon(self._on(node, "slurmd", "-D"), self._environment))
            until("idle nodes", lambda: self.run(0, "sinfo", "-h", "-o", "%T").strip() == "idle")
            yield

    def _on(self, node: int, *command: str) -> list[str]:
        named = f'hostname node{node} && exec "$@"'
        return self._hosts[node].command("unshare", "--uts", "sh", "-c", named, "sh", *command)

    def _configure(self) -> None:
        nodes = [
            f"NodeName=node{number} NodeAddr={host.address} CPUs=2"
            for number, host in enumerate(self._hosts)
        ]
        for name in ("state", *(f"node{number}" for number in range(len(self._hosts)))):
            (self._folder / name).mkdir()
        (self._folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self._folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                first=self._hosts[0].address, folder=self._folder, nodes="\n".join(nodes)
            )
        )


@contextlib.contextmanager
def _daemon(command: Sequence[str], environment: dict[str, str] | None) -> Iterator[None]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {DEADLINE_S:g} s: {what}")
        time.sleep(0.5)


def check(slurm: Slurm, first: Host, folder: Path) -> None:
    url, log = f"http://{first.address}:8000", folder / "job.log"
    slurm.run(0, "sbatch", "--nodes=3", f"--output={log}", str(SCRIPT), "smollm2")
    fetch = ("curl", "-s", "-m", "60")
    code = ("-o", "/dev/null", "-w", "%{http_code}")
    try:
        until("ready", lambda: slurm.run(0, *fetch, *code, f"{url}/ready") == "200")
    except SystemExit:
        print(log.read_text()[-4000:] if log.exists() else "the job has not begun")
        raise
    key = (folder / "keys" / "api-key").read_text().strip()
    body = '{"model":"smollm2","prompt":"Once upon a time","max_tokens":8,"temperature":0}'
    answer = slurm.run(
        *(0, *fetch, f"{url}/v1/completions", "-d", body, "-H", "content-type: application/json"),
        *("-H", f"authorization: Bearer {key}"),
    )
    if '"finish_reason":"length"' not in answer:
        raise SystemExit(f"no completion: {answer}")
    print(f"a completion by a job of three nodes: {answer[:200]}")
    slurm.run(0, "scancel", "--name=headrace")
    until("the job's end", lambda: not slurm.run(0, "squeue", "-h"))
    until("no process", lambda: not _processes(folder))
    print("cancelled, and no process is left")


def _processes(folder: Path) -> list[psutil.Process]:
    """Those of the job: only they know its keys."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("HEADRACE_BUS_CLUSTER_KEY_FILE", "").startswith(str(folder)):
                found.append(process)
    return found


def main() -> int:
    """The exit code."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    with (
        tempfile.TemporaryDirectory(prefix="headrace-") as name,
        network() as hosts,
    ):
        slurm = Slurm(hosts, Path(name))
        with slurm.running():
            check(slurm, hosts[0], Path(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
