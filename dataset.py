"""From jsonl lines {"wav": ..., "txt": ...} to batches of token rows and raw waveforms.

DataLoader workers only decode and resample audio and tokenise text; the log-mel is the model's.
"""

import contextlib
import io
import json
import os
from functools import partial
from multiprocessing import Pool

import numpy as np
import soundfile
import soxr
import torch
import whisper
from torch.nn.utils.rnn import pad_sequence
from transformers import HfArgumentParser
from whisper.audio import N_SAMPLES_PER_TOKEN, SAMPLE_RATE

SPEECH, PAD = -1, -2  # what stands in a row in place of a token id: a speech embedding, nothing
IGNORE = -100  # a label that is no target


class InputError(SystemExit):
    """A user's mistake: says which file, line or flag, what was expected, and how to mend it.

    Uncaught, it ends a script with its message on stderr, status 1, and no traceback.
    """


@contextlib.contextmanager
def explain(expected):
    """Makes whatever fails inside an InputError: what was expected, and the reason in brackets."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{expected} ({reason})") from error


def parse_flags(*arguments):
    """The dataclasses of a script's arguments, from its command line. Raises InputError."""
    with explain("wrong flags"):
        return HfArgumentParser(
            arguments, usage="%(prog)s --FLAG ..."
        ).parse_args_into_dataclasses()


def load_audio(path):
    """An audio file of any format and rate -> mono float32 waveform at 16 kHz, (n_samples,).

    Raises InputError if it cannot be decoded, is empty, or has a sample that is not finite.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (n, channels)
        waveform = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE)
    except (soundfile.LibsndfileError, TypeError, ValueError):  # leaves ffmpeg's formats
        with explain(f"{path}: neither libsndfile nor ffmpeg can decode it"):
            waveform = whisper.load_audio(path)
    if len(waveform) == 0 or not np.isfinite(waveform).all():
        raise InputError(f"{path}: holds no audio, or samples that are not finite numbers")
    return waveform


def audio_seconds(path):
    """Duration of an audio file, from its header where libsndfile reads it. Raises InputError."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    with contextlib.suppress(soundfile.LibsndfileError, TypeError):
        # The header of what was a stream may have no length, or an absurd one
        if 0 < (seconds := soundfile.info(path).duration) < 1e6:
            return seconds
    return len(load_audio(path)) / SAMPLE_RATE


def check_line(line, folder, training):
    """(seconds of audio, None) of a jsonl line (bytes), or (0, what is wrong with it)."""
    try:
        with explain('expected {"wav": "a path", "txt": "its transcript"}'):
            utterance = json.loads(line)
            path = os.path.join(folder, utterance["wav"])
            text = utterance["txt"] if training else utterance.get("txt", "")
            assert isinstance(text, str), "txt is not a string"
            text.encode()  # half a surrogate pair is no text
        return audio_seconds(path), None
    except InputError as error:
        return 0.0, str(error)


class Utterances(torch.utils.data.Dataset):
    """The lines of a jsonl, checked; item i is a dict: its keys, "wav" to open, "line" (i + 1).

    Holds the file's bytes, not a million dicts: little memory, which forked workers share.
    seconds (n,) is the audio's duration. The InputError lists the first ten bad lines and counts
    them all. A byte order mark and Windows line ends do no harm.
    """

    def __init__(self, path, training):
        with explain(f"{path}: cannot be read"), open(path, "rb") as file:
            self.data = file.read()
        self.folder = os.path.dirname(path)
        self.offsets = np.cumsum([0, *map(len, io.BytesIO(self.data))])
        check = partial(check_line, folder=self.folder, training=training)
        n_processes = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        with Pool(max(1, min(n_processes, len(self) // 1000))) as pool:
            checked = list(pool.imap(check, io.BytesIO(self.data), chunksize=100))
        self.seconds = np.array([seconds for seconds, _ in checked])
        bad = [f"{path}:{i}: {problem}" for i, (_, problem) in enumerate(checked, 1) if problem]
        if bad or not checked:
            count = [f"{path}: {len(bad)} bad lines in all" if checked else f"{path}: is empty"]
            raise InputError("\n".join(bad[:10] + count))

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, i):
        utterance = json.loads(self.data[self.offsets[i] : self.offsets[i + 1]])
        return utterance | {"wav": os.path.join(self.folder, utterance["wav"]), "line": i + 1}


class Rows:
    """Lays out the LLM's rows, for training and recognition alike:

    prefix_ids | n_speech places for speech embeddings | suffix_ids (| transcript | end_id).

    The tokenizer's own chat template is rendered once, with the speech inside the user turn, split
    there, and the pieces are tokenised. So the prompt at recognition is a prefix of the training
    row, and targets are known by their place, whatever ids the LLM pads or stops with.
    """

    def __init__(self, tokenizer, prompt, n_audio_ctx, stride, all_speech=False):
        self.tokenizer, self.all_speech = tokenizer, all_speech
        self.max_speech = n_audio_ctx // stride  # embeddings in the encoder's window: 300 in 30 s
        self.samples_per_embedding = stride * N_SAMPLES_PER_TOKEN
        self.window = self.max_speech * self.samples_per_embedding  # samples
        # Qwen3 must not think aloud, nor Llama 3.2 be told a date that differs at recognition
        options = {"tokenize": False, "enable_thinking": False, "date_string": "26 Jul 2024"}
        turns = [{"role": "user", "content": f"<speech>{prompt}"}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
        turns.append({"role": "assistant", "content": "<answer>"})
        answered = tokenizer.apply_chat_template(turns, **options)
        self.prefix_ids, self.suffix_ids = map(self.tokenize, asked.split("<speech>"))
        # A turn ends with the special token that stands behind an answer; some have none there
        behind = self.tokenize(answered.split("<answer>")[1])
        special = [i for i in behind if i in tokenizer.added_tokens_decoder]
        self.end_id = [*special, tokenizer.eos_token_id][0]

    def tokenize(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def n_speech(self, n_samples):
        """How many speech embeddings stand for a waveform: those that cover it, or all."""
        covering = -(-n_samples // self.samples_per_embedding)
        return self.max_speech if self.all_speech else min(covering, self.max_speech)

    def batch(self, waveforms, targets):
        """B waveforms (n_samples,) and lists of target ids (empty at recognition) -> SpeechLLM's

        input_ids (B, T), padded on the left; labels (B, K), the last K places of a row: IGNORE in
        the first column, for which nothing is left to predict it; and waveforms (B, samples).
        """
        ids = [
            self.prefix_ids + [SPEECH] * self.n_speech(len(waveform)) + self.suffix_ids + target
            for waveform, target in zip(waveforms, targets, strict=True)
        ]
        labels = [torch.tensor([IGNORE, *target]) for target in targets]
        pad = partial(pad_sequence, batch_first=True)
        # as int32, because Trainer rounds floats to bf16 for DeepSpeed
        waveforms = pad([torch.from_numpy(w) for w in waveforms]).view(torch.int32)
        ids = pad(list(map(torch.tensor, ids)), padding_value=PAD, padding_side="left")
        labels = pad(labels, padding_value=IGNORE, padding_side="left")
        return {"input_ids": ids, "labels": labels, "waveforms": waveforms}

    def collate(self, utterances):
        """Utterances' items -> a training batch."""
        waveforms = [load_audio(utterance["wav"]) for utterance in utterances]
        targets = [[*self.tokenize(utterance["txt"]), self.end_id] for utterance in utterances]
        return self.batch(waveforms, targets)


def training_set(utterances, rows, max_length):
    """The Utterances that fit, as a Subset. What does not fit is left out, never cut:

    audio longer than the encoder's window, and rows longer than max_length.
    """
    line_bytes = np.diff(utterances.offsets)  # no text has more tokens than its line has bytes
    longest_text = max_length - len(rows.prefix_ids) - len(rows.suffix_ids) - 1

    def fits(i):
        n_samples = utterances.seconds[i] * SAMPLE_RATE
        room = longest_text - rows.n_speech(round(n_samples))
        short = line_bytes[i] <= room or len(rows.tokenize(utterances[i]["txt"])) <= room
        return short and n_samples <= rows.window

    kept = [i for i in range(len(utterances)) if fits(i)]
    if not kept:
        window = f"{rows.window / SAMPLE_RATE:g} s"
        raise InputError(f"--data_path: all is longer than {window} or --model_max_length")
    return torch.utils.data.Subset(utterances, kept)
