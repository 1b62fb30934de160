"""Transcribes the audio files of a jsonl to result.txt, and scores the lines that have "txt".

One GPU or CPU:  python recognize.py --llm_model_name_or_path Qwen/Qwen2-1.5B-Instruct \\
                     --whisper_model_name_or_path large-v2 --data_path test.jsonl \\
                     --projector_model_path out/model.safetensors
8 GPUs:          torchrun --standalone --nproc_per_node=8 recognize.py ...

Line i of result.txt is the hypothesis for line i of the jsonl. result.txt.report has the scores
and the flagged lines.
"""

import math
import os
import re
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise, takewhile
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

import jiwer
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from more_itertools import batched, constrained_batches, flatten, split_into
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.hf_argparser import HfArg, HfArgumentParser
from whisper.audio import SAMPLE_RATE
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

from dataset import InputError, SpeechDataset, as_input_error, as_int16, check_minimum, load_audio
from model import ModelArguments, load_speech_llm


@dataclass(kw_only=True)
class DecodingArguments:
    data_path: str = HfArg(help='jsonl of {"wav": path}, and "txt" in the lines to score')
    result_path: str = HfArg(default="result.txt", help="line i is the hypothesis for line i")
    batch_size: int = HfArg(default=64, help="segments of up to 30 s that are decoded together")
    metric: Literal["wer", "cer", "auto"] = HfArg(
        default="auto", help="auto: cer if the references are in a script without spaces"
    )
    normalize: Literal["english", "basic"] | None = HfArg(
        default=None, help="a text normaliser of Whisper, for references and hypotheses"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = HfArg(
        default=None, help="of the frozen models; if None, bfloat16 on a GPU, else float32"
    )
    # Without a GPU, torchrun's processes form a group only if this is set
    use_cpu: bool = HfArg(default=not torch.accelerator.is_available(), help="use no GPU")
    num_workers: int = HfArg(default=min(4, os.cpu_count()), help="processes that load audio")


@dataclass
class GenerationArguments:
    """The flags of transformers' generate."""

    num_beams: int = HfArg(default=1, help="1 is greedy search")
    length_penalty: float = HfArg(default=1.0, help="above 0 favours longer hypotheses")
    repetition_penalty: float = HfArg(default=1.0, help="above 1 makes repetitions less likely")
    no_repeat_ngram_size: int = HfArg(default=0, help="above 0: size of n-grams not to repeat")
    max_new_tokens: int = HfArg(default=0, help="0 means 20 plus 10 per second of audio")


def transcribe(model, prompts, inputs, batch_size=64, **generate_kwargs):
    """Transcribes a list of audio files or waveforms; returns a list of (text, flag).

    A waveform has shape (n_samples,) at 16 kHz, int16 or float32 in [-1, 1]. Audio longer than the
    encoder's window is decoded in segments. flag: see hallucination_flag. generate_kwargs: see
    GenerationArguments. Raises InputError for a file that cannot be read.
    """
    if isinstance(inputs, str | Path):
        raise TypeError("expected a list of files or waveforms, not a single path")
    segments = []  # a list for each input
    for item in inputs:
        waveform = load_audio(item) if isinstance(item, str | Path) else as_int16(item)
        segments.append(split_at_pauses(waveform, prompts.max_samples))
    decoded = []
    for batch in batched(flatten(segments), batch_size):
        decoded += decode_batch(model, prompts, batch, **generate_kwargs)
    results = []
    for decoded_segments in split_into(decoded, map(len, segments)):
        texts, flags = zip(*decoded_segments, strict=True)
        flag = next(filter(None, flags), None)  # of the first flagged segment
        results.append((" ".join(filter(None, texts)), flag))
    return results


def split_at_pauses(waveform, max_samples):
    """Splits a waveform into segments of at most max_samples.

    Each cut is in the middle of the quietest 0.1 s in the last sixth of a segment (5 s of 30 s).
    """
    cuts, frame_length = [0], SAMPLE_RATE // 10
    while len(waveform) - cuts[-1] > max_samples:
        end = cuts[-1] + max_samples
        n_frames = max_samples // 6 // frame_length
        start = end - n_frames * frame_length
        frames = waveform[start:end].reshape(-1, frame_length).astype(float)
        quietest = (frames**2).sum(axis=1).argmin()
        cuts.append(start + quietest * frame_length + frame_length // 2)
    return [waveform[start:end] for start, end in pairwise([*cuts, len(waveform)])]


def decode_batch(
    model, prompts, waveforms, max_new_tokens=0, repetition_penalty=1.0, **generate_kwargs
):
    """Yields (text, flag) for each of the int16 waveforms, which are decoded in one batch.

    No result depends on the rest of the batch: every sequence has its own limit of tokens.
    """
    limits = [max_new_tokens or 20 + round(10 * len(w) / SAMPLE_RATE) for w in waveforms]
    limit_of_sequence = torch.tensor(limits, device=model.encoder.device)

    # token_ids (B * n_candidates, new tokens): 1 candidate if greedy, more than num_beams if not
    def at_limit(token_ids, scores, **kwargs):
        n_candidates = len(token_ids) // len(limits)
        return token_ids.shape[1] >= limit_of_sequence.repeat_interleave(n_candidates)

    sequences = model.generate(
        **prompts.recognition_batch(waveforms),
        max_new_tokens=max(limits),
        stopping_criteria=[at_limit],
        # Not generate's own repetition_penalty: it would ignore the first new tokens, as many as
        # the prompt has padding, because it takes them for the prompt
        logits_processor=[RepetitionPenaltyLogitsProcessor(float(repetition_penalty))],
        **generate_kwargs,
    )
    stop_ids = model.llm.generation_config.eos_token_id
    for token_ids, limit in zip(sequences.tolist(), limits, strict=True):
        # What follows is padding by end-of-turn tokens, as if the LLM had ended by itself
        token_ids = token_ids[:limit]
        text_ids = list(takewhile(lambda token_id: token_id not in stop_ids, token_ids))
        text = prompts.tokenizer.decode(text_ids, skip_special_tokens=True)
        text = " ".join(text.split())  # one line, whatever it contains
        yield text, hallucination_flag(text, has_ended=len(text_ids) < len(token_ids))


REFUSAL = re.compile(  # the LLM answers the user instead of transcribing
    r"(sorry|apolog|unable|cannot|can't).{0,60}\btranscribe (the|this|any|audio)\b"
    r"|\bno (\w+ )?(speech|audio)( \w+){0,2} to transcribe\b"
    r"|as an? (ai )?(large )?language model\b|please provide the audio"
    r"|(抱歉|对不起|无法).{0,20}(转录|转写|音频中|语音内容)|作为.{0,10}(语言模型|AI助手)",
    re.IGNORECASE,
)
# The same eight times in a row. It cannot start with a digit, or 100000000 would be a loop
LOOP = re.compile(r"([^\s\d].{0,60}?)\1{7,}")


def hallucination_flag(text, has_ended):
    """Returns "refusal", "loop" or "no stop" for a likely hallucination, else None.

    It does not look at the reference. has_ended: whether the LLM produced an end-of-turn token.
    """
    if REFUSAL.search(text):
        return "refusal"
    # The last repetition has no space behind it
    if LOOP.search(text + " ") or compression_ratio(text) > 2.4:  # the threshold of Whisper
        return "loop"
    return None if has_ended else "no stop"


def compression_ratio(text):
    """Returns how well zlib compresses a text, with each distinct character coded as one byte.

    In UTF-8, prose in a script of three bytes per character would look like a loop.
    """
    number = {character: i % 256 for i, character in enumerate(dict.fromkeys(text))}
    numbered = bytes(number[character] for character in text)
    return len(numbered) / len(zlib.compress(numbered))


# Scripts that are written without spaces: Thai, Lao, Burmese, Khmer, kana, Han
UNSPACED_SCRIPTS = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    r"\uff66-\uff9f\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]"
)
NORMALIZERS = {None: str, "english": EnglishTextNormalizer(), "basic": BasicTextNormalizer()}


def choose_metric(references):
    """Returns "cer" if most letters of the references are of unspaced scripts, else "wer"."""
    letters = "".join(filter(str.isalpha, "".join(references)))
    n_unspaced = len(UNSPACED_SCRIPTS.findall(letters))
    return "cer" if 2 * n_unspaced > len(letters) else "wer"


def score(records, metric, normalize):
    """Returns jiwer's WordOutput. For "cer" every character is a word, and spaces do not count."""

    def to_words(text):
        words = NORMALIZERS[normalize](text).split()
        return " ".join(words if metric == "wer" else "".join(words))

    references = [to_words(record["txt"]) for record in records]
    return jiwer.process_words(references, [to_words(record["hypothesis"]) for record in records])


def summarize(records, metric="auto", normalize=None):
    """Returns the summary as text: error rates of all and of the unflagged utterances, and counts.

    records: lines of a jsonl with "hypothesis" and "flag". Those without "txt" are not scored.
    """
    counts = Counter(record["flag"] for record in records if record["flag"])
    flagged = "flagged: " + (", ".join(f"{n} {flag}" for flag, n in counts.items()) or "none")
    records = [record for record in records if "txt" in record]
    if not records:
        return flagged
    if metric == "auto":
        metric = choose_metric([record["txt"] for record in records])
    total = score(records, metric, normalize)
    unflagged = [record for record in records if not record["flag"]]
    unflagged_rate = score(unflagged, metric, normalize).wer if unflagged else math.nan
    n_reference = total.hits + total.substitutions + total.deletions
    unit = "words" if metric == "wer" else "characters"
    return (
        f"{metric.upper()} {100 * total.wer:.2f}/{100 * unflagged_rate:.2f} % (all/not flagged): "
        f"{total.substitutions} substitutions, {total.deletions} deletions, "
        f"{total.insertions} insertions in {n_reference} reference {unit}\n{flagged}"
    )


def decode(model, prompts, dataset, args, generation_args, state):
    """Transcribes this process's share of a dataset; returns a list of records.

    A record is an item of the dataset without its waveform, with "line" (its text in the jsonl),
    "seconds" (of decoded audio), "hypothesis" and "flag".
    """
    longest_first = sorted(range(len(dataset)), key=lambda i: -dataset.seconds[i])
    # A batch has at most 30 s of audio for each of its utterances, or long files would fill memory
    limits = {"max_size": 30 * args.batch_size, "max_count": args.batch_size, "strict": False}
    batches = constrained_batches(longest_first, get_len=dataset.seconds.__getitem__, **limits)
    batches = list(batches)[state.process_index :: state.num_processes]
    options = {"collate_fn": list, "num_workers": args.num_workers}
    loader = DataLoader(dataset, batch_sampler=batches, **options)
    records = []
    for items in tqdm(loader, disable=not state.is_main_process):
        waveforms = [item.pop("waveform") for item in items]
        results = transcribe(model, prompts, waveforms, args.batch_size, **vars(generation_args))
        for item, waveform, (text, flag) in zip(items, waveforms, results, strict=True):
            if item["error"]:
                text, flag = "", "unreadable"
            item["line"] = dataset.lines[item["index"]]
            item["seconds"] = len(waveform) / SAMPLE_RATE
            records.append({**item, "hypothesis": text, "flag": flag})
    return records


def write_file(path, text):
    """Replaces a file as a whole, so that nobody ever reads half of it."""
    path = Path(path).resolve()
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.write_text(text, "utf-8", errors="replace")
    os.replace(temporary, path)


def write_results(records, summary, arguments, args):
    """Writes the result and the report. Returns the lines that could not be read."""
    details, unreadable = [summary, *map(str, arguments)], []
    for record in records:
        line = f"{args.data_path}:{record['index'] + 1}"
        if record["error"]:
            unreadable.append(f"{line}: {record['error']}")
        if record["flag"]:
            details.append(f"{line}: {record['flag']}: {record['error'] or record['hypothesis']}")
    write_file(args.result_path, "".join(record["hypothesis"] + "\n" for record in records))
    write_file(f"{args.result_path}.report", "\n".join([*details, ""]))
    return unreadable


def parse_flags():
    parser = HfArgumentParser((ModelArguments, DecodingArguments, GenerationArguments))
    with as_input_error("wrong flags"):
        model_args, args, generation_args = parser.parse_args_into_dataclasses()
    if not model_args.projector_model_path:
        raise InputError("--projector_model_path: expected a model.safetensors of train.py")
    result = Path(args.result_path).resolve()  # of a link, the file behind it
    with as_input_error(f"--result_path {result}: expected a file in a folder that can be written"):
        TemporaryFile(dir=result.parent).close()  # fails now, not after decoding
        if result.exists() and not result.is_file():
            raise ValueError("not a file")
        if Path(args.data_path).resolve() in (result, Path(f"{args.result_path}.report").resolve()):
            raise ValueError("it would replace the --data_path")
    check_minimum(args, batch_size=1, num_workers=0)
    check_minimum(generation_args, num_beams=1, max_new_tokens=0, no_repeat_ngram_size=0)
    check_minimum(generation_args, repetition_penalty=0.001, length_penalty=-math.inf)  # no nan
    return model_args, args, generation_args


def main():
    model_args, args, generation_args = parse_flags()
    dataset = SpeechDataset(args.data_path, require_text=False)
    state = PartialState(args.use_cpu, timeout=timedelta(days=30))  # processes wait for the slowest
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, prompts = load_speech_llm(model_args, state.device, dtype)
    start = time.perf_counter()
    records = gather_object(decode(model, prompts, dataset, args, generation_args, state))
    wall = time.perf_counter() - start
    state.destroy_process_group()  # else gloo's threads may crash the process at its exit
    if not state.is_main_process:
        return
    records.sort(key=lambda record: record["index"])
    if [record["line"] for record in records] != dataset.lines:
        raise InputError(f"{args.data_path}: read differently by the processes; nothing is written")
    seconds = sum(record["seconds"] for record in records)
    summary = summarize(records, args.metric, args.normalize)
    summary += f"\nRTFx {seconds / wall:.1f} ({seconds:.1f} s of audio in {wall:.1f} s)"
    unreadable = write_results(records, summary, [model_args, args, generation_args], args)
    print(summary)  # last, so that a closed pipe loses nothing
    if unreadable:
        message = "could not read these files; their lines in the result are empty:"
        raise InputError("\n".join([message, *unreadable]))


if __name__ == "__main__":
    main()
