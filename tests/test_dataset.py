"""The data: audio files, jsonl lines, and the rows that the LLM sees."""

import json
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from math import ceil

import numpy as np
import pytest
import soundfile
import torch
from conftest import FAMILIES, ROOT, make_jsonl, make_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from dataset import (
    IGNORE,
    PAD,
    SPEECH,
    InputError,
    RowFormat,
    Utterances,
    audio_seconds,
    load_audio,
    render_chat,
    user_error,
)


def make_rows(family, prompt="one two", n_audio_ctx=100, stride=5, all_speech=False):
    tokenizer = make_tokenizer(family)
    settings = {
        "chat": render_chat(tokenizer, prompt),
        "projector_stride": stride,
        "all_speech_embeddings": all_speech,
    }
    return RowFormat(tokenizer, settings, n_audio_ctx)


ROWS = {family: make_rows(family) for family in FAMILIES}  # their window is 2 s
WINDOW_30_S = [make_rows("qwen2", "one", 1500, all_speech=everything) for everything in (0, 1)]
LITERAL = {  # family: the rows of 0.2 s with "three one" and of 0.31 s with "two", the last ids
    # <|im_start|> user \n | speech | one _two <|im_end|> \n <|im_start|> as sistan t \n
    # | t h ree _ one <|im_end|>, and in the second row | t wo <|im_end|>
    "qwen2": (
        [1, 280, 201, -1, -1, 271, 286, 2, 201, 1, 263, 290, 86, 201],
        [1, 280, 201, -1, -1, -1, -1, 271, 286, 2, 201, 1, 263, 290, 86, 201],
        [86, 74, 274, 223, 271, 2],
        [86, 281, 2],
    ),
    # <s> [INST] _ | speech | one _two _ [/INST] | t h ree _ one </s>, and | t wo </s>
    "mistral": (
        [1, 3, 225, -1, -1, 273, 288, 225, 4],
        [1, 3, 225, -1, -1, -1, -1, 273, 288, 225, 4],
        [88, 76, 276, 225, 273, 2],
        [88, 283, 2],
    ),
}


def load_items(path):
    """All items of a training jsonl, with their audio."""
    utterances = Utterances(str(path), training=True)
    return [utterances[i] for i in range(len(utterances))]


@pytest.fixture
def literal_items(tmp_path):
    return load_items(make_jsonl(tmp_path, [0.2, 0.31], ["three one", "two"]))


@pytest.mark.parametrize("family", LITERAL)
def test_literal_training_rows(literal_items, family):
    """A training batch is this: rows in the order given, padded on the right, the targets
    transcript and turn's end alone, each predicted at the place before its own."""
    batch = ROWS[family].collate(literal_items)
    short_prompt, long_prompt, short_target, long_target = LITERAL[family]
    n_short, n_long = len(short_prompt), len(long_prompt)
    assert set(batch) == {"input_ids", "labels", "places", "waveforms", "n_samples", "errors"}
    assert batch["input_ids"].tolist() == [
        short_prompt + short_target,
        [*long_prompt, *long_target, -2],
    ]
    assert batch["labels"].tolist() == [short_target, [*long_target, -100, -100, -100]]
    assert batch["places"].tolist() == [
        [n_short - 1, n_short, n_short + 1, n_short + 2, n_short + 3, n_short + 4],
        [n_long - 1, n_long, n_long + 1, 0, 0, 0],
    ]
    assert batch["errors"] == []


@pytest.mark.parametrize("family", LITERAL)
def test_literal_recognition_rows(literal_items, family):
    """At recognition a batch is the same prompts, padded on the left, in the order given."""
    batch = ROWS[family].batch([item["waveform"] for item in literal_items])
    short_prompt, long_prompt, *_ = LITERAL[family]
    assert set(batch) == {"input_ids", "waveforms", "n_samples"}
    assert batch["input_ids"].tolist() == [[-2, -2, *short_prompt], long_prompt]


def test_batch_carries_no_padding(literal_items):
    """Waveforms travel as int16, one behind the other, and not as padded floats."""
    batch = ROWS["qwen2"].collate(literal_items)
    assert batch["n_samples"] == [3200, 4960]
    assert batch["waveforms"].dtype == torch.int16 and batch["waveforms"].shape == (8160,)
    for waveform, item in zip(batch["waveforms"].split([3200, 4960]), literal_items, strict=True):
        assert np.array_equal(waveform.numpy(), load_audio(item["wav"]))


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
    row is its target, what stands at a place predicts its label, and a batch is as wide as its
    longest row."""
    rows = ROWS[family]
    targets = [[*rows.tokenize(text), rows.end_id] for text, _ in utterances]
    waveforms = [np.zeros(n, np.int16) for _, n in utterances]
    training, recognition = rows.batch(waveforms, targets), rows.batch(waveforms)
    widths = []
    for k, (waveform, target) in enumerate(zip(waveforms, targets, strict=True)):
        [prompt] = rows.batch([waveform])["input_ids"].tolist()
        row, padded_prompt = training["input_ids"][k], recognition["input_ids"][k].tolist()
        assert [*([PAD] * (len(padded_prompt) - len(prompt))), *prompt] == padded_prompt
        assert row.tolist() == prompt + target + [PAD] * (len(row) - len(prompt) - len(target))
        assert prompt.count(SPEECH) == ceil(len(waveform) / 1600)
        labels = training["labels"][k].tolist()
        assert labels == target + [IGNORE] * (len(labels) - len(target))
        assert row[training["places"][k][: len(target)] + 1].tolist() == target
        widths.append(len(prompt + target))
    assert training["input_ids"].shape == (len(utterances), max(widths))
    assert training["labels"].shape == training["places"].shape
    assert training["labels"].shape[1] == max(map(len, targets))
    assert training["n_samples"] == [n for _, n in utterances]


@pytest.mark.parametrize("family", FAMILIES)
def test_row_is_the_chat(family):
    """A row is what the tokenizer makes of the rendered chat, but for the space that some templates
    put before an answer."""
    rows, tokenizer = ROWS[family], make_tokenizer(family)
    row = rows.batch([np.zeros(1600, np.int16)], [[*rows.tokenize("three"), rows.end_id]])
    ids = [i for i in row["input_ids"][0].tolist() if i != SPEECH]
    chat = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
    assert tokenizer.decode(ids) == rendered.replace("[/INST] ", "[/INST]")


CHATS = {  # family: what precedes the speech, what follows it, the token that ends the answer
    "qwen2": (
        "<|im_start|>user\n",
        "one two<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "one two<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\n",
        "one two<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "mistral": ("<s>[INST] ", "one two [/INST]", "</s>"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rendered_chat(family):
    """The chat is split around the speech, and an answer ends with the token that ends a turn."""
    assert render_chat(make_tokenizer(family), "one two") == CHATS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_that_names_an_answer(family):
    """A prompt may speak of <answer> tags; the turn's end is still what stands behind the answer.

    It was looked for behind the first "<answer>", which then is the prompt's."""
    prefix, suffix, end = render_chat(make_tokenizer(family), "put it into <answer> tags")
    assert (prefix, end) == (CHATS[family][0], CHATS[family][2])
    assert suffix == CHATS[family][1].replace("one two", "put it into <answer> tags")


def test_template_that_ends_no_turn():
    """Where no special token stands behind an answer, the eos token ends it."""
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert render_chat(tokenizer, "one") == ("user: ", "one\nassistant: ", "<|im_end|>")


def test_template_that_thinks():
    """An LLM that can think aloud is asked not to, as Qwen3's template is."""
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template += (
        "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% endif %}"
    )
    _, suffix, end = render_chat(tokenizer, "one")
    assert suffix == "one<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert end == "<|im_end|>"


@given(st.integers(1, 30 * 16000))
def test_n_speech(n_samples):
    """ceil(10 * seconds) embeddings stand for audio, at a stride of 5; on request all 300."""
    covering, everything = WINDOW_30_S
    assert covering.prompt(n_samples).count(SPEECH) == ceil(10 * Fraction(n_samples, 16000))
    assert everything.prompt(n_samples).count(SPEECH) == 300


def sine(frequency, rate, seconds=1.3):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def amplitude(waveform, frequency):
    """Of the sine of a frequency (Hz) in an int16 waveform at 16 kHz, where full scale is 1."""
    phase = 2j * np.pi * frequency * np.arange(len(waveform)) / 16000
    return 2 * abs((waveform / 32768 * np.exp(phase)).mean())


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
    """Any format, rate and number of channels becomes int16 at 16 kHz, the channels' mean."""
    channels = np.stack([sine(440, rate), sine(1000, rate)], axis=1)
    file_format = "OGG" if name.endswith("opus") else None
    soundfile.write(tmp_path / name, channels, rate, subtype=subtype, format=file_format)
    waveform = load_audio(str(tmp_path / name))
    assert waveform.dtype == np.int16 and waveform.ndim == 1
    assert len(waveform) / 16000 == pytest.approx(1.3, rel=0.01)
    assert audio_seconds(str(tmp_path / name)) == pytest.approx(1.3, rel=0.01)
    for frequency in (440, 1000):
        assert amplitude(waveform, frequency) == pytest.approx(0.25, rel=0.05)
    assert amplitude(waveform, 700) < 0.005


def test_samples_are_the_file_s(tmp_path):
    """The 65536 values of a 16-bit wav at 16 kHz come out as they are."""
    values = np.arange(-32768, 32768).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", values, 16000, subtype="PCM_16")
    assert np.array_equal(load_audio(str(tmp_path / "a.wav")), values)


def test_loud_audio_is_clipped(tmp_path):
    """Float samples beyond full scale are clipped; they never wrap around to the other sign."""
    samples = np.array([-3, -1, -0.5, 0, 0.5, 1, 3])
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    waveform = load_audio(str(tmp_path / "a.wav"))
    assert waveform.tolist() == [-32768, -32768, -16384, 0, 16384, 32767, 32767]


def test_ffmpeg(tmp_path, monkeypatch):
    """What libsndfile cannot read goes to the ffmpeg of the PATH (here a stand-in that answers with
    the file's own bytes, as 16-bit samples)."""
    samples = (sine(440, 16000) * 32767).astype("<i2")
    (tmp_path / "a.m4a").write_bytes(samples.tobytes())
    install_ffmpeg(tmp_path, 'while [ "$1" != -i ]; do shift; done\nexec cat "$2"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert np.array_equal(load_audio(str(tmp_path / "a.m4a")), samples)
    assert audio_seconds(str(tmp_path / "a.m4a")) == pytest.approx(1.3)


def install_ffmpeg(folder, script):
    (folder / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ffmpeg").chmod(0o755)


def test_what_does_not_fit_is_left_out(tmp_path):
    """Audio longer than the window, and rows longer than --model_max_length, are left out, and no
    other; what stays is whole, and what goes is counted."""
    rows, words = ROWS["qwen2"], ["one", "two", "three"] * 3
    seconds = [0.5, 1.0, 2.0, 2.0001, 3.0, *[0.3] * 9]
    texts = [*["one"] * 5, *(" ".join(words[: k + 1]) for k in range(9))]
    path = make_jsonl(tmp_path, seconds, texts)
    items = load_items(path)
    within_window = [i for i in range(len(seconds)) if seconds[i] <= 2]
    assert within_window == [0, 1, 2, *range(5, 14)]
    lengths = {i: rows.collate([items[i]])["input_ids"].shape[1] for i in within_window}
    for max_length in sorted({*lengths.values(), 1000}):
        utterances = Utterances(path, training=True)
        n_out = utterances.leave_out_long(rows, max_length)
        fitting = [i for i in within_window if lengths[i] <= max_length]
        assert n_out == len(seconds) - len(fitting)
        assert utterances.seconds == [seconds[i] for i in fitting]
        paths = [utterances.parse(k)["wav"] for k in range(len(utterances))]
        assert paths == [items[i]["wav"] for i in fitting]
    with pytest.raises(InputError, match="--model_max_length"):
        Utterances(path, training=True).leave_out_long(rows, min(lengths.values()) - 1)


@pytest.fixture
def folder(tmp_path):
    """A folder with a good wav file and some that are none."""
    soundfile.write(tmp_path / "a.wav", sine(440, 16000, 0.5), 16000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
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
    wav, waveform = str(folder / "a.wav"), load_audio(folder / "a.wav")
    expected = [
        {"wav": wav, "txt": "eins"},
        {"wav": wav, "txt": "你好", "speaker": 3},
        {"wav": wav, "txt": "\x85\u2028"},
    ]
    assert list(map(utterances.parse, range(len(utterances)))) == expected
    for item, line in zip(load_items(folder / "a.jsonl"), expected, strict=True):
        assert np.array_equal(item.pop("waveform"), waveform)
        assert item == line | {"error": None}
    assert utterances.seconds == [0.5, 0.5, 0.5]
    monkeypatch.chdir(folder)
    assert Utterances("a.jsonl", training=True).parse(0)["wav"] == "a.wav"


GOOD = b'{"wav": "a.wav", "txt": "one"}'
BAD = {  # line: what its message must name
    b"": '"wav"',
    b"   ": '"wav"',
    b'{"wav": "a.wav", "txt": "one"': '"wav"',
    b'["a.wav", "one"]': '"wav"',
    b"null": '"wav"',
    b'{"audio": "a.wav", "txt": "one"}': "'wav'",
    b'{"wav": "a.wav", "text": "one"}': "'txt'",
    b'{"wav": 1, "txt": "one"}': "int",
    b'{"wav": "a.wav", "txt": null}': '"txt"',
    b'{"wav": "a.wav", "txt": ["one"]}': '"txt"',
    b'{"wav": "a.wav", "txt": "\xff"}': "utf-8",
    b'{"wav": "a.wav", "txt": "\\ud83d"}': "utf-8",
    b'{"wav": "absent.wav", "txt": "one"}': "absent.wav: cannot be decoded",
    b'{"wav": ".", "txt": "one"}': ".: cannot be decoded",
    b'{"wav": "a\\u0000.wav", "txt": "one"}': "cannot be decoded",
    b'{"wav": "a\\ud83d.wav", "txt": "one"}': "utf-8",
    b'{"wav": "text.wav", "txt": "one"}': "text.wav: cannot be decoded",
    b'{"wav": "headerless.raw", "txt": "one"}': "headerless.raw: cannot be decoded",
    b'{"wav": "empty.wav", "txt": "one"}': "empty.wav: cannot be decoded (no audio",
    b'{"wav": "a.wav", "txt": "one", "duration": 0}': "duration",
    b'{"wav": "a.wav", "txt": "one", "duration": -1.5}': "duration",
    b'{"wav": "a.wav", "txt": "one", "duration": 1e9}': "duration",
    b'{"wav": "a.wav", "txt": "one", "duration": NaN}': "duration",
    b'{"wav": "a.wav", "txt": "one", "duration": Infinity}': "duration",
    b'{"wav": "a.wav", "txt": "one", "duration": null}': "duration",
    b'{"wav": "a.wav", "txt": "one", "duration": "0.5"}': "duration",
    b'{"wav": "a.wav", "txt": "one", "duration": [0.5]}': "duration",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_line(folder, line):
    """A bad line is named with its file and number, in one line, and what was expected."""
    (folder / "a.jsonl").write_bytes(b"\n".join([GOOD, line, GOOD, b""]))
    with pytest.raises(InputError) as error:
        Utterances(str(folder / "a.jsonl"), training=True)
    named, count = str(error.value).split("\n")
    assert named.startswith(f"{folder}/a.jsonl:2: ") and BAD[line] in named
    assert count == f"{folder}/a.jsonl: expected valid lines; 1 of 3 are invalid"


def test_many_bad_lines(folder):
    """The first ten bad lines are listed, and all are counted."""
    (folder / "a.jsonl").write_bytes(b"\n".join([GOOD, b"{}", *[GOOD, b"{}"] * 14, b""]))
    with pytest.raises(InputError) as error:
        Utterances(str(folder / "a.jsonl"), training=True)
    lines = str(error.value).split("\n")
    assert [line.split(": ")[0] for line in lines[:10]] == [
        f"{folder}/a.jsonl:{number}" for number in range(2, 22, 2)
    ]
    assert lines[10:] == [f"{folder}/a.jsonl: expected valid lines; 15 of 30 are invalid"]


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n", b"\r\n\r\n", b"\n \t\n\n  "])
def test_trailing_blank_lines(folder, end):
    """Blank lines at the end of a jsonl, which many editors leave, are no lines of it."""
    (folder / "a.jsonl").write_bytes(GOOD + b"\n" + GOOD + end)
    assert len(Utterances(str(folder / "a.jsonl"), training=True)) == 2


@pytest.mark.parametrize("content", [b"\n" + GOOD, GOOD + b"\n\n" + GOOD, GOOD + b"\n \n\n" + GOOD])
def test_blank_line_among_others(folder, content):
    """A blank line before a good one is named: it would shift each following line of a result."""
    (folder / "a.jsonl").write_bytes(content)
    blank = next(i for i, line in enumerate(content.split(b"\n"), 1) if not line.strip())
    with pytest.raises(InputError, match=rf"a\.jsonl:{blank}: expected"):
        Utterances(str(folder / "a.jsonl"), training=True)


def test_only_training_needs_transcripts(folder):
    """A jsonl without txt is good for recognition."""
    (folder / "a.jsonl").write_bytes(b'{"wav": "a.wav"}\n')
    assert len(Utterances(str(folder / "a.jsonl"), training=False)) == 1
    with pytest.raises(InputError, match=r"a\.jsonl:1: .*txt"):
        Utterances(str(folder / "a.jsonl"), training=True)


def test_no_jsonl(folder):
    """A jsonl that is empty, absent or a folder is named."""
    (folder / "a.jsonl").write_bytes(b"")
    for name, message in (
        ("a.jsonl", "expected valid lines"),
        ("b.jsonl", "No such file"),
        ("", "directory"),
    ):
        with pytest.raises(InputError, match=f"^{folder}/{name}: .*{message}"):
            Utterances(f"{folder}/{name}", training=True)


def test_stated_duration_is_believed(folder):
    """A file whose line states its duration is not opened at the start; one that is missing is
    named when it is loaded."""
    lines = [
        {"wav": "absent.wav", "txt": "one", "duration": 3.25},
        {"wav": "text.wav", "txt": "one", "duration": 4},
        {"wav": "a.wav", "txt": "one", "duration": 0.25},
        {"wav": "a.wav", "txt": "one"},
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    utterances = Utterances(str(folder / "a.jsonl"), training=True)
    assert utterances.seconds == [3.25, 4, 0.25, 0.5]
    items = load_items(folder / "a.jsonl")
    assert items[0]["error"].startswith(f"{folder}/absent.wav: cannot be decoded (")
    assert items[1]["error"].startswith(f"{folder}/text.wav: cannot be decoded (")
    for item in items[:2]:
        assert item["waveform"].tolist() == [0] and item["waveform"].dtype == np.int16
    for item in items[2:]:
        assert item["error"] is None and len(item["waveform"]) == 8000


def test_unreadable_item_is_no_target(folder):
    """An item that cannot be read is in the batch as silence without targets, and in "errors": the
    batch keeps its size, and the others' targets are theirs."""
    rows = ROWS["qwen2"]
    names = ("a.wav", "gone.wav", "nan.wav", "a.wav")
    lines = [{"wav": name, "txt": "one", "duration": 0.5} for name in names]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    batch = rows.collate(load_items(folder / "a.jsonl"))
    assert [error.partition(": ")[0] for error in batch["errors"]] == [
        f"{folder}/gone.wav",
        f"{folder}/nan.wav",
    ]
    assert batch["n_samples"] == [8000, 1, 1, 8000]
    assert batch["waveforms"][8000:8002].tolist() == [0, 0]
    target = [*rows.tokenize("one"), rows.end_id]
    assert batch["labels"].tolist() == [target, [IGNORE] * 2, [IGNORE] * 2, target]
    assert [row.count(SPEECH) for row in batch["input_ids"].tolist()] == [5, 1, 1, 5]


def test_nothing_of_a_batch_can_be_read(folder):
    """A batch of which nothing is left has rows, but no label."""
    line = {"wav": "gone.wav", "txt": "one", "duration": 0.5}
    (folder / "a.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line))
    batch = ROWS["qwen2"].collate(load_items(folder / "a.jsonl"))
    assert len(batch["errors"]) == 2 and batch["n_samples"] == [1, 1]
    assert batch["labels"].shape == batch["places"].shape == (2, 0)
    assert len(batch["input_ids"]) == 2


def test_audio_longer_than_stated(tmp_path):
    """In training, audio longer than its stated duration is whole; where the window (2 s) does not
    hold it, it is reported and not cut. Recognition gets all of it."""
    make_jsonl(tmp_path, [1.5, 2.5], ["one", "two"])
    lines = [{"wav": f"data-{i}.wav", "txt": "one two", "duration": 0.5} for i in (0, 1)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, utterances = ROWS["qwen2"], Utterances(str(tmp_path / "a.jsonl"), training=True)
    assert utterances.leave_out_long(rows, 512) == 0
    items = [utterances[i] for i in (0, 1)]
    assert [len(item["waveform"]) for item in items] == [24000, 40000]
    assert [item["error"] for item in items] == [None, None]
    batch = rows.collate(items)
    assert batch["errors"] == [f"{tmp_path}/data-1.wav: longer than its duration says"]
    assert sorted(batch["n_samples"]) == [1, 24000]
    n_targets = dict(zip(batch["n_samples"], (batch["labels"] != IGNORE).sum(1), strict=True))
    assert n_targets == {1: 0, 24000: len(rows.tokenize("one two")) + 1}


def test_start_up_does_not_hang(tmp_path):
    """When what decodes a file is killed, as an out-of-memory killer does, the start-up ends.

    It waited for ever for a process of its pool that was no more. Here the ffmpeg of the PATH kills
    the process that started it."""
    install_ffmpeg(tmp_path, "kill -9 $PPID")
    (tmp_path / "a.m4a").write_bytes(bytes(100))
    (tmp_path / "a.jsonl").write_text('{"wav": "a.m4a", "txt": "one"}')
    command = [sys.executable, "-c", "import dataset; dataset.Utterances('a.jsonl', True)"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=tmp_path, env={**os.environ, **path}, timeout=60)
    assert process.returncode == -signal.SIGKILL


def test_files_are_opened_side_by_side(tmp_path, monkeypatch):
    """Sixteen files are waited for at once, on however few cores: their storage may be slow.

    Each call of this ffmpeg waits until all of them have begun, and fails if that never happens."""
    install_ffmpeg(
        tmp_path,
        f"touch {tmp_path}/begun-$$\n"
        "for tenth in $(seq 300); do\n"
        f"    [ $(ls {tmp_path} | grep -c begun) = 16 ] && exec head -c 3200 /dev/zero\n"
        "    sleep 0.1\ndone\nexit 1",
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for i in range(16):
        (tmp_path / f"{i}.m4a").write_bytes(bytes(100))
    lines = [json.dumps({"wav": f"{i}.m4a", "txt": "one"}) for i in range(16)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert Utterances(str(tmp_path / "a.jsonl"), training=True).seconds == [0.1] * 16


def test_items_can_be_iterated(folder):
    """A for loop over Utterances ends behind the last, as over any Dataset: an index that is out of
    range is no fault of the jsonl's."""
    (folder / "a.jsonl").write_bytes(GOOD + b"\n" + GOOD)
    assert [item["txt"] for item in Utterances(str(folder / "a.jsonl"), True)] == ["one", "one"]


def test_long_jsonl(folder):
    """100,000 lines cost their bytes and little more, and item i is line i."""
    lines = [
        json.dumps({"wav": "a.wav", "txt": f"utterance {i}", "duration": i + 0.5})
        for i in range(100_000)
    ]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    n_bytes = (folder / "a.jsonl").stat().st_size
    tracemalloc.start()
    utterances = Utterances(str(folder / "a.jsonl"), training=True)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{n_bytes} bytes of jsonl: {held} are held, {peak} were needed")
    del lines
    assert held < 3 * n_bytes and peak < 8 * n_bytes
    assert len(pickle.dumps(utterances)) < 2 * n_bytes  # what a spawned worker is sent
    assert len(utterances) == 100_000
    for i in (0, 1, 4_999, 54_321, 99_999):
        assert utterances.parse(i)["txt"] == f"utterance {i}"
        assert utterances.seconds[i] == i + 0.5


def test_user_error():
    """Only errors of the named classes become a message of one line; a bug, or a machine without
    memory, keeps its traceback."""
    with pytest.raises(InputError) as error, user_error("--flag: expected a file", OSError):
        raise FileNotFoundError("no such file\nand more")
    assert str(error.value) == "--flag: expected a file (no such file)"
    for unexpected in (MemoryError("full"), torch.OutOfMemoryError("CUDA"), AssertionError("bug")):
        with (
            pytest.raises(type(unexpected)) as error,
            user_error("--flag: expected a file", OSError, ValueError),
        ):
            raise unexpected
        assert error.value is unexpected
