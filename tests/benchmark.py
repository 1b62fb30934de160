"""Measures train.py and recognize.py, through their command lines, on models of real sizes.

    python tests/benchmark.py --llm qwen2-1.5b --whisper large     (one GPU)
    python tests/benchmark.py --llm tiny --whisper tiny            (a CPU)
    python tests/benchmark.py ... --gpus 2 --only train --extra "--deepspeed ds_config_zero3.json"

Random weights (speed and memory do not depend on the values), a byte-level tokenizer, and synthetic
16-bit wav files with AISHELL-like lengths (gamma, mean 4.7 s). Random LLMs never stop, so decoding
is bounded by --max_new_tokens 50. Utterances per second are steady-state: without loading the
models and without the first steps. "of matmul" is the floating-point rate of the necessary
operations (encoder window, LLM forward and its backward to the activations, projector) over the
rate of a plain 8192^3 bf16 matrix product measured in the same run. With --gpus all figures but the
peak memory, which is one GPU's, are of all GPUs together.
"""

import argparse
import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

LLMS = {  # hidden, layers, heads, key-value heads, intermediate, vocabulary, tied
    "tiny": (128, 4, 4, 2, 384, 640, True),
    "qwen2-1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "llama3-8b": (4096, 32, 32, 8, 14336, 128256, False),
}
WHISPERS = {"tiny": (384, 6, 4), "small": (768, 12, 12), "large": (1280, 20, 32)}  # 80 mels
USER_FLAGS = (
    "--per_device_train_batch_size 8 --gradient_accumulation_steps 8 --gradient_checkpointing "
    "--dataloader_num_workers 4 --dataloader_prefetch_factor 10"
)
FAST_FLAGS = (
    "--per_device_train_batch_size 64 --dataloader_num_workers 8 --dataloader_prefetch_factor 4"
)
RUNS = {  # name: (script, flags, optimizer steps or utterances)
    "train, the user's flags": ("train.py", USER_FLAGS, 16),
    "train, the user's flags, not compiled": ("train.py", USER_FLAGS + " --compile False", 8),
    "train, recommended flags": ("train.py", FAST_FLAGS, 24),
    "decode, default flags": ("recognize.py", "", 384),
    "decode, 5 beams": ("recognize.py", "--num_beams 5", 256),
    "decode, recommended flags": ("recognize.py", "--batch_size 1024 --num_workers 8", 4096),
    "decode, 5 beams, recommended flags": (
        "recognize.py",
        "--num_beams 5 --batch_size 256 --num_workers 8",
        2048,
    ),
}


def build_world(folder, llm, whisper_name, device):
    """Random models in their real formats and 2048 wav files; returns their durations."""
    from conftest import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from whisper.model import ModelDimensions, Whisper

    family = "llama3" if llm.startswith("llama") else "qwen2"
    classes = {"llama3": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = LLMS[llm]
    tokenizer = make_tokenizer(family)
    config = classes[family][0](
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    tokenizer.save_pretrained(folder / "llm")
    with torch.device(device):
        model = classes[family][1](config).to(torch.bfloat16)
    model.save_pretrained(folder / "llm")
    state, heads, layers = WHISPERS[whisper_name]
    dims = ModelDimensions(80, 1500, state, heads, layers, 64, 16, state, heads, 1)
    with torch.device(device):
        model = Whisper(dims).half()
    weights = {"dims": dataclasses.asdict(dims), "model_state_dict": model.state_dict()}
    torch.save(weights, folder / "whisper.pt")
    del model
    random = np.random.default_rng(0)
    durations = random.gamma(11, 4.7 / 11, 2048).clip(1, 15)
    with open(folder / "data.jsonl", "w") as file:
        for i, seconds in enumerate(durations):
            noise = random.integers(-3000, 3000, round(16000 * seconds), dtype=np.int16)
            soundfile.write(folder / f"{i}.wav", noise, 16000)
            text = "".join(random.choice(list("abcdefgh"), round(3 * seconds)))
            file.write(json.dumps({"wav": f"{i}.wav", "txt": text}) + "\n")
    return durations


def child(script, arguments):
    """Runs a script with its arguments in this process, then prints its peak memory."""
    sys.argv = [script, *arguments]
    if not torch.cuda.is_available():
        sys.argv += ["--use_cpu"]
    runpy.run_path(script, run_name="__main__")
    if torch.cuda.is_available():
        print(f"PEAK {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)


def measure(folder, script, flags, amount, durations, gpus):
    """(utterances per second, audio seconds per second, peak memory) of one command."""
    command = [sys.executable]
    if gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    command += [__file__, "--child", script, "--llm_model_name_or_path"]
    command += [str(folder / "llm"), "--whisper_model_name_or_path", str(folder / "whisper.pt")]
    projector = folder / "out" / "model.safetensors"
    output = folder / "out" if not projector.exists() else Path(tempfile.mkdtemp(dir=folder))
    if script == "train.py":
        command += ["--data_path", str(folder / "data.jsonl"), "--output_dir", str(output)]
        command += ["--max_steps", str(amount), "--logging_steps", "1", "--report_to", "none"]
        command += ["--save_strategy", "no", "--learning_rate", "3e-4"]
        command += ["--bf16"] if torch.cuda.is_available() else []
    else:
        lines = (folder / "data.jsonl").read_text().splitlines(keepends=True)
        (folder / "test.jsonl").write_text("".join(islice(cycle(lines), amount)))
        command += ["--data_path", str(folder / "test.jsonl"), "--max_new_tokens", "50"]
        command += ["--projector_model_path", str(projector)]
        command += ["--result_path", str(folder / "result.txt")]
    command += flags.split()
    times, peak, rtfx, log = [], "-", None, []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    for line in process.stdout:
        log.append(line)
        if "'loss'" in line:
            times.append(time.perf_counter())
        if match := re.search(r"PEAK (.*)", line):
            peak = match[1]
        if match := re.search(r"RTFx ([\d.]+) \(([\d.]+) s of audio in ([\d.]+) s", line):
            rtfx = float(match[1]), float(match[3])
    if process.wait():
        print("".join(log[-30:]), file=sys.stderr)
        raise SystemExit(f"failed: {' '.join(command)}")
    if script == "recognize.py":
        return amount / rtfx[1], rtfx[0], peak
    batch = re.search(r"per_device_train_batch_size (\d+)", flags)[1]
    accumulation = re.findall(r"gradient_accumulation_steps (\d+)", flags)  # the last one counts
    batch = gpus * int(batch) * int([1, *accumulation][-1])
    skip = max(1, len(times) // 4)  # warming up
    rate = batch * (len(times) - 1 - skip) / (times[-1] - times[skip])
    return rate, rate * durations.mean(), peak


def matmul_rate(device):
    """Floating-point operations a second of a bf16 matrix product of 8192 x 8192."""
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    if device == "cuda":
        torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def necessary_flops(llm, whisper_name, durations, training):
    """Floating-point operations an utterance cannot do without."""
    state, _, layers = WHISPERS[whisper_name]
    encoder = layers * (24 * state**2 * 1500 + 4 * 1500**2 * state) + 6 * 3000 * state * (
        80 + state / 2
    )
    hidden, layers, heads, kv_heads, intermediate, vocabulary, _ = LLMS[llm]
    kv = 2 * hidden * kv_heads / heads
    per_place = 2 * layers * (2 * hidden**2 + hidden * kv + 3 * hidden * intermediate)
    n_speech, n_text = np.ceil(durations * 10).mean(), 3 * durations.mean() + 1
    places = 40 + n_speech + (n_text if training else 50)
    vocab = 2 * hidden * vocabulary * (n_text if training else 50)
    projector = 2 * n_speech * (5 * state**2 + 2048 * (state + hidden))
    return (
        encoder
        + (per_place * places + vocab) * (2 if training else 1)
        + projector * (3 if training else 1)
    )


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm", choices=LLMS, default="qwen2-1.5b")
    parser.add_argument("--whisper", choices=WHISPERS, default="large")
    parser.add_argument("--gpus", type=int, default=1, help="processes, started by torchrun")
    parser.add_argument("--only", default="", help="only runs whose name has this in it")
    parser.add_argument("--extra", default="", help="more flags for every run")
    args = parser.parse_args()
    os.chdir(Path(__file__).parent.parent)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(tempfile.mkdtemp())
    durations = build_world(folder, args.llm, args.whisper, device)
    torch.cuda.empty_cache()
    peak_rate = matmul_rate(device)
    print(f"{args.llm}, Whisper {args.whisper}, matmul {peak_rate / 1e12:.2f} TFLOP/s", flush=True)
    for name, (script, flags, amount) in RUNS.items():
        if args.only and args.only not in name and name != next(iter(RUNS)):
            continue
        flags = f"{flags} {args.extra}"
        if device == "cpu" and script == "train.py":  # enough to see that it runs
            amount, flags = 4, flags + " --gradient_accumulation_steps 1"
        elif device == "cpu":
            amount = 24
        start = time.perf_counter()
        utterances, rtfx, peak = measure(folder, script, flags, amount, durations, args.gpus)
        whole = time.perf_counter() - start
        flops = necessary_flops(args.llm, args.whisper, durations, script == "train.py")
        share = 100 * utterances * flops / peak_rate / args.gpus
        print(
            f"{name:38} {utterances:7.1f} utt/s  RTFx {rtfx:7.1f}  peak {peak:>9}  "
            f"{share:4.1f} % of matmul  ({whole:.0f} s in all)",
            flush=True,
        )
    from dataset import Utterances, load_audio

    utterances = Utterances(str(folder / "data.jsonl"), training=True)
    start = time.perf_counter()
    for i in range(256):
        load_audio(utterances[i]["wav"])
    print(f"data loading {(time.perf_counter() - start) / 256 * 1e3:.2f} ms an utterance, a worker")


if __name__ == "__main__":
    main()
