"""Transcribes a jsonl, line by line, to result.txt, and scores it where the jsonl has "txt".

One GPU or CPU:  python recognize.py --llm_model_name_or_path Qwen2-1.5B-Instruct \\
                     --whisper_model_name_or_path large --data_path test.jsonl \\
                     --projector_model_path out/checkpoint-600/model.safetensors
8 GPUs:          torchrun --standalone --nproc_per_node=8 recognize.py ...

Writes result.txt (line i is the hypothesis of line i) and result.txt.report. A run that is cut off
leaves what it has decoded in result.txt.records-*, and --resume goes on from there.
"""

import contextlib
import glob
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, islice, pairwise, takewhile
from pathlib import Path
from typing import Literal

import jiwer
import torch
from accelerate import PartialState
from more_itertools import constrained_batches
from torch.utils.data import DataLoader
from tqdm import tqdm
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer
from whisper.utils import compression_ratio

from dataset import SAMPLE_RATE, InputError, Utterances, end_with_parent, load_audio, parse_flags
from model import ModelArguments, load_speech_llm

UNSPACED = r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"  # Thai, kana, Han
REFUSAL = (  # the LLM talks to the user about the task
    r"(?i)(sorry|apolog|unable|cannot|can't).{0,60}\btranscribe (the|this|any|audio)\b"
    r"|as an? (ai )?(large )?language model\b|please provide the audio"
    r"|(抱歉|对不起|无法).{0,20}(转录|转写|音频中|语音内容)|作为.{0,10}(语言模型|AI助手)"
)
LOOP = r"([^\s\d].{0,60}?)\1{7,}"  # said eight times in a row; not the zeros of 100000000
MINIMUM = {"batch_size": 1, "num_workers": 0, "num_beams": 1, "max_new_tokens": 0}
MINIMUM |= {"no_repeat_ngram_size": 0, "repetition_penalty": 1e-3}
NORMALIZERS = {None: str, "english": EnglishTextNormalizer(), "basic": BasicTextNormalizer()}


@dataclass(kw_only=True)
class DecodingArguments:
    data_path: str  # jsonl of {"wav": ...}, and "txt" to score against
    result_path: str = "result.txt"
    resume: bool = False  # go on from the records that a cut-off run of these flags has left
    batch_size: int = 64  # windows of audio, of up to 30 s, decoded together
    metric: Literal["wer", "cer", "auto"] = "auto"  # cer if references are mostly Han, kana, Thai
    normalize: Literal["english", "basic"] | None = None  # Whisper's text normalisers
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # bfloat16 on a GPU
    use_cpu: bool = False
    num_workers: int = min(4, os.cpu_count())  # processes that load audio


@dataclass
class SearchArguments:  # flags of transformers' generate
    num_beams: int = 1  # 1 is greedy search
    length_penalty: float = 1.0  # above 0 favours longer beams
    repetition_penalty: float = 1.0  # above 1: what was said becomes less likely
    no_repeat_ngram_size: int = 0  # above 0: so many tokens are not said twice
    max_new_tokens: int = 0  # 0: 20, and 10 for each second of audio


def split_at_pauses(waveform, max_samples):
    """Pieces of at most max_samples that join to the waveform, cut where it is quietest.

    That is in the middle of the 0.1 s of least energy in the last sixth of a piece (5 of 30 s).
    """
    cuts, frame = [0], SAMPLE_RATE // 10
    while len(waveform) - cuts[-1] > max_samples:
        end = cuts[-1] + max_samples
        last_sixth = end - max_samples // 6 // frame * frame
        energies = (waveform[last_sixth:end].reshape(-1, frame).astype(float) ** 2).sum(axis=1)
        cuts.append(last_sixth + energies.argmin() * frame + frame // 2)
    return [waveform[start:end] for start, end in pairwise([*cuts, len(waveform)])]


def hallucination(text, stopped):
    """Why a hypothesis cannot be what was said, judged without the reference; None if it can."""
    if re.search(REFUSAL, text):
        return "refusal"
    if re.search(LOOP, text + " ") or compression_ratio(text) > 2.4:  # as whisper.transcribe
        return "loop"
    return None if stopped else "no stop"


def transcribe_windows(model, rows, windows, max_new_tokens=0, **flags):
    """Yields (text, hallucination's kind or None) of waveforms (n_samples,) int16, in one batch.

    A row ends at its own limit, so that it does not depend on the rows that share its batch.
    """
    limits = [max_new_tokens or 20 + round(10 * len(wav) / SAMPLE_RATE) for wav in windows]
    limit_of_row = torch.tensor(limits, device=model.encoder.device)

    def at_limit(ids, scores, **kwargs):  # ids (rows x beam candidates, new tokens)
        return ids.shape[1] >= limit_of_row.repeat_interleave(len(ids) // len(limits))

    flags |= {"max_new_tokens": max(limits), "stopping_criteria": [at_limit]}
    stop_ids = model.llm.generation_config.eos_token_id
    sequences = model.generate(**rows.batch(windows), **flags).tolist()
    for ids, limit in zip(sequences, limits, strict=True):
        spoken = list(takewhile(lambda token: token not in stop_ids, ids[:limit]))
        text = rows.tokenizer.decode(spoken, skip_special_tokens=True)
        text = " ".join(text.split())  # one line, whatever it holds
        yield text, hallucination(text, stopped=len(spoken) < len(ids[:limit]))


def transcribe(model, rows, audio, batch_size=64, **flags):
    """[(transcript, hallucination's kind or None)] of files or waveforms (n_samples,) int16.

    What is longer than the encoder's window is decoded in windows. flags: those of transformers'
    generate. Raises InputError for a file that cannot be read.
    """
    waveforms = [load_audio(item) if isinstance(item, str | Path) else item for item in audio]
    pieces = [split_at_pauses(waveform, rows.max_samples) for waveform in waveforms]
    windows = list(chain.from_iterable(pieces))
    results = []
    for k in range(0, len(windows), batch_size):
        results += transcribe_windows(model, rows, windows[k : k + batch_size], **flags)
    remaining = iter(results)
    transcripts = []
    for n_windows in map(len, pieces):
        texts, kinds = zip(*islice(remaining, n_windows), strict=True)
        kind = next((kind for kind in kinds if kind), None)
        transcripts.append((" ".join(filter(None, texts)), kind))
    return transcripts


def score(records, metric, normalize):
    """jiwer's output; in the CER each character is a word, and spaces never count."""

    def split(text):
        words = NORMALIZERS[normalize](text).split()
        return " ".join(words if metric == "wer" else "".join(words))

    references = [split(record["txt"]) for record in records]
    return jiwer.process_words(references, [split(record["hypothesis"]) for record in records])


def report(records, metric="auto", normalize=None):
    """Rates of all / of what is not flagged, counts of errors and of flags, as printed.

    records: lines of a jsonl, those without "txt" are not scored, with "hypothesis" and "flag".
    """
    counts = Counter(record["flag"] for record in records if record["flag"])
    flags = "flagged: " + (", ".join(f"{n} {flag}" for flag, n in counts.items()) or "none")
    records = [record for record in records if "txt" in record]
    if not records:
        return flags
    if metric == "auto":
        text = "".join(record["txt"] for record in records)
        metric = "cer" if 2 * len(re.findall(UNSPACED, text)) > len(text) else "wer"
    total = score(records, metric, normalize)
    unflagged = [record for record in records if not record["flag"]]
    unflagged_rate = score(unflagged, metric, normalize).wer if unflagged else math.nan
    n_words = total.hits + total.substitutions + total.deletions
    return (
        f"{metric.upper()} {100 * total.wer:.2f}/{100 * unflagged_rate:.2f} % (all/not flagged), "
        f"{n_words} in the references: {total.substitutions} substitutions, {total.deletions} "
        f"deletions, {total.insertions} insertions\n{flags}"
    )


def read_records(result):
    """{index of a line: its record}, from the files that processes append to."""
    records = {}
    for path in result.parent.glob(f"{glob.escape(result.name)}.records-*"):
        for line in path.read_text("utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):  # a kill may have torn a line
                record = json.loads(line)
                records[record["index"]] = record
    return records


def check_arguments(model_args, args, search):
    """Rejects what would otherwise fail late or silently. Raises InputError."""
    result = Path(args.result_path)
    if result.is_dir() or not result.parent.is_dir():
        raise InputError(f"--result_path {result}: expected a file in a folder that exists")
    if not model_args.projector_model_path:
        raise InputError("--projector_model_path: expected a model.safetensors of train.py")
    numbers = vars(args) | vars(search)
    for name, least in MINIMUM.items():
        if numbers[name] < least:
            raise InputError(f"--{name} {numbers[name]}: expected {least} or more")


def main():
    model_args, args, search = parse_flags(ModelArguments, DecodingArguments, SearchArguments)
    check_arguments(model_args, args, search)
    result = Path(args.result_path)
    utterances = Utterances(args.data_path, training=False)
    done = read_records(result)
    if done and not args.resume:
        raise InputError(f"{result}.records-*: a run was cut off; add --resume, or delete them")
    for i, record in done.items():
        if i >= len(utterances) or record["wav"] != utterances.parse(i)["wav"]:
            raise InputError(f"{result}.records-*: not of {args.data_path}; delete them")
    # Without a GPU, accelerate would let torchrun's processes each decode everything
    cpu = args.use_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu, timeout=timedelta(days=30))  # ranks wait however long
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model, rows = load_speech_llm(model_args, state.device, dtype)
    state.wait_for_everyone()  # nobody writes before everybody has read
    seconds = utterances.seconds
    todo = sorted(set(range(len(utterances))) - set(done), key=lambda i: -seconds[i])
    # Each has at most so many windows, since a cut leaves at least 5/6 of a window before it
    excess = [s * SAMPLE_RATE / rows.max_samples - 1 for s in seconds]
    windows = [1 + max(0, math.ceil(over * 6 / 5)) for over in excess]
    batches = constrained_batches(todo, args.batch_size, get_len=windows.__getitem__, strict=False)
    batches = list(batches)[state.process_index :: state.num_processes]
    workers = {"num_workers": args.num_workers, "worker_init_fn": end_with_parent}
    loader = DataLoader(utterances, batch_sampler=batches, collate_fn=list, **workers)
    progress = tqdm(loader, disable=not state.is_main_process)
    with open(f"{result}.records-{state.process_index}", "a", encoding="utf-8") as file:
        for batch, items in zip(batches, progress, strict=True):
            waveforms = [item.pop("waveform") for item in items]
            transcripts = transcribe(model, rows, waveforms, args.batch_size, **vars(search))
            for i, item, (text, flag) in zip(batch, items, transcripts, strict=True):
                if item["error"]:
                    text, flag = "", "unreadable"
                record = {"index": i, "line": f"{args.data_path}:{i + 1}", "hypothesis": text}
                # The line break comes first, since a kill may have torn the line before
                print("\n" + json.dumps(item | record | {"flag": flag}), file=file, flush=True)
    state.wait_for_everyone()
    wall = progress.format_dict["elapsed"]
    state.destroy_process_group()  # else gloo's threads may abort the process as it exits
    if not state.is_main_process:
        return
    records = [record for _, record in sorted(read_records(result).items())]
    audio = sum(seconds[i] for i in todo)
    results = report(records, args.metric, args.normalize)
    results += f"\nRTFx {audio / wall:.1f} ({audio:.1f} s of audio in {wall:.1f} s)"
    print(results)
    flagged = [record for record in records if record["flag"]]
    details = [f"{r['line']}: {r['flag']}: {r['error'] or r['hypothesis']}" for r in flagged]
    details = [results, str(model_args), str(args), str(search), *details, ""]
    Path(f"{result}.report").write_text("\n".join(details), "utf-8", errors="replace")
    result.write_text("".join(record["hypothesis"] + "\n" for record in records), "utf-8")
    for path in result.parent.glob(f"{glob.escape(result.name)}.records-*"):
        path.unlink()
    if errors := [f"{r['line']}: {r['error']}" for r in flagged if r["error"]]:
        raise InputError("\n".join(["these lines are empty in the result:", *errors]))


if __name__ == "__main__":
    main()
