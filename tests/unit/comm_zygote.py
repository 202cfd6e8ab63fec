"""Imports torch once, then forks the ranks of one scenario a line of standard input; answers in JSON.

A rank of a scenario is a process that connects for real. Its answer: what it returned, or its error.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from protocol.topology import Topology
from tests.unit.comm_work import Work
from worker.comm import CollectiveError, GlooCommunicator


def listening_addresses() -> list[str]:
    """Return the addresses this process listens on, as /proc/net/tcp and tcp6 spell them."""
    links = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_socket()]
    inodes = {str(fd.readlink()) for fd in links}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.append(fields[1].split(":")[0])
    return found


def all_operations(comm: GlooCommunicator, job: dict[str, Any]) -> Any:
    Work(comm, job["seed"], job["turns"], job["pause_s"]).run()
    return sorted(set(listening_addresses()))


def one_leaves(comm: GlooCommunicator, job: dict[str, Any]) -> Any:
    """Rank ``victim`` dies, stops or just stays away; the others go on with ``operation``."""
    comm.barrier()
    if comm.rank == job["victim"]:
        if job["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(job["timeout_s"] + 0.2)
        return "stayed away"
    x = torch.ones(4, 576)
    for _ in range(1000):
        if job["operation"] == "all_reduce":
            comm.all_reduce(x)
        elif job["operation"] == "barrier":
            comm.barrier()
        elif job["operation"] == "from_previous_stage":
            comm.from_previous_stage((4, 576), torch.float32)
        elif job["operation"] == "tokens_from_last_stage":
            comm.tokens_from_last_stage(3)
        else:
            comm.to_next_stage(x)
    return "nothing happened"


def different_plans(comm: GlooCommunicator, job: dict[str, Any]) -> Any:
    x = torch.zeros(8 if comm.rank == job["victim"] else 9)
    comm.all_reduce(x)
    return "nothing happened"


SCENARIOS = {f.__name__: f for f in (all_operations, one_leaves, different_plans)}


def live(job: dict[str, Any], rank: int, rendezvous: str) -> dict[str, Any]:
    """Return one rank's answer."""
    torch.set_num_threads(1)
    began = time.monotonic()
    answer: dict[str, Any] = {"rank": rank}
    comm = None
    try:
        if rank in job.get("absent", ()):
            return answer | {"result": "absent"}
        topology = Topology(tp=job["tp"], pp=job["pp"], dcp=job.get("dcp", 1))
        comm = GlooCommunicator.connect(topology, rank, rendezvous, job["timeout_s"])
        answer["result"] = SCENARIOS[job["scenario"]](comm, job)
    except CollectiveError as error:
        answer |= {"error": error.message, "peers": error.peers, "operation": error.operation}
    except Exception as error:
        answer["unexpected"] = repr(error)
    finally:
        if comm is not None:
            comm.close()
            comm.close()
    return answer | {"seconds": time.monotonic() - began}


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Fork the ranks, collect their answers (none of one that was killed), wait for all."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary, *job.get("folders", ()))
        directory.mkdir(parents=True, exist_ok=True)
        pipes, pids = [], []
        for rank in range(job["tp"] * job["pp"]):
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                answer = live(job, rank, str(directory / "rendezvous-0"))
                os.write(writing, json.dumps(answer).encode())
                os._exit(0)
            os.close(writing)
            pipes.append(reading)
            pids.append(pid)
        answers = []
        for pipe in pipes:
            with os.fdopen(pipe, "rb") as stream:
                said = stream.read()
            if said:
                answers.append(json.loads(said))
        for pid in pids:
            os.waitpid(pid, 0)
        leftover = [path for path in directory.iterdir() if "rank" in path.name]
        assert not leftover, leftover
        return answers


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
