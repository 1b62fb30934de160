"""The data: a jsonl of {"wav": path, "txt": transcript, "duration": seconds} -> batches.

"duration" may be left out, and is then read from the file's header. A relative path is taken from
the jsonl's own folder. DataLoader workers decode and resample audio and tokenise text; the log-mel
is the model's.
"""

import contextlib
import json
import os
from itertools import compress
from multiprocessing.pool import ThreadPool

import numpy as np
import soundfile
import soxr
import torch
import whisper
from torch.nn.utils.rnn import pad_sequence
from transformers import HfArgumentParser
from whisper.audio import N_SAMPLES_PER_TOKEN, SAMPLE_RATE

SPEECH, PAD = -1, -2  # stand in input_ids where there is no token: a speech embedding, padding
IGNORE = -100  # a label that is not a target


class InputError(SystemExit):
    """A user's mistake: says which file, line or flag, what was expected, and how to fix it.

    Uncaught, it ends a script with its message on stderr, status 1, and no traceback.
    """


@contextlib.contextmanager
def user_error(expected, *errors):
    """Turns errors of these classes into an InputError: what was expected, the cause in brackets.

    It surrounds only what the user has typed or provided; all other errors keep their traceback.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, torch.OutOfMemoryError):  # a RuntimeError, but no wrong flag
            raise
        cause = str(error).partition("\n")[0]
        raise InputError(f"{expected} ({cause})") from error


def parse_flags(*dataclasses):
    """Instances of the dataclasses, from a script's command line. Raises InputError."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    parser = HfArgumentParser(dataclasses, usage="%(prog)s --FLAG ...")
    with user_error("wrong flags", ValueError):
        return parser.parse_args_into_dataclasses()


def end_with_parent(*_):
    """Lets Linux end this process when the one that started it dies, even by kill -9.

    So neither torchrun's processes outlive it, nor the workers that load audio for them.
    """
    torch.multiprocessing._prctl_pr_set_pdeathsig(9)  # SIGKILL; elsewhere it does nothing


def load_audio(path):
    """An audio file of any format, rate and number of channels -> (n_samples,) int16, 16 kHz mono.

    Raises InputError if it cannot be decoded, is empty, or has a sample that is not finite.
    """
    with user_error(f"{path}: cannot be decoded", OSError, RuntimeError, ValueError):
        os.stat(path)  # names a missing file better than what follows
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (n, channels)
            waveform = soxr.resample(samples.mean(axis=1), rate, SAMPLE_RATE)
        except (soundfile.LibsndfileError, TypeError):  # TypeError: a headerless file
            waveform = whisper.load_audio(path)  # by ffmpeg
        if len(waveform) == 0 or not np.isfinite(waveform).all():
            raise ValueError("no audio, or samples that are not finite numbers")
    return (waveform * 32768).round().clip(-32768, 32767).astype(np.int16)


def audio_seconds(path):
    """Duration of an audio file, from its header where libsndfile reads it. Raises InputError."""
    with contextlib.suppress(soundfile.LibsndfileError, TypeError, ValueError):
        # The header of what was a stream may have no length, or an absurd one
        if 0 < (seconds := soundfile.info(path).duration) < 1e6:
            return seconds
    return len(load_audio(path)) / SAMPLE_RATE


class Utterances(torch.utils.data.Dataset):
    """The lines of a jsonl, checked. Item i is the dict of a line, with two keys more:

    "waveform" (n_samples,) int16, and "error": None, or why the waveform is a single zero.

    Holds the raw lines, and parses one when asked for it: a million lines take little memory.
    seconds: the duration of each. The InputError lists the first ten bad lines and counts them all.
    """

    def __init__(self, path, training):
        self.path, self.training = path, training
        with user_error(f"{path}: cannot be read", OSError), open(path, "rb") as file:
            self.lines = file.read().rstrip().splitlines()
        with ThreadPool(32) as pool:  # threads, because to open files is to wait
            self.seconds = pool.map(self.measure, range(len(self)))
        bad = [str(error) for error in self.seconds if isinstance(error, InputError)]
        if bad or not self.lines:
            count = f"{path}: expected valid lines; {len(bad)} of {len(self)} are invalid"
            raise InputError("\n".join([*bad[:10], count]))

    def measure(self, i):
        """Seconds of audio of item i, or the InputError that names its line."""
        try:
            utterance = self.parse(i)
            return utterance.get("duration") or audio_seconds(utterance["wav"])
        except InputError as error:
            return InputError(f"{self.path}:{i + 1}: {error}")

    def parse(self, i):
        """Item i without its audio; "wav" is a path to open. Raises InputError."""
        expected = 'expected {"wav": "a path", "txt": "its transcript"}'
        with user_error(expected, ValueError, KeyError, TypeError, AttributeError):
            utterance = json.loads(self.lines[i])
            utterance["wav"] = os.path.join(os.path.dirname(self.path), utterance["wav"])
            text = utterance["txt"] if self.training else utterance.get("txt", "")
            text.encode()  # neither null nor half of a surrogate pair
            duration = utterance.get("duration", 1)
            if type(duration) not in (int, float) or not 0 < duration < 1e6:
                raise ValueError("duration is not a number of seconds")
        return utterance

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        utterance = self.parse(i)
        try:
            return utterance | {"waveform": load_audio(utterance["wav"]), "error": None}
        except InputError as error:
            return utterance | {"waveform": np.zeros(1, np.int16), "error": str(error)}

    def leave_out_long(self, rows, max_length):
        """Drops audio longer than the encoder's window, and rows longer than max_length.

        Neither is ever cut. Returns their number. Raises InputError if nothing is left.
        """
        fits = []
        for i, seconds in enumerate(self.seconds):
            n_samples = round(seconds * SAMPLE_RATE)
            text = self.parse(i)["txt"]
            room = max_length - len(rows.prompt(n_samples)) - 1  # for the text, before its end
            # A text has at most a token for each of its bytes, which are counted faster
            is_short = len(text.encode()) <= room or len(rows.tokenize(text)) <= room
            fits.append(is_short and n_samples <= rows.max_samples)
        if not any(fits):
            raise InputError(f"{self.path}: no utterance fits the encoder and --model_max_length")
        self.lines = list(compress(self.lines, fits))
        self.seconds = list(compress(self.seconds, fits))
        return fits.count(False)


def render_chat(tokenizer, prompt):
    """The LLM's chat template around a user turn of speech and prompt, as three texts:

    what precedes the speech, what follows it up to the answer, the token that ends the answer.
    """
    options = {"tokenize": False, "enable_thinking": False}  # Qwen3 must not think aloud
    turns = [{"role": "user", "content": f"<speech>{prompt}"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
    turns.append({"role": "assistant", "content": "<answer>"})
    answered = tokenizer.apply_chat_template(turns, **options)
    prefix, suffix = asked.split("<speech>")
    # The special token behind an answer ends it; where a template has none, the eos token does
    behind = tokenizer.tokenize(answered.split("<answer>")[-1])
    special = [token for token in behind if token in tokenizer.get_added_vocab()]
    return prefix, suffix, special[0] if special else tokenizer.eos_token


class RowFormat:
    """How speech and text are laid out in the LLM's input, in training and recognition alike:

    prefix | speech embeddings | suffix (| transcript | end)

    prefix, suffix and end are render_chat's, saved with the projector, so that recognition sees the
    prompt of training. What is a target is known by its place, never by its id: the LLM may pad
    with its stop token.
    """

    def __init__(self, tokenizer, settings, n_audio_ctx):
        self.tokenizer, self.all_speech = tokenizer, settings["all_speech_embeddings"]
        self.prefix_ids, self.suffix_ids = map(self.tokenize, settings["chat"][:2])
        self.end_id = tokenizer.convert_tokens_to_ids(settings["chat"][2])
        self.samples_per_embedding = settings["projector_stride"] * N_SAMPLES_PER_TOKEN
        self.max_speech = n_audio_ctx // settings["projector_stride"]  # 300 in Whisper's 30 s
        self.max_samples = self.max_speech * self.samples_per_embedding

    def tokenize(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, n_samples):
        """Ids up to the transcript; SPEECH for each embedding that covers audio, or for all."""
        covering = min(-(-n_samples // self.samples_per_embedding), self.max_speech)
        n_speech = self.max_speech if self.all_speech else covering
        return self.prefix_ids + [SPEECH] * n_speech + self.suffix_ids

    def batch(self, waveforms, targets=None):
        """B waveforms (n_samples,) int16, and in training lists of target ids -> a batch:

        waveforms (all samples,) int16, concatenated: padding would be most of what workers
        send; n_samples, a list: the host must know them without waiting for the GPU; input_ids
        (B, T). In training rows are padded on the right, where nothing that comes before sees it,
        and labels (B, K) are the targets, places (B, K) what predicts them. In recognition rows
        are padded on the left, so that all go on from their ends.
        """
        n_samples = [len(waveform) for waveform in waveforms]
        batch = {"waveforms": torch.from_numpy(np.concatenate(waveforms)), "n_samples": n_samples}
        prompts = [self.prompt(n) for n in n_samples]
        if targets is None:
            return batch | {"input_ids": pad(prompts, PAD, "left")}
        rows = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
        places = [range(len(p) - 1, len(row) - 1) for p, row in zip(prompts, rows, strict=True)]
        batch |= {"labels": pad(targets, IGNORE), "places": pad(places, 0)}
        return batch | {"input_ids": pad(rows, PAD)}

    def collate(self, utterances):
        """Items of Utterances -> a training batch, and "errors": why some of them have no targets.

        Nothing is learned from these, and the batch keeps its size on every process.
        """
        waveforms, targets, errors = [], [], []
        for item in utterances:
            error = item["error"]
            if len(item["waveform"]) > self.max_samples:
                error = f"{item['wav']}: longer than its duration says"
            waveforms.append(item["waveform"][:1] if error else item["waveform"])
            targets.append([] if error else [*self.tokenize(item["txt"]), self.end_id])
            errors += [error] if error else []
        return self.batch(waveforms, targets) | {"errors": errors}


def pad(lists, value, side="right"):
    """Lists of integers -> (B, length of the longest)."""
    rows = [torch.tensor(numbers, dtype=torch.long) for numbers in lists]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
