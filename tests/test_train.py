"""train.py, by its real command: the user's flags, equal ways to one batch, checkpoints, mistakes.

Trainings that need no command of their own are those of tests/several.py. Exact resume, nodes and
corrupt files are in test_zero3.py.
"""

import http.server
import json
import math
import shutil
import subprocess
import sys
import threading
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, make_jsonl, make_llm, make_whisper, outlive, run, torchrun, wait_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from several import PARTITIONED, Runs, as_flags, log_of, zero3

import train
from dataset import InputError, SpeechDataset
from model import ModelArguments, Projector, load_speech_llm

PROJECTOR_NAMES = [f"projector.{name}" for name in Projector(4, 4).state_dict()]
N_STEPS = 105  # of the verbatim command; 1 % of them, rounded up, are 2


def assert_close(a, b, rel):
    """That two checkpoints' tensors differ by at most rel of their norms."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= rel * b[name].norm(), name


def settings_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["west"])


def in_shell(line, *command):
    """A command that runs after a line of bash, in the same process."""
    return "bash", "-c", f'{line} && exec "$@"', "bash", *command


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with an LLM, a Whisper and two jsonl files, and the flags that name the models."""
    folder = tmp_path_factory.mktemp("parts")
    llm = make_llm(folder / "llm", num_hidden_layers=1, initializer_range=0.1)
    whisper_file = make_whisper(folder / "whisper.pt", n_audio_ctx=20)  # a window of 0.4 s
    make_jsonl(folder, [0.1 + 0.02 * (i % 11) for i in range(16)], name="train.jsonl")
    # A random LLM likes to repeat a token, so that some of these are predicted rightly
    texts = ["h" * (1 + 3 * i) for i in range(7)]
    make_jsonl(folder, [0.1 + 0.05 * (i % 5) for i in range(7)], texts, "eval.jsonl", seed=1)
    return folder, ["--llm_model_name_or_path", llm, "--whisper_model_name_or_path", whisper_file]


@pytest.fixture(scope="module")
def verbatim(parts):
    """(output_dir, stdout) of the user's command, on one process of a CPU without DeepSpeed."""
    folder, models = parts
    n_lines = N_STEPS * 64 // 5  # with 5 epochs of batches of 8 x 8
    lines = (folder / "train.jsonl").read_text() * (n_lines // 16)
    (folder / "verbatim.jsonl").write_text(lines)
    flags = f"""
        --bf16 True --output_dir {folder / "verbatim"} --num_train_epochs 5
        --per_device_train_batch_size 8 --per_device_eval_batch_size 1
        --gradient_accumulation_steps 8 --evaluation_strategy no --save_strategy steps
        --save_steps 100 --save_total_limit 10 --learning_rate 3e-4 --weight_decay 0.01
        --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1
        --report_to none --model_max_length 512 --gradient_checkpointing
        --dataloader_num_workers 4 --dataloader_prefetch_factor 10 --use_cpu
    """
    data = ["--data_path", folder / "verbatim.jsonl"]
    command = [*torchrun(1), "train.py", *models, *data, *flags.split()]
    process = run(*in_shell("umask 022", *command))
    return folder / "verbatim", process.stdout


def test_learning_rate_of_the_users_flags(verbatim):
    """--warmup_ratio 0.01 with cosine: up over 1 % of the steps, then down to 0 along a cosine."""
    rates = log_of(verbatim[0], "learning_rate")
    assert list(rates) == list(range(1, N_STEPS + 1))
    assert [rates[1], rates[2], rates[3]] == [0, 1.5e-4, 3e-4]
    for step in range(3, N_STEPS + 1):
        decay = math.cos(math.pi * (step - 3) / (N_STEPS - 2))
        assert rates[step] == pytest.approx(3e-4 * (1 + decay) / 2, rel=1e-6)
    assert rates[N_STEPS] < 1e-3 * 3e-4


def test_users_flags_train(verbatim):
    """In bf16, and with gradient checkpointing, the loss falls, and nothing is evaluated."""
    losses = list(log_of(verbatim[0], "loss").values())
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])
    assert not log_of(verbatim[0], "eval_loss")


def test_checkpoints(parts, verbatim):
    """A checkpoint holds the projector, what built it and what resuming needs; the end of training
    leaves the final projector in output_dir."""
    output_dir = verbatim[0]
    files = [output_dir / name / "model.safetensors" for name in ("checkpoint-100", ".")]
    _, llm, _, whisper_file = parts[1]
    for file in files:
        assert sorted(load_file(file)) == sorted(PROJECTOR_NAMES)
        assert settings_of(file) == {
            "llm_model_name_or_path": llm,
            "whisper_model_name_or_path": whisper_file,
            "projector_hidden_dim": 2048,
            "projector_stride": 5,
            "prompt": "Transcribe the speech",
            "encoder_window": "full",
            "chat": [
                "<|im_start|>user\n",
                "Transcribe the speech<|im_end|>\n<|im_start|>assistant\n",
                "<|im_end|>",
            ],
        }
    last = output_dir / f"checkpoint-{N_STEPS}"
    assert (last / "model.safetensors").read_bytes() == files[1].read_bytes()
    moments = torch.load(last / "optimizer.pt")["state"].values()
    tensors = load_file(files[1]).values()
    assert sorted(m["exp_avg"].shape for m in moments) == sorted(t.shape for t in tensors)
    weights = "model.safetensors", "optimizer.pt"
    rest = [file for file in last.iterdir() if file.name not in weights]
    assert all(file.stat().st_size < 50_000 for file in rest)  # the LLM has 160,000


@pytest.fixture(scope="module")
def in_docker(parts, tmp_path_factory):
    """(jsonl, output_dir) of a real run with workers under umask 027, in a /dev/shm of 1 MB.

    Docker gives 64 MB. Where nobody may mount a file system, the machine's own is used.
    """
    folder = tmp_path_factory.mktemp("docker")
    path = Path(make_jsonl(folder, [0.4] * 8))
    path.write_text(path.read_text() * 80)
    flags = ["--data_path", path, "--output_dir", folder / "out", "--use_cpu"]
    flags += as_flags(max_steps=10, save_steps=10, report_to="none", dataloader_num_workers=2)
    flags += as_flags(per_device_train_batch_size=64, dataloader_prefetch_factor=4)
    namespace = ["unshare", "-rm", *in_shell("mount -t tmpfs -o size=1m tmpfs /dev/shm")]
    if run(*namespace, "true", check=False).returncode != 0:
        namespace = []
    command = in_shell("umask 027", sys.executable, "train.py", *parts[1], *flags)
    run(*namespace, *command, timeout=100)
    return path, folder / "out"


def test_waveforms_do_not_fill_the_shared_memory(parts, in_docker):
    """Training went on to its end where /dev/shm has less than the 0.8 MB of one batch, and eight
    are prefetched. It once hung for ever. Where /dev/shm has room, waveforms go through it."""
    assert list(log_of(in_docker[1], "loss")) == [10]
    dataset = SpeechDataset(in_docker[0], require_text=True)
    _, prompts = load_speech_llm(ModelArguments(parts[1][1], parts[1][3]))
    batch = prompts.collate([dataset[i] for i in range(64)])
    has_room = shutil.disk_usage("/dev/shm").free >= 2**30
    assert isinstance(batch["waveforms"], torch.Tensor) == has_room


def test_no_worker_outlives_a_killed_training(parts, in_docker, tmp_path):
    """kill -9, as an out-of-memory killer does it, ends the workers that load audio as well: they
    would wait forever to send a batch, since they hold both ends of the pipe."""
    flags = [*parts[1], "--data_path", in_docker[0], "--output_dir", tmp_path, "--use_cpu"]
    flags += as_flags(max_steps=100_000, save_steps=5, report_to="none", dataloader_num_workers=2)
    flags += as_flags(per_device_train_batch_size=64, dataloader_persistent_workers=True)
    command = [sys.executable, "train.py", *map(str, flags), "--disable_tqdm", "True"]
    with open(tmp_path / "log", "w") as log:
        training = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    wait_for(lambda: list(tmp_path.glob("checkpoint-*")), training)
    workers = psutil.Process(training.pid).children()
    training.kill()
    training.wait()
    assert len(workers) == 2 and not outlive(workers)


def test_mode_of_the_projector(verbatim, in_docker):
    """The umask says who may read a projector: 022 everybody, 027 the group. It was 0600."""
    for folder, step, mode in (verbatim[0], 100, 0o644), (in_docker[1], 10, 0o640):
        for name in f"checkpoint-{step}", ".":
            file = folder / name / "model.safetensors"
            assert file.stat().st_mode & 0o777 == mode


@pytest.fixture(scope="module")
def ways(parts):
    """The same training by batches of 8: at once, accumulated, by DDP, and by compiled layers; what
    others make of its checkpoints; and trainings that diverge at their third step."""
    folder, models = parts
    flags = as_flags(
        data_path=folder / "train.jsonl",
        eval_data_path=folder / "eval.jsonl",
        num_train_epochs=3,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        prompt="English/words",
    )
    runs = Runs(folder, [*models, *flags])

    def sizes(batch, accumulation, eval_batch):
        return as_flags(
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=eval_batch,
        )

    compiled, checkpointing = ["--compile"], ["--gradient_checkpointing"]
    runs.add("at once", 0, sizes(8, 1, 7))
    runs.add("accumulated", 0, sizes(2, 4, 1))
    runs.add("two processes", 2, sizes(4, 1, 2))
    runs.add("compiled", 2, [*sizes(2, 2, 4), *compiled, *checkpointing])
    no_eval = ["--eval_strategy", "no"]  # which would be compiled too
    runs.add("zero3-compiled", 2, [*sizes(2, 2, 1), *PARTITIONED, *compiled, *no_eval])
    capped = zero3(stage3_model_persistence_threshold=190_000)  # a part of the LLM stays gathered
    flags = [*sizes(4, 1, 1), *capped, *compiled, *checkpointing, *no_eval]
    runs.add("zero3-compiled-checkpointing", 2, flags)
    often = [*sizes(4, 1, 2), "--save_steps", 1, "--resume_from_checkpoint", "True"]
    runs.add("killed", 2, often, "resumed", kill_when="checkpoint-3")
    other = as_flags(prompt="German/words", projector_stride=4, encoder_window="audio")
    other += as_flags(projector_hidden_dim=7, whisper_model_name_or_path=folder / "copy.pt")
    shutil.copy(folder / "whisper.pt", folder / "copy.pt")
    runs.add("resumed", 2, [*often, *other])
    # These begin when the two workers of several.py have done all the above
    moved = shutil.copytree(folder / "llm", folder / "moved" / "llm")
    flags = ["--projector_model_path", runs.projector("at once")]
    flags += as_flags(llm_model_name_or_path=moved, learning_rate=0, max_steps=3)
    runs.add("continued", 0, flags)
    diverging = as_flags(learning_rate=1e30, max_grad_norm=0, warmup_steps=4, max_steps=12)
    diverging += [*as_flags(save_steps=1, save_total_limit=2), *no_eval]
    rarely = ["--logging_steps", 100]  # a checkpoint was once saved before its loss was looked at
    runs.add("diverged", 0, diverging)
    runs.add("diverged-rarely-logged", 2, [*diverging, *rarely])
    runs.add("diverged-zero3-rarely-logged", 2, [*diverging, *rarely, *PARTITIONED])
    runs.do()
    return runs


ZERO3_WAYS = ["zero3-compiled", "zero3-compiled-checkpointing"]
WAYS = ["accumulated", "two processes", "compiled", *ZERO3_WAYS]


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_a_batch(ways, way):
    """8 utterances at once, 2 x 4 accumulated, 2 processes x 4, and 2 x 2 x 2 by compiled and
    checkpointed layers, by DDP and by ZeRO-3, train the same projector, by the same losses, though
    transcripts differ in length: each target token counts alike."""
    losses = ways.log_of("at once", "loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6] and len(set(losses.values())) == 6
    assert ways.log_of(way, "loss") == pytest.approx(losses, rel=1e-5)
    norms = ways.log_of("at once", "grad_norm")
    assert ways.log_of(way, "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert_close(ways.projector(way), ways.projector("at once"), 1e-5)


@pytest.mark.parametrize("way", ["at once", *WAYS])
def test_compiling(ways, way):
    """--compile compiles the LLM's layers, under DeepSpeed too, which once ignored it; without the
    flag nothing is compiled on a CPU. Compiled layers recompute their activations by themselves:
    Trainer's checkpointing would stand in their graphs and make them slower. And they keep neither
    DDP nor the process group alive; see the test of test_zero3."""
    for rank in range(len(ways.statuses(way))):
        notes = ways.notes(way, rank)
        assert (notes["graphs"] > 0) == ("compiled" in way)
        assert notes["checkpointed"] == 0 and notes["left"] == []


@pytest.mark.parametrize("way", ["accumulated", "two processes", "compiled"])
def test_evaluation_does_not_depend_on_its_batches(ways, way):
    """Loss and token accuracy of --eval_data_path are per target token, whatever the batch size and
    the number of processes; they are those of the projector of that step."""
    for key in ("eval_loss", "eval_token_accuracy"):
        at_once = ways.log_of("at once", key)
        assert list(at_once) == [3, 6]
        assert ways.log_of(way, key) == pytest.approx(at_once, rel=1e-5)
    assert 0 < ways.log_of("at once", "eval_token_accuracy")[6] < 1


def test_resume_with_other_flags(ways):
    """The same command goes on from its latest checkpoint, which --resume_from_checkpoint True asks
    for as well, says so, and ends as if not stopped. What the checkpoint says of prompt, stride,
    sizes and window is used and printed; the names of the models are those of the run."""
    assert ways.statuses("killed") == [-9, -9] and ways.statuses("resumed") == [0, 0]
    assert "Starting from step 0" in ways.stdout("killed")
    assert f"Resuming from {ways.folder}/resumed/checkpoint-" in ways.stdout("resumed")
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert ways.log_of("resumed", key) == ways.log_of("two processes", key)
    assert_close(ways.projector("resumed"), ways.projector("two processes"), 0)
    settings = settings_of(ways.projector("two processes"))
    settings["whisper_model_name_or_path"] = str(ways.folder / "copy.pt")
    assert settings_of(ways.projector("resumed")) == settings
    assert f"settings: {settings}" in ways.stdout("resumed")


def test_start_from_a_projector(ways):
    """--projector_model_path trains on from that projector: at a learning rate of 0, it stays. The
    checkpoint names the LLM of this run, which has moved to another folder."""
    assert "Starting from step 0" in ways.stdout("continued")
    assert_close(ways.projector("continued"), ways.projector("at once"), 0)
    expected = ways.log_of("at once", "eval_loss")[6]
    assert ways.log_of("continued", "eval_loss")[3] == pytest.approx(expected, rel=1e-5)
    settings = settings_of(ways.projector("at once"))
    settings["llm_model_name_or_path"] = str(ways.folder / "moved" / "llm")
    assert settings_of(ways.projector("continued")) == settings


@pytest.mark.parametrize("name", ["", "-rarely-logged", "-zero3-rarely-logged"])
def test_a_training_that_diverges_ends(ways, name):
    """The first loss that is not finite ends all processes in one line, before anything is saved
    over the good checkpoints, however rarely losses are logged. It once trained on to a status of 0
    and checkpoints that held nothing but NaN."""
    name = f"diverged{name}"
    statuses = ways.statuses(name)
    assert statuses == [1] * len(statuses)
    for rank in range(len(statuses)):
        stderr = ways.stderr(name, rank)
        assert stderr.splitlines()[-1].startswith("step 3: loss is nan: training has diverged")
        assert "Traceback" not in stderr
    checkpoints = sorted((ways.folder / name).iterdir())
    assert [path.name for path in checkpoints] == ["checkpoint-1", "checkpoint-2"]
    for checkpoint in checkpoints:
        assert all(t.isfinite().all() for t in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_infinite_gradient_norm(tmp_path, precision):
    """It ends training, but not in fp16, whose scaler skips a step in which gradients overflow. A
    CPU has no scaler, so that the norm is given to the log here."""
    flags = {} if precision == "fp32" else {precision: True}
    args = train.TrainingArguments(
        data_path="", output_dir=str(tmp_path), use_cpu=True, report_to="none", **flags
    )
    trainer = train.ProjectorTrainer(torch.nn.Linear(1, 1), args)
    trainer.log({"loss": 1.0, "grad_norm": 1.0})
    overflow = {"loss": 1.0, "grad_norm": math.inf}
    if precision == "fp16":
        trainer.log(overflow)
        overflow = {"loss": math.nan}
    with pytest.raises(InputError, match="training has diverged"):
        trainer.log(overflow)


def test_a_projector_of_nan_is_not_resumed(ways, mistaken, tmp_path):
    """A checkpoint that is not finite is refused in one line that names it."""
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(ways.folder / "at once" / checkpoint.name, checkpoint)
    file = checkpoint / "model.safetensors"
    tensors, settings = load_file(file), json.dumps(settings_of(file))
    tensors["projector.linear1.weight"][3, 5] = math.nan
    save_file(tensors, file, {"west": settings})
    message = mistaken("--output_dir", tmp_path)
    assert message.startswith(f"{file}: ") and "not finite" in message
    assert len(message.splitlines()) == 1


def order_of(lengths, batch_size, epoch, seed=42, data_seed=None):
    """The order of an epoch, as a Trainer gets it that has drawn other random numbers before."""
    seeds = {"seed": seed, "data_seed": data_seed}
    args = SimpleNamespace(train_batch_size=batch_size, gradient_accumulation_steps=1, **seeds)
    dataset, state = SimpleNamespace(seconds=lengths), SimpleNamespace(epoch=epoch)
    torch.rand(1)
    trainer = SimpleNamespace(args=args, train_dataset=dataset, state=state)
    return list(train.EpochLengthSampler(trainer))


def test_batches_of_like_length():
    """--train_sampling_strategy group_by_length leaves little padding. It takes each utterance once
    an epoch, in an order that depends on seed and epoch alone, and is another for others."""
    lengths, orders = [0.1 * (i * 37 % 300) for i in range(801)], []
    for epoch, seed in (0, 42), (1, 42), (2, 42), (0, 1):
        order = order_of(lengths, 8, float(epoch), seed)
        assert sorted(order) == list(range(801))
        assert order_of(lengths, 8, epoch + 0.37, seed) == order
        assert order_of(lengths, 8, float(epoch), seed=7, data_seed=seed) == order
        batches = [[lengths[i] for i in order[k : k + 8]] for k in range(0, 801, 8)]
        padded = sum(8 * max(batch) for batch in batches)
        assert sum(lengths) > 0.9 * padded  # about half is padding in a random order
        assert order not in orders
        orders.append(order)


def test_a_mistake_ends_the_command(parts):
    """A user's mistake ends train.py with one line on stderr and status 1, before a model loads."""
    (parts[0] / "bad.jsonl").write_text('{"wav": "train-0.wav", "txt": "one"}\n{}\n')
    flags = ["--data_path", parts[0] / "bad.jsonl", "--output_dir", parts[0] / "none"]
    absent = ["--llm_model_name_or_path", "absent", "--whisper_model_name_or_path", "absent"]
    process = run(sys.executable, "train.py", *absent, *flags, "--use_cpu", check=False)
    assert process.returncode == 1
    assert f"{parts[0]}/bad.jsonl:2: " in process.stderr
    assert "Traceback" not in process.stderr


@pytest.fixture
def mistaken(parts, monkeypatch, tmp_path):
    """Runs train.main with flags added, and returns the message that ends it."""
    folder, models = parts
    flags = [*models, "--data_path", folder / "train.jsonl", "--output_dir", tmp_path, "--use_cpu"]

    def message(*added):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, [*flags, *added])])
        with pytest.raises(InputError) as error:
            train.main()
        return str(error.value)

    return message


def test_evaluation_without_audio(mistaken, tmp_path):
    """An evaluation whose audio cannot be read says so, and not that training has diverged."""
    line = {"wav": "absent.wav", "txt": "one", "duration": 0.2}
    (tmp_path / "eval.jsonl").write_text(json.dumps(line))
    flags = as_flags(max_steps=1, eval_steps=1, save_strategy="no", report_to="none")
    flags += as_flags(eval_data_path=tmp_path / "eval.jsonl", eval_strategy="steps")
    assert mistaken(*flags) == "--eval_data_path: no utterance could be read"


def test_a_finished_run_without_its_projector(parts, in_docker, tmp_path):
    """A run that was killed after its last checkpoint gets its model.safetensors when it is
    started again."""
    out = shutil.copytree(in_docker[1], tmp_path / "out")
    (out / "model.safetensors").unlink()
    flags = ["--data_path", in_docker[0], "--output_dir", out, "--use_cpu"]
    flags += as_flags(max_steps=10, save_steps=10, report_to="none", per_device_train_batch_size=64)
    assert "Training is finished" in run(sys.executable, "train.py", *parts[1], *flags).stdout
    saved = (out / "checkpoint-10" / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == saved


def test_data_that_cannot_be_used(mistaken, tmp_path):
    """A jsonl that is not there is named, for training as for evaluation, and so is a
    --model_max_length that no utterance fits."""
    for flag in ("--data_path", "--eval_data_path"):
        assert f"{tmp_path}/absent.jsonl" in mistaken(flag, tmp_path / "absent.jsonl")
    assert "--model_max_length" in mistaken("--model_max_length", 3)


def test_models_that_do_not_fit(ways, mistaken, tmp_path):
    """An unknown Whisper is answered with the names of the known ones. An LLM without a chat
    template, or a folder without an LLM, is refused by its flag. So is a projector for an LLM of
    other sizes, whether a flag names it or a checkpoint in output_dir is to be resumed."""
    message = mistaken("--whisper_model_name_or_path", "gigantic")
    assert message.startswith("--whisper_model_name_or_path gigantic: ")
    assert all(name in message for name in ("tiny", "large-v3", "turbo"))
    llm = Path(make_llm(tmp_path / "llm"))
    (llm / "chat_template.jinja").unlink()
    for path in (llm, tmp_path / "absent"):
        message = mistaken("--llm_model_name_or_path", path)
        assert message.startswith(f"--llm_model_name_or_path {path}: ")
        assert "chat template" in message
    flags = ["--llm_model_name_or_path", make_llm(tmp_path / "wide", hidden_size=64)]
    path = ways.projector("at once")
    message = mistaken(*flags, "--projector_model_path", path)
    assert message.startswith(f"{path}: expected a projector for these models")
    assert len(message.splitlines()) == 1
    message = mistaken(*flags, "--output_dir", path.parent)
    checkpoint = path.parent / "checkpoint-6" / "model.safetensors"
    assert message.startswith(f"{checkpoint}: expected a projector for these models")


@pytest.mark.parametrize(
    ("added", "named"),
    [
        ("--unknown_flag 1", "--unknown_flag"),
        ("--evaluation_strategy often", "often"),
        ("--encoder_window half", "--encoder_window"),
        ("--projector_stride 0", "--projector_stride 0: expected 1 or more"),
        ("--projector_hidden_dim 0", "--projector_hidden_dim 0: expected 1 or more"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: expected 1 or more"),
        ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0: expected 1 or more"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: expected 1 or more"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor 0.1 does not work"),
        ("--neftune_noise_alpha 5", "--neftune_noise_alpha 5.0 does not work"),
        ("--batch_eval_metrics True", "--batch_eval_metrics True does not work"),
        ("--prediction_loss_only", "--prediction_loss_only True does not work"),
        ("--eval_do_concat_batches False", "--eval_do_concat_batches False does not work"),
        ("--train_sampling_strategy batch_rebalance", "batch_rebalance is not supported"),
        ("--eval_strategy steps", "--eval_strategy steps needs --eval_data_path"),
        (f"--output_dir {__file__}", f"--output_dir {__file__} is a file"),
    ],
)
def test_wrong_flags(mistaken, capsys, added, named):
    """A flag that does not exist, cannot be, or does not work with this model is named in one line,
    before it is noticed that there is no such model."""
    try:
        message = mistaken(*as_flags(llm_model_name_or_path="absent"), *added.split())
    except SystemExit:  # argparse's own end
        message = capsys.readouterr().err.splitlines()[-1]
    assert named in message and len(message.splitlines()) == 1
    assert "absent" not in message


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers huggingface_hub as the hub does; the server keeps in `commits` what each adds."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        address = f"http://{self.headers['Host']}/user/west"
        if "/preupload/" in self.path:  # no file is so large that it takes LFS
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            answer = {"files": modes}
        elif "/commit/" in self.path:
            added = [json.loads(line)["value"] for line in body.splitlines()[1:]]
            self.server.commits.append({file["path"]: b64decode(file["content"]) for file in added})
            answer = {"commitUrl": f"{address}/commit/1", "commitOid": "1", "hookOutput": ""}
        else:
            answer = {"url": address}
        self.answer(answer)

    def do_GET(self):
        self.answer({"id": "user/west", "name": "user", "sha": "1", "siblings": []})

    def answer(self, answer):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        pass


def test_push_to_hub(parts, tmp_path):
    """--push_to_hub: the final projector and a model card arrive, no checkpoint does."""
    folder, models = parts
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.commits = []  # {path in the repository: bytes}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--data_path", folder / "train.jsonl", "--output_dir", tmp_path, "--use_cpu"]
    flags += ["--max_steps", 2, "--save_steps", 1, "--report_to", "none"]
    flags += ["--push_to_hub", "--hub_model_id", "user/west", "--hub_token", "hf_x"]
    address = f"http://127.0.0.1:{server.server_address[1]}"
    env = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    run(*torchrun(2), "train.py", *models, *flags, env=env)
    server.shutdown()
    files = {path: content for commit in server.commits for path, content in commit.items()}
    assert files["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert "- west\n- automatic-speech-recognition\n" in card and "learning_rate: 5e-05" in card
    assert not [path for path in files if "checkpoint" in path]
