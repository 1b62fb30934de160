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
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import jiwer
import numpy as np
import torch
from tqdm import tqdm
from transformers import HfArgumentParser
from whisper.audio import SAMPLE_RATE
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer
from whisper.utils import compression_ratio

from dataset import InputError, Utterances, load_audio
from model import ModelArguments, load_speech_llm

UNSPACED = r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"  # Thai, kana, Han
REFUSAL = (  # the LLM talks to the user about the task
    r"(?i)(sorry|apolog|unfortunately|unable|cannot|can't|as an ai|appears|please).{0,80}"
    r"(to transcribe|transcribe (the|this|any|that)|(audio|speech) (file|clip|input|provided)|"
    r"language model)|(抱歉|对不起|无法|没有|请提供|作为).{0,20}(转录|转写|音频|语音|录音|语言模型)"
)
LOOP = r"(\S.{0,60}?)\1{7,}"  # whatever is said eight times in a row


@dataclass
class DecodingArguments:
    data_path: str  # jsonl of {"wav": ...}, and "txt" to score against
    result_path: str = "result.txt"
    batch_size: int = 64  # windows of audio decoded together
    num_beams: int = 1  # 1 is greedy search
    length_penalty: float = 1.0  # above 0 favours longer beams
    max_new_tokens: int | None = None  # by default 20, and one for each 0.1 s of audio
    metric: str = "auto"  # wer, cer, or auto: cer where references are mostly Han, kana or Thai
    normalize: bool = False  # with Whisper's text normaliser: its English one if all is ASCII
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = "bfloat16" if torch.cuda.is_available() else "float32"
    num_workers: int = min(4, os.cpu_count())  # processes that load audio


def hallucination(text, seconds, stopped):
    """Why a hypothesis cannot be what was said, judged without the reference; None if it can."""
    if re.search(REFUSAL, text):
        return "refusal"
    if re.search(LOOP, text + " ") or compression_ratio(text) > 2.4:  # as whisper.transcribe
        return "loop"
    # nobody says 30 letters, or 10 characters of an unspaced script, a second
    if len(text) + 2 * len(re.findall(UNSPACED, text)) > 15 + 30 * seconds:
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


def load_windows(utterances, window):
    """[(line, its windows of audio, None or why there are none)] of Utterances' items."""
    loaded = []
    for utterance in utterances:
        try:
            windows = split_at_pauses(load_audio(utterance["wav"]), window)
            loaded.append((utterance["line"], windows, None))
        except InputError as error:
            loaded.append((utterance["line"], [], str(error)))
    return loaded


def transcribe(model, rows, waveforms, max_new_tokens=None, num_beams=1, length_penalty=1.0):
    """[(text, stopped)] of waveforms of at most a window; stopped: by a stop token of the LLM.

    A row ends at its own limit, so that it does not depend on the rows that share its batch.
    """
    device = next(model.projector.parameters()).device
    batch = rows.batch(waveforms, [[] for _ in waveforms])
    limits = [max_new_tokens or 20 + -(-len(w) // rows.samples_per_embedding) for w in waveforms]
    row_limits = torch.tensor(limits, device=device)

    def at_limit(ids, scores, **kwargs):  # ids (rows x beam candidates, new tokens)
        return ids.shape[1] >= row_limits.repeat_interleave(len(ids) // len(limits))

    output = model.generate(
        batch["input_ids"].to(device),
        batch["waveforms"].to(device),
        max_new_tokens=max(limits),
        num_beams=num_beams,
        length_penalty=length_penalty,
        stopping_criteria=[at_limit],
    )
    results, stop_ids = [], model.llm.generation_config.eos_token_id
    for ids, limit in zip(output.tolist(), limits, strict=True):
        length = next((t for t, i in enumerate(ids[:limit]) if i in stop_ids), limit)
        text = rows.tokenizer.decode(ids[:length], skip_special_tokens=True)
        results.append((" ".join(text.split()), length < limit))  # one line, whatever it holds
    return results


def decode(model, rows, utterances, batches, args):
    """Yields a record for each utterance: {"line", "text", "flag", "error"}."""
    load = partial(load_windows, window=rows.window)
    options = {"batch_sampler": batches, "collate_fn": load, "num_workers": args.num_workers}
    search = (args.max_new_tokens, args.num_beams, args.length_penalty)
    for batch in torch.utils.data.DataLoader(utterances, **options):
        waveforms = [window for _, windows, _ in batch for window in windows]
        texts = []
        for k in range(0, len(waveforms), args.batch_size):
            texts += transcribe(model, rows, waveforms[k : k + args.batch_size], *search)
        for line, windows, error in batch:
            pieces, texts = texts[: len(windows)], texts[len(windows) :]
            text, stopped = " ".join(piece for piece, _ in pieces), all(end for _, end in pieces)
            flag = hallucination(text, utterances.seconds[line - 1], stopped)
            flag = "unreadable" if error else flag
            yield {"line": line, "text": text, "flag": flag, "error": error}


def read_records(prefix):
    """{line: record} of the files of JSON lines that processes write while they decode."""
    records = {}
    for path in glob.glob(glob.escape(prefix) + "*"):
        with open(path, encoding="utf-8") as file, suppress(ValueError):
            for record in map(json.loads, file):  # a kill may have torn the last line
                records[record["line"]] = record
    return records


def write_whole(path, lines):
    """Writes lines of text to a file that appears whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    os.replace(path + ".tmp", path)


def score(pairs, metric, normalize):
    """(the metric's name, jiwer's output) of [(reference, hypothesis)]."""
    text = "".join(reference for reference, _ in pairs)
    if normalize:
        normalizer = EnglishTextNormalizer() if text.isascii() else BasicTextNormalizer()
        pairs = [map(normalizer, pair) for pair in pairs]
    if metric == "auto":
        metric = "cer" if 2 * len(re.findall(UNSPACED, text)) > len(text) else "wer"
    space = "" if metric == "cer" else " "  # spaces never count in the CER
    sides = zip(*([space.join(side.split()) for side in pair] for pair in pairs), strict=True)
    process = jiwer.process_words if metric == "wer" else jiwer.process_characters
    return metric, process(*map(list, sides))


def report(utterances, records, args):
    """The score in a few lines, and jiwer's alignments of the errors."""
    scored = [r for r in records if "txt" in utterances[r["line"] - 1]]
    if not scored:
        return ["no line has a txt to score against"], ""
    pairs = [(utterances[record["line"] - 1]["txt"], record["text"]) for record in scored]
    metric, every = score(pairs, args.metric, args.normalize)
    unflagged = [pair for pair, r in zip(pairs, scored, strict=True) if not r["flag"]]
    _, kept = score(unflagged or [("", "")], metric, args.normalize)
    head = [
        f"{metric.upper()} {100 * getattr(every, metric):.2f}/{100 * getattr(kept, metric):.2f} "
        f"(% of all {len(pairs)} utterances / of the {len(unflagged)} that are not flagged): "
        f"{every.substitutions} substitutions, {every.deletions} deletions, {every.insertions} "
        f"insertions in {every.hits + every.substitutions + every.deletions}"
    ]
    return head, jiwer.visualize_alignment(every, show_measures=False, skip_correct=True)


def main():
    parser = HfArgumentParser(
        (ModelArguments, DecodingArguments), usage="recognize.py --FLAG VALUE"
    )
    model_args, args = parser.parse_args_into_dataclasses()
    utterances = Utterances(args.data_path, training=False)
    if not os.path.isdir(os.path.dirname(args.result_path) or "."):
        raise InputError(f"--result_path {args.result_path}: make its folder first")
    rank, n_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if n_ranks > 1:  # only to wait for each other, however long
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model, rows = load_speech_llm(model_args, args.device, getattr(torch, args.dtype))
    model.to(args.device).eval()
    run = json.dumps([vars(model_args), vars(args), hashlib.sha256(utterances.data).hexdigest()])
    partial_path = f"{args.result_path}.partial-{hashlib.sha256(run.encode()).hexdigest()[:8]}-"
    done = read_records(partial_path)
    if n_ranks > 1:
        torch.distributed.barrier()  # nobody writes before everybody has read
    # Longest first, and what needs several windows is a batch of its own
    todo = [i for i in np.argsort(-utterances.seconds, kind="stable").tolist() if i + 1 not in done]
    n_long = int((utterances.seconds[todo] * SAMPLE_RATE > rows.window).sum())
    batches = [[i] for i in todo[:n_long]]
    batches += [todo[k : k + args.batch_size] for k in range(n_long, len(todo), args.batch_size)]
    progress = tqdm(total=sum(map(len, batches[::n_ranks])), unit="utt", disable=rank > 0)
    started = time.time()
    with open(f"{partial_path}{rank}", "a", encoding="utf-8") as file:
        for record in decode(model, rows, utterances, batches[rank::n_ranks], args):
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
            progress.update()
    progress.close()
    if n_ranks > 1:
        torch.distributed.barrier()
    if rank > 0:
        return
    records = [record for _, record in sorted(read_records(partial_path).items())]
    flagged = [record for record in records if record["flag"]]
    head, alignments = report(utterances, records, args)
    head += [f"{n} {flag}" for flag, n in Counter(record["flag"] for record in flagged).items()]
    seconds, wall = utterances.seconds[todo].sum(), time.time() - started
    head.append(f"RTFx {seconds / wall:.1f} ({seconds:.1f} s of audio in {wall:.1f} s)")
    listed = [f"{args.data_path}:{r['line']}: {r['flag']}: {r['text']}" for r in flagged]
    write_whole(args.result_path, [record["text"] for record in records])
    write_whole(f"{args.result_path}.report", [*head, *listed, run, alignments])
    print(*head, sep="\n")
    for path in glob.glob(glob.escape(args.result_path) + ".partial-*"):
        os.remove(path)
    errors = [f"{args.data_path}:{r['line']}: {r['error']}" for r in records if r["error"]]
    if errors:
        raise InputError("\n".join(["lines that are empty in the result:", *errors]))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"recognize.py: {error}")
    except KeyboardInterrupt:
        sys.exit("recognize.py: interrupted; the same command goes on from here")
