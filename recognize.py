"""Transcribes a jsonl, line by line, to result.txt, and scores it where the jsonl has "txt".

One GPU or CPU:  python recognize.py --llm_model_name_or_path Qwen2-1.5B-Instruct \\
                     --whisper_model_name_or_path large --data_path test.jsonl \\
                     --projector_model_path out/checkpoint-600/model.safetensors
8 GPUs:          torchrun --standalone --nproc_per_node=8 recognize.py ...

Writes result.txt (line i is the hypothesis of line i) and result.txt.report. A run that is cut off
leaves what it has decoded in result.txt.partial-*, and the same command goes on from there.
"""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import jiwer
import torch
from accelerate import PartialState
from tqdm import tqdm
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer
from whisper.utils import compression_ratio

from dataset import SAMPLE_RATE, SPEECH, InputError, Utterances, load_audio, parse_flags
from model import ModelArguments, load_speech_llm

UNSPACED = r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"  # Thai, kana, Han
REFUSAL = (  # the LLM talks to the user about the task
    r"(?i)(sorry|apolog|unfortunately|unable|cannot|can't|appears|seems|there is no).{0,60}"
    r"\b(to transcribe|transcribe (the|this|any|audio)|(audio|speech) (clip|input|provided|in)\b)"
    r"|please (provide|upload).{0,20}(audio|speech|recording)|as an? (ai|(large )?language model)\b"
    r"|here is the transcription|作为.{0,10}(语言模型|AI助手)|请(提供|上传).{0,10}(音频|语音|录音)"
    r"|(抱歉|对不起|无法|不能).{0,20}(转录|转写|这段音频|音频(中|文件|内容)|语音内容)"
)
LOOP = r"([^\s\d].{0,60}?)\1{7,}"  # said eight times in a row; not the zeros of 100000000


@dataclass(kw_only=True)
class DecodingArguments:
    data_path: str  # jsonl of {"wav": ...}, and "txt" to score against
    result_path: str = "result.txt"
    batch_size: int = 64  # windows of audio decoded together
    num_beams: int = 1  # 1 is greedy search
    length_penalty: float = 1.0  # above 0 favours longer beams
    max_new_tokens: int | None = None  # by default 20, and one for each speech embedding
    metric: Literal["wer", "cer", "auto"] = "auto"  # cer if references are mostly Han, kana, Thai
    normalize: bool = False  # by Whisper's text normaliser: the English one if all is ASCII
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # bfloat16 on a GPU
    use_cpu: bool = False
    num_workers: int = min(4, os.cpu_count())  # processes that load audio


def hallucination(text, seconds, stopped):
    """Why a hypothesis cannot be what was said, judged without the reference; None if it can."""
    if re.search(REFUSAL, text):
        return "refusal"
    if re.search(LOOP, text + " ") or compression_ratio(text) > 2.4:  # as whisper.transcribe
        return "loop"
    # nobody says 30 letters, or 10 kana or Han characters, a second
    if len(text) + 2 * len(re.findall(r"[\u3040-\u9fff]", text)) > 15 + 30 * seconds:
        return "too long"
    return None if stopped else "no stop"


def split_at_pauses(waveform, window):
    """Pieces of at most `window` samples that join to the waveform, cut where it is quietest.

    That is in the middle of the 0.1 s of least energy in the last sixth of the window (5 of 30 s).
    """
    pieces, frame = [], SAMPLE_RATE // 10
    while len(waveform) > window:
        start = window - window // 6 // frame * frame
        energies = (waveform[start:window].reshape(-1, frame) ** 2).sum(axis=1)
        cut = start + energies.argmin() * frame + frame // 2
        pieces.append(waveform[:cut])
        waveform = waveform[cut:]
    return [*pieces, waveform]


def load_batches(utterances, rows, size):
    """What a DataLoader worker makes of Utterances' items: (per utterance, per batch).

    [(line, samples of each window, None or why there are none)], [Rows.batch of `size` windows].
    """
    loaded, windows = [], []
    for utterance in utterances:
        mine, error = [], None
        try:
            mine = split_at_pauses(load_audio(utterance["wav"]), rows.window)
        except InputError as problem:
            error = str(problem)
        loaded.append((utterance["line"], list(map(len, mine)), error))
        windows += mine
    chunks = [windows[k : k + size] for k in range(0, len(windows), size)]
    return loaded, [rows.batch(chunk, [[] for _ in chunk]) for chunk in chunks]


def transcribe(model, rows, batch, args):
    """[(text, stopped)] of the rows of a Rows.batch; stopped: by a stop token of the LLM.

    A row ends at its own limit, so that it does not depend on the rows that share its batch.
    """
    device = next(model.parameters()).device
    ids, waveforms = batch["input_ids"].to(device), batch["waveforms"].to(device)
    limits = (ids == SPEECH).sum(1) + 20  # a speech embedding is 0.1 s: one token at most
    if args.max_new_tokens:
        limits = torch.full_like(limits, args.max_new_tokens)

    def at_limit(ids, scores, **kwargs):  # ids (rows x beam candidates, new tokens)
        return ids.shape[1] >= limits.repeat_interleave(len(ids) // len(limits))

    search = {"num_beams": args.num_beams, "length_penalty": args.length_penalty}
    search |= {"max_new_tokens": int(limits.max()), "stopping_criteria": [at_limit]}
    output = model.generate(ids, waveforms, **search)
    results, stop_ids = [], model.llm.generation_config.eos_token_id
    for ids, limit in zip(output.tolist(), limits.tolist(), strict=True):
        length = next((t for t, i in enumerate(ids[:limit]) if i in stop_ids), limit)
        text = rows.tokenizer.decode(ids[:length], skip_special_tokens=True)
        results.append((" ".join(text.split()), length < limit))  # one line, whatever it holds
    return results


def decode(model, rows, utterances, groups, args):
    """Yields a record for each utterance: {"line", "text", "flag", "error"}."""
    load = partial(load_batches, rows=rows, size=args.batch_size)
    options = {"batch_sampler": groups, "collate_fn": load, "num_workers": args.num_workers}
    for loaded, batches in torch.utils.data.DataLoader(utterances, **options):
        pieces = [piece for batch in batches for piece in transcribe(model, rows, batch, args)]
        for line, lengths, error in loaded:
            mine, pieces = pieces[: len(lengths)], pieces[len(lengths) :]
            text = " ".join(text for text, _ in mine if text)
            judged = zip(lengths, mine, strict=True)  # all prose is a loop to zlib if long enough
            flags = [hallucination(said, n / SAMPLE_RATE, end) for n, (said, end) in judged]
            flag = "unreadable" if error else next(filter(None, flags), None)
            yield {"line": line, "text": text, "flag": flag, "error": error}


def read_records(paths):
    """{line: record} of files of JSON lines, the last of which a kill may have torn."""
    texts = [text for path in paths for text in path.read_bytes().split(b"\n")[:-1]]
    return {record["line"]: record for record in map(json.loads, texts)}


def write_whole(path, lines):
    """A text file that appears whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    aside.replace(path)


def report(utterances, records, args):
    """(lines of results, lines of detail): rates and counts; flagged lines and alignments."""
    flagged = [record for record in records if record["flag"]]
    counts = Counter(record["flag"] for record in flagged)
    results = ["flagged: " + (", ".join(f"{n} {flag}" for flag, n in counts.items()) or "none")]
    details = [f"{args.data_path}:{r['line']}: {r['flag']}: {r['text']}" for r in flagged]
    references = [utterances[i].get("txt") for i in range(len(records))]
    scored = [i for i, reference in enumerate(references) if reference is not None]
    if not scored:
        return results, details
    sides = [references[i] for i in scored], [records[i]["text"] for i in scored]
    text, metric = "".join(sides[0]), args.metric
    if args.normalize:
        normalizer = EnglishTextNormalizer() if text.isascii() else BasicTextNormalizer()
        sides = [list(map(normalizer, side)) for side in sides]
    if metric == "auto":
        metric = "cer" if 2 * len(re.findall(UNSPACED, text)) > len(text) else "wer"
    space = " " if metric == "wer" else ""  # spaces never count in the CER
    sides = [[space.join(line.split()) for line in side] for side in sides]
    process = jiwer.process_words if metric == "wer" else jiwer.process_characters
    every = process(*sides)
    kept = [k for k, i in enumerate(scored) if not records[i]["flag"]]
    rest = process(*([side[k] for k in kept] for side in sides))
    n_errors = [every.substitutions, every.deletions, every.insertions]
    rates = "/".join(f"{100 * getattr(output, metric):.2f}" for output in (every, rest))
    counts = "{} in the references: {} substitutions, {} deletions, {} insertions".format(
        every.hits + sum(n_errors[:2]), *n_errors
    )
    results.insert(0, f"{metric.upper()} {rates} % (all/not flagged), {counts}")
    details.append(jiwer.visualize_alignment(every, show_measures=False, skip_correct=True))
    return results, details


def main():
    model_args, args = parse_flags(ModelArguments, DecodingArguments)
    utterances, result = Utterances(args.data_path, training=False), Path(args.result_path)
    if not result.parent.is_dir():
        raise InputError(f"--result_path {result}: make its folder first")
    if not model_args.projector_model_path or args.batch_size < 1:
        raise InputError("expected a --projector_model_path, and a --batch_size of 1 or more")
    # Without a GPU, accelerate would let torchrun's processes each decode everything
    cpu = args.use_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu, timeout=timedelta(days=30))  # ranks wait however long
    dtype = args.dtype or ("float32" if state.device.type == "cpu" else "bfloat16")
    model, rows = load_speech_llm(model_args, state.device, getattr(torch, dtype))
    model.to(state.device).eval()
    run = json.dumps([vars(model_args), vars(args), hashlib.sha256(utterances.data).hexdigest()])
    partials = f"{result.name}.partial-{hashlib.sha256(run.encode()).hexdigest()[:8]}-"
    done = read_records(result.parent.glob(glob.escape(partials) + "*"))
    state.wait_for_everyone()  # nobody writes before everybody has read
    # Longest first, and what needs several windows is a batch of its own
    seconds, size = utterances.seconds, args.batch_size
    todo = sorted(set(range(len(seconds))) - {line - 1 for line in done}, key=lambda i: -seconds[i])
    batches = [[i] for i in todo if seconds[i] * SAMPLE_RATE > rows.window]
    batches += [todo[k : k + size] for k in range(len(batches), len(todo), size)]
    batches = batches[state.process_index :: state.num_processes]
    progress = tqdm(total=sum(map(len, batches)), unit="utt", disable=state.process_index > 0)
    mine = result.parent / f"{partials}{state.process_index}-{len(done)}"  # new at each restart
    with open(mine, "w", encoding="utf-8") as file:
        for record in decode(model, rows, utterances, batches, args):
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
            progress.update()
    progress.close()
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    records = read_records(result.parent.glob(glob.escape(partials) + "*"))
    records = [records[i + 1] for i in range(len(utterances))]
    results, details = report(utterances, records, args)
    audio, wall = sum(seconds[i] for i in todo), progress.format_dict["elapsed"]
    results.append(f"RTFx {audio / wall:.1f} ({audio:.1f} s of audio in {wall:.1f} s)")
    write_whole(result, [record["text"] for record in records])
    write_whole(Path(f"{result}.report"), [*results, run, *details])
    print(*results, sep="\n")
    for path in result.parent.glob(glob.escape(result.name) + ".partial-*"):
        path.unlink()
    errors = [f"{args.data_path}:{r['line']}: {r['error']}" for r in records if r["error"]]
    if errors:
        raise InputError("\n".join(["these lines are empty in the result:", *errors]))


if __name__ == "__main__":
    main()
