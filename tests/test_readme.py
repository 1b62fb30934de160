"""README.md and docs/ say what is so: their commands run, their tables hold every flag, their links

lead on, and the first page stays one.
"""

import ast
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tokenize
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, TINY, free_endpoint, run

import model
from dataset import SpeechDataset, load_audio
from model import ModelArguments, ProjectorArguments
from recognize import DecodingArguments, GenerationArguments
from train import TrainingArguments

PAGES = {path.name: path.read_text("utf-8") for path in ROOT.glob("docs/*.md")}
README = PAGES["README.md"] = (ROOT / "README.md").read_text("utf-8")


def snippet(page, heading, language, nth=0):
    """The nth fenced block of a language in the section of a page that stands under a heading."""
    section = re.split("^##+ ", PAGES[page].partition(f"\n{heading}\n")[2], flags=re.M)[0]
    return re.findall(rf"^```{language}\n(.*?)\n```$", section, re.M | re.S)[nth]


def make_archive(path, folder, top):
    """A .tar.gz of folder/top, which it removes: what is left is what one downloads."""
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder / top, top)
    for file in sorted((folder / top).rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (folder / top).rmdir()


def make_audio(path, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(16000 * seconds)), 16000)


def prepared(heading, folder):
    """Runs the recipe under a heading in a folder: its shell lines, then its Python."""
    run("bash", "-ec", snippet("recipes.md", heading, "bash"), cwd=folder)
    run(sys.executable, "-c", snippet("recipes.md", heading, "python"), cwd=folder)


def test_aishell(tmp_path):
    """A speaker is an archive in the archive, words are spaced, and some have no transcript."""
    wavs = tmp_path / "data_aishell" / "wav"
    for name in "train/S0002/BAC009S0002W0122", "dev/S0724/BAC009S0724W0121":
        make_audio(wavs / f"{name}.wav", 0.5)
        make_audio(wavs / f"{name[:-3]}999.wav", 0.5)  # without a transcript
        part, speaker, _ = name.split("/")
        make_archive(wavs / f"{speaker}.tar.gz", wavs, part)
    make_audio(wavs / "test/S0764/BAC009S0764W0121.wav", 0.7)
    make_archive(wavs / "S0764.tar.gz", wavs, "test")
    transcript = tmp_path / "data_aishell/transcript/aishell_transcript_v0.8.txt"
    transcript.parent.mkdir()
    transcript.write_text(
        "BAC009S0002W0122 而 对 楼市 成交 抑制 作用 最 大 的 限 购\n"
        "BAC009S0003W0123 没有 录音\n"
        "BAC009S0724W0121 广州市  房地产 中介 协会 分析\n"
        "BAC009S0764W0121 甚至 出现 交易 几乎 停滞 的 情况\n",
        "utf-8",
    )
    make_archive(tmp_path / "data_aishell.tgz", tmp_path, "data_aishell")
    prepared("## AISHELL-1", tmp_path)
    wanted = {
        "train": ("train/S0002/BAC009S0002W0122", "而对楼市成交抑制作用最大的限购", 0.5),
        "dev": ("dev/S0724/BAC009S0724W0121", "广州市房地产中介协会分析", 0.5),
        "test": ("test/S0764/BAC009S0764W0121", "甚至出现交易几乎停滞的情况", 0.7),
    }
    for part, (name, text, seconds) in wanted.items():
        utterances = SpeechDataset(f"{tmp_path}/data_aishell/{part}.jsonl", True)
        assert [utterance["txt"] for utterance in utterances] == [text]
        assert utterances[0]["wav"] == f"{wavs}/{name}.wav"
        assert utterances[0]["duration"] == seconds
        assert len(load_audio(utterances[0]["wav"])) == round(16000 * seconds)


def test_librispeech(tmp_path):
    """The three training sets are one, both tests stay apart, and text is lower case."""
    trains = ["train-clean-100", "train-clean-360", "train-other-500"]
    parts = [*trains, "dev-clean", "dev-other", "test-clean", "test-other"]
    for i, part in enumerate(parts):
        chapter = tmp_path / f"LibriSpeech/{part}/{i}/77"
        for k in range(2):
            make_audio(chapter / f"{i}-77-000{k}.flac", 0.1 * (i + 1))
        lines = f"{i}-77-0000 HE SAID {part.upper()}\n{i}-77-0001 IT'S MISTER QUILTER\n"
        (chapter / f"{i}-77.trans.txt").write_text(lines)
        (tmp_path / "LibriSpeech/README.TXT").write_text("in every archive")
        make_archive(tmp_path / f"{part}.tar.gz", tmp_path, "LibriSpeech")
    prepared("## LibriSpeech", tmp_path)
    wanted = {"train": trains, "dev": ["dev-clean", "dev-other"]}
    for name in "train", "dev", "test-clean", "test-other":
        utterances = SpeechDataset(f"{tmp_path}/LibriSpeech/{name}.jsonl", True)
        said = [
            text
            for part in wanted.get(name, [name])
            for text in (f"he said {part}", "it's mister quilter")
        ]
        assert [utterance["txt"] for utterance in utterances] == said
        lengths = [len(utterance["waveform"]) / 16000 for utterance in utterances]
        assert lengths == pytest.approx([utterance["duration"] for utterance in utterances])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where README's commands find what they name: scripts, corpora of 16 lines, projectors."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), ROOT / "ds_config_zero3.json", ROOT / "tests"]:
        (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", folder / "docs")
    for corpus in ".", "data_aishell", "LibriSpeech":
        (folder / corpus).mkdir(exist_ok=True)
        for name in "train", "dev", "test", "test-clean", "test-other":
            part = TINY / ("train.jsonl" if name == "train" else "test.jsonl")
            lines = [json.loads(line) for line in part.read_text("utf-8").splitlines()[:16]]
            lines = [json.dumps(line | {"wav": str(TINY / line["wav"])}) for line in lines]
            (folder / corpus / f"{name}.jsonl").write_text("\n".join(lines))
    for name in "aishell", "librispeech":
        (folder / "exp" / name).mkdir(parents=True)
        shutil.copy(TINY / "projector.safetensors", folder / "exp" / name / "model.safetensors")
    return folder


def shell(commands, folder, **env):
    """The output of README's commands, on two processes of a CPU and the demo's models."""
    for pattern, tiny in (
        (r"(--llm_model_name_or_path) \S+", rf"\1 {TINY}/llm"),
        (r"(--whisper_model_name_or_path) \S+", rf"\1 {TINY}/whisper.pt"),
        (r"(--nproc_per_node)=8", r"\1=2"),
        (r"--bf16 True", "--bf16 True --max_steps 2"),
    ):
        commands = re.sub(pattern, tiny, commands)
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"CUDA_VISIBLE_DEVICES": ""}
    return run("bash", "-ec", commands, env=env, cwd=folder).stdout


def smaller(commands, *pairs):
    """Commands in which each printed flag of (printed, small) pairs has become the small one."""
    for printed, small in pairs:
        assert printed in commands
        commands = commands.replace(printed, small)
    return commands


@pytest.mark.parametrize("nth", range(2))
def test_train_and_recognize(folder, nth):
    """The commands for one GPU, and those for eight, which decode a checkpoint of the first."""
    commands = snippet("README.md", "## Train and recognize", "bash", nth)
    printed = [("--max_steps 2000", "--max_steps 2"), ("checkpoint-600", "checkpoint-2")][nth]
    assert "WER" in shell(smaller(commands, printed), folder)
    assert len((folder / "result.txt").read_text().splitlines()) == 16


@pytest.mark.parametrize("nth", range(4))
def test_training_commands(folder, nth):
    """Each way of the recipe trains and evaluates, and tensorboard has something to show."""
    flags, *commands = snippet("recipes.md", "## Training", "bash").split("\n\n# ")
    command = commands[nth].partition("\n")[2]
    if "HOST" in command:  # two nodes
        command = command.replace("HOST:29400", free_endpoint()).replace("node=8", "node=1")
        command = f"{command} &\n{command}\nwait $!"
    output = shell(f"{flags}\n{command}".replace("exp/aishell", f"exp/{nth}"), folder)
    assert output.count("'train_loss'") == 1  # the processes are one training
    assert (folder / "exp" / str(nth) / "model.safetensors").exists()
    assert list((folder / "exp" / str(nth)).rglob("events.out.tfevents*"))


def test_decoding_commands(folder):
    output = shell(snippet("recipes.md", "## Decoding", "bash"), folder)
    assert len(re.findall("^WER", output, re.M)) == 3  # not one of each process
    for name in "aishell/result", "librispeech/test-clean", "librispeech/test-other":
        assert len((folder / "exp" / f"{name}.txt").read_text().splitlines()) == 16


def test_bundled_projector(folder, tmp_path):
    command = snippet("README.md", "## Try it on a laptop", "bash")
    output = shell(command.replace("/tmp/result.txt", f"{tmp_path}/result.txt"), folder)
    assert float(re.search(r"WER ([\d.]+)", output)[1]) < 2


def test_figure(folder):
    """The figure's commands, on 16 utterances and 20 steps instead of 400 and 500."""
    commands = smaller(
        snippet("training.md", "## The demo's curve", "bash"),
        ("tests/tiny/train.jsonl", "train.jsonl"),
        ("tests/tiny/test.jsonl", "test.jsonl"),
        ("_steps 50", "_steps 10"),
        ("seq 50 50 500", "seq 10 10 20"),
    )
    shell(commands, folder)
    assert "</svg>" in (folder / "docs/demo_curve.svg").read_text()


def test_real_speech(folder):
    """The commands of our runs, then the test with the neighbour's audio, then the figure."""
    commands = smaller(
        snippet("results.md", "## Our runs", "bash"),
        ("--max_steps 2000", "--max_steps 2"),
        ("--eval_steps 100", "--eval_steps 1"),
        ("--save_steps 500", "--save_steps 2"),
    )
    assert "WER" in shell(commands, folder)
    losses = shell(snippet("training.md", "## Does the LLM use the audio?", "bash"), folder)
    assert losses.count("'eval_loss'") == 2
    shell(snippet("training.md", "## The plateau and the cliff", "bash"), folder)
    assert "</svg>" in (folder / "docs/real_curve.svg").read_text()


@pytest.mark.parametrize("with_speakers", [True, False])
def test_augmentation(tmp_path, with_speakers):
    """Copies at other speeds and joined utterances: texts, durations, files and speakers fit."""
    lines = [json.loads(line) for line in (TINY / "train.jsonl").read_text("utf-8").splitlines()]
    lines = [line | {"wav": str(TINY / line["wav"])} for line in lines[:40]]
    if with_speakers:
        lines = [line | {"speaker": line["voice"]} for line in lines]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    code = snippet("recipes.md", "## More from little data", "python")
    assert len(code.splitlines()) <= 40
    run(sys.executable, "-c", code, cwd=tmp_path)
    made = SpeechDataset(f"{tmp_path}/data/augmented.jsonl", True)
    items = list(made)
    assert all(item["error"] is None for item in items)
    originals, copies, joined = items[:40], items[40:120], items[120:]
    assert {item["txt"] for item in originals} == {line["txt"] for line in lines}
    for copy, original in zip(copies, originals * 2, strict=True):
        assert copy["txt"] == original["txt"]
    ratios = [c["duration"] / o["duration"] for c, o in zip(copies, originals * 2, strict=True)]
    assert ratios == pytest.approx([1 / 0.9] * 40 + [1 / 1.1] * 40, abs=0.01)
    words = " ".join(item["txt"] for item in joined).split()
    assert words == " ".join(item["txt"] for item in originals).split() * 3
    assert len(joined) < 120 and max(item["duration"] for item in joined) < 30


def test_wandb(folder):
    """--report_to wandb logs; without its server, into a folder."""
    flags = (
        snippet("recipes.md", "## Training", "bash").split("\n\n# ")[0].replace("aishell", "wandb")
    )
    flags = flags.replace("data_wandb", "data_aishell").replace("tensorboard", "wandb")
    shell(flags + "\npython train.py $flags", folder, WANDB_MODE="offline")
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("task", ["train, user", "decode, 5 beams"])
def test_benchmark(task, tmp_path):
    """A training and a decoding of its table, in the tiny world that a CPU can stand."""
    command = f"python tests/benchmark.py --llm tiny --whisper tiny --world {tmp_path} --gpus 2"
    output = shell(f'{command} --only "{task}" --only-window audio --only-format opus', ROOT)
    assert len(re.findall(r"[\d.]+ utt/s  RTFx +[\d.]+ .* % of matmul", output)) == 1


def test_from_python():
    """The snippet prints what is said in its bundled recording, or nearly: its model is tiny."""
    code = snippet("README.md", "## From Python", "python")
    output = run(sys.executable, "-c", code).stdout
    utterances = SpeechDataset(f"{TINY}/test.jsonl", True)
    parsed = [utterances.parse_line(i) for i in range(len(utterances))]
    spoken = {utterance["wav"]: utterance["txt"] for utterance in parsed}
    reference = spoken[str(TINY / re.search(r"audio/[\w.-]+", code)[0])]
    assert jiwer.wer(reference, " ".join(re.findall(r"\b[a-z]+\b", output))) < 0.5


def test_specaugment(llm, whisper_file, monkeypatch):
    """The example encoder takes SpeechEncoder's place: it masks in training, and there alone."""
    monkeypatch.setattr(model, "SpeechEncoder", model.SpeechEncoder)  # undoes the example's change
    exec(snippet("README.md", "## Where to change things", "python"), {"__name__": "example"})
    speech_llm, prompts = model.load_speech_llm(ModelArguments(llm, whisper_file), "cpu")
    noise = np.random.default_rng(0).integers(-9999, 9999, 32000, dtype=np.int16)
    batch = prompts.training_batch([noise], [prompts.target_ids("one two")])
    with torch.no_grad():
        plain = [speech_llm(**batch)["loss"].item() for _ in range(2)]
    masked = [speech_llm.train()(**batch)["loss"] for _ in range(2)]
    assert plain[0] == plain[1]
    assert len({*plain, *(loss.item() for loss in masked)}) == 3
    masked[0].backward()
    assert all(p.grad is not None for p in speech_llm.projector.parameters())


@pytest.mark.parametrize(
    "arguments",
    [ModelArguments, ProjectorArguments, TrainingArguments, DecodingArguments, GenerationArguments],
)
def test_every_flag_is_in_a_table(arguments):
    """Of train.TrainingArguments those that it declares itself."""
    cells = re.findall(r"^\|([^|]*)\|", PAGES["flags.md"], re.M)
    flags = set(re.findall(r"`--(\w+)`", " ".join(cells)))
    assert not set(arguments.__annotations__) - flags


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Relative links lead to files that exist."""
    folder = ROOT if page == "README.md" else ROOT / "docs"
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", PAGES[page])
    for link in map("".join, links):
        if not re.match("[a-z]+:", link):
            assert (folder / link.partition("#")[0]).exists(), link


def code_lines(path):
    """Lines of a module that hold code: no blank lines, comments and docstrings."""
    source = path.read_text("utf-8")
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped | {tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_first_page():
    """README.md can be read in two minutes, and its table counts the code lines of the modules."""
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 1500
    table = dict(re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README, re.M))
    modules = ["dataset.py", "model.py", "train.py", "recognize.py"]
    assert table == {name: str(code_lines(ROOT / name)) for name in modules}
