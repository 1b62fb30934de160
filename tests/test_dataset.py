"""The data: audio files, jsonl lines, and the sequences that the LLM reads."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import tracemalloc
from argparse import Namespace
from math import ceil

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch
from conftest import FAMILIES, ROOT, make_jsonl, make_tokenizer, run
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dataset import (
    IGNORE_INDEX,
    PAD,
    SPEECH,
    InputError,
    PromptFormat,
    SpeechDataset,
    as_input_error,
    as_int16,
    audio_seconds,
    check_minimum,
    load_audio,
    render_chat,
)


def make_prompts(family, prompt="one two", new_token=None):
    """Returns a PromptFormat at stride 5 for a window of 2 s; a new token has no embedding."""
    tokenizer = make_tokenizer(family)
    n_token_embeddings = len(tokenizer)
    if new_token:
        tokenizer.add_tokens(new_token)
    settings = {"chat": render_chat(tokenizer, prompt), "projector_stride": 5}
    encoder = Namespace(samples_per_frame=320, max_frames=100)
    return PromptFormat(tokenizer, settings, encoder, n_token_embeddings)


PROMPTS = {family: make_prompts(family) for family in FAMILIES}
LITERAL = {  # family: the prompts of 0.2 s and 0.31 s, the targets of "three one" and "two"
    # <|im_start|> user \n | speech | one _two <|im_end|> \n <|im_start|> as sistan t \n
    # | t h ree _ one <|im_end|>, and in the second sequence | t wo <|im_end|>
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


@pytest.mark.parametrize("family", LITERAL)
def test_literal_batches(tmp_path, family):
    """These are a training batch, padded on the right, whose targets are the transcript and the
    end-of-turn token, and a recognition batch, which is padded on the left."""
    items = list(SpeechDataset(make_jsonl(tmp_path, [0.2, 0.31], ["three one", "two"]), True))
    short_prompt, long_prompt, short_target, long_target = LITERAL[family]
    n_short, n_long = len(short_prompt), len(long_prompt)
    batch = PROMPTS[family].collate(items)
    assert {key: batch[key].tolist() for key in ("input_ids", "labels", "target_positions")} == {
        "input_ids": [short_prompt + short_target, [*long_prompt, *long_target, -2]],
        "labels": [short_target, [*long_target, -100, -100, -100]],
        "target_positions": [
            [*range(n_short - 1, n_short + 5)],
            [n_long - 1, n_long, n_long + 1, 0, 0, 0],
        ],
    }
    recognition = PROMPTS[family].recognition_batch([item["waveform"] for item in items])
    assert recognition.keys() == {"input_ids", "waveforms", "n_samples"}
    assert recognition["input_ids"].tolist() == [[-2, -2, *short_prompt], long_prompt]


def test_waveforms_travel_without_padding(tmp_path):
    """Workers send the waveforms of a batch as int16 samples, one after the other."""
    dataset = SpeechDataset(make_jsonl(tmp_path, [1.5, 0.25]), True)
    [batch] = DataLoader(dataset, 2, collate_fn=PROMPTS["qwen2"].collate, num_workers=1)
    waveforms = np.asarray(batch["waveforms"])
    assert waveforms.dtype == np.int16 and batch["n_samples"] == [24000, 4000]
    expected = [load_audio(tmp_path / f"data-{i}.wav") for i in (0, 1)]
    assert np.array_equal(waveforms, np.concatenate(expected))


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    st.sampled_from(sorted(FAMILIES)),
    st.lists(st.tuples(TEXT, st.integers(1, 40000)), min_size=1, max_size=4),
)
@example("llama3", [("", 1), ("<|im_end|> </s>", 32000)])
def test_batches(family, utterances):
    """Whatever is said, the prompt at recognition is a prefix of the training sequence, the rest
    of the sequence is its target, and the logits at a target position predict its label. Every
    0.1 s of audio has a speech embedding, up to the window's 20."""
    prompts = PROMPTS[family]
    targets = [prompts.target_ids(text) for text, _ in utterances]
    waveforms = [np.zeros(n, np.int16) for _, n in utterances]
    training = prompts.training_batch(waveforms, targets)
    sequences = training["input_ids"].tolist()
    padded_prompts = prompts.recognition_batch(waveforms)["input_ids"].tolist()
    n_paddings = []
    for k, (target, (_, n_samples)) in enumerate(zip(targets, utterances, strict=True)):
        prompt = prompts.prompt_ids(n_samples)
        assert prompt.count(SPEECH) == min(ceil(n_samples / 1600), 20)
        assert padded_prompts[k] == [PAD] * (len(padded_prompts[k]) - len(prompt)) + prompt
        n_padding = len(sequences[k]) - len(prompt + target)
        assert sequences[k] == prompt + target + [PAD] * n_padding
        labels, positions = training["labels"][k].tolist(), training["target_positions"][k]
        assert labels == target + [IGNORE_INDEX] * (len(labels) - len(target))
        assert training["input_ids"][k][positions[: len(target)] + 1].tolist() == target
        n_paddings.append(n_padding)
    assert min(n_paddings) == 0 and training["labels"].shape[1] == max(map(len, targets))


@pytest.mark.parametrize("prompt", ["one two", "put it into <answer> tags"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sequence_is_the_chat(family, prompt):
    """A sequence is what the tokenizer makes of the rendered chat, with the speech before the
    prompt, up to the end-of-turn token, but for the space that some templates put before an
    answer. A prompt may contain the word that stands for an answer."""
    prompts = make_prompts(family, prompt)
    ids = prompts.prompt_ids(1600) + prompts.target_ids("three")
    place, tokenizer = ids.index(SPEECH), prompts.tokenizer
    text = tokenizer.decode(ids[:place]) + "<speech>" + tokenizer.decode(ids[place + 1 :])
    user, answer = {"role": "user", "content": f"<speech>{prompt}"}, {"role": "assistant"}
    rendered = tokenizer.apply_chat_template([user, answer | {"content": "three"}], tokenize=False)
    assert text == rendered.rstrip("\n").replace("[/INST] ", "[/INST]")
    assert ids[-1] == tokenizer.convert_tokens_to_ids(FAMILIES[family][-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_transcripts_are_text(family):
    """A transcript that spells the end-of-turn token or any other does not contain its id."""
    special = FAMILIES[family][1]
    text = "one " + " two ".join(special)
    ids = PROMPTS[family].target_ids(text)[:-1]
    assert min(ids) >= len(special) and PROMPTS[family].tokenizer.decode(ids) == text


PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
THINKING = (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}"
)


def test_odd_templates():
    """The eos token ends an answer if the template does not, an LLM that can think is asked not
    to, and a chat without a place for the speech or without an end of the answer is refused."""
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template += THINKING
    _, suffix, end_of_turn = render_chat(tokenizer, "one")
    assert suffix == "one<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert end_of_turn == "<|im_end|>"
    tokenizer.chat_template = PLAIN
    assert render_chat(tokenizer, "one") == ("user: ", "one\nassistant: ", "<|im_end|>")
    with pytest.raises(ValueError, match="--prompt contains <speech>"):
        render_chat(tokenizer, "<speech>")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no token ends an answer"):
        render_chat(tokenizer, "one")


def test_tokens_without_embedding(tmp_path):
    """A token beyond the embedding table is refused: the prompt's when the LLM is loaded, that of
    a transcript before training, with file and line."""
    path = make_jsonl(tmp_path, [0.2] * 3, ["one", "a purple one", "two"])
    reason = "the LLM has no embedding for its token 'purple'"
    with pytest.raises(InputError) as error:
        SpeechDataset(path, True).drop_long(make_prompts("qwen2", new_token="purple"), 100)
    assert str(error.value) == f"{path}:2: cannot be tokenized ({reason})"
    with pytest.raises(ValueError, match=reason):
        make_prompts("qwen2", "a purple prompt", new_token="purple")


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
    path, channels = str(tmp_path / name), np.stack([sine(440, rate), sine(1000, rate)], axis=1)
    file_format = "OGG" if name.endswith("opus") else None
    soundfile.write(path, channels, rate, subtype=subtype, format=file_format)
    waveform = load_audio(path)
    assert waveform.dtype == np.int16 and waveform.ndim == 1
    assert len(waveform) / 16000 == pytest.approx(1.3, rel=0.01)
    assert audio_seconds(path) == pytest.approx(1.3, rel=0.01)
    for frequency in (440, 1000):
        assert amplitude(waveform, frequency) == pytest.approx(0.25, rel=0.05)
    assert amplitude(waveform, 700) < 0.005


def test_samples_are_exact(tmp_path):
    """The 65536 values of a 16-bit wav at 16 kHz come out as they are, and as the same float32
    values from Python; floats beyond full scale are clipped and never wrap around."""
    values = np.arange(-32768, 32768).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", values, 16000, subtype="PCM_16")
    assert np.array_equal(load_audio(tmp_path / "a.wav"), values)
    floats = soundfile.read(tmp_path / "a.wav", dtype="float32")[0]
    for waveform in (values, floats, torch.tensor(values), torch.tensor(floats)):
        assert as_int16(waveform).dtype == np.int16 and np.array_equal(as_int16(waveform), values)
    soundfile.write(tmp_path / "b.wav", [-3, -1, -0.5, 0, 0.5, 1, 3], 16000, subtype="FLOAT")
    clipped = [-32768, -32768, -16384, 0, 16384, 32767, 32767]
    assert load_audio(tmp_path / "b.wav").tolist() == clipped


def test_other_waveforms_are_refused():
    """A waveform is (n_samples,) of int16, or of float32 in [-1, 1], and nothing else."""
    shapes, dtypes = ((0,), (), (1, 100), (100, 2)), (np.float64, np.float16, np.int32, np.uint8)
    waveforms = [np.zeros(n, dtype) for n in shapes for dtype in (np.int16, np.float32)]
    waveforms += [np.zeros(100, dtype) for dtype in dtypes]
    waveforms += [np.float32([0, 1.01]), np.float32([0, np.nan]), [0, 1, 2], "a.wav"]
    for waveform in waveforms:
        with pytest.raises(ValueError, match=r"int16, or of float32 in \[-1, 1\]"):
            as_int16(waveform)


def item_error(path, **line):
    """Returns the "error" of a file as the only item of a jsonl; it is load_audio's, too."""
    (path.parent / "a.jsonl").write_text(json.dumps({"wav": path.name, "txt": "one", **line}))
    [item] = SpeechDataset(str(path.parent / "a.jsonl"), True)
    if item["error"]:
        assert item["waveform"].tolist() == [0] and item["waveform"].dtype == np.int16
        assert item["error"].startswith(f"{path}: cannot be decoded (")
        with pytest.raises(InputError) as error:
            load_audio(str(path), line.get("duration"))
        assert str(error.value) == item["error"] and "\n" not in item["error"]
    return item["error"]


@pytest.fixture
def ffmpeg(tmp_path_factory, monkeypatch):
    """A real ffmpeg in the PATH; returns its path."""
    folder = tmp_path_factory.mktemp("ffmpeg")
    (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder / "ffmpeg"


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.aiff", "a.au", "a.w64"])
def test_torn_file(tmp_path, ffmpeg, name):
    """A file that ends before its header says so is unreadable, and ffmpeg is not asked for what
    libsndfile knows: it would read the rest of a torn flac without a word."""
    path, noise = tmp_path / name, np.random.default_rng(0).normal(size=48000) * 0.1
    soundfile.write(path, noise, 16000)
    assert item_error(path) is None
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    assert audio_seconds(path) == pytest.approx(3, rel=0.02)
    reason = r"flac decoder lost sync|it holds 1\.[78] s, but its header says 3\.0 s"
    assert re.search(reason, item_error(path))


@pytest.mark.parametrize(
    ("seconds", "good", "bad"), [(3, (2.5, 3.5), (2.4, 3.6)), (10, (9.1, 11.1), (9.0, 11.2))]
)
def test_stated_duration(tmp_path, seconds, good, bad):
    """Audio that is more than 10 % and 0.5 s away from its line's duration is unreadable."""
    path = tmp_path / "a.flac"
    soundfile.write(path, sine(440, 8000, seconds), 8000)
    for duration in good:
        assert item_error(path, duration=duration) is None
    for duration in bad:
        reason = f'(it holds {seconds:.1f} s, but its "duration" says {duration:.1f} s)'
        assert item_error(path, duration=duration).endswith(reason)


@pytest.mark.parametrize(
    "fields",
    [
        *({4: size, 40: size} for size in (0xFFFFFFFF, 0x80000000, 0x7FFFFFFF)),
        {4: 0x7FFFF024, 40: 0x7FFFEFFF},  # sox's for 24 bits
        {4: 8, 40: 0},
        {4: 2_000_000},
        {28: 64000},  # bytes per second
    ],
)
def test_header_that_states_no_length(tmp_path, fields):
    """Placeholders for the sizes in the header of a streamed wav, and wrong numbers that say
    nothing of its length, do no harm."""
    path = tmp_path / "a.wav"
    soundfile.write(path, sine(440, 16000), 16000)
    content, expected = bytearray(path.read_bytes()), load_audio(path)
    assert content[36:40] == b"data"
    for offset, value in fields.items():
        content[offset : offset + 4] = value.to_bytes(4, "little")
    path.write_bytes(content)
    assert audio_seconds(path) == 1.3 and item_error(path) is None
    assert np.array_equal(load_audio(path), expected)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg(tmp_path, subtype):
    """Several Ogg streams in one file, of which libsndfile reads the first alone, are named."""
    path = tmp_path / "a.ogg"
    soundfile.write(path, sine(440, 16000), 16000, format="OGG", subtype=subtype)
    path.write_bytes(path.read_bytes() * 2)
    assert "several Ogg streams joined" in item_error(path, duration=1.3)
    with pytest.raises(InputError, match=r"a\.jsonl:1: .*/a\.ogg: .*several Ogg streams joined"):
        item_error(path)


def test_ffmpeg(tmp_path, ffmpeg, monkeypatch):
    """What libsndfile does not recognise goes to ffmpeg, whose last line tells what is wrong;
    without ffmpeg the message says what to install."""
    soundfile.write(tmp_path / "a.wav", sine(440, 16000, 3), 16000)
    options = ["-loglevel", "error", "-i", tmp_path / "a.wav"]
    subprocess.run([ffmpeg, *options, tmp_path / "a.m4a"], check=True)
    assert item_error(tmp_path / "a.m4a") is None
    assert item_error(tmp_path / "a.m4a", duration=5).endswith('"duration" says 5.0 s)')
    assert audio_seconds(str(tmp_path / "a.m4a")) == pytest.approx(3, abs=0.1)
    assert amplitude(load_audio(str(tmp_path / "a.m4a")), 440) == pytest.approx(0.5, rel=0.05)
    (tmp_path / "b.m4a").write_text("<html>not found</html>" * 100)
    reason = "(Error opening input files: Invalid data found when processing input)"
    assert item_error(tmp_path / "b.m4a", duration=1).endswith(reason)
    # libsndfile guesses the length of an mp3 of variable bit rate without a Xing header
    mp3 = ["-af", "apad=pad_dur=5", "-q:a", "5", "-write_xing", "0", tmp_path / "a.mp3"]
    subprocess.run([ffmpeg, *options, *mp3], check=True)
    assert item_error(tmp_path / "a.mp3", duration=8).endswith('"duration" says 8.0 s)')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert item_error(tmp_path / "a.m4a", duration=3).endswith("install ffmpeg to read it)")


def test_drop_long(tmp_path):
    """Audio longer than the window, and sequences over --model_max_length, are dropped and
    counted, and no other; what stays is complete."""
    prompts, words = PROMPTS["qwen2"], ["one", "two", "three"] * 3
    seconds = [0.5, 1.0, 2.0, 2.0001, 3.0, *[0.3] * 9]
    texts = [*["one"] * 5, *(" ".join(words[: k + 1]) for k in range(9))]
    path = make_jsonl(tmp_path, seconds, texts)
    items = list(SpeechDataset(path, True))
    in_window = [0, 1, 2, *range(5, 14)]  # 2 s
    lengths = {i: prompts.collate([items[i]])["input_ids"].shape[1] for i in in_window}
    for max_length in sorted({*lengths.values(), 1000}):
        dataset = SpeechDataset(path, True)
        n_dropped = dataset.drop_long(prompts, max_length)
        fitting = [i for i in in_window if lengths[i] <= max_length]
        assert n_dropped == len(seconds) - len(fitting)
        assert dataset.seconds == [seconds[i] for i in fitting]
        assert [item["wav"] for item in dataset] == [items[i]["wav"] for i in fitting]
    with pytest.raises(InputError, match="--model_max_length"):
        SpeechDataset(path, True).drop_long(prompts, min(lengths.values()) - 1)


@pytest.fixture
def folder(tmp_path):
    """A folder with a good wav file and some that are none."""
    soundfile.write(tmp_path / "a.wav", sine(440, 16000, 0.5), 16000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan), 16000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no audio at all " * 100)
    (tmp_path / "headerless.raw").write_bytes(bytes(3200))
    return tmp_path


def read(folder, content, require_text=True):
    """Returns the SpeechDataset of a jsonl with this content: bytes, or a list of dicts."""
    if not isinstance(content, bytes):
        content = "\n".join(map(json.dumps, content)).encode()
    (folder / "a.jsonl").write_bytes(content)
    return SpeechDataset(str(folder / "a.jsonl"), require_text)


def test_jsonl_of_any_editor(folder, monkeypatch):
    """A byte order mark, Windows line ends, a missing last one and further keys do no harm; a
    relative path is resolved against the jsonl's own folder."""
    wav, waveform = str(folder / "a.wav"), load_audio(folder / "a.wav")
    lines = [
        '{"wav": "a.wav", "txt": "eins"}',
        '{"txt": "你好", "wav": "a.wav", "speaker": 3}',
        json.dumps({"wav": wav, "txt": "\x85\u2028"}, ensure_ascii=False),
    ]
    dataset = read(folder, b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    expected = [{"txt": "eins"}, {"txt": "你好", "speaker": 3}, {"txt": "\x85\u2028"}]
    for i, item in enumerate(dataset):
        assert np.array_equal(item.pop("waveform"), waveform)
        assert item == expected[i] | {"wav": wav, "index": i, "error": None}
    assert len(dataset) == 3 and dataset.seconds == [0.5, 0.5, 0.5]
    monkeypatch.chdir(folder)
    assert SpeechDataset("a.jsonl", True)[0]["wav"] == "a.wav"


GOOD = b'{"wav": "a.wav", "txt": "one"}'
BAD = {  # line: what its message must name
    **dict.fromkeys([b"", b"   ", GOOD[:-1], b'["a.wav", "one"]', b"null"], '"wav"'),
    b'{"audio": "a.wav", "txt": "one"}': "'wav'",
    b'{"wav": 1, "txt": "one"}': "int",
    b'{"wav": "a.wav", "text": "one"}': "'txt'",
    b'{"wav": "a.wav", "txt": null}': '"txt"',
    b'{"wav": "a.wav", "txt": ["one"]}': '"txt"',
    b'{"wav": "a.wav", "txt": "\xff"}': "utf-8",
    b'{"wav": "a.wav", "txt": "\\ud83d"}': "utf-8",
    b'{"wav": "a\\ud83d.wav", "txt": "one"}': "utf-8",
    b'{"wav": "a\\u0000.wav", "txt": "one"}': "cannot be decoded",
    **{
        b'{"wav": "%s", "txt": "one"}' % wav: wav.decode() + ": cannot be decoded (" + reason
        for wav, reason in {
            b"absent.wav": "[Errno 2] No such file",
            b".": "not a format that",
            b"text.wav": "not a format that",
            b"headerless.raw": "not a format that",
            b"empty.wav": "no audio",
        }.items()
    },
    **{
        b'{"wav": "a.wav", "txt": "one", "duration": %s}' % value: "duration is not a number"
        for value in b'0 -1.5 1e9 NaN Infinity null true "0.5" [0.5]'.split()
    },
}


@pytest.mark.parametrize("line", BAD)
def test_bad_line(folder, line, monkeypatch):
    """A bad line is named with its file and number, in one line, and what was expected.

    A blank line before a good one is bad, too: it would shift each following line of a result."""
    monkeypatch.setenv("PATH", str(folder))  # without ffmpeg
    with pytest.raises(InputError) as error:
        read(folder, b"\n".join([GOOD, line, GOOD, b""]))
    named, count = str(error.value).split("\n")
    assert named.startswith(f"{folder}/a.jsonl:2: ") and BAD[line] in named
    assert count == f"{folder}/a.jsonl: 1 of 3 lines are invalid"


def test_many_bad_lines(folder):
    """The first ten bad lines are listed, and all are counted."""
    with pytest.raises(InputError) as error:
        read(folder, b"\n".join([GOOD, b"{}"] * 15))
    *lines, count = str(error.value).split("\n")
    assert [line.split(":")[1] for line in lines] == [str(n) for n in range(2, 22, 2)]
    assert count == f"{folder}/a.jsonl: 15 of 30 lines are invalid"


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n", b"\r\n\r\n", b"\n \t\n\n  "])
def test_trailing_blank_lines(folder, end):
    """Blank lines at the end of a jsonl, which many editors leave, are no lines of it."""
    assert len(read(folder, GOOD + b"\n" + GOOD + end)) == 2


def test_only_training_needs_transcripts(folder):
    """A jsonl without txt is good for recognition."""
    assert len(read(folder, b'{"wav": "a.wav"}\n', require_text=False)) == 1
    with pytest.raises(InputError, match=r"a\.jsonl:1: .*txt"):
        read(folder, b'{"wav": "a.wav"}\n')


def test_no_jsonl(folder):
    """A jsonl that is empty, absent or a folder is named."""
    (folder / "a.jsonl").write_bytes(b"")
    reasons = {"a.jsonl": "0 of 0 lines", "b.jsonl": "No such file", "": "directory"}
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=f"^{folder}/{name}: .*{reason}"):
            SpeechDataset(f"{folder}/{name}", True)


def test_unusable_items(folder, capsys):
    """A file whose line states its duration is opened when it is loaded. If it cannot be read or
    is longer than the window (2 s), it is reported and stays in the batch without targets."""
    soundfile.write(folder / "long.wav", sine(440, 16000, 2.1), 16000)
    durations = {"a.wav": 0.5, "gone.wav": 3.25, "nan.wav": 0.5, "long.wav": 2, "./a.wav": 0.5}
    lines = [{"wav": wav, "txt": "one", "duration": n} for wav, n in durations.items()]
    dataset, prompts = read(folder, lines), PROMPTS["qwen2"]
    assert dataset.seconds == [*durations.values()]
    batch = prompts.collate(list(dataset))
    assert [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"Warning: skipped {folder}/gone.wav: cannot be decoded",
        f"Warning: skipped {folder}/nan.wav: cannot be decoded",
        f"Warning: skipped {folder}/long.wav: longer than the encoder's window",
    ]
    assert batch["n_samples"] == [8000, 1, 1, 1, 8000]
    target = prompts.target_ids("one")
    nothing = [IGNORE_INDEX] * len(target)
    assert batch["labels"].tolist() == [target, nothing, nothing, nothing, target]
    speech = [sequence.count(SPEECH) for sequence in batch["input_ids"].tolist()]
    assert speech == [5, 1, 1, 1, 5]
    nothing = prompts.collate([dataset[1], dataset[2]])  # a batch without any target
    assert nothing["labels"].shape == nothing["target_positions"].shape == (2, 0)


def start_up(folder, script, n_files):
    """Reads, in its own process, a jsonl of files that this script in place of ffmpeg decodes."""
    (folder / "ffmpeg").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ffmpeg").chmod(0o755)
    for i in range(n_files):
        (folder / f"{i}.m4a").write_bytes(bytes(100))
    lines = [json.dumps({"wav": f"{i}.m4a", "txt": "one"}) for i in range(n_files)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    code = "import dataset; print(dataset.SpeechDataset('a.jsonl', True).seconds)"
    return run(sys.executable, "-c", code, cwd=folder, env=path, check=False, timeout=60)


def test_start_up_does_not_hang(tmp_path):
    """When what decodes a file is killed, as an out-of-memory killer does, the start-up ends. A
    pool of processes would wait for ever. Here ffmpeg kills the process that started it."""
    assert start_up(tmp_path, "kill -9 $PPID", 1).returncode == -signal.SIGKILL


def test_files_are_opened_side_by_side(tmp_path):
    """Sixteen files are waited for at once, on however few cores: their storage may be slow.

    Each call of this ffmpeg waits until all of them have begun, and fails if that never happens."""
    script = (
        f"touch {tmp_path}/begun-$$\n"
        "for tenth in $(seq 300); do\n"
        f"    [ $(ls {tmp_path} | grep -c begun) = 16 ] && exec head -c 3200 /dev/zero\n"
        "    sleep 0.1\ndone\nexit 1"
    )
    assert start_up(tmp_path, script, 16).stdout.strip() == str([0.1] * 16)


def test_long_jsonl(folder):
    """100,000 lines cost their bytes and little more, and item i is line i."""
    content = "".join(
        json.dumps({"wav": "a.wav", "txt": f"utterance {i}", "duration": i + 0.5}) + "\n"
        for i in range(100_000)
    ).encode()
    tracemalloc.start()
    dataset = read(folder, content)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    n_bytes = len(content)
    assert held < 3 * n_bytes and peak < 8 * n_bytes
    assert len(pickle.dumps(dataset)) < 2 * n_bytes  # what a spawned worker is sent
    assert len(dataset) == 100_000
    for i in (0, 1, 4_999, 54_321, 99_999):
        assert dataset.parse_line(i)["txt"] == f"utterance {i}"
        assert dataset.seconds[i] == i + 0.5


def test_input_errors():
    """The user's mistakes become a message of one line, while a machine without memory keeps its
    traceback; a minimum refuses nan, too."""
    for error, expected in {
        FileNotFoundError("no such file\nand more"): InputError("--flag: expected (no such file)"),
        MemoryError("full"): MemoryError("full"),
        torch.OutOfMemoryError("CUDA"): torch.OutOfMemoryError("CUDA"),
    }.items():
        with pytest.raises(type(expected)) as raised, as_input_error("--flag: expected"):
            raise error
        assert str(raised.value) == str(expected)
    check_minimum(Namespace(num=1), num=1)
    for value in (0.9, float("nan")):
        with pytest.raises(InputError, match=f"^--num {value}: expected 1 or more"):
            check_minimum(Namespace(num=value), num=1)
