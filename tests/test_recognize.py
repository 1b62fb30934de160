"""Decoding: no transcript depends on its batch, no audio is lost, and result.txt is complete."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import (
    ROOT,
    TINY,
    free_endpoint,
    make_jsonl,
    make_llm,
    make_tokenizer,
    make_whisper,
    run,
    torchrun,
    wait_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import decoders
from torch.nn.modules.module import register_module_forward_pre_hook

import recognize
import train
from dataset import InputError, load_audio
from model import ModelArguments, ProjectorArguments, load_speech_llm, save_projector

DEMO = {
    "llm_model_name_or_path": TINY / "llm",
    "whisper_model_name_or_path": TINY / "whisper.pt",
    "projector_model_path": TINY / "projector.safetensors",
}
FROZEN = {name: path for name, path in DEMO.items() if "projector" not in name}
SUMMARY = (
    r"WER (\d+\.\d\d)/(\d+\.\d\d) % \(all/not flagged\): (\d+) substitutions, (\d+) deletions, "
    r"(\d+) insertions in (\d+) reference words\n"
    r"flagged: (.+)\nRTFx (\d+\.\d) \((\d+\.\d) s of audio in (\d+\.\d) s\)\n"
)


def load(parts, **projector_settings):
    """Loads (model, prompts) on the CPU in float32, with a new projector if parts have none."""
    args = ModelArguments(**{name: str(part) for name, part in parts.items()})
    projector_args = ProjectorArguments(**projector_settings)
    return load_speech_llm(args, "cpu", torch.float32, projector_args=projector_args)


def untrained(parts, folder, **projector_settings):
    """Saves a new projector for these models as train.py does; returns the three parts."""
    path = folder / "untrained.safetensors"
    save_projector(load(parts, **projector_settings)[0], path)
    return {**parts, "projector_model_path": path}


def demo_projector(path, **settings):
    """Saves the bundled projector as if it had been trained with other settings."""
    bundled = DEMO["projector_model_path"]
    metadata = json.loads(safe_open(bundled, "pt").metadata()["west"]) | settings
    save_file(load_file(bundled), path, {"west": json.dumps(metadata)})
    return path


def arguments(parts, data, result, **flags):
    """Returns recognize.py's command line as strings."""
    flags = {**parts, "data_path": data, "result_path": result, "use_cpu": True, **flags}
    words = ([f"--{name}"] + [value] * (value is not True) for name, value in flags.items())
    return [str(word) for word in itertools.chain(*words)]


def recognized(parts, data, result, **flags):
    """Runs recognize.py's main() in this process; returns the lines of its result file."""
    argv = ["recognize.py", *arguments(parts, data, result, **{"num_workers": 0, **flags})]
    with patch.object(sys, "argv", argv):
        recognize.main()
    return lines_of(result)


def start(*command, **options):
    """Starts a process of the repository; its output can be read by communicate()."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, **options}
    # Tests that run in the background inherit an ignored Ctrl-C
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([str(word) for word in command], text=True, **options)


def lines_of(result):
    return Path(result).read_text("utf-8").split("\n")[:-1]


def report_of(result):
    return Path(f"{result}.report").read_text("utf-8")


def contents(folder):
    """Returns {name: bytes} of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextmanager
def inputs_of(kind):
    """Collects the shape of the first input at each call of modules of a class."""
    shapes = []

    def hook(module, inputs):
        if type(module).__name__ == kind:
            shapes.append(tuple(inputs[0].shape))

    handle = register_module_forward_pre_hook(hook)
    try:
        yield shapes
    finally:
        handle.remove()


def demo_lines(n=150):
    """Returns n lines spread over tests/tiny/test.jsonl, with absolute paths."""
    lines = lines_in(TINY / "test.jsonl")[:: 150 // n][:n]
    return [{"wav": str(TINY / line["wav"]), "txt": line["txt"]} for line in lines]


def lines_in(jsonl):
    return [json.loads(line) for line in Path(jsonl).read_text("utf-8").splitlines()]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def noise(*seconds):
    """Returns int16 waveforms of noise."""
    random = np.random.default_rng(0)
    return [(random.normal(size=round(16000 * s)) * 3000).astype(np.int16) for s in seconds]


@pytest.fixture(scope="module")
def random_models(tmp_path_factory):
    """A random LLM, which never stops by itself, and a random Whisper with a window of 6 s."""
    folder = tmp_path_factory.mktemp("models")
    llm = make_llm(folder / "llm", "llama3")
    whisper = make_whisper(folder / "whisper.pt", n_audio_ctx=300)
    return {"llm_model_name_or_path": llm, "whisper_model_name_or_path": whisper}


@pytest.fixture(scope="module")
def demo_jsonl(tmp_path_factory):
    """23 of the demo's utterances, and one that is longer than the encoder's window."""
    folder, lines = tmp_path_factory.mktemp("demo"), demo_lines(23)
    long = np.concatenate([load_audio(line["wav"]) for line in lines[:5]])
    soundfile.write(folder / "long.flac", long, 16000)
    long_line = {"wav": str(folder / "long.flac"), "txt": " ".join(u["txt"] for u in lines[:5])}
    return write_jsonl(folder / "test.jsonl", [*lines[:7], long_line, *lines[7:]])


@pytest.fixture(scope="module")
def demo_transcripts(demo_jsonl):
    """What one process decodes from demo_jsonl, greedily."""
    return recognized(DEMO, demo_jsonl, demo_jsonl.parent / "result.txt", batch_size=8)


def error_rate(parts, data, result, **flags):
    recognized(parts, data, result, **flags)
    return float(re.match(r"[WC]ER ([\d.]+)/", report_of(result))[1])


# The commands


def test_the_command_of_the_design_works_as_it_stands(tmp_path):
    """It prints the WER of held-out speech in the final form of the summary, and RTFx.

    It runs in a folder that holds the files; the names of the models are local paths there.
    """
    command = """
    python recognize.py \\
        --llm_model_name_or_path Qwen2-1.5B-Instruct --whisper_model_name_or_path tiny \\
        --projector_model_path Qwen-1.5B-Instruct-whisper-tiny/checkpoint-600/model.safetensors \\
        --data_path test.jsonl --result_path result.txt
    """
    checkpoint = tmp_path / "Qwen-1.5B-Instruct-whisper-tiny" / "checkpoint-600"
    checkpoint.mkdir(parents=True)
    demo_projector(checkpoint / "model.safetensors")
    for name, target in {
        "recognize.py": ROOT / "recognize.py",
        "Qwen2-1.5B-Instruct": TINY / "llm",
        "tiny": TINY / "whisper.pt",
        "audio": TINY / "audio",
        "test.jsonl": TINY / "test.jsonl",
    }.items():
        (tmp_path / name).symlink_to(target)
    before = set(tmp_path.iterdir())
    words = shlex.split(command.replace("\\\n", ""))
    words[words.index("tiny")] = "./tiny"  # else it is a name to openai-whisper
    done = run(sys.executable, *words[1:], cwd=tmp_path)
    wer, sound_wer, *numbers, flagged, rtfx, seconds, wall = re.fullmatch(
        SUMMARY, done.stdout
    ).groups()
    *errors, n_words = map(int, numbers)
    assert float(wer) <= 2.5 and float(sound_wer) <= float(wer) and flagged
    assert n_words == sum(len(line["txt"].split()) for line in demo_lines())
    assert f"{100 * sum(errors) / n_words:.2f}" == wer
    decoded = sum(len(load_audio(line["wav"])) for line in demo_lines()) / 16000
    assert float(seconds) == round(decoded, 1)
    assert float(rtfx) == pytest.approx(decoded / float(wall), rel=0.1)
    assert "3/3" in done.stderr and "Warning" not in done.stderr  # the progress bar, and no more
    result = tmp_path / "result.txt"
    assert len(lines_of(result)) == 150
    assert report_of(result).startswith(done.stdout) and "num_beams=1" in report_of(result)
    assert set(tmp_path.iterdir()) - before == {result, tmp_path / "result.txt.report"}


def test_the_untrained_projector_says_nothing(tmp_path, demo_jsonl):
    """Without training the demo's WER is at least 90 %: its frozen parts do not do it alone."""
    parts = untrained(FROZEN, tmp_path)
    assert error_rate(parts, demo_jsonl, tmp_path / "result.txt") >= 90


@pytest.mark.parametrize(
    "parts",
    [
        (recognize, ModelArguments, recognize.DecodingArguments, recognize.GenerationArguments),
        (train, ModelArguments, ProjectorArguments, train.TrainingArguments),
    ],
    ids=["recognize", "train"],
)
def test_help_explains_every_own_flag(parts, capsys, monkeypatch):
    """--help of both scripts has a text and the default of each flag that is not transformers'."""
    script, *classes = parts
    monkeypatch.setenv("COLUMNS", "1000")  # a line for each flag
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        script.parse_flags()
    options = capsys.readouterr().out.split("options:")[1]
    for own_class in classes:
        for name in own_class.__annotations__:
            default = re.escape(str(getattr(own_class, name, None)))
            text = rf"\n  --{name}\b.*\s{{2,}}\w.{{9,}} \(default: {default}\)\n"
            assert re.search(text, options + "\n"), name


WRONG_FLAGS = """
--beams 5: wrong flags .*--beams
--encoder_window audio: wrong flags .*--encoder_window
--batch_size 0: --batch_size 0: expected 1 or more
--num_workers -1: --num_workers -1: expected 0 or more
--num_beams 0: --num_beams 0: expected 1 or more
--num_beams many: invalid int value
--repetition_penalty 0: --repetition_penalty 0.0: expected
--repetition_penalty nan: --repetition_penalty nan: expected
--max_new_tokens -1: --max_new_tokens -1: expected 0 or more
--no_repeat_ngram_size -1: --no_repeat_ngram_size -1: expected 0 or more
--metric bleu: invalid choice
--dtype float33: invalid choice
--normalize no: invalid choice
--result_path no/such/r.txt: --result_path .*: expected a file .*can be written .*No such
--result_path /proc/r.txt: --result_path /proc/r.txt: expected a file in a folder that can be writ
--result_path /dev/null: --result_path /dev/null: expected a file .*not a file
--result_path tests: --result_path .*/tests: expected a file .*not a file
--projector_model_path : --projector_model_path: expected a model.safetensors of train.py
--data_path nowhere.jsonl: nowhere.jsonl: cannot be read
--data_path tests: tests: cannot be read
"""


@pytest.mark.parametrize("line", WRONG_FLAGS.strip().splitlines())
def test_a_wrong_flag_is_named_before_any_model_is_loaded(tmp_path, capsys, monkeypatch, line):
    """A user's mistake is one line, with status 1 or argparse's 2, and nothing is written."""
    flag, message = line.split(": ", maxsplit=1)
    name, value = flag.removeprefix("--").split(" ")
    nothing = dict.fromkeys(DEMO, "/nowhere")  # to load one of them would be another error
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        recognized(nothing, TINY / "test.jsonl", tmp_path / "r.txt", **{name: value})
    said = capsys.readouterr().err if stopped.value.code == 2 else str(stopped.value)
    assert re.search(message, said.splitlines()[-1])
    assert stopped.value.code == 2 or "\n" not in said
    assert not list(tmp_path.iterdir())


# From Python


def test_files_and_waveforms_are_the_same_audio(demo_transcripts):
    """A str, a Path, int16 and float32 samples in [-1, 1], of numpy or torch, are transcribed
    alike: floats once were heard as silence."""
    model, prompts = load(DEMO)
    files = [line["wav"] for line in demo_lines(23)[:7]]
    waveforms = [load_audio(file) for file in files]
    floats = [waveform / np.float32(32768) for waveform in waveforms]
    expected = [(text, None) for text in demo_transcripts[:7]]
    for inputs in files, map(Path, files), waveforms, floats, map(torch.from_numpy, floats):
        assert recognize.transcribe(model, prompts, inputs) == expected
    mixture = [files[0], floats[1], waveforms[2]]
    assert recognize.transcribe(model, prompts, mixture) == expected[:3]
    assert recognize.transcribe(model, prompts, []) == []
    with pytest.raises(InputError, match=r"nowhere\.wav: cannot be decoded"):
        recognize.transcribe(model, prompts, [files[0], "nowhere.wav"])


@pytest.mark.parametrize(
    "inputs",
    [
        *("one.wav", Path("one.wav"), [None], [[0.5] * 16000], np.zeros(16000, np.int16)),
        *([np.zeros(16000, dtype)] for dtype in (float, np.int32, np.uint8)),
        *([np.full(16000, value, np.float32)] for value in (1.5, np.nan)),
        *([np.zeros(shape, np.int16)] for shape in [(1, 16000), (16000, 1), 0]),
    ],
    ids=str,
)
def test_other_inputs_are_one_clear_error(inputs):
    """A waveform of another type or shape, or one input instead of a list, is never decoded."""
    model, prompts = load(FROZEN)
    with inputs_of("Projector") as encoded, pytest.raises((TypeError, ValueError)) as stopped:
        recognize.transcribe(model, prompts, inputs)
    assert re.match("expected a (list of files|waveform)", str(stopped.value)) and not encoded


# No transcript depends on its batch


ALL_FLAGS = [
    {
        **{"num_beams": beams, "length_penalty": length_penalty},
        **{"repetition_penalty": penalty, "no_repeat_ngram_size": n, "max_new_tokens": limit},
    }
    for beams, length_penalty in [(1, 1), (3, 1), (4, -2), (2, 3)]
    for penalty, n, limit in [
        (1, 0, 0),
        (1.2, 0, 0),
        (1.5, 0, 0),
        (1, 2, 0),
        (1, 0, 9),
        (1.5, 3, 12),
    ]
]


def assert_independent_of_batches(model, prompts, waveforms, all_flags):
    """Batch sizes 1, 3 and 64, and another order, give the same [(text, flag)] with all flags.

    Returns the number of different results, and the first of them.
    """
    results = []
    for flags in all_flags:
        alone = recognize.transcribe(model, prompts, waveforms, 1, **flags)
        assert recognize.transcribe(model, prompts, waveforms, 3, **flags) == alone, flags
        others = recognize.transcribe(model, prompts, waveforms[::-1], 64, **flags)[::-1]
        assert others == alone, flags
        results.append(tuple(alone))
    return len(set(results)), results[0]


@pytest.mark.parametrize(("window", "all_flags"), [("full", ALL_FLAGS), ("audio", ALL_FLAGS[::5])])
def test_no_flag_makes_the_demo_depend_on_the_batch(tmp_path, window, all_flags):
    """In float32 neither batch size nor order changes a transcript, with any decoding flags.

    transformers' own --repetition_penalty spares as many new tokens as a prompt has padding.
    """
    projector = demo_projector(tmp_path / "model.safetensors", encoder_window=window)
    model, prompts = load({**DEMO, "projector_model_path": projector})
    waveforms = [load_audio(line["wav"]) for line in demo_lines(10)]
    waveforms.append(np.concatenate(waveforms[:5]))  # longer than the window
    waveforms += [waveforms[3][:8000], np.zeros(1, np.int16), np.zeros(30_000, np.int16)]
    with inputs_of("GELU") as encoded:
        n_results, transcripts = assert_independent_of_batches(model, prompts, waveforms, all_flags)
    # The window is the projector's own: all 250 frames, of 5 s, or blocks of 100 for the audio
    assert ({shape[-2] % 250 for shape in encoded} == {0}) == (window == "full")
    assert len(set(transcripts)) > 9  # it does not say the same whatever it hears
    assert n_results > len(all_flags) / 3  # the flags change what it says


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Mistral", "GPTNeoX"])
def test_no_flag_makes_a_random_llm_depend_on_the_batch(tmp_path, random_models, family):
    """An LLM that seldom stops is cut at each utterance's own limit, whichever share its batch."""
    tokenizer = make_tokenizer("gemma")
    tokenizer.save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(initializer_range=0.2, **sizes, **ids)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    parts = {**random_models, "llm_model_name_or_path": tmp_path}
    waveforms = noise(0.05, 1.9, 0.4, 2.0, 0.9, 8.3, 0.1, 2.1, 0.4, 4.0)
    for window in "full", "audio":
        n_results, transcripts = assert_independent_of_batches(
            *load(parts, encoder_window=window), waveforms, ALL_FLAGS[::5]
        )
        assert len(set(transcripts)) > 4 and n_results == 5


def greedy_by_hand(model, prompts, waveform, penalty, n_tokens):
    """Returns a text decoded without cache or padding. The scores of all earlier new tokens are
    penalised as in CTRL (arXiv 1909.05858, section 4.1)."""
    embeds, ids = model.embed(**prompts.recognition_batch([waveform])), []
    while len(ids) < n_tokens:
        new = model.llm.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
        scores = model.llm(inputs_embeds=torch.cat([embeds, new], dim=1)).logits[0, -1]
        for i in set(ids):
            scores[i] *= penalty if scores[i] < 0 else 1 / penalty
        ids.append(scores.argmax().item())
    return " ".join(prompts.tokenizer.decode(ids, skip_special_tokens=True).split())


@torch.no_grad()
def test_the_repetition_penalty_is_for_every_new_token(random_models):
    """Batched decoding says what an own greedy search says of each utterance alone."""
    model, prompts = load(random_models)
    waveforms = noise(0.1, 3.0, 0.6, 1.5)
    for penalty in 1.0, 1.2, 1.5:
        expected = [greedy_by_hand(model, prompts, w, penalty, n_tokens=16) for w in waveforms]
        flags = {"repetition_penalty": penalty, "max_new_tokens": 16}
        found = recognize.transcribe(model, prompts, waveforms, **flags)
        assert [text for text, _ in found] == expected


def test_every_decoding_flag_reaches_the_search(tmp_path, demo_jsonl, demo_transcripts):
    """The command line gives what transcribe() gives with the same flags, and each changes it."""
    model, prompts = load(DEMO)
    files = [line["wav"] for line in lines_in(demo_jsonl)]
    for flags in [
        {"num_beams": 3, "length_penalty": -9.0},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"max_new_tokens": 3},
    ]:
        texts = [text for text, _ in recognize.transcribe(model, prompts, files, **flags)]
        assert recognized(DEMO, demo_jsonl, tmp_path / "result.txt", **flags) == texts
        assert texts != demo_transcripts


def test_batch_size_and_cache_reach_the_model(tmp_path, random_models):
    """batch_size bounds the segments of a forward pass; after the prompt, passes are one token."""
    data = make_jsonl(tmp_path, [0.05, 1.9, 0.4, 2.0, 0.9, 8.3, 0.1, 14.0])  # the window is 6 s
    parts = untrained(random_models, tmp_path)
    for batch_size in 2, 5:
        with inputs_of("Projector") as encoded, inputs_of("LlamaMLP") as decoded:
            recognized(parts, data, tmp_path / "r.txt", batch_size=batch_size)
        assert max(shape[0] for shape in encoded) == batch_size
        assert sum(shape[0] for shape in encoded) == 6 + 2 + 3
        prompts = [shape for shape in decoded if shape[1] > 1]
        assert len(prompts) == 2 * len(encoded)  # 2 layers
        assert len(decoded) > 20 * len(prompts)


@pytest.mark.parametrize("stride", [5, 20])
def test_the_limit_follows_the_seconds(random_models, stride):
    """It is 20 tokens and 10 a second, whatever the stride, or what --max_new_tokens says.

    At a stride of 20 a limit of one token per speech embedding cut what people say.
    """
    model, prompts = load(random_models, projector_stride=stride)
    for flags, expected in ({}, 35), ({"max_new_tokens": 3}, 3):
        with inputs_of("LlamaMLP") as decoded:
            [(_, flag)] = recognize.transcribe(model, prompts, noise(1.5), **flags)
        assert len(decoded) == 2 * expected and flag  # 2 layers


def test_generation_config_is_not_inherited(tmp_path, whisper_file):
    """Of the LLM's own generation_config.json only the stop tokens act."""
    parts = {"whisper_model_name_or_path": whisper_file}
    parts["llm_model_name_or_path"] = folder = make_llm(tmp_path / "llm", "llama3")
    plain = recognize.transcribe(*load(parts), noise(0.5, 1.5))
    own = {"repetition_penalty": 1.8, "temperature": 0.2, "top_p": 0.3, "do_sample": True}
    own |= {"num_beams": 4, "no_repeat_ngram_size": 1, "max_new_tokens": 2, "eos_token_id": 1}
    Path(folder, "generation_config.json").write_text(json.dumps(own), "utf-8")
    assert recognize.transcribe(*load(parts), noise(0.5, 1.5)) == plain
    everything = {"eos_token_id": list(range(300))}
    Path(folder, "generation_config.json").write_text(json.dumps(everything), "utf-8")
    assert recognize.transcribe(*load(parts), noise(0.5, 1.5)) == [("", None)] * 2


# Long audio


@given(st.integers(1, 60_000), st.integers(9_600, 40_000), st.integers(0, 2**31))
@settings(max_examples=100)
def test_split_at_pauses_loses_nothing(n_samples, window, seed):
    """Segments are at most a window long and join to the waveform, whatever it is."""
    waveform = np.random.default_rng(seed).integers(-32768, 32768, n_samples, np.int16)
    segments = recognize.split_at_pauses(waveform, window)
    assert all(0 < len(segment) <= window for segment in segments)
    assert np.array_equal(np.concatenate(segments), waveform)
    # All but the last fill most of the window, so that no more decoding is done than needed
    assert all(len(segment) >= window * 5 // 6 for segment in segments[:-1])


@given(st.lists(st.floats(0.5, 4.0), min_size=10, max_size=60), st.integers(0, 2**31))
@settings(max_examples=30)
def test_split_at_pauses_cuts_in_a_pause(words, seed):
    """A tone with pauses of 0.25 s is cut in them, wherever one is in the window's last sixth."""
    rate, window, parts, loud = 16000, 30 * 16000, [], []
    for seconds in words:
        n = round(seconds * rate)
        parts += [np.sin(np.arange(n) * 0.1), np.zeros(rate // 4)]
        loud += [np.ones(n, bool), np.zeros(rate // 4, bool)]
    waveform = np.concatenate(parts) * 32000
    waveform += np.random.default_rng(seed).normal(size=len(waveform)) * 32
    waveform = waveform.clip(-32768, 32767).astype(np.int16)
    loud, cut = np.concatenate(loud), 0
    for segment in recognize.split_at_pauses(waveform, window)[:-1]:
        cut += len(segment)  # no word is longer than 4 s, so the last 5 s hold a pause
        assert not loud[cut - 400 : cut + 400].any()


def test_a_long_file_loses_nothing(tmp_path):
    """Two minutes are what their utterances are alone. Each segment has its own limit of tokens,
    and is judged for itself: twelve times the same utterance are no loop."""
    model, prompts = load(DEMO)
    slots, faint = [], np.random.default_rng(0)
    for line in demo_lines(8):
        speech = load_audio(line["wav"])
        slot = (faint.normal(size=68_000) * 3).astype(np.int16)  # 4.25 s, in a window of 5 s
        slot[: len(speech)] += speech
        slot[:1600] = slot[-1600:] = 0  # the quietest place is where the next utterance begins
        slots.append(slot)
    alone, flags = zip(*recognize.transcribe(model, prompts, slots), strict=True)
    assert all(alone) and set(flags) == {None}
    [long, other] = recognize.transcribe(model, prompts, [np.concatenate(slots * 4), slots[3]])
    assert long == (" ".join(alone * 4), None) and other == (alone[3], None)
    soundfile.write(tmp_path / "long.flac", np.concatenate(slots[:1] * 12), 16000)
    data = write_jsonl(tmp_path / "long.jsonl", [{"wav": "long.flac"}])
    assert recognized(DEMO, data, tmp_path / "r.txt") == [" ".join(alone[:1] * 12)]
    assert report_of(tmp_path / "r.txt").startswith("flagged: none\n")


def test_a_batch_is_bounded_by_its_audio(tmp_path, random_models, capsys):
    """A batch of two holds at most 60 s, so that long files do not fill the memory."""
    data = make_jsonl(tmp_path, [25.0, 25.0, 40.0, 40.0, 90.0])
    recognized(untrained(random_models, tmp_path), data, tmp_path / "r.txt", batch_size=2)
    assert "4/4" in capsys.readouterr().err  # 90, 40, 40, and 25 + 25


# result.txt is complete


def test_two_processes_equal_one(tmp_path, demo_jsonl, demo_transcripts):
    """torchrun's result is one process' byte for byte, with an odd number of lines for 2 ranks."""
    lines = demo_jsonl.read_text("utf-8").splitlines()
    odd, result = tmp_path / "odd.jsonl", tmp_path / "result.txt"
    odd.write_text("\n".join([*lines, lines[0]]) + "\n", "utf-8")
    script = tmp_path / "script.py"  # gloo's threads would abort a process that keeps its group
    script.write_text(
        "import runpy, sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'recognize.py')!r}, run_name='__main__')\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    done = run(*torchrun(2), script, *arguments(DEMO, odd, result, batch_size=4))
    expected = [*demo_transcripts, demo_transcripts[0]]
    assert result.read_bytes() == "".join(f"{line}\n" for line in expected).encode()
    assert done.stdout.count("WER") == 1 and done.stdout.count("RTFx") == 1  # one process reports
    assert "4/4" in done.stderr  # and decodes its half of the 7 batches


def on_two_nodes(folder, jsonls):
    """Decodes in two folders that share nothing, in processes with the variables of torchrun.

    Each folder has an old result.txt. Returns each node's finished (process, stdout, stderr).
    """
    host, port = free_endpoint().split(":")
    processes = []
    for rank, lines in enumerate(jsonls):
        node = folder / f"node{rank}"
        node.mkdir()
        (node / "result.txt").write_text("old\n")
        write_jsonl(node / "data.jsonl", lines)
        env = {"MASTER_ADDR": host, "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank)}
        env |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        argv = arguments(DEMO, "data.jsonl", "result.txt", batch_size=3, num_workers=0)
        command = [sys.executable, ROOT / "recognize.py", *argv]
        processes.append(start(*command, cwd=node, env={**os.environ, **env}))
    return [(process, *process.communicate(timeout=200)) for process in processes]


def test_two_nodes_without_a_shared_folder(tmp_path, demo_jsonl, demo_transcripts):
    """The main node's result is complete; it once held the lines of that node alone."""
    for process, _, errors in on_two_nodes(tmp_path, [lines_in(demo_jsonl)] * 2):
        assert process.returncode == 0, errors
    assert lines_of(tmp_path / "node0" / "result.txt") == demo_transcripts
    assert set(contents(tmp_path / "node1")) == {"data.jsonl", "result.txt"}


@pytest.mark.parametrize("n_lines", [6, 7])
def test_nodes_that_read_different_data_are_refused(tmp_path, n_lines):
    """A jsonl of another length, or another of as many lines: an existing result stays."""
    [line] = demo_lines(1)
    jsonls = [[line | {"txt": str(i)} for i in range(n)] for n in (7, n_lines)]
    jsonls[1][3]["txt"] = "other"
    (main, out, errors), _ = on_two_nodes(tmp_path, jsonls)
    assert main.returncode == 1 and out == ""
    assert "data.jsonl: read differently by the processes; nothing is written" in errors
    for node in tmp_path.iterdir():
        assert set(contents(node)) == {"data.jsonl", "result.txt"}
        assert (node / "result.txt").read_text() == "old\n"


def test_two_runs_with_one_result_path(tmp_path):
    """Both end, and the result and the report are each the whole file of one of them."""
    parts, results = [], []
    for i, lines in enumerate([demo_lines(40)[:20], demo_lines(40)[20:33]]):
        data = write_jsonl(tmp_path / f"{i}.jsonl", lines)
        results.append(recognized(DEMO, data, tmp_path / "alone.txt"))
        argv = arguments(DEMO, data, tmp_path / "result.txt", num_workers=0, batch_size=2)
        parts.append(start(sys.executable, "recognize.py", *argv))
    outputs = [process.communicate(timeout=200)[0] for process in parts]
    assert [process.returncode for process in parts] == [0, 0]
    assert lines_of(tmp_path / "result.txt") in results
    assert any(report_of(tmp_path / "result.txt").startswith(output) for output in outputs)
    assert not [path.name for path in tmp_path.iterdir() if "tmp" in path.name]


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_an_existing_result(tmp_path, kill):
    """Nothing of it is touched, and nothing else is left behind."""
    folder, log = tmp_path / "run", tmp_path / "log"
    folder.mkdir()
    (folder / "result.txt").write_text("old\n")
    data = write_jsonl(tmp_path / "data.jsonl", demo_lines())
    argv = arguments(DEMO, data, folder / "result.txt", batch_size=1, num_workers=0, num_beams=5)
    with open(log, "w") as file:
        process = start(sys.executable, "recognize.py", *argv, stderr=file)
    wait_for(lambda: re.search(r"\b[1-9]\d*/150 ", log.read_text()), process)
    process.send_signal(kill)
    assert process.wait(timeout=60) != 0
    assert contents(folder) == {"result.txt": b"old\n"}


def test_a_full_disk_leaves_an_existing_result(tmp_path, demo_jsonl):
    """A file that cannot be written to its end replaces nothing."""
    old = {"result.txt": b"old\n", "result.txt.report": b"old report\n"}
    for name, text in old.items():
        (tmp_path / name).write_bytes(text)
    limit = "import recognize, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)); "
    argv = arguments(DEMO, demo_jsonl, tmp_path / "result.txt", num_workers=0)
    env = {"PYTHONDONTWRITEBYTECODE": "1"}
    done = run(sys.executable, "-c", limit + "recognize.main()", *argv, check=False, env=env)
    assert done.returncode == 1 and "File too large" in done.stderr and done.stdout == ""
    assert contents(tmp_path).items() >= old.items()


def test_a_closed_pipe_costs_nothing(tmp_path, demo_jsonl, demo_transcripts):
    """`recognize.py ... | head -1` has written everything before it prints, unbuffered too."""
    result = tmp_path / "result.txt"
    command = [sys.executable, "recognize.py", *arguments(DEMO, demo_jsonl, result)]
    done = run("bash", "-c", f"{shlex.join(command)} | head -1", env={"PYTHONUNBUFFERED": "1"})
    assert done.stdout.startswith("WER ") and done.stdout.count("\n") == 1
    assert lines_of(result) == demo_transcripts
    assert re.match(SUMMARY, report_of(result))[0].startswith(done.stdout)


def test_a_result_that_is_a_link(tmp_path, demo_jsonl, demo_transcripts):
    """The file behind a link is replaced and the link stays; a link to nowhere is refused."""
    folder, link = tmp_path / "folder", tmp_path / "result.txt"
    folder.mkdir()
    (folder / "target.txt").write_text("old\n")
    link.symlink_to(folder / "target.txt")
    assert recognized(DEMO, demo_jsonl, link) == demo_transcripts
    assert link.is_symlink() and lines_of(folder / "target.txt") == demo_transcripts
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "target.txt")
    with pytest.raises(InputError, match=r"--result_path .*/nowhere/target.txt: expected a file"):
        recognized(dict.fromkeys(DEMO, "/nowhere"), demo_jsonl, link)


@pytest.mark.parametrize("data", ["result", "result.report"])
def test_a_result_never_replaces_the_data(tmp_path, demo_jsonl, data):
    """Neither the result nor the report may be the jsonl."""
    shutil.copy(demo_jsonl, tmp_path / data)
    with pytest.raises(InputError, match=r"--result_path .*would replace the --data_path"):
        recognized(dict.fromkeys(DEMO, "/nowhere"), tmp_path / data, tmp_path / "result")


def test_the_report_beside_a_link_never_replaces_the_data(tmp_path, demo_jsonl):
    """The report lies beside the link that --result_path names, not beside the file behind it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "result").symlink_to(tmp_path / "elsewhere" / "result")
    data = shutil.copy(demo_jsonl, tmp_path / "result.report")
    with pytest.raises(InputError, match=r"--result_path .*would replace the --data_path"):
        recognized(dict.fromkeys(DEMO, "/nowhere"), data, tmp_path / "result")


def test_a_hypothesis_stays_on_its_line(tmp_path, demo_jsonl, demo_transcripts):
    """Line breaks of any kind in what the LLM says become spaces."""
    llm = tmp_path / "llm"
    shutil.copytree(TINY / "llm", llm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm)
    breaks = decoders.Replace(" ", "\r\n\u2028\x85\v")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), breaks])
    tokenizer.save_pretrained(llm)
    assert tokenizer.decode(tokenizer("one two")["input_ids"]) == "one\r\n\u2028\x85\vtwo"
    parts = {**DEMO, "llm_model_name_or_path": llm}
    recognized(parts, demo_jsonl, tmp_path / "r.txt")
    assert (tmp_path / "r.txt").read_text("utf-8").splitlines() == demo_transcripts


def test_damaged_audio_leaves_its_line_empty(tmp_path, demo_jsonl, demo_transcripts, capsys):
    """It is named with its line and reason, status 1; the others are right, and RTFx counts them.

    Damaged are a truncated file, a NaN, a wrong "duration", and one that is missing.
    """
    lines, result = lines_in(demo_jsonl), tmp_path / "result.txt"
    speech = load_audio(lines[2]["wav"])
    soundfile.write(tmp_path / "cut.wav", speech, 16000)
    os.truncate(tmp_path / "cut.wav", len(speech))  # half of the samples
    soundfile.write(tmp_path / "nan.wav", np.append(speech / 32768, np.nan), 16000, "FLOAT")
    lines[2]["wav"], lines[9]["wav"] = str(tmp_path / "cut.wav"), str(tmp_path / "nan.wav")
    lines[4]["duration"] = 99999
    lines[20] |= {"wav": "/nowhere.wav", "duration": 0.5}
    data = write_jsonl(tmp_path / "data.jsonl", lines)
    with pytest.raises(SystemExit) as stopped:
        recognized(DEMO, data, result, batch_size=4)
    _, *named = str(stopped.value).splitlines()  # Python prints it and exits with status 1
    reasons = {2: "header says", 4: '"duration" says', 9: "not finite", 20: "No such file"}
    for (i, reason), message in zip(reasons.items(), named, strict=True):
        assert message.startswith(f"{data}:{i + 1}: {lines[i]['wav']}: ") and reason in message
        assert f"\n{data}:{i + 1}: unreadable: {lines[i]['wav']}: " in report_of(result)
    expected = ["" if i in reasons else text for i, text in enumerate(demo_transcripts)]
    assert lines_of(result) == expected
    summary = re.fullmatch(SUMMARY, capsys.readouterr().out)
    assert summary[7] == "4 unreadable"
    decoded = [len(load_audio(u["wav"])) for i, u in enumerate(lines) if i not in reasons]
    assert float(summary[9]) == round(sum(decoded) / 16000, 1)


def test_keys_of_our_own_in_a_jsonl(tmp_path, demo_jsonl, demo_transcripts):
    """Keys that records use do no harm. Lines without txt are not scored."""
    keys = {"index": -1, "flag": "loop", "error": "no", "hypothesis": "spam", "seconds": -5}
    keys |= {"waveform": None, "line": 7}
    lines, result = [keys | line for line in lines_in(demo_jsonl)], tmp_path / "result.txt"
    n_words = sum(len(line["txt"].split()) for line in lines[5:])
    for scored in f"in {n_words} reference words\nflagged: none\n", "^flagged: none\nRTFx ":
        for line in lines if "^" in scored else lines[:5]:
            line.pop("txt", None)
        data = write_jsonl(tmp_path / "data.jsonl", lines)
        assert recognized(DEMO, data, result) == demo_transcripts
        assert re.search(scored, report_of(result))


def test_metric_and_normaliser_reach_the_summary(tmp_path, demo_jsonl):
    """References as printed in books have a WER of 100 %, and normalised that of the words."""
    lines = [line | {"txt": line["txt"].upper()} for line in lines_in(demo_jsonl)]
    data, result = write_jsonl(tmp_path / "data.jsonl", lines), tmp_path / "result.txt"
    assert error_rate(DEMO, data, result) == 100
    plain = error_rate(DEMO, demo_jsonl, result)
    assert error_rate(DEMO, data, result, normalize="basic") == plain <= 15
    error_rate(DEMO, demo_jsonl, result, metric="cer")
    assert re.match("CER .* reference characters\n", report_of(result))
