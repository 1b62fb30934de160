"""train.py, by its real command: the user's flags, equal ways to one batch, checkpoints, mistakes.

Trainings that need no command of their own are those of tests/several.py. Exact resume, nodes and
corrupt files are in test_zero3.py.
"""

import http.server
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import (
    ROOT,
    is_alive,
    make_jsonl,
    make_llm,
    make_whisper,
    outlive,
    run,
    torchrun,
    wait_for,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from several import PARTITIONED, Runs, as_flags, log_of

import train
from dataset import InputError
from model import Projector

PROJECTOR_NAMES = [f"projector.{name}" for name in Projector(4, 4).state_dict()]
N_STEPS = 105  # of the verbatim command; 1 % of them, rounded up, are 2


def assert_close(a, b, rel):
    """That two checkpoints' tensors differ by at most rel of their norms."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= rel * b[name].norm(), name


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
    process = run(*torchrun(1), "train.py", *models, *data, *flags.split())
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
    output_dir, settings = verbatim[0], {}
    for name in ("checkpoint-100", f"checkpoint-{N_STEPS}", "."):
        path = output_dir / name / "model.safetensors"
        with safe_open(path, "pt") as file:
            assert list(file.keys()) == sorted(PROJECTOR_NAMES)
            settings[name] = json.loads(file.metadata()["west"])
    assert settings["."] == settings["checkpoint-100"]
    _, llm, _, whisper_file = parts[1]
    assert settings["."] == {
        "llm_model_name_or_path": llm,
        "whisper_model_name_or_path": whisper_file,
        "projector_hidden_dim": 2048,
        "projector_stride": 5,
        "prompt": "Transcribe the speech",
        "all_speech_embeddings": False,
        "encoder_window": "full",
        "chat": [
            "<|im_start|>user\n",
            "Transcribe the speech<|im_end|>\n<|im_start|>assistant\n",
            "<|im_end|>",
        ],
    }
    last = output_dir / f"checkpoint-{N_STEPS}"
    assert_close(output_dir / "model.safetensors", last / "model.safetensors", 0)
    moments = torch.load(last / "optimizer.pt")["state"].values()
    tensors = load_file(path).values()
    assert sorted(m["exp_avg"].shape for m in moments) == sorted(t.shape for t in tensors)
    rest = [
        file for file in last.iterdir() if file.name not in ("model.safetensors", "optimizer.pt")
    ]
    assert all(file.stat().st_size < 50_000 for file in rest)  # the LLM has 160,000


@pytest.fixture(scope="module")
def ways(parts):
    """The same training by batches of 8: at once, accumulated, by DDP, and by compiled layers; and
    what others make of its checkpoints."""
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
    zero3 = [*PARTITIONED, *compiled, "--eval_strategy", "no"]  # which would be compiled too
    runs.add("zero3-compiled", 2, [*sizes(2, 2, 1), *zero3])
    runs.add("zero3-compiled-checkpointing", 2, [*sizes(4, 1, 1), *zero3, *checkpointing])
    often = [*sizes(4, 1, 2), "--save_steps", 1]
    runs.add("killed", 2, often, "resumed", kill_when="checkpoint-3")
    other = as_flags(prompt="German/words", projector_stride=4, encoder_window="audio")
    other += as_flags(projector_hidden_dim=7)
    runs.add("resumed", 2, [*often, *other])
    # These begin when the two workers of several.py have done all the above
    moved = shutil.copytree(folder / "llm", folder / "moved" / "llm")
    projector = ["--projector_model_path", runs.projector("at once")]
    flags = as_flags(llm_model_name_or_path=moved, learning_rate=0, max_steps=3)
    runs.add("continued", 0, [*flags, *projector])
    renamed = make_llm(folder / "renamed", num_hidden_layers=1, seed=7)
    flags = as_flags(llm_model_name_or_path=renamed, max_steps=1)
    runs.add("renamed", 0, [*flags, *projector])
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
    flag nothing is compiled on a CPU."""
    for rank in range(len(ways.statuses(way))):
        assert (ways.n_graphs(way, rank) > 0) == ("compiled" in way)


@pytest.mark.parametrize("way", ["two processes", "compiled", *ZERO3_WAYS])
def test_nothing_distributed_is_left(ways, way):
    """Compiled layers keep neither DDP nor the process group alive; see the test of test_zero3."""
    assert ways.left(way) == ["", ""]


@pytest.mark.parametrize("way", ["compiled", "zero3-compiled-checkpointing"])
def test_compiled_layers_recompute_by_themselves(ways, way):
    """Trainer's checkpointing, which has two flags in newer transformers, would stand in their
    graphs and make them slower."""
    for rank in range(len(ways.statuses(way))):
        assert ways.n_checkpointed(way, rank) == 0


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
    """The same command goes on from its newest checkpoint, says so, and ends as if not stopped.
    What the checkpoint says of prompt, stride, sizes and window is used, and a flag that differs,
    be it before a slash alone, is one warning of one process."""
    assert ways.statuses("killed") == [-9, -9] and ways.statuses("resumed") == [0, 0]
    assert f"Resuming from {ways.folder}/resumed/checkpoint-" in ways.stdout("resumed")
    for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
        assert ways.log_of("resumed", key) == ways.log_of("two processes", key)
    assert_close(ways.projector("resumed"), ways.projector("two processes"), 0)
    with (
        safe_open(ways.projector("resumed"), "pt") as resumed,
        safe_open(ways.projector("two processes"), "pt") as whole,
    ):
        assert resumed.metadata() == whole.metadata()
    for warning in (
        "--prompt was English/words in training, not German/words",
        "--projector_stride was 5 in training, not 4",
        "--projector_hidden_dim was 2048 in training, not 7",
        "--encoder_window was full in training, not audio",
    ):
        assert ways.stderr("resumed").count(f"Warning: {warning}") == 1
    assert ways.stderr("resumed").count("in training, not") == 4
    assert "in training, not" not in ways.stderr("resumed", 1)


def test_start_from_a_projector(ways):
    """--projector_model_path trains on from that projector: at a learning rate of 0, it stays. Its
    LLM may have moved to another folder."""
    assert "Starting from the first step" in ways.stdout("continued")
    assert_close(ways.projector("continued"), ways.projector("at once"), 0)
    expected = ways.log_of("at once", "eval_loss")[6]
    assert ways.log_of("continued", "eval_loss")[3] == pytest.approx(expected, rel=1e-5)
    assert "in training, not" not in ways.stderr("continued")


def test_projector_of_an_llm_of_another_name(ways):
    """An LLM of another name, but of the same sizes, may be the same one renamed: one warning names
    both, and training goes on."""
    assert ways.statuses("renamed") == [0]
    warning = "Warning: --llm_model_name_or_path was {0}/llm in training, not {0}/renamed"
    assert ways.stderr("renamed").count(warning.format(ways.folder)) == 1
    assert ways.stderr("renamed").count("in training, not") == 1


def order_of(lengths, batch_size, epoch, seed=42):
    """The order of an epoch, as a Trainer gets it that has drawn other random numbers before."""
    args = SimpleNamespace(train_batch_size=batch_size, gradient_accumulation_steps=1, seed=seed)
    utterances, state = SimpleNamespace(seconds=lengths), SimpleNamespace(epoch=epoch)
    trainer = SimpleNamespace(args=args, train_dataset=utterances, state=state)
    torch.rand(1)
    return list(train.LengthSampler(trainer))


@given(
    st.lists(st.floats(0.1, 30), min_size=1, max_size=200), st.integers(1, 16), st.integers(0, 99)
)
def test_order_of_an_epoch(lengths, batch_size, epoch):
    """--train_sampling_strategy group_by_length takes each utterance once an epoch, in an order
    that depends on seed and epoch alone, not on the random numbers drawn before: a run that resumes
    in the middle of an epoch has drawn others."""
    order = order_of(lengths, batch_size, float(epoch))
    assert sorted(order) == list(range(len(lengths)))
    assert order_of(lengths, batch_size, epoch + 0.37) == order


def test_batches_of_like_length():
    """Grouping by length leaves little padding, and epochs and seeds differ in their batches."""
    lengths, orders = [0.1 * (i * 37 % 300) for i in range(800)], []
    for epoch, seed in (0, 42), (1, 42), (2, 42), (0, 1):
        order = order_of(lengths, 8, epoch, seed)
        batches = [[lengths[i] for i in order[k : k + 8]] for k in range(0, 800, 8)]
        padded = sum(8 * max(batch) for batch in batches)
        assert sum(lengths) > 0.9 * padded  # about half is padding in a random order
        assert order not in orders
        orders.append(order)


def start(command, flags, output_dir):
    """A command in the background, which trains for a million steps unless the flags say else."""
    schedule = as_flags(max_steps=1_000_000, save_steps=5, save_total_limit=2, report_to="none")
    schedule += ["--use_cpu", *as_flags(output_dir=output_dir)]
    words = [str(word) for word in (*command, "train.py", *schedule, *flags)]
    if command == ["bash"]:
        words = ["bash", "-c", f"{shlex.join([sys.executable, *words[1:]])} & wait"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(output_dir / "log", "w") as log:
        return subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log)


def test_workers_end_with_torchrun(parts, tmp_path):
    """kill -9 of torchrun, as an out-of-memory killer does it, ends its workers and their workers.
    They once stayed, and wrote into the same output_dir as the resumed run."""
    flags = [*parts[1], "--data_path", parts[0] / "train.jsonl"]
    flags += ["--dataloader_num_workers", 1, "--dataloader_persistent_workers"]
    launcher = start(torchrun(2), flags, tmp_path)
    workers = []
    try:
        wait_for(lambda: list(tmp_path.glob("checkpoint-*")), launcher)
        workers = psutil.Process(launcher.pid).children(recursive=True)
        assert len(workers) == 4
        launcher.kill()
        launcher.wait()
        assert not outlive(workers)
    finally:
        launcher.kill()
        for worker in filter(is_alive, workers):
            worker.kill()


def test_training_outlives_its_shell(parts, tmp_path):
    """Without torchrun, training goes on to its end when the shell that started it is killed."""
    flags = [*parts[1], "--data_path", parts[0] / "train.jsonl", "--max_steps", 150]
    shell = start(["bash"], flags, tmp_path)
    wait_for(lambda: list(tmp_path.glob("checkpoint-*")), shell)
    [training] = psutil.Process(shell.pid).children()
    shell.kill()
    shell.wait()
    assert is_alive(training)
    while is_alive(training):
        time.sleep(0.05)
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "checkpoint-150").exists()


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


def test_absent_files(mistaken, tmp_path):
    """A jsonl that is not there is named, for training as for evaluation."""
    for flag in ("--data_path", "--eval_data_path"):
        assert f"{tmp_path}/absent.jsonl" in mistaken(flag, tmp_path / "absent.jsonl")


def test_unknown_whisper(mistaken):
    """An unknown Whisper is answered with the names of the known ones."""
    message = mistaken("--whisper_model_name_or_path", "gigantic")
    assert message.startswith("--whisper_model_name_or_path gigantic: ")
    assert all(name in message for name in ("tiny", "large-v3", "turbo"))


def test_not_an_llm(mistaken, tmp_path):
    """An LLM without a chat template is refused by its flag, and so is a folder that holds none."""
    llm = Path(make_llm(tmp_path / "llm"))
    (llm / "chat_template.jinja").unlink()
    for path in (llm, tmp_path / "absent"):
        message = mistaken("--llm_model_name_or_path", path)
        assert message.startswith(f"--llm_model_name_or_path {path}: ")
        assert "chat template" in message


def test_llm_of_other_sizes(ways, mistaken, tmp_path):
    """A projector for an LLM of other sizes is refused in one line, whether a flag names it or a
    checkpoint in output_dir is to be resumed, which stays as it is."""
    llm = make_llm(tmp_path / "wide", hidden_size=64)
    flags, path = ["--llm_model_name_or_path", llm], ways.projector("at once")
    message = mistaken(*flags, "--projector_model_path", path)
    assert message.startswith(f"--projector_model_path {path}: expected models of its sizes")
    assert len(message.splitlines()) == 1
    checkpoint = path.parent / "checkpoint-6" / "model.safetensors"
    before = checkpoint.read_bytes()
    message = mistaken(*flags, "--output_dir", path.parent)
    assert message.startswith(f"--projector_model_path {checkpoint}: expected models of its sizes")
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    ("added", "named"),
    [
        (["--unknown_flag", "1"], "--unknown_flag"),
        (["--model_max_length", "3"], "--model_max_length"),
        (["--evaluation_strategy", "often"], "often"),
        (["--encoder_window", "half"], "--encoder_window"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha"),
        (["--batch_eval_metrics", "True"], "--batch_eval_metrics"),
    ],
)
def test_wrong_flags(mistaken, capsys, added, named):
    """A flag that does not exist, cannot be, or does not work with this model is named in one
    line."""
    try:
        message = mistaken(*added)
    except SystemExit:  # argparse's own end
        message = capsys.readouterr().err.splitlines()[-1]
    assert named in message and len(message.splitlines()) == 1


def test_missing_flag(monkeypatch, capsys):
    """A required flag that is missing is named."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--use_cpu"])
    with pytest.raises(SystemExit) as error:
        train.main()
    assert error.value.code == 2
    assert "--data_path" in capsys.readouterr().err.splitlines()[-1]


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
