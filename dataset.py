"""The data: a jsonl of {"wav": path, "txt": transcript, "duration": seconds} becomes batches.

"duration" is optional; if it is missing, it is read from the audio file. A relative path is
resolved against the folder of the jsonl. DataLoader workers decode audio and tokenize text; the
log-mel spectrogram is computed in model.py.
"""

import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import signal
import sys
from itertools import compress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import whisper
from torch.nn.utils.rnn import pad_sequence
from whisper.audio import SAMPLE_RATE

# In input_ids these mark a speech embedding and padding. They are no token ids
SPEECH, PAD = -1, -2
IGNORE_INDEX = -100  # a label that the loss ignores
MAX_SECONDS = 1e6  # a longer duration, of over 11 days, is invalid


class SpeechDataset(torch.utils.data.Dataset):
    """The utterances of a jsonl. Item i is line i as a dict, with three more keys:

    "index": i
    "waveform": (n_samples,) int16, 16 kHz; a single zero if the audio cannot be read
    "error": None, or the reason why the audio cannot be read

    Lines are kept unparsed, so that a million of them fit in memory. self.seconds holds their
    durations. Raises InputError if a line is invalid, or has no "duration" and unreadable audio.
    """

    def __init__(self, path, require_text):
        self.path, self.require_text = path, require_text
        with as_input_error(f"{path}: cannot be read"), open(path, "rb") as file:
            self.lines = file.read().rstrip().splitlines()
        with ThreadPool(32) as pool:  # threads: opening files is I/O-bound
            durations = pool.map(self.duration_or_error, range(len(self.lines)))
        errors = [error for error in durations if isinstance(error, str)]
        if errors or not self.lines:
            summary = f"{path}: {len(errors)} of {len(self.lines)} lines are invalid"
            raise InputError("\n".join([*errors[:10], summary]))
        self.seconds = durations

    def duration_or_error(self, i):
        """Returns the duration of line i, or an error message that names the line.

        No InputError is raised: it is a SystemExit, which would hang the pool of threads.
        """
        try:
            utterance = self.parse_line(i)
            return utterance.get("duration") or audio_seconds(utterance["wav"])
        except InputError as error:
            return f"{self.path}:{i + 1}: {error}"

    def parse_line(self, i):
        """Returns line i as a dict, with a path in "wav". Raises InputError if it is invalid."""
        line = self.lines[i]
        with as_input_error('expected {"wav": "a path", "txt": "its transcript"}'):
            utterance = json.loads(line)
            utterance["wav"] = os.path.join(os.path.dirname(self.path), utterance["wav"])
            if self.require_text or "txt" in utterance:
                utterance["txt"].encode()  # raises an error for null and half a surrogate pair
            duration = utterance.get("duration", 1)
            # No isinstance, because true is an int
            if type(duration) not in (int, float) or not 0 < duration < MAX_SECONDS:
                raise ValueError("duration is not a number of seconds")
        return utterance

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        if torch.utils.data.get_worker_info():
            end_with_parent()
        utterance = self.parse_line(i)
        try:
            waveform, error = load_audio(utterance["wav"], utterance.get("duration")), None
        except InputError as reason:
            waveform, error = np.zeros(1, np.int16), str(reason)
        return {**utterance, "index": i, "waveform": waveform, "error": error}

    def drop_long(self, prompts, max_length):
        """Drops utterances that do not fit the encoder's window or whose sequence is too long.

        Nothing is truncated. Returns the number of dropped utterances. Raises InputError if none
        is left, or if a transcript has a token that the LLM has no embedding for.
        """
        keep = []
        for i, seconds in enumerate(self.seconds):
            n_samples = round(seconds * SAMPLE_RATE)
            with as_input_error(f"{self.path}:{i + 1}: cannot be tokenized"):
                targets = prompts.target_ids(self.parse_line(i)["txt"])
            length = len(prompts.prompt_ids(n_samples)) + len(targets)
            keep.append(length <= max_length and n_samples <= prompts.max_samples)
        if not any(keep):
            raise InputError(f"{self.path}: no utterance fits the encoder and --model_max_length")
        self.lines = list(compress(self.lines, keep))
        self.seconds = list(compress(self.seconds, keep))
        return keep.count(False)


def end_with_parent():
    """Makes Linux end this process, a DataLoader worker, when its parent has been killed.

    Otherwise it would wait forever to send its batch through a full pipe, and occupy GPU memory.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only Linux has prctl
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def load_audio(path, stated_seconds=None):
    """Reads audio of any format, sampling rate and number of channels: (n_samples,) int16, 16 kHz.

    Raises InputError if the file cannot be decoded, is empty, holds a sample that is not finite,
    or is much shorter or longer than its header or stated_seconds says.
    """
    with as_input_error(f"{path}: cannot be decoded"):
        os.stat(path)  # soundfile's error for a missing file is unclear
        try:
            with soundfile.SoundFile(path) as file:
                samples = file.read(dtype="float32", always_2d=True)  # (n, channels)
                in_header = header_seconds(file)
            waveform = soxr.resample(samples.mean(axis=1), file.samplerate, SAMPLE_RATE)
        except (soundfile.LibsndfileError, TypeError) as error:
            # ffmpeg tries what libsndfile does not know: its error then has code 1. For raw audio
            # soundfile raises a TypeError, which has no code. Any other error: a damaged file
            if getattr(error, "code", 1) != 1:
                raise
            waveform, in_header = decode_with_ffmpeg(path), None
        if len(waveform) == 0 or not np.isfinite(waveform).all():
            raise ValueError("no audio, or samples that are not finite numbers")
        seconds = len(waveform) / SAMPLE_RATE
        for source, stated in ("header", in_header), ('"duration"', stated_seconds):
            if stated and abs(seconds - stated) > max(0.1 * stated, 0.5):
                raise ValueError(f"it holds {seconds:.1f} s, but its {source} says {stated:.1f} s")
    return as_int16(waveform.clip(-1, 1))


def header_seconds(file):
    """Returns the duration that the header of a soundfile.SoundFile states, or None.

    Raises ValueError for several Ogg streams in one file: libsndfile would read the first alone.
    """
    if file.format == "OGG" and Path(file.name).read_bytes().count(b"OggS\0\2") > 1:
        raise ValueError("several Ogg streams joined in one file; convert it, for example to flac")
    seconds = file.frames / file.samplerate
    # For a truncated file, file.frames counts only what exists. libsndfile then logs the header's
    # size and the real one, in bytes: "data : HEADER (should be REAL)"
    size = re.search(r"(?:data|SSND|riff|[Ss]ize) +: (\d+) \(should be (\d+)\)", file.extra_info)
    stated, actual = map(int, size.groups()) if size else (0, 0)
    if 0 < actual < stated < 0x7FFF0000:  # a larger size is the placeholder of a streaming encoder
        seconds *= stated / actual
    return seconds if 0 < seconds < MAX_SECONDS else None


def decode_with_ffmpeg(path):
    """Returns a waveform (n_samples,) float32. Raises ValueError with ffmpeg's own reason."""
    try:
        return whisper.load_audio(path)
    except FileNotFoundError:
        raise ValueError("not a format that libsndfile knows; install ffmpeg to read it") from None
    except RuntimeError as error:
        raise ValueError(str(error).strip().splitlines()[-1]) from error


def audio_seconds(path):
    """Returns the duration: the header's if it states one, else that of the decoded audio."""
    # If this fails, load_audio finds the duration, or raises the right error
    with contextlib.suppress(Exception), soundfile.SoundFile(path) as file:
        if seconds := header_seconds(file):
            return seconds
    return len(load_audio(path)) / SAMPLE_RATE


def as_int16(waveform):
    """Converts a float32 waveform in [-1, 1] to int16. An int16 waveform is returned unchanged.

    Raises ValueError for anything else, and for an empty waveform.
    """
    samples = np.asarray(waveform)
    if samples.dtype == np.float32 and (abs(samples) <= 1).all():
        samples = (samples * 32768).round().clip(-32768, 32767).astype(np.int16)
    if samples.dtype != np.int16 or samples.ndim != 1 or len(samples) == 0:
        raise ValueError("expected a waveform (n_samples,) of int16, or of float32 in [-1, 1]")
    return samples


def render_chat(tokenizer, prompt):
    """Renders the LLM's chat template with one user turn: the speech, followed by the prompt.

    Returns three strings: the text before the speech, the text between speech and answer, and the
    token that ends the answer. Raises ValueError if the template has no place for one of them.
    """
    # Without enable_thinking=False, Qwen3 writes its reasoning before the answer
    options = {"tokenize": False, "enable_thinking": False}
    turns = [{"role": "user", "content": f"<speech>{prompt}"}]
    prompt_text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
    if prompt_text.count("<speech>") != 1:
        raise ValueError("the template drops the user's turn, or --prompt contains <speech>")
    prefix, suffix = prompt_text.split("<speech>")
    turns.append({"role": "assistant", "content": "<answer>"})
    full_text = tokenizer.apply_chat_template(turns, **options)
    _, answer, after_answer = full_text.rpartition("<answer>")
    if not answer:
        raise ValueError("the template drops the assistant's turn")
    # The first control token after the answer ends the turn
    control_tokens = tokenizer.get_added_vocab()
    end_tokens = [token for token in tokenizer.tokenize(after_answer) if token in control_tokens]
    end = end_tokens[0] if end_tokens else tokenizer.eos_token
    if end is None:
        raise ValueError("no token ends an answer: neither the template nor the tokenizer has one")
    return prefix, suffix, end


class PromptFormat:
    """The sequence that the LLM reads, in training and in recognition:

    prefix | speech embeddings | suffix | transcript | end-of-turn token

    prefix, suffix and the end-of-turn token come from render_chat. They are saved with the
    projector as settings["chat"], so that recognition uses the prompt of training. Targets are
    known by position, never by token id, because some LLMs use the end-of-turn token as the padding
    token.
    """

    def __init__(self, tokenizer, settings, encoder, n_token_embeddings):
        self.chat = settings.get("chat") or render_chat(tokenizer, settings["prompt"])
        prefix, suffix, end_of_turn = self.chat
        self.tokenizer, self.n_token_embeddings = tokenizer, n_token_embeddings
        self.prefix_ids, self.suffix_ids = self.tokenize(prefix), self.tokenize(suffix)
        [self.end_of_turn_id] = self.tokenize(end_of_turn)  # one token
        self.samples_per_embedding = settings["projector_stride"] * encoder.samples_per_frame
        self.max_embeddings = encoder.max_frames // settings["projector_stride"]  # 300 for 30 s
        self.max_samples = self.max_embeddings * self.samples_per_embedding

    def tokenize(self, text, **options):
        """Returns token ids. Raises ValueError if the LLM has no embedding for one of them."""
        ids = self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        if max(ids, default=0) >= self.n_token_embeddings:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise ValueError(f"the LLM has no embedding for its token {token!r}")
        return ids

    def prompt_ids(self, n_samples):
        """Returns the ids before the transcript, with SPEECH for each embedding that has audio."""
        n_embeddings = math.ceil(n_samples / self.samples_per_embedding)
        speech = [SPEECH] * min(n_embeddings, self.max_embeddings)
        return self.prefix_ids + speech + self.suffix_ids

    def target_ids(self, text):
        """Returns the ids that the LLM has to predict: the transcript and the end-of-turn token."""
        # Split, because "<|im_end|>" or "<unk>" in a transcript is text, not a control token
        return [*self.tokenize(text, split_special_tokens=True), self.end_of_turn_id]

    def recognition_batch(self, waveforms):
        """Builds a batch from B int16 waveforms.

        input_ids (B, T) is padded on the left, so that every prompt ends where generation starts.
        """
        prompts = [self.prompt_ids(len(waveform)) for waveform in waveforms]
        return {"input_ids": pad(prompts, PAD, side="left"), **audio_inputs(waveforms)}

    def training_batch(self, waveforms, targets):
        """Builds a batch from B int16 waveforms and B lists of target ids.

        input_ids (B, T) is padded on the right: no token attends to padding, and the LLM needs no
        attention mask. labels (B, K): target ids or IGNORE_INDEX. target_positions (B, K): the
        positions whose logits predict the labels.
        """
        sequences, positions = [], []
        for waveform, target_ids in zip(waveforms, targets, strict=True):
            prompt = self.prompt_ids(len(waveform))
            sequences.append(prompt + target_ids)
            positions.append(range(len(prompt) - 1, len(prompt) + len(target_ids) - 1))
        return {
            "input_ids": pad(sequences, PAD),
            "labels": pad(targets, IGNORE_INDEX),
            "target_positions": pad(positions, 0),
            **audio_inputs(waveforms),
        }

    def collate(self, items):
        """Builds a training batch from items of a SpeechDataset.

        An item that cannot be used is reported, and stays in the batch without targets, so that
        every process keeps the same batch size.
        """
        waveforms, targets = [], []
        for item in items:
            waveform, error = item["waveform"], item["error"]
            if len(waveform) > self.max_samples:
                error = f"{item['wav']}: longer than the encoder's window"
            if error:
                print(f"Warning: skipped {error}", file=sys.stderr)
            waveforms.append(waveform[:1] if error else waveform)
            targets.append([] if error else self.target_ids(item["txt"]))
        return self.training_batch(waveforms, targets)


def audio_inputs(waveforms):
    """Returns the waveforms, concatenated because padding wastes memory, and their lengths.

    The lengths are a list, which the host reads without waiting for the GPU.
    """
    samples = np.concatenate(waveforms)
    # Workers send tensors through /dev/shm, and training would hang if it were full. Docker gives
    # it 64 MB. There the samples stay an array, which is sent through a pipe and is slower
    if not shared_memory_is_scarce():
        samples = torch.from_numpy(samples)
    return {"waveforms": samples, "n_samples": [len(waveform) for waveform in waveforms]}


def shared_memory_is_scarce():
    """Returns whether /dev/shm has less than 1 GiB left."""
    return Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free < 2**30


def pad(sequences, value, side="right"):
    """Pads lists of integers to a tensor (B, longest)."""
    tensors = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


class InputError(SystemExit):
    """A mistake in the user's input. The message names the file, line or flag and what is expected.

    If it is not caught, it ends the script with status 1 and its message, without a traceback.
    """


@contextlib.contextmanager
def as_input_error(expected):
    """Re-raises an exception as InputError("<expected> (<cause>)").

    Use it only around code that reads what the user typed or provided.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = str(error).strip().partition("\n")[0]
        raise InputError(f"{expected} ({cause})") from error


def check_minimum(args, **minimums):
    """Raises InputError if one of these flags is below its minimum."""
    for name, minimum in minimums.items():
        if not getattr(args, name) >= minimum:  # also refuses nan
            raise InputError(f"--{name} {getattr(args, name)}: expected {minimum} or more")
