"""The data: audio files, jsonl lines, and the rows that the LLM sees."""

import json
import pickle
import tracemalloc
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import soundfile
import torch
from conftest import FAMILIES, make_jsonl, make_llm, make_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from dataset import (
    IGNORE,
    PAD,
    SPEECH,
    InputError,
    Rows,
    Utterances,
    audio_seconds,
    load_audio,
    training_set,
)
from model import ModelArguments, load_speech_llm

ROWS = {family: Rows(make_tokenizer(family), "one two", 100, 5) for family in FAMILIES}  # 2 s
WINDOW_30_S = [Rows(make_tokenizer("qwen2"), "one", 1500, 5, everything) for everything in (0, 1)]
# Of 0.2 s with "three one" and of 0.31 s with "two": input_ids, labels and mask
LITERAL = {
    # <|im_start|> user \n | speech | one _two <|im_end|> \n <|im_start|> as sistan t \n
    # | t h ree _ one <|im_end|>, and in the second row | t wo <|im_end|>
    "qwen2": (
        [
            [1, 280, 201, -1, -1, 271, 286, 2, 201, 1, 263, 290, 86, 201, 86, 74, 274, 223, 271, 2],
            [-2, 1, 280, 201, -1, -1, -1, -1, 271, 286, 2, 201, 1, 263, 290, 86, 201, 86, 281, 2],
        ],
        [[-100, 86, 74, 274, 223, 271, 2], [-100, -100, -100, -100, 86, 281, 2]],
        [[1] * 20, [0] + [1] * 19],
    ),
    # <s> [INST] _ | speech | one _two _ [/INST] | t h ree _ one </s>, and | t wo </s>
    "mistral": (
        [
            [1, 3, 225, -1, -1, 273, 288, 225, 4, 88, 76, 276, 225, 273, 2],
            [-2, 1, 3, 225, -1, -1, -1, -1, 273, 288, 225, 4, 88, 283, 2],
        ],
        [[-100, 88, 76, 276, 225, 273, 2], [-100, -100, -100, -100, 88, 283, 2]],
        [[1] * 15, [0] + [1] * 14],
    ),
}


@pytest.mark.parametrize("family", LITERAL)
def test_literal_rows(tmp_path, whisper_file, family):
    """Ids, labels and mask of a batch are these: the loss is on transcript and turn's end alone."""
    args = ModelArguments(make_llm(tmp_path / "llm", family), whisper_file, prompt="one two")
    model, rows = load_speech_llm(args, "cpu", torch.float32)
    path = make_jsonl(tmp_path, [0.2, 0.31], ["three one", "two"])
    batch = rows.collate(list(Utterances(path, training=True)))
    input_ids, labels, mask = LITERAL[family]
    assert batch["input_ids"].tolist() == input_ids
    assert batch["labels"].tolist() == labels
    assert model.embed(batch["input_ids"], batch["waveforms"])[1].tolist() == mask
    waveforms = batch["waveforms"].view(torch.float32)
    assert waveforms.shape == (2, 4960) and not waveforms[0, 3200:].any()
    assert np.array_equal(waveforms[1].numpy(), load_audio(tmp_path / "data-1.wav"))


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    utterances=st.lists(
        st.tuples(st.text(st.characters(codec="utf-8"), max_size=20), st.integers(1, 32000)),
        min_size=1,
        max_size=4,
    ),
)
@example("llama3", [("", 1), ("<|im_end|> </s>", 32000)])
def test_rows(family, utterances):
    """Whatever is said, the prompt at recognition is a prefix of the training row, the rest of the
    row is its target, and a batch is as wide as its longest row."""
    rows = ROWS[family]
    targets = [[*rows.tokenize(text), rows.end_id] for text, _ in utterances]
    waveforms = [np.zeros(n, np.float32) for _, n in utterances]
    batch = rows.batch(waveforms, targets)
    widths = []
    for k, (waveform, target) in enumerate(zip(waveforms, targets, strict=True)):
        prompt = rows.batch([waveform], [[]])["input_ids"][0].tolist()
        row = [i for i in batch["input_ids"][k].tolist() if i != PAD]
        label = batch["labels"][k].tolist()
        assert row == prompt + target and prompt.count(SPEECH) == rows.n_speech(len(waveform))
        assert label[-len(target) :] == target and set(label[: -len(target)]) == {IGNORE}
        widths.append(len(row))
    assert batch["input_ids"].shape == (len(utterances), max(widths))
    assert batch["labels"].shape[1] == 1 + max(map(len, targets))
    assert batch["waveforms"].shape[1] == max(n for _, n in utterances)


@pytest.mark.parametrize("family", FAMILIES)
def test_row_is_the_chat(family):
    """A row is what the tokenizer makes of the rendered chat, but for the space that some templates
    put before an answer."""
    rows, tokenizer = ROWS[family], make_tokenizer(family)
    row = rows.batch([np.zeros(1600, np.float32)], [[*rows.tokenize("three"), rows.end_id]])
    ids = [i for i in row["input_ids"][0].tolist() if i != SPEECH]
    chat = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
    assert tokenizer.decode(ids) == rendered.replace("[/INST] ", "[/INST]")


@given(st.integers(1, 30 * 16000))
def test_n_speech(n_samples):
    """ceil(10 * seconds) embeddings stand for audio, at a stride of 5; on request all 300."""
    covering, everything = WINDOW_30_S
    assert covering.n_speech(n_samples) == ceil(10 * Fraction(n_samples, 16000))
    assert everything.n_speech(n_samples) == 300


def sine(frequency, rate, seconds=1.3):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def amplitude(waveform, frequency):
    """Of the sine of a frequency (Hz) in a waveform at 16 kHz."""
    phase = 2j * np.pi * frequency * np.arange(len(waveform)) / 16000
    return 2 * abs((waveform * np.exp(phase)).mean())


@pytest.mark.parametrize(
    ("name", "rate", "subtype"),
    [
        ("a.wav", 8000, "PCM_16"),
        ("a.wav", 44100, "PCM_24"),
        ("a.wav", 48000, "FLOAT"),
        ("a.wav", 8000, "ULAW"),
        ("a.flac", 44100, "PCM_24"),
        ("a.ogg", 44100, "VORBIS"),
        ("a.opus", 48000, "OPUS"),
        ("a.mp3", 44100, "MPEG_LAYER_III"),
    ],
)
def test_formats(tmp_path, name, rate, subtype):
    """Any format, rate and number of channels becomes 16 kHz and the channels' mean."""
    channels = np.stack([sine(440, rate), sine(1000, rate)], axis=1)
    file_format = "OGG" if name.endswith("opus") else None
    soundfile.write(tmp_path / name, channels, rate, subtype=subtype, format=file_format)
    waveform = load_audio(str(tmp_path / name))
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert len(waveform) / 16000 == pytest.approx(1.3, rel=0.01)
    assert audio_seconds(str(tmp_path / name)) == pytest.approx(1.3, rel=0.01)
    for frequency in (440, 1000):
        assert amplitude(waveform, frequency) == pytest.approx(0.25, rel=0.05)
    assert amplitude(waveform, 700) < 0.005


def test_ffmpeg(tmp_path, monkeypatch):
    """What libsndfile cannot read goes to the ffmpeg of the PATH (here a stand-in that answers with
    the file's own bytes, as 16-bit samples)."""
    samples = (sine(440, 16000) * 32767).astype("<i2")
    (tmp_path / "a.m4a").write_bytes(samples.tobytes())
    program = tmp_path / "ffmpeg"
    program.write_text('#!/bin/sh\nwhile [ "$1" != -i ]; do shift; done\nexec cat "$2"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    waveform = load_audio(str(tmp_path / "a.m4a"))
    np.testing.assert_allclose(waveform, samples / 32768, atol=1e-4)
    assert audio_seconds(str(tmp_path / "a.m4a")) == pytest.approx(1.3)


def test_training_set_leaves_out_what_does_not_fit(tmp_path):
    """Audio longer than the window, and rows longer than --model_max_length, are left out, and no
    other; what is kept is whole."""
    rows, words = ROWS["qwen2"], ["one", "two", "three"] * 3
    seconds = [0.5, 1.0, 2.0, 2.0001, 3.0, *[0.3] * 9]
    texts = [*["one"] * 5, *(" ".join(words[: k + 1]) for k in range(9))]
    utterances = Utterances(make_jsonl(tmp_path, seconds, texts), training=True)
    lengths = [rows.collate([u])["input_ids"].shape[1] for u in utterances]
    within_window = [i for i in range(len(seconds)) if seconds[i] <= 2]
    assert within_window == [0, 1, 2, *range(5, 14)]
    for max_length in sorted({*lengths, 1000}):
        kept = [u["line"] - 1 for u in training_set(utterances, rows, max_length)]
        assert kept == [i for i in within_window if lengths[i] <= max_length]
    with pytest.raises(InputError, match="--model_max_length"):
        training_set(utterances, rows, min(lengths) - 1)


@pytest.fixture
def folder(tmp_path):
    """A folder with a good wav file and some that are none."""
    soundfile.write(tmp_path / "a.wav", sine(440, 16000, 0.5), 16000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    (tmp_path / "text.wav").write_text("no audio at all " * 100)
    (tmp_path / "headerless.raw").write_bytes(bytes(3200))
    return tmp_path


def test_jsonl_of_any_editor(folder, monkeypatch):
    """A byte order mark, Windows line ends, a missing last one and further keys do no harm; wav is
    taken from the jsonl's own folder."""
    lines = [
        '{"wav": "a.wav", "txt": "eins"}',
        '{"txt": "你好", "wav": "a.wav", "speaker": 3}',
        json.dumps({"wav": str(folder / "a.wav"), "txt": "\x85\u2028"}, ensure_ascii=False),
    ]
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    utterances = Utterances(str(folder / "a.jsonl"), training=True)
    wav = str(folder / "a.wav")
    assert list(map(utterances.__getitem__, range(len(utterances)))) == [
        {"wav": wav, "txt": "eins", "line": 1},
        {"wav": wav, "txt": "你好", "speaker": 3, "line": 2},
        {"wav": wav, "txt": "\x85\u2028", "line": 3},
    ]
    assert utterances.seconds.tolist() == [0.5, 0.5, 0.5]
    monkeypatch.chdir(folder)
    assert Utterances("a.jsonl", training=True)[0]["wav"] == "a.wav"


GOOD = b'{"wav": "a.wav", "txt": "one"}'
BAD = {  # line: what its message must name
    b"": '"wav"',
    b"   ": '"wav"',
    b'{"wav": "a.wav", "txt": "one"': '"wav"',
    b'["a.wav", "one"]': '"wav"',
    b'{"audio": "a.wav", "txt": "one"}': "'wav'",
    b'{"wav": "a.wav", "text": "one"}': "'txt'",
    b'{"wav": 1, "txt": "one"}': "int",
    b'{"wav": "a.wav", "txt": null}': "txt is not a string",
    b'{"wav": "a.wav", "txt": ["one"]}': "txt is not a string",
    b'{"wav": "a.wav", "txt": "\xff"}': "utf-8",
    b'{"wav": "a.wav", "txt": "\\ud83d"}': "utf-8",
    b'{"wav": "absent.wav", "txt": "one"}': "absent.wav: no such file",
    b'{"wav": ".", "txt": "one"}': "no such file",
    b'{"wav": "text.wav", "txt": "one"}': "text.wav: neither libsndfile nor ffmpeg",
    b'{"wav": "headerless.raw", "txt": "one"}': "headerless.raw: neither libsndfile nor ffmpeg",
    b'{"wav": "empty.wav", "txt": "one"}': "empty.wav: holds no audio",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_line(folder, line):
    """A bad line is named with its file and number, in one line, and what was expected."""
    (folder / "a.jsonl").write_bytes(b"\n".join([GOOD, line, GOOD, b""]))
    with pytest.raises(InputError) as error:
        Utterances(str(folder / "a.jsonl"), training=True)
    named, count = str(error.value).split("\n")
    assert named.startswith(f"{folder}/a.jsonl:2: ") and BAD[line] in named
    assert count == f"{folder}/a.jsonl: 1 bad lines in all"


def test_many_bad_lines(folder):
    """The first ten bad lines are listed, and all are counted."""
    (folder / "a.jsonl").write_bytes(b"\n".join([GOOD, b"{}", *[GOOD, b"{}"] * 14, b""]))
    with pytest.raises(InputError) as error:
        Utterances(str(folder / "a.jsonl"), training=True)
    lines = str(error.value).split("\n")
    assert [line.split(": ")[0] for line in lines[:10]] == [
        f"{folder}/a.jsonl:{number}" for number in range(2, 22, 2)
    ]
    assert lines[10:] == [f"{folder}/a.jsonl: 15 bad lines in all"]


def test_only_training_needs_transcripts(folder):
    """A jsonl without txt is good for recognition."""
    (folder / "a.jsonl").write_bytes(b'{"wav": "a.wav"}\n')
    assert len(Utterances(str(folder / "a.jsonl"), training=False)) == 1
    with pytest.raises(InputError, match=r"a\.jsonl:1: .*txt"):
        Utterances(str(folder / "a.jsonl"), training=True)


def test_no_jsonl(folder):
    """A jsonl that is empty, absent or a folder is named."""
    (folder / "a.jsonl").write_bytes(b"")
    for name, message in (("a.jsonl", "is empty"), ("b.jsonl", "No such file"), ("", "directory")):
        with pytest.raises(InputError, match=f"^{folder}/{name}: .*{message}"):
            Utterances(f"{folder}/{name}", training=True)


def test_long_jsonl(folder):
    """100,000 lines, checked by several processes, cost their bytes and little more, and item i is
    line i."""
    lines = [json.dumps({"wav": "a.wav", "txt": f"utterance {i}"}) for i in range(100_000)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    n_bytes = (folder / "a.jsonl").stat().st_size
    tracemalloc.start()
    utterances = Utterances(str(folder / "a.jsonl"), training=True)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{n_bytes} bytes of jsonl: {held} are held, {peak} were needed")
    del lines
    assert held < 2 * n_bytes and peak < 8 * n_bytes
    assert len(pickle.dumps(utterances)) < 2 * n_bytes  # what a spawned worker is sent
    assert len(utterances) == 100_000
    for i in (0, 1, 4_999, 54_321, 99_999):
        assert utterances[i] == {"wav": f"{folder}/a.wav", "txt": f"utterance {i}", "line": i + 1}
