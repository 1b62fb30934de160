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
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, free_endpoint, make_jsonl, make_llm, make_whisper
from safetensors import safe_open
from safetensors.torch import load_file
from several import PARTITIONED, Runs, as_flags, zero3

import train

ZERO3 = ["--deepspeed", ROOT / "ds_config_zero3.json"]
CAP = 200_000  # elements: the projector has 171,088, the LLM 56,064
CAPPED = zero3(stage3_model_persistence_threshold=CAP)
AUDIO = ["--encoder_window", "audio"]
GROUPED = ["--train_sampling_strategy", "group_by_length", *as_flags(eval_strategy="steps")]
GROUPED += as_flags(eval_steps=5)
# 17 utterances by 2 at once: an epoch has 5 steps, and its last step is a shorter one
STEPS = 12
RECIPE = as_flags(
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_ratio=0.2,
    adam_beta1=0.8,
    adam_beta2=0.95,
    weight_decay=0.02,
    gradient_accumulation_steps=2,
    max_steps=STEPS,
    save_steps=2,
)
SETUPS = {  # name: processes (0: without torchrun), flags
    "plain-fp32": (0, ["--dataloader_num_workers", "1", "--dataloader_prefetch_factor", "4"]),
    "grouped": (0, GROUPED),
    "zero3-one-process": (1, ZERO3),
    "ddp-bf16": (2, ["--bf16", *AUDIO]),
    "ddp-grouped": (2, GROUPED),
    "zero3-fp32": (2, [*ZERO3, "--save_total_limit", "2"]),
    "zero3-capped": (2, CAPPED),
    "zero3-bf16": (2, [*PARTITIONED, "--bf16", *AUDIO]),
}
LLMS = [("qwen2", True), ("llama3", False)]  # family, and whether the embeddings are tied


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of each setup an uninterrupted run, and one that is killed twice while it saves and resumed.

    The second kill is at the 8th step, in the middle of the second epoch.
    """
    folder = tmp_path_factory.mktemp("runs")
    models = as_flags(
        llm_model_name_or_path=make_llm(folder / "llm"),
        whisper_model_name_or_path=make_whisper(folder / "whisper.pt", n_audio_ctx=200),
    )
    data = as_flags(
        data_path=make_jsonl(folder, [0.2 * (1 + i % 8) + i % 3 for i in range(17)]),
        eval_data_path=make_jsonl(folder, [0.3, 2.5, 1.1], name="eval.jsonl", seed=1),
    )
    runs = Runs(folder, [*models, *data, *as_flags(logging_steps=1)])
    for name, (processes, flags) in SETUPS.items():
        batch = as_flags(per_device_train_batch_size=2 // max(processes, 1))
        recipe, killed = (processes, [*RECIPE, *batch, *flags]), f"{name}-killed"
        runs.add(name, *recipe)
        delay = random.uniform(0, 0.03)
        runs.add(f"{killed}-1", *recipe, killed, kill_when="checkpoint-4", kill_after=delay)
        runs.add(f"{killed}-2", *recipe, killed, kill_when="checkpoint-8")
        runs.add(f"{killed}-3", *recipe, killed)
    runs.add("zero3-partitioned", 2, [*runs.recipes["zero3-fp32"][1], *PARTITIONED])
    for name in "grouped", "ddp-grouped":
        processes, flags = runs.recipes[name]
        frozen = as_flags(learning_rate=0, num_train_epochs=1.6, max_steps=-1)
        runs.add(f"{name}-frozen", processes, [*flags, *frozen])
    add_runs_that_save_only_the_model(runs)
    add_runs_with_corrupt_files(runs)
    runs.do()
    return runs


def test_flags_win(runs):
    """Under DeepSpeed the optimizer, betas, weight decay, schedule and warm-up are the flags'."""

    def cosine(step):  # of 12, 3 of them warm-up
        return step / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 9)) / 2

    for name in "zero3-fp32", "zero3-bf16", "zero3-one-process", "ddp-bf16":
        rates = list(runs.log_of(name, "learning_rate").values())
        # what is logged at step n is the rate that step n has used
        assert rates == pytest.approx([3e-3 * cosine(step) for step in range(STEPS)])
    [path, _] = runs.folder.glob(f"zero3-fp32/checkpoint-{STEPS}/*/*_optim_states.pt")
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]
    groups = state["optimizer_state_dict"]["param_groups"]
    assert [group["betas"] for group in groups] == [(0.8, 0.95)] * len(groups)
    assert sorted(group["weight_decay"] for group in groups) == [0, 0.02]  # biases have none


@pytest.mark.parametrize("name", SETUPS)
def test_nothing_distributed_is_left(runs, name):
    """Else gloo's threads now and then abort the process as it exits, or hang it.

    They need the GIL to release their last tensors. As Python exits they cannot get it ("terminate
    called"). If DDP is the last owner of the group, its destructor holds it and waits for them.
    """
    for rank in range(max(SETUPS[name][0], 1)):
        assert runs.notes(name, rank)["left"] == []


def test_the_llm_is_partitioned_while_it_loads(runs):
    """Before there is an engine no process holds a parameter of the LLM, of none the whole."""
    for name in "zero3-bf16", "zero3-fp32":
        for rank in 0, 1:
            shapes = runs.notes(name, rank)["shapes"]
            whole = runs.notes("ddp-bf16", rank)["shapes"]
            llm = [name for name in shapes if name.startswith("llm.")]
            assert len(llm) > 20
            assert all(shapes[name][0] == (0,) for name in llm)
            assert all(shapes[name][1] == whole[name][0] for name in llm)


def test_what_stays_gathered(runs):
    """By the json an LLM of its cap or less stays gathered on every process. Of a larger one as
    many parameters do as fit the cap, and the others are partitioned between their uses, as all
    are by a threshold of 0. Losses, gradients and weights are the same to the last digit."""
    for rank in 0, 1:
        notes = runs.notes("zero3-fp32", rank)
        assert not notes["partitioned"]
        assert notes["gathered"].keys() == notes["shapes"].keys()
        assert not runs.notes("zero3-partitioned", rank)["gathered"]
        capped = runs.notes("zero3-capped", rank)
        assert 0.9 * CAP < sum(capped["gathered"].values()) <= CAP
        for part in "gathered", "partitioned":
            assert sum(name.startswith("llm.model.layers") for name in capped[part]) >= 8
    for name in "zero3-capped", "zero3-partitioned":
        for key in "loss", "grad_norm":
            assert runs.log_of(name, key) == runs.log_of("zero3-fp32", key)
        weights = load_file(runs.projector("zero3-fp32"))
        assert same_tensors(load_file(runs.projector(name)), weights)


def test_the_log_of_zero3(runs):
    """It holds what train.py and transformers say, and one line of accelerate; once it had two of
    torch for each gather and reduction, 186 of 220 lines."""
    for name in "zero3-fp32", "zero3-capped", "zero3-bf16":
        for rank in 0, 1:
            lines = runs.stderr(name, rank).splitlines()
            rest = [line for line in lines if line and not line.startswith("[transformers]")]
            assert len(rest) <= 1 and all("Gradient accumulation steps" in line for line in rest)


def test_the_same_initial_projector(runs):
    """The seed alone gives the first weights: no engine, dtype, rank or number of processes."""
    first = runs.notes("plain-fp32")["projector"]
    for name, (processes, _) in SETUPS.items():
        for rank in range(processes or 1):
            assert same_tensors(first, runs.notes(name, rank)["projector"])


@pytest.mark.parametrize("name", SETUPS)
def test_a_checkpoint_is_the_projector_and_little_else(runs, name):
    """Whole projector.* tensors that say what built them, and at most 6 times their size in all."""
    checkpoint = runs.folder / name / f"checkpoint-{STEPS}"
    tensors = load_file(checkpoint / "model.safetensors")
    whole = runs.notes("plain-fp32")["projector"]
    assert {key: value.shape for key, value in tensors.items()} == {
        f"projector.{key}": value.shape for key, value in whole.items()
    }
    settings = json.loads(safe_open(checkpoint / "model.safetensors", "pt").metadata()["west"])
    assert settings["llm_model_name_or_path"] == str(runs.folder / "llm")
    assert settings["projector_hidden_dim"] == 2048
    assert settings["encoder_window"] == ("audio" if "audio" in SETUPS[name][1] else "full")
    assert same_tensors(tensors, load_file(runs.projector(name)))
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    fp32 = 4 * sum(value.numel() for value in whole.values())
    assert size <= 6 * fp32
    for path in checkpoint.glob(f"global_step{STEPS}/*_model_states.pt"):
        state = torch.load(path, weights_only=False)
        assert all(key.startswith("projector.") for key in state["module"])
        assert not state["frozen_param_shapes"] and not state["frozen_param_fragments"]


def test_save_total_limit(runs):
    """Of the checkpoints only the latest --save_total_limit stay, killed in between or not."""
    for out in "zero3-fp32", "zero3-fp32-killed":
        names = sorted(path.name for path in (runs.folder / out).glob("checkpoint-*"))
        assert names == ["checkpoint-10", "checkpoint-12"]


def resumed_at(runs, name):
    """The step that a run says it resumes from, or 0."""
    stdout = runs.stdout(name)
    if "Starting from step 0" in stdout:
        return 0
    return int(stdout.partition("Resuming from ")[2].split()[0].rpartition("checkpoint-")[2])


@pytest.mark.parametrize("name", SETUPS)
def test_a_killed_run_resumes_exactly(runs, name):
    """Losses, evaluations and weights are an uninterrupted run's, bit for bit, though kill -9 has
    struck in the first epoch and in the middle of the second."""
    processes, killed = SETUPS[name][0] or 1, f"{name}-killed"
    assert -9 in runs.statuses(f"{killed}-1") and -9 in runs.statuses(f"{killed}-2")
    assert runs.statuses(name) == runs.statuses(f"{killed}-3") == [0] * processes
    assert resumed_at(runs, f"{killed}-2") in (2, 4, 6)
    assert resumed_at(runs, f"{killed}-3") in (6, 8)  # an epoch has 5 steps
    assert len(runs.log_of(name, "loss")) == STEPS
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_token_accuracy"):
        assert runs.log_of(killed, key) == runs.log_of(name, key), key
    assert len(runs.log_of(name, "eval_loss")) == (3 if "grouped" in name else 0)
    weights = load_file(runs.projector(name))
    assert same_tensors(load_file(runs.projector(killed)), weights)
    initial = runs.notes(name)["projector"]
    assert not torch.equal(weights["projector.linear2.weight"], initial["linear2.weight"])


@pytest.mark.parametrize("name", ["grouped", "ddp-grouped"])
def test_grouping_gives_other_batches(runs, name):
    """--train_sampling_strategy group_by_length trains by other batches than the random order, and
    by others in each epoch: at a learning rate of 0 no loss of the first comes back."""
    losses = runs.log_of("plain-fp32", "loss")
    assert runs.log_of(name, "loss") != pytest.approx(losses, rel=1e-2)
    losses = list(runs.log_of(f"{name}-frozen", "loss").values())
    assert len(set(losses)) == len(losses) == 8  # 1.6 epochs of 5 steps


def test_a_torn_checkpoint_is_ignored(runs):
    """A run that was killed when checkpoint-8 had just appeared resumes from the older, complete
    one, and does not move the torn one."""
    logs = {name: resumed_at(runs, f"{name}-killed-3") for name in SETUPS}
    assert 6 in logs.values()  # a kill so early leaves checkpoint-8 complete only by chance
    assert not list(runs.folder.glob("*/*incomplete*"))


def test_every_torn_trainer_state_is_recognised(runs, tmp_path):
    """A trainer_state.json that is cut or missing means torn, and an older checkpoint serves; no
    checkpoint is touched. Steps are compared as numbers: checkpoint-8 is older than checkpoint-12,
    though it sorts after it as text. An absent --output_dir is a first start."""
    latest, older = (tmp_path / f"checkpoint-{step}" for step in (STEPS, 8))
    for path in latest, older:
        shutil.copytree(runs.folder / "plain-fp32" / path.name, path)
    args = train.TrainingArguments(data_path="", output_dir=str(tmp_path), use_cpu=True)
    state = latest / "trainer_state.json"
    whole = state.read_bytes()
    assert train.find_checkpoint(args) == (str(latest), STEPS)
    for length in {*range(0, len(whole), 23), len(whole.rstrip()) - 1}:
        state.write_bytes(whole[:length])
        assert train.find_checkpoint(args) == (str(older), 8)
    state.unlink()
    assert train.find_checkpoint(args) == (str(older), 8)
    (older / "trainer_state.json").unlink()
    assert train.find_checkpoint(args) == ("", 0)
    assert sorted(tmp_path.iterdir()) == [latest, older]
    args.output_dir = str(tmp_path / "absent")
    assert train.find_checkpoint(args) == ("", 0)


def add_runs_that_save_only_the_model(runs):
    """A run of 2 steps, and one that goes on to 4 by --save_only_model; one that is told to resume
    from the fourth, and one that goes on to 6 by itself."""
    checkpoint = runs.folder / "only-model" / "checkpoint-4"
    ends = {
        "2": ["--max_steps", 2],
        "4": ["--max_steps", 4, "--save_only_model"],
        "refused": ["--max_steps", 6, "--resume_from_checkpoint", checkpoint],
        "6": ["--max_steps", 6],
    }
    for name, flags in ends.items():
        flags += as_flags(save_steps=2, lr_scheduler_type="constant")
        runs.add(f"only-model-{name}", 0, flags, "only-model")


def test_a_model_alone_is_not_resumed(runs):
    """A checkpoint of --save_only_model would start optimizer and schedule anew: it is passed over
    for an older one that holds them, and refused in one line if --resume_from_checkpoint names it.
    """
    names = [f"only-model-{steps}" for steps in (2, 4, 6)]
    assert [runs.statuses(name) for name in names] == [[0]] * 3
    assert [resumed_at(runs, name) for name in names] == [0, 2, 2]
    assert runs.statuses("only-model-refused") == [1]
    [line] = runs.stderr("only-model-refused").splitlines()
    assert line.startswith(f"{runs.folder}/only-model/checkpoint-4: ")
    assert "--save_only_model" in line


def add_runs_with_corrupt_files(runs):
    """Runs in the order of the jsonl, by 2 utterances: of 6, of which 3 cannot be decoded, on one
    process, by DDP and by ZeRO-3; and of the 3 others alone."""
    folder, texts = runs.folder, ["one", "two three", "three two one"]
    whole = Path(make_jsonl(folder, [0.5, 1.5, 3], texts, "whole.jsonl")).read_text().splitlines()
    (folder / "garbage.wav").write_bytes(b"RIFF\0\0\0\0WAVE" + bytes(range(256)))
    not_a_number = np.zeros(16000, np.float32)
    not_a_number[8000] = np.nan
    soundfile.write(folder / "nan.wav", not_a_number, 16000, subtype="FLOAT")
    bad = [
        {"wav": "garbage.wav", "txt": "one", "duration": 1},
        {"wav": "nan.wav", "txt": "two"},
        {"wav": "absent.wav", "txt": "three", "duration": 1},
    ]
    bad = [json.dumps(line) for line in bad]
    lines = [whole[0], whole[1], bad[0], whole[2], bad[1], bad[2]]
    (folder / "corrupt.jsonl").write_text("\n".join(lines))
    schedule = ["--train_sampling_strategy", "sequential", *as_flags(eval_strategy="epoch")]
    schedule += as_flags(optim="sgd", lr_scheduler_type="constant", learning_rate=0.1)
    schedule += as_flags(num_train_epochs=3, save_strategy="epoch", per_device_eval_batch_size=1)
    ways = {
        "whole": (0, []),
        "corrupt": (0, []),
        "ddp-corrupt": (2, ["--dataloader_num_workers", 1]),
        "zero3-corrupt": (2, PARTITIONED),
    }
    for name, (processes, flags) in ways.items():
        path = folder / ("whole.jsonl" if name == "whole" else "corrupt.jsonl")
        data = as_flags(data_path=path, eval_data_path=path)
        batch = as_flags(per_device_train_batch_size=2 // max(processes, 1))
        runs.add(name, processes, [*schedule, *data, *batch, *flags])


@pytest.mark.parametrize("name", ["corrupt", "ddp-corrupt", "zero3-corrupt"])
def test_corrupt_files_are_skipped(runs, name):
    """Files that cannot be decoded take no part in training and evaluation: the others give the
    losses and the projector that they give alone, also where only one process has a corrupt file,
    and where a whole batch is corrupt. Each is named whenever it is read, by a worker as well."""
    processes = 1 if name == "corrupt" else 2
    assert runs.statuses(name) == [0] * processes
    losses = list(runs.log_of(name, "loss").values())
    assert losses[2::3] == [0, 0, 0]  # the third batch of an epoch has only corrupt files
    del losses[2::3]
    assert losses == pytest.approx(list(runs.log_of("whole", "loss").values()), rel=1e-5)
    for key in "eval_loss", "eval_token_accuracy":
        found, expected = (list(runs.log_of(out, key).values()) for out in (name, "whole"))
        assert len(found) == 3 and found == pytest.approx(expected, rel=1e-5)
    expected, initial = load_file(runs.projector("whole")), runs.notes("whole")["projector"]
    for key, value in load_file(runs.projector(name)).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, initial[key.removeprefix("projector.")])
    stderr = "".join(runs.stderr(name, rank) for rank in range(processes))
    for file in (
        "garbage.wav",
        "nan.wav",
        "absent.wav",
    ):  # in three epochs, and as many evaluations
        assert stderr.count(f"Warning: skipped {runs.folder / file}: ") == 6
    assert stderr.count("Warning: skipped") == 18
    assert "Warning" not in runs.stderr("whole")


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Of each LLM's shape a step of plain SGD, learning rate 1, on 8 utterances in 2 batches.

    llama3's are with the window "audio".
    """
    folder = tmp_path_factory.mktemp("gradients")
    shared = as_flags(
        whisper_model_name_or_path=make_whisper(folder / "whisper.pt", n_audio_ctx=200),
        data_path=make_jsonl(folder, [0.2 * (1 + i) + i % 3 for i in range(8)]),
        optim="sgd",
        learning_rate=1,
        lr_scheduler_type="constant",
        max_steps=1,
        save_steps=1,
        logging_steps=1,
        max_grad_norm=1e9,
        projector_hidden_dim=64,
        gradient_accumulation_steps=2,
    )
    runs = Runs(folder, shared)
    for family, tied in LLMS:
        llm = as_flags(llm_model_name_or_path=make_llm(folder / family, family, tied))
        llm += AUDIO if family == "llama3" else []
        for processes, engine, flags in (0, "", []), (2, "", []), (2, "-zero3", PARTITIONED):
            batch = as_flags(per_device_train_batch_size=4 // max(processes, 1))
            for checkpointing in [], ["--gradient_checkpointing"]:
                name = f"{family}-{processes}{engine}{''.join(checkpointing)}"
                runs.add(name, processes, [*llm, *batch, *flags, *checkpointing])
    runs.do()
    return runs


@pytest.mark.parametrize("family", [family for family, _ in LLMS])
def test_the_same_gradient_everywhere(gradients, family):
    """A process, DDP and ZeRO-3, with and without gradient checkpointing, see one gradient, in the
    encoder's whole window as in one that follows the audio."""
    names = [name for name in gradients.recipes if name.startswith(family)]
    assert len(names) == 6
    steps = []
    for name in names:
        after, before = load_file(gradients.projector(name)), gradients.notes(name)["projector"]
        gradient = {key: before[key] - after[f"projector.{key}"] for key in before}
        loss, norm = (gradients.log_of(name, key)[1] for key in ("loss", "grad_norm"))
        steps.append((loss, norm, gradient))
    first_loss, first_norm, gradient = steps[0]
    norm = torch.stack([value.norm() for value in gradient.values()]).norm().item()
    assert first_norm == pytest.approx(norm, rel=1e-4) and norm > 1e-2
    for loss, norm, other_gradient in steps[1:]:
        assert loss == pytest.approx(first_loss, rel=1e-5)
        assert norm == pytest.approx(first_norm, rel=1e-5)
        for key in gradient:  # differences of weights below 1, rounded to 6e-8
            torch.testing.assert_close(other_gradient[key], gradient[key], rtol=1e-4, atol=3e-7)


FINISHED = ["plain-fp32", "zero3-fp32", "whole", "grouped-frozen"]


@pytest.fixture(scope="module")
def agents(runs):
    """Trainings by two torchruns with a worker each, which meet on the loopback as nodes would.

    Each has a working folder of its own. They do finished trainings again, too.
    """
    nodes = [runs.folder / f"node-{rank}" for rank in (0, 1)]
    shutil.copytree(runs.folder / "zero3-fp32-killed", runs.folder / "agents-torn")
    (runs.folder / "agents-torn" / f"checkpoint-{STEPS}" / "trainer_state.json").write_text("{")
    for name in "agents", "agents-torn":
        runs.add(name, *runs.recipes["zero3-fp32"])
    for name in FINISHED:
        shutil.copytree(runs.folder / name, runs.folder / f"{name}-again")
        runs.add(f"{name}-again", *runs.recipes[name])
    longer = as_flags(max_steps=STEPS + 2)
    for name in "ddp-bf16", "zero3-fp32":
        shutil.copytree(runs.folder / name, runs.folder / f"{name}-of-1")
        runs.add(f"{name}-of-1", 1, [*runs.recipes[name][1], *longer])
    # One node has the checkpoint, the other what a second process leaves. c10d numbers the nodes as
    # it likes, so that with both ways round the first process is once the one that sees nothing
    for out, (here, there) in {"on-node-0": nodes, "on-node-1": nodes[::-1]}.items():
        shutil.copytree(runs.folder / "ddp-bf16", here / out)
        torn = there / out / f"checkpoint-{STEPS}"
        torn.mkdir(parents=True)
        shutil.copy(runs.folder / "ddp-bf16" / torn.name / "rng_state_1.pth", torn)
        runs.add(out, 2, [*runs.recipes["ddp-bf16"][1], *longer, *as_flags(output_dir=out)])
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--rdzv_id=west", "--rdzv_backend=c10d", f"--rdzv_endpoint={free_endpoint()}"]
    script = [ROOT / "tests" / "several.py", runs.file()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen([*map(str, (*command, *script))], cwd=node, env=env) for node in nodes
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.terminate()
    return runs


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_training_started_again(agents, name):
    """It says that it is finished, and changes no file: not by --max_steps, for whole epochs, for a
    fraction, by ZeRO-3. It once trained a step more each time and deleted the good checkpoints."""
    processes = max(agents.recipes[name][0], 1)
    assert agents.statuses(f"{name}-again") == [0] * processes
    assert "Training is finished: " in agents.stdout(f"{name}-again")
    files = [path for path in (agents.folder / name).rglob("*") if path.is_file()]
    again = agents.folder / f"{name}-again"
    assert len(files) == sum(path.is_file() for path in again.rglob("*")) > 6
    for path in files:
        other = again / path.relative_to(agents.folder / name)
        assert other.read_bytes() == path.read_bytes()
        assert other.stat().st_mtime_ns == path.stat().st_mtime_ns


def test_two_nodes_equal_one(agents):
    """Two agents of torchrun with a worker each train what one agent with two workers does."""
    assert agents.statuses("agents") == [0, 0]
    assert agents.log_of("agents", "loss") == agents.log_of("zero3-fp32", "loss")
    weights = load_file(agents.projector("zero3-fp32"))
    assert same_tensors(load_file(agents.projector("agents")), weights)


def test_two_nodes_ignore_a_torn_checkpoint(agents):
    """A torn checkpoint in a folder that nodes share is passed over by all of them."""
    assert agents.statuses("agents-torn") == [0, 0]
    assert resumed_at(agents, "agents-torn") == STEPS - 2
    assert agents.log_of("agents-torn", "loss") == agents.log_of("zero3-fp32", "loss")
    weights = load_file(agents.projector("zero3-fp32"))
    assert same_tensors(load_file(agents.projector("agents-torn")), weights)


@pytest.mark.parametrize("name", ["on-node-0", "on-node-1"])
def test_nodes_without_a_shared_output_dir(agents, name):
    """Where one node has the checkpoint and the other has not, as when --output_dir is not shared,
    all processes end by the same line. The second node once moved its part away and began at step
    0, while the first one resumed."""
    assert agents.statuses(name) == [1, 1]
    for process in 0, 1:
        lines = agents.stderr(name, process).splitlines()
        assert len(lines) == 1 and "Nodes must share --output_dir" in lines[0]
        assert "Starting" not in agents.stdout(name, process)
    for node in 0, 1:  # nothing was trained, moved or written
        folder = agents.folder / f"node-{node}" / name
        newest = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
        assert newest == STEPS


def test_another_number_of_processes(agents):
    """DDP's checkpoint of 2 processes serves 1, which goes on to its larger --max_steps; ZeRO-3's
    does not, and a line says the remedy."""
    assert agents.statuses("ddp-bf16-of-1") == [0]
    assert len(agents.log_of("ddp-bf16-of-1", "loss")) == STEPS + 2
    assert agents.statuses("zero3-fp32-of-1") == [1]
    checkpoint = agents.folder / "zero3-fp32-of-1" / f"checkpoint-{STEPS}"
    message = agents.stderr("zero3-fp32-of-1").splitlines()[-1]
    assert message == f"{checkpoint}: saved by 2 processes of DeepSpeed; resume with as many"
    assert "Traceback" not in agents.stderr("zero3-fp32-of-1")
