"""Decoding: the same transcripts however they are batched, all the audio, and no night lost."""

import hashlib
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import ROOT, TINY, make_jsonl, make_llm, make_whisper, run, torchrun
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import recognize
from dataset import load_audio
from model import ModelArguments, load_speech_llm

DEMO = {
    "llm_model_name_or_path": TINY / "llm",
    "whisper_model_name_or_path": TINY / "whisper.pt",
    "projector_model_path": TINY / "projector.safetensors",
}


def untrained(parts, folder):
    """A projector fresh from its initialisation, saved for these models as train.py saves one."""
    names = {name: str(path) for name, path in parts.items()}
    model, _ = load_speech_llm(ModelArguments(**names), torch.device("cpu"), torch.float32)
    path, metadata = folder / "untrained.safetensors", {"west": json.dumps(model.settings)}
    save_file(model.state_dict(), path, metadata)
    return {**parts, "projector_model_path": path}


def arguments(parts, data, result, **flags):
    """recognize.py's command line, as strings."""
    flags = {**parts, "data_path": data, "result_path": result, **flags}
    return [*(str(w) for name, value in flags.items() for w in (f"--{name}", value)), "--use_cpu"]


def recognized(parts, data, result, **flags):
    """Runs recognize.py's main() in this process; returns the lines of its result file."""
    argv = ["recognize.py", *arguments(parts, data, result, **{"num_workers": 0, **flags})]
    with patch.object(sys, "argv", argv):
        recognize.main()
    return Path(result).read_text("utf-8").split("\n")[:-1]


def full_report(result):
    return Path(f"{result}.report").read_text("utf-8")


@contextmanager
def inputs_of(kind, call=None):
    """The shapes of the first input of each call of modules of a class, as they come."""
    shapes = []

    def hook(module, inputs):
        if type(module).__name__ == kind:
            shapes.append(tuple(inputs[0].shape))
            if call:
                call(len(shapes))

    handle = register_module_forward_pre_hook(hook)
    try:
        yield shapes
    finally:
        handle.remove()


def demo_lines(n=None):
    """Utterances of tests/tiny/test.jsonl, spread over it, with absolute paths."""
    lines = (TINY / "test.jsonl").read_text("utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    lines = lines[:: len(lines) // n][:n] if n else lines
    return [{"wav": str(TINY / line["wav"]), "txt": line["txt"]} for line in lines]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def random_parts(tmp_path_factory):
    """A random LLM, which never stops by itself, and a random Whisper with a window of 2 s."""
    folder = tmp_path_factory.mktemp("random")
    llm, whisper = make_llm(folder / "llm", "llama3"), make_whisper(folder / "whisper.pt")
    return untrained({"llm_model_name_or_path": llm, "whisper_model_name_or_path": whisper}, folder)


@pytest.fixture(scope="module")
def random_jsonl(tmp_path_factory):
    seconds = [0.05, 1.9, 0.4, 2.0, 0.9, 5.3, 0.1, 1.2, 0.4, 1.6, 0.7]  # one over the window
    return make_jsonl(tmp_path_factory.mktemp("noise"), seconds)


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
    """What one process makes of demo_jsonl, greedily."""
    return recognized(DEMO, demo_jsonl, demo_jsonl.parent / "result.txt", batch_size=8)


def error_rate(parts, data, result, **flags):
    recognized(parts, data, result, **flags)
    return float(re.match(r"WER ([\d.]+)/", full_report(result))[1])


def test_the_untrained_projector_says_nothing(tmp_path, demo_jsonl):
    """Without training the demo's WER is at least 90 %: its frozen parts do not do it alone."""
    frozen = {name: path for name, path in DEMO.items() if "projector" not in name}
    assert error_rate(untrained(frozen, tmp_path), demo_jsonl, tmp_path / "result.txt") >= 90


def test_the_bundled_projector_transcribes_held_out_speech(tmp_path):
    """The user's command prints a WER of at most 10 % as `WER a/b`, counts, RTFx and progress."""
    result = tmp_path / "result.txt"
    argv = arguments(DEMO, TINY / "test.jsonl", result)
    done = run(sys.executable, "recognize.py", *argv)
    rates = re.match(r"WER (\d+\.\d\d)/(\d+\.\d\d) % .*\b(\d+) in the references", done.stdout)
    assert float(rates[1]) <= 10 and float(rates[2]) <= float(rates[1])
    assert int(rates[3]) == sum(len(line["txt"].split()) for line in demo_lines())
    errors = re.search(r"(\d+) substitutions, (\d+) deletions, (\d+) insertions", done.stdout)
    assert abs(sum(map(int, errors.groups())) / int(rates[3]) * 100 - float(rates[1])) < 0.01
    assert re.search(r"^flagged: ", done.stdout, re.M) and re.search(
        r"^RTFx \d+", done.stdout, re.M
    )
    assert "150/150" in done.stderr  # the progress bar
    assert len(result.read_text("utf-8").splitlines()) == 150
    report = full_report(result)
    assert report.startswith(done.stdout) and '"num_beams": 1' in report and "REF:" in report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.txt", "result.txt.report"]


@pytest.mark.parametrize("num_beams", [1, 5])
def test_demo_transcripts_depend_on_no_batch(tmp_path, demo_jsonl, demo_transcripts, num_beams):
    """In fp32 batch sizes 1, 3, 8, 32 and a shuffled jsonl give the same hypotheses, in order."""
    result, flags = tmp_path / "result.txt", {"num_beams": num_beams}
    got = {n: recognized(DEMO, demo_jsonl, result, batch_size=n, **flags) for n in (1, 3, 8, 32)}
    assert got[1] == got[3] == got[8] == got[32]
    assert num_beams > 1 or got[1] == demo_transcripts
    order = np.random.default_rng(7).permutation(len(got[1]))
    lines = [json.loads(line) for line in demo_jsonl.read_text("utf-8").splitlines()]
    shuffled = write_jsonl(tmp_path / "shuffled.jsonl", [lines[i] for i in order])
    transcripts = recognized(DEMO, shuffled, result, batch_size=8, **flags)
    assert transcripts == [got[1][i] for i in order]


@pytest.mark.parametrize("num_beams", [1, 5])
def test_random_transcripts_depend_on_no_batch(tmp_path, random_parts, random_jsonl, num_beams):
    """An LLM that never stops is cut at each row's own limit, whichever rows share its batch."""
    result, flags = tmp_path / "result.txt", {"num_beams": num_beams}
    got = [
        recognized(random_parts, random_jsonl, result, batch_size=n, **flags) for n in (1, 3, 8, 32)
    ]
    assert got[0] == got[1] == got[2] == got[3]
    assert len(set(got[0])) > 5  # it does not say the same whatever it hears
    assert "no stop" in full_report(result)


def test_two_processes_equal_one(tmp_path, demo_jsonl, demo_transcripts):
    """torchrun's result is one process' byte for byte, with 24 and with 25 lines for 2 ranks."""
    lines = demo_jsonl.read_text("utf-8").splitlines()
    odd = tmp_path / "odd.jsonl"
    odd.write_text("\n".join([*lines, lines[0]]) + "\n", "utf-8")
    result = tmp_path / "result.txt"
    done = run(*torchrun(2), "recognize.py", *arguments(DEMO, odd, result, batch_size=4))
    expected = "".join(f"{line}\n" for line in [*demo_transcripts, demo_transcripts[0]])
    assert result.read_bytes() == expected.encode()
    assert done.stdout.count("WER") == 1  # one process reports
    assert sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name) == []


def test_batch_size_and_cache_reach_the_model(tmp_path, random_parts, random_jsonl):
    """batch_size bounds the rows of a forward pass; behind the prompt each pass has one place."""
    for batch_size in 2, 5:
        with inputs_of("Projector") as encoded, inputs_of("LlamaMLP") as decoded:
            recognized(random_parts, random_jsonl, tmp_path / "r.txt", batch_size=batch_size)
        assert max(shape[0] for shape in encoded) == batch_size
        # Each batch has one pass over its prompts and the KV cache makes the rest single steps
        prompts = [shape for shape in decoded if shape[1] > 1]
        assert len(prompts) == 2 * len(encoded)  # 2 layers
        assert len(decoded) > 20 * len(prompts)


def test_max_new_tokens(tmp_path, random_parts):
    """The limit is 20 tokens and one per 0.1 s of audio, or what --max_new_tokens says."""
    data = make_jsonl(tmp_path, [1.5])
    for flags, expected in ({}, 35), ({"max_new_tokens": 3}, 3):
        with inputs_of("LlamaMLP") as decoded:
            recognized(random_parts, data, tmp_path / "r.txt", **flags)
        assert len(decoded) == 2 * expected
        assert "no stop" in full_report(tmp_path / "r.txt")


def test_generation_config_is_not_inherited(tmp_path, random_parts, random_jsonl):
    """Of the LLM's own generation_config.json only the stop tokens act."""
    plain = recognized(random_parts, random_jsonl, tmp_path / "r.txt")
    folder = tmp_path / "llm"
    shutil.copytree(random_parts["llm_model_name_or_path"], folder)
    parts = {**random_parts, "llm_model_name_or_path": folder}
    own = {"repetition_penalty": 1.8, "temperature": 0.2, "top_p": 0.3, "do_sample": True}
    own |= {"num_beams": 4, "no_repeat_ngram_size": 1, "max_new_tokens": 2, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(own), "utf-8")
    assert recognized(parts, random_jsonl, tmp_path / "r.txt") == plain
    everything = list(range(300))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": everything}))
    assert not any(recognized(parts, random_jsonl, tmp_path / "r.txt"))


def make_wordy_llm(folder, words, seed=0):
    """A random LLM that knows nothing but a few words and one stop token."""
    vocabulary = {"<|im_end|>": 0, "<unk>": 1, **{word: i for i, word in enumerate(words, 2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    )
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def exhaustive(model, rows, waveform, n_tokens):
    """{ids: log probability} of all hypotheses of at most n_tokens, the stop token counted."""
    hypotheses = {
        (*words, 0)[:n_tokens]
        for length in range(n_tokens + 1)
        for words in itertools.product(range(1, model.config.vocab_size), repeat=length)
    }
    scores = {}
    for length in range(1, n_tokens + 1):
        same = [list(ids) for ids in hypotheses if len(ids) == length]
        batch = rows.batch([waveform] * len(same), same)
        with torch.no_grad():
            embeds, mask = model.embed(batch["input_ids"], batch["waveforms"])
            logits = model.llm(inputs_embeds=embeds, attention_mask=mask).logits
        logs = logits[:, -length - 1 : -1].log_softmax(-1)
        totals = logs.gather(2, torch.tensor(same)[..., None]).sum((1, 2))
        scores |= {tuple(ids): total.item() for ids, total in zip(same, totals, strict=True)}
    return scores


def test_beam_search_reproduces_an_exhaustive_search(tmp_path, whisper_file):
    """With beams for all, the winner has the best log probability / length ** length_penalty."""
    winners, greedy = {}, 0
    for seed in range(4):
        llm = make_wordy_llm(tmp_path / f"llm{seed}", ["a", "b", "c"], seed)
        model, rows = load_speech_llm(ModelArguments(str(llm), whisper_file), "cpu", torch.float32)
        model.eval()
        noise = np.random.default_rng(seed).normal(size=16000).astype(np.float32)
        scores = exhaustive(model, rows, noise, n_tokens=4)
        assert len(scores) == 1 + 4 + 16 + 64 + 256
        for penalty in -2.0, 0.0, 1.0, 3.0:
            best = max(scores, key=lambda ids: scores[ids] / len(ids) ** penalty)
            text = rows.tokenizer.decode([i for i in best if i != 0])
            for beams in 64, 1:
                args = recognize.DecodingArguments(
                    data_path="", num_beams=beams, length_penalty=penalty, max_new_tokens=4
                )
                found = recognize.transcribe(model, rows, rows.batch([noise], [[]]), args)
                if beams == 64:
                    assert found == [(text, best[-1] == 0)]
            greedy += found == [(text, best[-1] == 0)]
            winners[seed, penalty] = best
    assert greedy < len(winners)  # so num_beams mattered
    assert any(len(winners[s, -2.0]) < len(winners[s, 3.0]) for s in range(4))  # length_penalty too


def test_a_hypothesis_stays_on_its_line(tmp_path, whisper_file):
    """Line breaks of any kind in what the LLM says become spaces; the file is UTF-8."""
    words = ["one\ntwo", "three\u2028four", "fünf\r\nsechs", "七\x85八"]
    llm = make_wordy_llm(tmp_path / "llm", words, seed=1)
    parts = {"llm_model_name_or_path": llm, "whisper_model_name_or_path": whisper_file}
    parts = untrained(parts, tmp_path)
    data = make_jsonl(tmp_path, [1.0, 1.1, 1.2, 1.3, 1.4])
    recognized(parts, data, tmp_path / "result.txt", length_penalty=9, num_beams=5)
    text = (tmp_path / "result.txt").read_bytes().decode("utf-8")
    assert len(text.splitlines()) == 5 == text.count("\n")
    said = re.findall("one two|three four|fünf sechs|七 八", text)
    assert len(set(said)) >= 2  # it did say words that hold line breaks


@given(st.integers(0, 60_000), st.integers(9_600, 40_000), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_split_at_pauses_loses_nothing(n_samples, window, seed):
    """Pieces are at most a window long and join to the waveform, whatever it is."""
    waveform = np.random.default_rng(seed).normal(size=n_samples).astype(np.float32)
    pieces = recognize.split_at_pauses(waveform, window)
    assert all(0 < len(piece) <= window for piece in pieces) or n_samples == 0
    assert np.array_equal(np.concatenate(pieces), waveform)
    # All but the last fill most of the window, so that no more decoding is done than needed
    assert all(len(piece) >= window * 5 // 6 for piece in pieces[:-1])


@given(st.lists(st.floats(0.5, 4.0), min_size=10, max_size=60), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_split_at_pauses_cuts_in_a_pause(words, seed):
    """A tone with pauses of 0.25 s is cut in them, wherever one is in the window's last sixth."""
    rate, window, parts, loud = 16000, 30 * 16000, [], []
    for seconds in words:
        n = round(seconds * rate)
        parts += [np.sin(np.arange(n) * 0.1), np.zeros(rate // 4)]
        loud += [np.ones(n, bool), np.zeros(rate // 4, bool)]
    waveform = np.concatenate(parts).astype(np.float32)
    waveform += np.random.default_rng(seed).normal(size=len(waveform)).astype(np.float32) * 1e-3
    loud, place = np.concatenate(loud), 0
    for piece in recognize.split_at_pauses(waveform, window)[:-1]:
        place += len(piece)  # no word is longer than 4 s, so the last 5 s hold a pause
        assert not loud[place - 400 : place + 400].any()


def test_ten_minutes_lose_nothing_and_need_little_memory(tmp_path):
    """A 10-minute file gives what its utterances give alone, in memory bounded by its samples."""
    period, faint = 68_000, np.random.default_rng(0)  # 4.25 s, in a window of 5 s
    slots = []
    for line in demo_lines(12):
        speech = load_audio(line["wav"])
        slot = faint.normal(size=period).astype(np.float32) * 1e-4
        slot[: len(speech)] += speech
        slot[:1600] = slot[-1600:] = 0  # the quietest place is where the next utterance begins
        soundfile.write(tmp_path / f"{len(slots)}.flac", slot, 16000)
        slots.append(slot)
    short = write_jsonl(tmp_path / "short.jsonl", [{"wav": f"{i}.flac"} for i in range(12)])
    soundfile.write(tmp_path / "long.flac", np.concatenate(slots * 12), 16000)
    long = write_jsonl(tmp_path / "long.jsonl", [{"wav": "long.flac"}])
    script = (
        "import resource, sys, recognize\n"
        "for argv in sys.argv[1].split('|'):\n"
        "    sys.argv = ['recognize.py', *argv.split()]\n"
        "    recognize.main()\n"
        "    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    flags = {"batch_size": 12, "num_workers": 0}
    commands = [arguments(DEMO, data, f"{data}.txt", **flags) for data in (short, long)]
    done = run(sys.executable, "-c", script, "|".join(map(" ".join, commands)))
    alone = Path(f"{short}.txt").read_text("utf-8").split("\n")[:-1]
    assert all(alone)
    assert Path(f"{long}.txt").read_text("utf-8") == " ".join(alone * 12) + "\n"
    assert "flagged: none" in done.stdout.split("peak")[1]  # windows are judged one by one
    before, after = map(int, re.findall(r"peak (\d+)", done.stdout))
    print(f"peak memory: {before} MiB, then with 10 minutes {after} MiB")
    assert after - before < 250  # MiB; the samples alone are 37, twice in float32 and int16


def test_what_can_be_known_before_stops_the_run(tmp_path):
    """Missing files: the first ten with their lines and the count of all, before any model."""
    lines = [{"wav": f"missing-{i}.wav"} for i in range(25)]
    lines[3] = {"wav": demo_lines(1)[0]["wav"]}
    data = write_jsonl(tmp_path / "data.jsonl", lines)
    nothing = {"llm_model_name_or_path": "/nowhere", "whisper_model_name_or_path": "/nowhere"}
    argv = arguments(nothing, data, tmp_path / "result.txt")
    done = run(sys.executable, "recognize.py", *argv, check=False)
    bad = [1, 2, 3, *range(5, 12)]
    expected = [f"{data}:{i}: {tmp_path / f'missing-{i - 1}.wav'}: no such file" for i in bad]
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == [*expected, f"{data}: 24 bad lines in all"]
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_bad_audio_does_not_cost_a_night(tmp_path, demo_jsonl, demo_transcripts, capsys):
    """What fails while decoding is an empty line, named on stderr; the others are right."""
    lines = [json.loads(line) for line in demo_jsonl.read_text("utf-8").splitlines()]
    speech = load_audio(lines[2]["wav"])
    soundfile.write(tmp_path / "cut.flac", speech, 16000)
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])  # its header is good
    speech[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", speech, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "gone.wav", np.zeros(800), 16000)  # the shortest, so the last
    for i, name in (2, "cut.flac"), (9, "nan.wav"), (20, "gone.wav"):
        lines[i]["wav"] = str(tmp_path / name)
    data, result = write_jsonl(tmp_path / "data.jsonl", lines), tmp_path / "result.txt"
    vanish = lambda n: (tmp_path / "gone.wav").unlink(missing_ok=True)  # noqa: E731
    with inputs_of("Projector", vanish), pytest.raises(SystemExit) as stopped:
        recognized(DEMO, data, result, batch_size=4)
    message = str(stopped.value)  # Python prints it on stderr and exits with status 1
    for i, name in (3, "cut.flac"), (10, "nan.wav"), (21, "gone.wav"):
        assert f"{data}:{i}: {tmp_path / name}: " in message
    assert message.count(str(data)) == 3
    transcripts = result.read_text("utf-8").split("\n")[:-1]
    expected = [text if i not in (2, 9, 20) else "" for i, text in enumerate(demo_transcripts)]
    assert transcripts == expected
    assert "3 unreadable" in capsys.readouterr().out


def test_a_killed_run_goes_on(tmp_path):
    """kill -9 leaves readable records; the same command decodes the rest, to the same result."""
    data = write_jsonl(tmp_path / "data.jsonl", demo_lines(40))
    expected = recognized(DEMO, data, tmp_path / "whole.txt", batch_size=1)
    folder = tmp_path / "run"
    folder.mkdir()
    result, flags = folder / "result.txt", {"batch_size": 1, "num_workers": 0}
    argv = arguments(DEMO, data, result, **flags)
    process = subprocess.Popen(
        [sys.executable, "recognize.py", *argv], cwd=ROOT, stderr=subprocess.DEVNULL
    )

    def records():
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("result.txt.partial-*"))

    while records() < 5 and process.poll() is None:
        time.sleep(0.001)  # only to poll: what we wait for is the fifth record
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    [partial] = folder.iterdir()  # no result.txt
    kept = partial.read_text("utf-8").splitlines()
    assert 5 <= len(kept) < 40
    for record in map(json.loads, kept):  # readable, and right
        assert record["text"] == expected[record["line"] - 1]
    torn = '{"line": 40, "text": "转'.encode()[:-1]
    partial.write_bytes("\n".join(kept).encode() + b"\n" + torn)  # torn in a character
    stray = re.sub(
        "partial-[0-9a-f]{8}", "partial-" + hashlib.md5(b"x").hexdigest()[:8], partial.name
    )
    (folder / stray).write_text('{"line": 40, "text": "stray", "flag": null, "error": null}\n')
    with inputs_of("Projector") as encoded:
        assert recognized(DEMO, data, result, **flags) == expected
    assert len(encoded) == 40 - len(kept)  # only the rest was decoded
    assert sorted(path.name for path in folder.iterdir()) == ["result.txt", "result.txt.report"]


def test_the_same_process_id_twice(tmp_path, random_parts, random_jsonl):
    """Going on loses nothing where process ids repeat, as they do in containers."""
    result = tmp_path / "result.txt"
    expected = recognized(random_parts, random_jsonl, result, batch_size=2)

    def interrupt(n):
        if n == 3:
            raise KeyboardInterrupt

    for _ in range(2):  # in this one process, so with one id
        with inputs_of("Projector", interrupt), pytest.raises(KeyboardInterrupt):
            recognized(random_parts, random_jsonl, tmp_path / "again.txt", batch_size=2)
    with inputs_of("Projector") as encoded:
        again = recognized(random_parts, random_jsonl, tmp_path / "again.txt", batch_size=2)
    assert again == expected and 0 < len(encoded) < 4


def clip(name, path):
    """One of the demo's utterances as a user may have it."""
    speech = load_audio(demo_lines(1)[0]["wav"])
    at = lambda rate: soxr.resample(speech, 16000, rate)  # noqa: E731
    stereo = lambda rate: np.stack([at(rate) * 1.5, at(rate) * 0.5], axis=1)  # noqa: E731
    if name in ("zero bytes", "text", "m4a"):  # a box of m4a's, where nothing can make a whole one
        content = {"zero bytes": b"", "text": b"not audio\n" * 99}
        path.write_bytes(content.get(name, b"\0\0\0\x1cftypM4A " + b"\0" * 64))
        if name == "m4a" and shutil.which("ffmpeg"):
            soundfile.write(path.with_suffix(".wav"), speech, 16000)
            source = ["-i", path.with_suffix(".wav")]
            subprocess.run(["ffmpeg", "-y", *source, path], check=True, capture_output=True)
        return
    samples, rate, options = {
        "8 kHz telephone": (at(8000), 8000, {"subtype": "ULAW"}),
        "mu-law": (speech, 16000, {"subtype": "ULAW"}),
        "16 kHz": (speech, 16000, {}),
        "44.1 kHz": (at(44100), 44100, {}),
        "48 kHz stereo": (stereo(48000), 48000, {}),
        "24 bit": (speech, 16000, {"subtype": "PCM_24"}),
        "float": (speech, 16000, {"subtype": "FLOAT"}),
        "mp3": (at(44100), 44100, {"format": "MP3"}),
        "opus": (stereo(48000), 48000, {"format": "OGG", "subtype": "OPUS"}),
        "flac": (speech, 16000, {"format": "FLAC"}),
        "flac of a stream": (speech, 16000, {"format": "FLAC"}),
        "no samples": (speech[:0], 16000, {}),
        "NaN": (np.where(np.arange(len(speech)) == 9, np.nan, speech), 16000, {"subtype": "FLOAT"}),
        "clipped": ((speech * 30).clip(-1, 1), 16000, {}),
        "DC offset": (speech + 0.2, 16000, {"subtype": "FLOAT"}),
        "0.05 s": (speech[8000:8800], 16000, {}),
        "silence": (speech * 0, 16000, {}),
        "raw": (speech, 16000, {"format": "RAW", "subtype": "PCM_16"}),
    }[name]
    soundfile.write(path, samples, rate, **({"format": "WAV"} | options))
    if name == "flac of a stream":  # whose header does not tell its length
        content = bytearray(path.read_bytes())
        content[21:26] = content[21] & 0xF0, 0, 0, 0, 0
        path.write_bytes(content)


SAME = ["16 kHz", "44.1 kHz", "48 kHz stereo", "24 bit", "float", "mu-law", "mp3", "opus", "flac"]
TRANSCRIBED = ["8 kHz telephone", "clipped", "DC offset", "0.05 s", "silence"]
BAD = ["zero bytes", "text", "no samples", "NaN", "raw"]
EITHER = ["m4a", "flac of a stream"]  # with ffmpeg, or without


@pytest.mark.parametrize("name", SAME + TRANSCRIBED + BAD + EITHER)
def test_any_sound_is_transcribed_or_named(tmp_path, demo_transcripts, name):
    """Re-encoded speech keeps its transcript; other sound is decoded, or named as bad."""
    suffix = {"m4a": ".m4a", "raw": ".raw"}.get(name, ".audio")
    path, result = tmp_path / f"clip{suffix}", tmp_path / "result.txt"
    clip(name, path)
    data = write_jsonl(tmp_path / "data.jsonl", [{"wav": path.name}])
    if name in BAD or (name in EITHER and not shutil.which("ffmpeg")):
        with pytest.raises(SystemExit, match=re.escape(f"{data}:1: {path}: ")):
            recognized(DEMO, data, result)
        return
    lines = recognized(DEMO, data, result)
    assert len(lines) == 1
    if name not in TRANSCRIBED:
        assert lines[0] == demo_transcripts[0]


def test_a_hundred_thousand_lines(tmp_path):
    """Start-up holds the jsonl's bytes and a few numbers a line: under 60 MiB for 100,000."""
    make_jsonl(tmp_path, [0.1] * 10, name="few.jsonl")
    few = (tmp_path / "few.jsonl").read_text("utf-8")
    (tmp_path / "many.jsonl").write_text(few * 10_000, "utf-8")
    script = (
        "import os, sys, time, psutil\n"
        "from dataset import Utterances\n"
        "memory = psutil.Process(os.getpid()).memory_info\n"
        "before, start = memory().rss, time.monotonic()\n"
        "utterances = Utterances(sys.argv[1], training=False)\n"
        "print(len(utterances), utterances[99_999]['line'])\n"
        "print(time.monotonic() - start, (memory().rss - before) / 2**20)\n"
    )
    done = run(sys.executable, "-c", script, tmp_path / "many.jsonl")
    n_lines, last, seconds, mib = map(float, done.stdout.split())
    print(f"100,000 lines: {seconds:.1f} s, {mib:.0f} MiB")
    assert n_lines == last == 100_000 and mib < 60


def test_a_jsonl_as_it_may_come(tmp_path, demo_jsonl, demo_transcripts):
    """Without txt there is no score; extra keys, a BOM and Windows line ends do no harm."""
    lines = [json.loads(line) for line in demo_jsonl.read_text("utf-8").splitlines()]
    lines = [json.dumps({"wav": line["wav"], "speaker": 7, "好": []}) for line in lines]
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # and no line end at its end
    assert recognized(DEMO, data, tmp_path / "result.txt", batch_size=8) == demo_transcripts
    report = full_report(tmp_path / "result.txt")
    assert report.startswith("flagged: none\nRTFx ") and "WER" not in report


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data_path": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
        ({"data_path": "/dev/null"}, "/dev/null: is empty"),
        ({"beams": 5}, "wrong flags .*--beams"),
        ({"batch_size": 0}, "a --batch_size of 1 or more"),
        ({"result_path": "no/such/folder/r.txt"}, "--result_path .*make its folder"),
        ({"projector_model_path": "nowhere"}, "--projector_model_path nowhere: expected a model"),
        ({"projector_model_path": TINY / "llm/model.safetensors"}, "--projector_model_path"),
        ({"whisper_model_name_or_path": "huge"}, "--whisper_model_name_or_path .*'tiny'"),
        (
            {"llm_model_name_or_path": TINY / "audio"},
            "--llm_model_name_or_path .*: expected an LLM",
        ),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, demo_jsonl, flags, message):
    """A user's mistake ends with one message that names the flag; nothing is written."""
    with pytest.raises(SystemExit, match=message):
        recognized(DEMO, demo_jsonl, tmp_path / "r.txt", **flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["llm_model_name_or_path", "whisper_model_name_or_path"])
def test_a_projector_of_other_models_is_refused(tmp_path, demo_jsonl, part):
    """A projector decodes with the LLM and the encoder that it was trained with, or not at all."""
    if part.startswith("llm"):  # of the same size, so that its shapes fit
        other = make_llm(tmp_path / "llm", hidden_size=128)
    else:
        other = make_whisper(tmp_path / "whisper.pt", n_audio_ctx=250, n_audio_state=128)
    with pytest.raises(SystemExit, match=r"--projector_model_path .*made for other models"):
        recognized({**DEMO, part: other}, demo_jsonl, tmp_path / "result.txt")


@pytest.mark.parametrize("flags", [{"metric": "bleu"}, {"dtype": "float33"}])
def test_a_choice_is_checked_before_decoding(tmp_path, demo_jsonl, capsys, flags):
    """A metric or dtype that does not exist is refused at once, not after a night."""
    with pytest.raises(SystemExit) as stopped:
        recognized(DEMO, demo_jsonl, tmp_path / "result.txt", **flags)
    assert stopped.value.code == 2 and "invalid choice" in capsys.readouterr().err
