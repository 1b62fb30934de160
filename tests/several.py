"""Trains several times in one torchrun: torchrun ... tests/several.py runs.json

runs.json lists runs {"flags": those of train.py, "log": a path, "processes": how many of torchrun's
take part, "kill_when": a path or null, "kill_after": seconds}. Each run is a fork of a worker that
has done its imports, which take longer than a tiny training; the fork runs train.py as __main__, in
a rendezvous of its own. All of a run's processes are killed by SIGKILL kill_after seconds after
kill_when exists, or once one of them has failed. What rank r writes goes to log.r, its exit status,
below 0 for a signal, to log.r.status, the model's parameters before training to log.r.pt.
"""

import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

import deepspeed
import torch
from torch.distributed import TCPStore
from transformers import Trainer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402, F401  (so that the forks need not import what it imports)

# DeepSpeed would spend two minutes on compiling an all-reduce through shared memory that only its
# inference uses, and has no environment variable or setting to decline
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def note_parameters(trainer_train, path):
    """Trainer.train that first, before there is an engine, saves what the parameters are."""

    def note_and_train(self, *args, **kwargs):
        shapes = {
            name: (tuple(p.shape), tuple(getattr(p, "ds_shape", p.shape)))
            for name, p in self.model.named_parameters()
        }
        torch.save({"shapes": shapes, "projector": self.model.projector.state_dict()}, path)
        return trainer_train(self, *args, **kwargs)

    return note_and_train


def start(run, log, port):
    """The id of a process that runs train.py."""
    if child := os.fork():
        return child
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["MASTER_PORT"] = str(port)
    if run["processes"] == 1:
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = "1"
    Trainer.train = note_parameters(Trainer.train, f"{log}.pt")
    sys.argv = ["train.py", *run["flags"]]
    status = 1
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        status = 0
    except SystemExit as end:  # as Python itself ends a script by these two
        print(end, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # clearing the memory that holds the imports would take seconds


def watch(child, run, log):
    """Exit status of a child that is killed when its time has come."""
    others = [Path(f"{run['log']}.{rank}.status") for rank in range(run["processes"])]
    kill_at = None
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        failed = any(path.exists() and path.read_text() not in ("", "0") for path in others)
        if kill_at is None and run["kill_when"] and os.path.exists(run["kill_when"]):
            kill_at = time.monotonic() + run["kill_after"]
        if failed or (kill_at and time.monotonic() >= kill_at):
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    Path(f"{log}.status").write_text(str(os.waitstatus_to_exitcode(ended[1])))


def main():
    rank = int(os.environ["RANK"])
    agents = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for i, run in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        log = f"{run['log']}.{rank}"
        if rank == 0:
            store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
            agents.set(f"port of run {i}", str(store.port))
        if rank < run["processes"]:
            watch(start(run, log, int(agents.get(f"port of run {i}"))), run, log)
        agents.set(f"rank {rank} has done run {i}", "")
        agents.wait([f"rank {r} has done run {i}" for r in range(int(os.environ["WORLD_SIZE"]))])


if __name__ == "__main__":
    main()
