"""train.py, by its real command: the user's flags, equal ways to one batch, checkpoints, mistakes.

DeepSpeed and exact resume have test files of their own.
"""

import http.server
import json
import math
import shutil
import sys
import threading
from base64 import b64decode
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_jsonl, make_llm, make_whisper, run, torchrun
from safetensors import safe_open
from safetensors.torch import load_file

import train
from dataset import InputError
from model import Projector

PROJECTOR_NAMES = [f"projector.{name}" for name in Projector(4, 4).state_dict()]
N_STEPS = 120  # of the verbatim command; 1 % of them, rounded up, are 2


def log_of(output_dir, key):
    """{step: value} of what the newest checkpoint logged under a key."""
    checkpoint = transformers.trainer_utils.get_last_checkpoint(output_dir)
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return {entry["step"]: entry[key] for entry in state["log_history"] if key in entry}


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
    assert settings["."]["llm_model_name_or_path"] == llm
    assert settings["."]["whisper_model_name_or_path"] == whisper_file
    assert settings["."].keys() >= {"fingerprint", "prompt", "projector_stride"}
    assert_close(output_dir / "model.safetensors", path.parent / "model.safetensors", 0)
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
    """{way: output_dir} of the same training by batches of 8: at once, accumulated, and by DDP."""
    folder, models = parts
    flags = ["--data_path", folder / "train.jsonl", "--eval_data_path", folder / "eval.jsonl"]
    schedule = """
        --use_cpu --report_to none --num_train_epochs 3 --learning_rate 1e-3 --logging_steps 1
        --save_steps 2 --eval_strategy steps --eval_steps 3
    """
    flags += schedule.split()
    ways = {  # way: command, batch size, accumulation, batch size of evaluation
        "at once": ([sys.executable], 8, 1, 7),
        "accumulated": ([sys.executable], 2, 4, 1),
        "two processes": (torchrun(2), 4, 1, 2),
        "compiled": (torchrun(2), 2, 2, 4),
    }
    for way, (python, batch, accumulation, eval_batch) in ways.items():
        sizes = ["--per_device_train_batch_size", batch, "--per_device_eval_batch_size", eval_batch]
        sizes += ["--gradient_accumulation_steps", accumulation, "--output_dir", folder / way]
        compiled = ["--compile", "--gradient_checkpointing"] if way == "compiled" else []
        run(*python, "train.py", *models, *flags, *sizes, *compiled)
    return {way: folder / way for way in ways}, [*models, *flags]


@pytest.mark.parametrize("way", ["accumulated", "two processes", "compiled"])
def test_ways_to_a_batch(ways, way):
    """8 utterances at once, 2 x 4 accumulated, 2 processes x 4, and 2 x 2 x 2 by compiled and
    checkpointed layers train the same projector, by the same losses, though transcripts differ in
    length: each target token counts alike."""
    expected, found = ways[0]["at once"], ways[0][way]
    losses = log_of(expected, "loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6] and len(set(losses.values())) == 6
    assert log_of(found, "loss") == pytest.approx(losses, rel=1e-5)
    assert log_of(found, "grad_norm") == pytest.approx(log_of(expected, "grad_norm"), rel=1e-4)
    assert_close(found / "model.safetensors", expected / "model.safetensors", 1e-5)


def test_evaluation_does_not_depend_on_its_batches(ways):
    """Loss and token accuracy of --eval_data_path are per target token, whatever the batch size and
    the number of processes; they are those of the projector of that step."""
    for key in ("eval_loss", "eval_token_accuracy"):
        at_once, *others = (log_of(folder, key) for folder in ways[0].values())
        assert list(at_once) == [3, 6]
        assert others == [pytest.approx(at_once, rel=1e-5)] * 3
    assert 0 < log_of(ways[0]["at once"], "eval_token_accuracy")[6] < 1


def test_resume(parts, ways):
    """The same command goes on from its newest checkpoint, says so, and ends as if not stopped."""
    whole, resumed = ways[0]["at once"], parts[0] / "resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-6", "*.safetensors"))
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copy(whole / name / "model.safetensors", resumed / name)
    sizes = ["--per_device_train_batch_size", 8, "--per_device_eval_batch_size", 7]
    process = run(sys.executable, "train.py", *ways[1], *sizes, "--output_dir", resumed)
    assert f"Resuming from {resumed}/checkpoint-4" in process.stdout
    assert log_of(resumed, "loss") == log_of(whole, "loss")
    assert_close(resumed / "model.safetensors", whole / "model.safetensors", 0)


def test_start_from_a_projector(parts, ways):
    """--projector_model_path trains on from that projector: at a learning rate of 0, it stays."""
    path, out = ways[0]["at once"] / "model.safetensors", parts[0] / "continued"
    flags = ["--projector_model_path", path, "--output_dir", out, "--learning_rate", 0]
    process = run(sys.executable, "train.py", *ways[1], *flags, "--max_steps", 3)
    assert "Starting from the first step" in process.stdout
    assert_close(out / "model.safetensors", path, 0)
    expected = log_of(ways[0]["at once"], "eval_loss")[6]
    assert log_of(out, "eval_loss")[3] == pytest.approx(expected, rel=1e-5)


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


def test_projector_of_another_llm(parts, ways, mistaken, tmp_path):
    """A projector of another LLM is refused, and the message names the one that it belongs to."""
    path = ways[0]["at once"] / "model.safetensors"
    flags = ["--llm_model_name_or_path", make_llm(tmp_path / "llm", seed=1)]
    message = mistaken(*flags, "--projector_model_path", path)
    assert message.startswith(f"--projector_model_path {path}: ")
    assert str(parts[0] / "llm") in message


@pytest.mark.parametrize(
    ("added", "named"),
    [
        (["--unknown_flag", "1"], "--unknown_flag"),
        (["--model_max_length", "3"], "--model_max_length"),
        (["--evaluation_strategy", "often"], "often"),
    ],
)
def test_wrong_flags(mistaken, added, named):
    """A flag that does not exist, or cannot be, is named."""
    assert named in mistaken(*added)


def test_missing_flag(monkeypatch, capsys):
    """A required flag that is missing is named."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--use_cpu"])
    with pytest.raises(SystemExit) as error:
        train.main()
    assert error.value.code == 2
    assert "--data_path" in capsys.readouterr().err.splitlines()[-1]


def test_compile_without_a_compiler(parts, tmp_path):
    """One line says what is missing, and which flag does without."""
    folder, models = parts
    env = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/cache"}
    flags = ["--data_path", folder / "train.jsonl", "--output_dir", tmp_path / "out", "--compile"]
    process = run(sys.executable, "train.py", *models, *flags, env=env, check=False)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("--compile: needs a C compiler")
    assert "--compile False" in process.stderr and "Traceback" not in process.stderr


def test_resume_with_another_llm(ways, mistaken, tmp_path):
    """A checkpoint in output_dir that was trained with another LLM is not resumed, nor touched."""
    other = make_llm(tmp_path / "other", seed=7)
    message = mistaken("--llm_model_name_or_path", other, "--output_dir", ways[0]["at once"])
    assert "checkpoint-6/model.safetensors: made for other models" in message
    assert (ways[0]["at once"] / "checkpoint-6" / "model.safetensors").exists()


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
