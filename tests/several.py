"""Trains several times in one torchrun, because imports take longer than a tiny training.

`Runs` is for the tests: it collects runs, and does them by torchrun ... tests/several.py runs.json.
A run is {"flags": those of train.py, "log": a path, "processes": how many (0: without torchrun's
environment), "workers": which of torchrun's workers take part, "kill_when": a path or null,
"kill_after": seconds}.

A worker does its runs one after the other, each in a fork that runs train.py as __main__, in a
rendezvous of the run's own. All processes of a run are killed by SIGKILL kill_after seconds after
kill_when exists, or PATIENCE after one of them has failed. Rank r writes its stdout to log.r, its
stderr to log.r.err, its exit status (below 0 for a signal) to log.r.status, and what it knows of
its model and of torch to log.r.pt (see note_model and start).
"""

import gc
import json
import math
import os
import runpy
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from conftest import ROOT, torchrun
from conftest import run as run_command
from curve import log_of
from torch.distributed import TCPStore
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

N_WORKERS = 2
PATIENCE = 10  # seconds in which a process must have seen that another one has failed
TORCHRUN = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"]


def as_flags(**values):
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def zero3(**changes):
    """Returns the flags of ZeRO-3 by ds_config_zero3.json with other values."""
    config = json.loads((ROOT / "ds_config_zero3.json").read_text())
    config["zero_optimization"].update(changes, stage3_prefetch_bucket_size=10_000)
    return ["--deepspeed", json.dumps(config)]


# No parameter of a tiny LLM stays gathered; by the json as it is, all do
PARTITIONED = zero3(stage3_param_persistence_threshold=0)


class Runs:
    """A folder of trainings, whose flags begin with those that they share."""

    def __init__(self, folder, shared_flags):
        self.folder, self.list, self.outputs, self.recipes = folder, [], [], {}
        self.shared_flags = [*shared_flags, "--use_cpu", *as_flags(report_to="none")]
        self.shared_flags += ["--disable_tqdm", "True"]

    def add(self, name, processes, flags, out=None, kill_when=None, kill_after=0):
        """Adds a run with --output_dir out, a folder named like the run if not given."""
        self.recipes[name] = processes, flags
        out = out or name
        if out not in self.outputs:
            self.outputs.append(out)
        worker = self.outputs.index(out) % N_WORKERS
        output_dir = as_flags(output_dir=self.folder / out)
        self.list.append(
            {
                "flags": [str(flag) for flag in (*self.shared_flags, *output_dir, *flags)],
                "log": str(self.folder / name),
                "processes": processes,
                "workers": list(range(N_WORKERS)) if processes == N_WORKERS else [worker],
                "kill_when": kill_when and str(self.folder / out / kill_when),
                "kill_after": kill_after,
            }
        )

    def file(self):
        """Writes the runs collected to a file, and returns its path."""
        path = self.folder / f"runs-{len(list(self.folder.glob('runs-*')))}.json"
        path.write_text(json.dumps(self.list))
        self.list = []
        return path

    def do(self):
        run_command(*torchrun(N_WORKERS), "tests/several.py", self.file(), timeout=600)

    def stdout(self, name, rank=0):
        return Path(f"{self.folder / name}.{rank}").read_text()

    def stderr(self, name, rank=0):
        return Path(f"{self.folder / name}.{rank}.err").read_text()

    def statuses(self, name):
        return [int(path.read_text()) for path in sorted(self.folder.glob(f"{name}.*.status"))]

    def notes(self, name, rank=0):
        return torch.load(f"{self.folder / name}.{rank}.pt")

    def log_of(self, out, key):
        """{step: value} of what the latest checkpoint of a folder logged under a key."""
        return log_of(self.folder / out, key)

    def projector(self, out):
        """The file that training leaves at its end."""
        return self.folder / out / "model.safetensors"


def note_model(trainer_train, path):
    """Wraps Trainer.train, which then saves notes on the model as it begins and as it has ended.

    "shapes": {parameter: (its shape, its shape if gathered)} and "projector": its tensors, before
    there is an engine. "gathered" and "partitioned": the parameters' sizes as training has ended.
    "checkpointed": how many modules Trainer has told to checkpoint their activations.
    """

    def note_and_train(self, *args, **kwargs):
        shapes = {
            name: (tuple(p.shape), tuple(getattr(p, "ds_shape", p.shape)))
            for name, p in self.model.named_parameters()
        }
        projector = {k: v.clone() for k, v in self.model.projector.state_dict().items()}
        notes = {"shapes": shapes, "projector": projector}
        torch.save(notes, path)
        output = trainer_train(self, *args, **kwargs)
        notes |= {"gathered": {}, "partitioned": {}}
        for name, p in self.model.named_parameters():
            if hasattr(p, "ds_persist"):
                assert p.ds_persist == (p.ds_status.name == "AVAILABLE") == (p.numel() > 0), name
                notes["gathered" if p.ds_persist else "partitioned"][name] = p.ds_numel
        modules = self.model.modules()
        notes["checkpointed"] = sum(getattr(m, "gradient_checkpointing", False) for m in modules)
        torch.save(notes, path)
        return output

    return note_and_train


def start(run, log, port):
    """The id of a process that runs train.py. At a good end it adds two things to its notes.

    "graphs": how many torch.compile has compiled. "left": what of torch.distributed is left.
    """
    if child := os.fork():
        return child
    for path, stream in (log, 1), (f"{log}.err", 2):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    if run["processes"] == 0:
        for name in TORCHRUN:
            del os.environ[name]
    if run["processes"] == 1:
        os.environ.update(dict(zip(TORCHRUN, "0011", strict=False)))
    os.environ["MASTER_PORT"] = str(port)
    Trainer.train = note_model(Trainer.train, f"{log}.pt")
    sys.argv = ["train.py", *run["flags"]]
    status = 1
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        left = [type(x).__name__ for x in gc.get_objects() if type(x) is DistributedDataParallel]
        left += ["process group"] if torch.distributed.is_initialized() else []
        notes = torch.load(f"{log}.pt") if Path(f"{log}.pt").exists() else {}
        notes["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch.save({**notes, "left": left}, f"{log}.pt")
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
    """Waits for a child, which is killed when its time has come, and writes its exit status."""
    others = [Path(f"{run['log']}.{rank}.status") for rank in range(run["processes"])]
    kill_at = math.inf
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        now = time.monotonic()
        if run["kill_when"] and os.path.exists(run["kill_when"]):
            kill_at = min(kill_at, now + run["kill_after"])
        if any(path.exists() and path.read_text() not in ("", "0") for path in others):
            kill_at = min(kill_at, now + PATIENCE)
        if now >= kill_at:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    Path(f"{log}.status").write_text(str(os.waitstatus_to_exitcode(ended[1])))


def import_all():
    """Imports what the forks would each have to import."""
    import deepspeed
    import torch._inductor.compile_fx  # noqa: F401  (which DeepSpeed and --compile import)

    import train  # noqa: F401

    # DeepSpeed would spend two minutes on compiling an all-reduce through shared memory that only
    # its inference uses, and has no environment variable or setting to decline
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gc.freeze()  # Trainer's gc.collect() would look at all this in each fork


def main():
    import_all()
    worker, n_workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents, stores = TCPStore(*address, is_master=False, timeout=timedelta(minutes=10)), []
    for i, run in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        if worker not in run["workers"]:
            continue
        rank = run["workers"].index(worker)
        if rank == 0:
            stores.append(TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False))
            agents.set(f"port of run {i}", str(stores[-1].port))
        log = f"{run['log']}.{rank}"
        watch(start(run, log, int(agents.get(f"port of run {i}"))), run, log)
    agents.set(f"worker {worker} is done", "")
    agents.wait([f"worker {other} is done" for other in range(n_workers)])


if __name__ == "__main__":
    main()
