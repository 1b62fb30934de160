"""ZeRO-3 and its siblings on CPU: flags, partitioning, checkpoints, exact resume, gradients, nodes.

The trainings are those of tests/several.py: real processes of torchrun, with DeepSpeed's CPU
accelerator and gloo, killed by real signals.
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, free_endpoint, make_jsonl, make_llm, make_whisper, run, torchrun
from safetensors import safe_open
from safetensors.torch import load_file

import train


def as_flags(**values):
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


ZERO3 = ["--deepspeed", "ds_config_zero3.json"]
BF16 = ["--bf16"]
RECIPE = {
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.2,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "weight_decay": 0.02,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": 10,
    "save_steps": 2,
}
# 9 utterances: an epoch has 3 steps for 2 processes, 5 for 1, and its last step is a shorter one
SETUPS = {  # name: processes, flags
    "plain-fp32": (1, ["--dataloader_num_workers", "1", "--dataloader_prefetch_factor", "4"]),
    "ddp-bf16": (2, BF16),
    "zero3-fp32": (2, [*ZERO3, "--save_total_limit", "2"]),
    "zero3-bf16": (2, [*ZERO3, *BF16]),
    "zero3-one-process": (1, ZERO3),
}
FAMILIES = [("qwen2", True), ("qwen2", False), ("llama3", True), ("llama3", False)]  # tied or not
ALL_WAYS = [("qwen2", True), ("llama3", False)]  # the others save time, without half of the ways


class Runs:
    """A folder of models, data and trainings; collects runs, then does them in one torchrun."""

    def __init__(self, folder, n_utterances=9):
        self.folder, self.list = folder, []
        self.whisper = make_whisper(folder / "whisper.pt")
        self.data = make_jsonl(folder, [0.2 * (1 + i % 8) for i in range(n_utterances)])
        self.llm = make_llm(folder / "llm")

    def add(self, name, out, processes, flags, llm=None, kill_when=None, kill_after=0):
        models = ["--llm_model_name_or_path", llm or self.llm]
        models += ["--whisper_model_name_or_path", self.whisper]
        files = ["--data_path", self.data, "--output_dir", str(self.folder / out)]
        files += ["--use_cpu", "--report_to", "none", "--logging_steps", "1"]
        self.list.append(
            {
                "flags": [*models, *files, *flags],
                "log": str(self.folder / name),
                "processes": processes,
                "kill_when": kill_when and str(self.folder / out / kill_when),
                "kill_after": kill_after,
            }
        )

    def file(self):
        path = self.folder / f"runs-{len(self.list)}.json"
        path.write_text(json.dumps(self.list))
        self.list = []
        return path

    def do(self):
        run(*torchrun(2), "tests/several.py", self.file())
        return self

    def log(self, name, rank=0):
        return (self.folder / f"{name}.{rank}").read_text()

    def statuses(self, name):
        return [int(path.read_text()) for path in sorted(self.folder.glob(f"{name}.*.status"))]

    def started_from(self, name, rank=0):
        return torch.load(self.folder / f"{name}.{rank}.pt")

    def history(self, out, step=10):
        state = self.folder / out / f"checkpoint-{step}" / "trainer_state.json"
        return [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of each setup an uninterrupted run, and one killed while it saves, killed again, resumed."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    for name, (processes, flags) in SETUPS.items():
        flags, killed = [*as_flags(**RECIPE), *flags], f"{name}-killed"
        runs.add(name, name, processes, flags)
        runs.add(f"{killed}-1", killed, processes, flags, kill_when="checkpoint-4")
        delay = random.uniform(0, 0.1)
        runs.add(
            f"{killed}-2", killed, processes, flags, kill_when="checkpoint-6", kill_after=delay
        )
        runs.add(f"{killed}-3", killed, processes, flags)
    return runs.do()


def test_flags_win(runs):
    """Under DeepSpeed the optimizer, betas, weight decay, schedule and warm-up are the flags'."""

    def cosine(step):  # of 10, 2 of them warm-up
        return step / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 8)) / 2

    for name in "zero3-fp32", "zero3-bf16", "zero3-one-process", "ddp-bf16":
        rates = [entry["learning_rate"] for entry in runs.history(name)]
        # what is logged at step n is the rate that step n has used
        assert rates == pytest.approx([3e-3 * cosine(step) for step in range(10)])
    path = next(
        (runs.folder / "zero3-fp32" / "checkpoint-10").glob("global_step10/*_optim_states.pt")
    )
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]
    groups = state["optimizer_state_dict"]["param_groups"]
    assert [group["betas"] for group in groups] == [(0.8, 0.95)] * len(groups)
    assert sorted(group["weight_decay"] for group in groups) == [0, 0.02]  # biases have none


def test_the_llm_is_partitioned_while_it_loads(runs):
    """Before there is an engine no process holds a parameter of the LLM, of none the whole."""
    for rank in 0, 1:
        shapes = runs.started_from("zero3-bf16", rank)["shapes"]
        whole = runs.started_from("ddp-bf16", rank)["shapes"]
        llm = [name for name in shapes if name.startswith("llm.")]
        assert len(llm) > 20
        assert all(shapes[name][0] == (0,) for name in llm)
        assert all(shapes[name][1] == whole[name][0] for name in llm)


def test_the_same_initial_projector(runs):
    """The seed alone gives the first weights: no engine, dtype, rank or number of processes."""
    first = runs.started_from("plain-fp32")["projector"]
    for name, (processes, _) in SETUPS.items():
        for rank in range(processes):
            assert same_tensors(first, runs.started_from(name, rank)["projector"])


@pytest.mark.parametrize("name", SETUPS)
def test_a_checkpoint_is_the_projector_and_little_else(runs, name):
    """Whole projector.* tensors that say what built them, and at most 6 times their size in all."""
    checkpoint = runs.folder / name / "checkpoint-10"
    tensors = load_file(checkpoint / "model.safetensors")
    whole = runs.started_from("plain-fp32")["projector"]
    assert {key: value.shape for key, value in tensors.items()} == {
        f"projector.{key}": value.shape for key, value in whole.items()
    }
    settings = json.loads(safe_open(checkpoint / "model.safetensors", "pt").metadata()["west"])
    assert settings["llm_model_name_or_path"] == runs.llm
    assert settings["projector_hidden_dim"] == 2048
    assert same_tensors(tensors, load_file(runs.folder / name / "model.safetensors"))
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    fp32 = 4 * sum(value.numel() for value in whole.values())
    print(f"{name}: {size} bytes, {size / fp32:.2f} times the projector's {fp32}")
    assert size <= 6 * fp32
    for path in checkpoint.glob("global_step10/*_model_states.pt"):
        state = torch.load(path, weights_only=False)
        assert all(key.startswith("projector.") for key in state["module"])
        assert not state["frozen_param_shapes"] and not state["frozen_param_fragments"]


def test_save_total_limit(runs):
    """Of the checkpoints only the newest --save_total_limit stay, killed in between or not."""
    for out in "zero3-fp32", "zero3-fp32-killed":
        names = sorted(path.name for path in (runs.folder / out).glob("checkpoint-*"))
        assert names == ["checkpoint-10", "checkpoint-8"]


@pytest.mark.parametrize("name", SETUPS)
def test_a_killed_run_resumes_exactly(runs, name):
    """Losses and weights are an uninterrupted run's, bit for bit, wherever kill -9 has struck."""
    processes = SETUPS[name][0]
    killed = f"{name}-killed"
    assert -9 in runs.statuses(f"{killed}-1") and -9 in runs.statuses(f"{killed}-2")
    assert runs.statuses(name) == runs.statuses(f"{killed}-3") == [0] * processes
    assert "Resuming from" in runs.log(f"{killed}-2") and "Resuming" in runs.log(f"{killed}-3")
    assert len(runs.history(name)) == 10
    assert runs.history(killed) == runs.history(name)
    weights = load_file(runs.folder / name / "model.safetensors")
    assert same_tensors(load_file(runs.folder / killed / "model.safetensors"), weights)
    assert not same_tensors(weights, runs.started_from(name)["projector"])


def test_a_checkpoint_torn_by_a_kill_is_put_aside(runs):
    """What kill -9 leaves of a checkpoint that has just appeared is put aside at the next start."""
    torn = list(runs.folder.glob("*/incomplete-checkpoint-*"))
    assert torn
    logs = [runs.log(f"{name}-killed-{i}") for name in SETUPS for i in (2, 3)]
    for path in torn:
        warning = f"{path.parent / path.name.removeprefix('incomplete-')} is incomplete, moved"
        assert sum(warning in log for log in logs) >= 1


def test_every_torn_trainer_state_is_recognised(runs, tmp_path, capsys):
    """A trainer_state.json that is cut or missing means torn, and an older checkpoint serves."""
    for step in 8, 10:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        shutil.copy(runs.folder / "plain-fp32" / folder.name / "trainer_state.json", folder)
    state = tmp_path / "checkpoint-10" / "trainer_state.json"
    whole = state.read_bytes()
    assert train.newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    for length in {*range(0, len(whole), 23), len(whole.rstrip()) - 1}:
        state.write_bytes(whole[:length])
        assert train.newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
        (tmp_path / "incomplete-checkpoint-10").rename(tmp_path / "checkpoint-10")
    state.unlink()
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    (tmp_path / "incomplete-checkpoint-10").mkdir()  # from an earlier kill
    capsys.readouterr()
    assert train.newest_checkpoint(tmp_path) is None
    assert capsys.readouterr().err.count("incomplete, moved to") == 2


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Of each LLM's shape a step of plain SGD, learning rate 1, on 8 utterances in 2 batches."""
    once = as_flags(optim="sgd", learning_rate=1, lr_scheduler_type="constant", max_steps=1)
    once += as_flags(save_steps=1, max_grad_norm=1e9, projector_hidden_dim=64)
    runs = Runs(tmp_path_factory.mktemp("gradients"), n_utterances=8)
    for family, tied in FAMILIES:
        llm = make_llm(runs.folder / f"{family}-{tied}", family, tied)
        for n in 1, 2:
            for kind in [[], ZERO3][:n]:  # zero3-one-process is above
                for checkpointing in [], ["--gradient_checkpointing"]:
                    if (family, tied) not in ALL_WAYS and bool(checkpointing) != bool(kind):
                        continue
                    name = f"{family}-{tied}{n}{''.join(kind + checkpointing)}".replace(" ", "")
                    name = name.replace(".json", "")
                    batch = as_flags(per_device_train_batch_size=4 // n)
                    batch += as_flags(gradient_accumulation_steps=2)
                    runs.add(name, name, n, [*once, *batch, *kind, *checkpointing], llm=llm)
    return runs.do()


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_the_same_gradient_everywhere(gradients, family, tied):
    """A process, DDP and ZeRO-3, with and without gradient checkpointing, see one gradient."""
    names = sorted(
        path.name for path in gradients.folder.glob(f"{family}-{tied}[12]*") if path.is_dir()
    )
    assert len(names) == (6 if (family, tied) in ALL_WAYS else 3)
    steps = []
    for name in names:
        before = gradients.started_from(name)["projector"]
        after = load_file(gradients.folder / name / "model.safetensors")
        gradient = {key: before[key] - after[f"projector.{key}"] for key in before}
        steps.append((gradients.history(name, step=1)[0], gradient))
    first, gradient = steps[0]
    norm = torch.stack([value.norm() for value in gradient.values()]).norm().item()
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 1e-2
    for other, other_gradient in steps[1:]:
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
        for key in gradient:  # differences of weights below 1, rounded to 6e-8
            torch.testing.assert_close(other_gradient[key], gradient[key], rtol=1e-4, atol=3e-7)


@pytest.fixture(scope="module")
def agents(runs):
    """Trainings by two torchruns with a worker each, which meet on the loopback as nodes would."""
    shutil.copytree(runs.folder / "zero3-fp32-killed", runs.folder / "agents-torn")
    (runs.folder / "agents-torn" / "checkpoint-10" / "trainer_state.json").write_text("{")
    for name in "agents", "agents-torn":
        runs.add(name, name, 2, [*as_flags(**RECIPE), *SETUPS["zero3-fp32"][1]])
    for name in "ddp-bf16", "zero3-fp32":
        shutil.copytree(runs.folder / name, runs.folder / f"{name}-of-1")
        flags = [*as_flags(**RECIPE | {"max_steps": 12}), *SETUPS[name][1]]
        runs.add(f"{name}-of-1", f"{name}-of-1", 1, flags)
    path = runs.file()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    torchrun += ["--rdzv_id=west", "--rdzv_backend=c10d", f"--rdzv_endpoint={free_endpoint()}"]
    command = [*torchrun, str(ROOT / "tests" / "several.py"), str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    processes = [subprocess.Popen(command, cwd=ROOT, env=env) for _ in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.terminate()
    return runs


def test_two_nodes_equal_one(agents):
    """Two agents of torchrun with a worker each train what one agent with two workers does."""
    assert agents.statuses("agents") == [0, 0]
    assert agents.history("agents") == agents.history("zero3-fp32")
    weights = load_file(agents.folder / "zero3-fp32" / "model.safetensors")
    assert same_tensors(load_file(agents.folder / "agents" / "model.safetensors"), weights)


def test_two_nodes_put_one_torn_checkpoint_aside(agents):
    """A torn checkpoint in a folder that nodes share is put aside, and all of them resume."""
    assert agents.statuses("agents-torn") == [0, 0]
    assert (agents.folder / "agents-torn" / "incomplete-checkpoint-10").is_dir()
    assert agents.history("agents-torn") == agents.history("zero3-fp32")
    weights = load_file(agents.folder / "zero3-fp32" / "model.safetensors")
    assert same_tensors(load_file(agents.folder / "agents-torn" / "model.safetensors"), weights)


def test_another_number_of_processes(agents):
    """DDP's checkpoint of 2 processes serves 1; ZeRO-3's does not, and a line says the remedy."""
    assert agents.statuses("ddp-bf16-of-1") == [0]
    assert len(agents.history("ddp-bf16-of-1", step=12)) == 12
    assert agents.statuses("zero3-fp32-of-1") == [1]
    checkpoint = agents.folder / "zero3-fp32-of-1" / "checkpoint-10"
    message = agents.log("zero3-fp32-of-1").splitlines()[-1]
    assert message == f"{checkpoint}: start 2 processes, or give another --output_dir"
    assert "Traceback" not in agents.log("zero3-fp32-of-1")
