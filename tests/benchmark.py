"""Measures train.py and recognize.py, through their command lines, on models of real sizes.

    python tests/benchmark.py --llm qwen2-1.5b --whisper large     (one GPU: the whole table)
    python tests/benchmark.py --llm tiny --whisper tiny            (a CPU: shows that it runs)
    python tests/benchmark.py ... --seconds 12.3 --only "train, best flags"
    python tests/benchmark.py ... --gpus 2 --only "train, user" \\
        --extra "--deepspeed ds_config_zero3.json"
    python tests/benchmark.py ... --only "train, user" --profile 40

Models have random weights, on which speed and memory do not depend, and a byte-level tokenizer.
Audio is noise, as 16-bit wav and as Opus files. Its durations follow a gamma distribution with a
mean of --seconds (4.7 as in AISHELL-1, 12.3 as in LibriSpeech), between 1 and 30 s. A random LLM
never stops, so decoding is limited by --max_new_tokens 50.

Utterances per second do not count the loading of the models, nor the first third of the steps. The
time of every optimizer step is printed, so that a warm-up that is too short can be seen.
"of matmul" compares the floating-point operations that are necessary (encoder over its window, LLM
forward and backward to its inputs, projector) with a bf16 matrix product of 8192 x 8192, measured
in the same run. With --gpus all figures are those of all GPUs together, except the peak memory.
--profile N also prints where micro-steps N and N + 1 spend the time of the host and of the GPU.
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
from itertools import cycle, islice, pairwise, product
from multiprocessing.pool import ThreadPool
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
BEST_FLAGS = (
    "--per_device_train_batch_size 64 --dataloader_num_workers 8 --dataloader_prefetch_factor 4"
)
TASKS = {  # name: (script, flags, optimizer steps or utterances)
    "train, user's flags": ("train.py", USER_FLAGS, 10),
    "train, best flags": ("train.py", BEST_FLAGS, 30),
    "train, best flags, by length": (
        "train.py",
        f"{BEST_FLAGS} --train_sampling_strategy group_by_length",
        30,
    ),
    "decode, default flags": ("recognize.py", "", 384),
    "decode, best flags": ("recognize.py", "--batch_size 1024 --num_workers 8", 3072),
    "decode, 5 beams, best flags": (
        "recognize.py",
        "--num_beams 5 --batch_size 512 --num_workers 8",
        1536,
    ),
}


def make_durations(mean, n_files):
    """Durations in seconds, between 1 and 30."""
    shape = 11 if mean < 8 else 5  # read sentences differ less in length than read books
    return np.random.default_rng(0).gamma(shape, mean / shape, n_files).clip(1, 30)


def build_world(folder, llm, whisper_name, durations, device):
    """Random models in their real formats, projectors for both windows, wav and Opus files."""
    from conftest import make_tokenizer
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from whisper.model import ModelDimensions, Whisper

    from dataset import render_chat
    from model import Projector, ProjectorArguments

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
    )
    tokenizer.save_pretrained(folder / "llm")
    with torch.device(device):
        model = classes[family][1]._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "llm")
    state, heads, layers = WHISPERS[whisper_name]
    dims = ModelDimensions(80, 1500, state, heads, layers, 64, 16, state, heads, 1)
    with torch.device(device):
        model = Whisper(dims).half()
    weights = {"dims": dataclasses.asdict(dims), "model_state_dict": model.state_dict()}
    torch.save(weights, folder / "whisper.pt")
    for window in "full", "audio":
        tensors = {f"projector.{k}": v for k, v in Projector(state, hidden).state_dict().items()}
        settings = vars(ProjectorArguments(encoder_window=window))
        settings = {**settings, "chat": render_chat(tokenizer, settings["prompt"])}
        save_file(tensors, folder / f"{window}.safetensors", {"west": json.dumps(settings)})

    def write_audio(i):
        random = np.random.default_rng(i)
        noise = random.integers(-3000, 3000, round(16000 * durations[i]), dtype=np.int16)
        soundfile.write(folder / f"{i}.wav", noise, 16000)
        soundfile.write(folder / f"{i}.opus", noise, 16000, format="OGG", subtype="OPUS")
        return "".join(random.choice(list("abcdefgh"), round(3 * durations[i])))

    with ThreadPool() as pool:
        texts = pool.map(write_audio, range(len(durations)))
    for kind in "wav", "opus":
        lines = [{"wav": f"{i}.{kind}", "txt": text} for i, text in enumerate(texts)]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def profile_training(first):
    """Lets Trainer profile two micro-steps and print where host and GPU spend their time."""
    import transformers
    from torch.profiler import ProfilerActivity, profile

    training_step, n_steps = transformers.Trainer.training_step, 0
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    profiler = profile(activities=activities)

    def profiled_step(*args, **kwargs):
        nonlocal n_steps
        if n_steps == first:
            profiler.start()
        loss = training_step(*args, **kwargs)
        n_steps += 1
        if n_steps == first + 2:
            profiler.stop()
            for order in ["self_cpu_time_total", "self_device_time_total"][: len(activities)]:
                print(profiler.key_averages().table(sort_by=order, row_limit=25), flush=True)
        return loss

    if int(os.environ.get("RANK", 0)) == 0:
        transformers.Trainer.training_step = profiled_step


def child(script, arguments):
    """Runs a script with its arguments in this process, then prints its peak memory."""
    sys.argv = [script, *arguments]
    if not torch.cuda.is_available():
        sys.argv += ["--use_cpu"]
    if first := int(os.environ.get("PROFILE_MICRO_STEP", 0)):
        profile_training(first)
    runpy.run_path(script, run_name="__main__")
    if torch.cuda.is_available():
        print(f"PEAK {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", flush=True)


def measure(folder, script, flags, amount, window, kind, gpus):
    """Runs one command; returns its utterances per second and its peak of memory."""
    command = [sys.executable]
    if gpus > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    command += [__file__, "--child", script, "--llm_model_name_or_path"]
    command += [str(folder / "llm"), "--whisper_model_name_or_path", str(folder / "whisper.pt")]
    output = tempfile.mkdtemp(dir=folder)
    if script == "train.py":
        command += ["--data_path", str(folder / f"{kind}.jsonl"), "--output_dir", output]
        command += ["--max_steps", str(amount), "--logging_steps", "1", "--report_to", "none"]
        command += ["--save_strategy", "no", "--learning_rate", "3e-4", "--encoder_window", window]
        command += ["--bf16"] if torch.cuda.is_available() else []
    else:
        lines = (folder / f"{kind}.jsonl").read_text().splitlines(keepends=True)
        test = folder / f"{Path(output).name}.jsonl"
        test.write_text("".join(islice(cycle(lines), amount)))
        command += ["--data_path", str(test), "--max_new_tokens", "50"]
        command += ["--projector_model_path", str(folder / f"{window}.safetensors")]
        command += ["--result_path", f"{output}/result.txt"]
    command += flags.split()
    times, peak, wall, log = [], "-", None, []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    for line in process.stdout:
        log.append(line)
        if "'loss'" in line:
            times.append(time.perf_counter())
        if match := re.search(r"PEAK (.*)", line):
            peak = match[1]
        if "PROFILE_MICRO_STEP" in os.environ and re.search(r"^-----|CPU|::|[mu]s  ", line):
            print(line, end="")
        if match := re.search(r"RTFx [\d.]+ \([\d.]+ s of audio in ([\d.]+) s", line):
            wall = float(match[1])
    if process.wait():
        print("".join(log[-30:]), file=sys.stderr)
        raise SystemExit(f"failed: {' '.join(command)}")
    if script == "recognize.py":
        return amount / wall, peak
    batch = re.findall(r"per_device_train_batch_size (\d+)", flags)[-1]
    accumulation = re.findall(r"gradient_accumulation_steps (\d+)", flags)  # the last one counts
    batch = gpus * int(batch) * int([1, *accumulation][-1])
    skip = max(1, len(times) // 3)  # warming up
    steps = " ".join(f"{1000 * (end - start):.0f}" for start, end in pairwise(times))
    print(f"  ms per step, the first {skip} not counted: {steps}", flush=True)
    return batch * (len(times) - 1 - skip) / (times[-1] - times[skip]), peak


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


def necessary_flops(llm, whisper_name, durations, training, window="full"):
    """Floating-point operations an utterance cannot do without, on average."""
    state, _, layers = WHISPERS[whisper_name]
    n = np.full(len(durations), 1500.0)  # encoder states
    if window == "audio":
        n = np.ceil(durations / 2).clip(max=15) * 100
    encoder = layers * (24 * state**2 * n + 4 * n**2 * state).mean()
    encoder += 6 * 3000 * state * (80 + state / 2)  # convolutions
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
    parser.add_argument("--seconds", type=float, default=4.7, help="mean duration")
    parser.add_argument("--gpus", type=int, default=1, help="processes, started by torchrun")
    parser.add_argument("--only", default="", help="only runs whose name has this in it")
    parser.add_argument("--only-window", choices=["full", "audio"])
    parser.add_argument("--only-format", choices=["wav", "opus"])
    parser.add_argument("--extra", default="", help="more flags for every run")
    parser.add_argument("--profile", type=int, help="profile two micro-steps of training")
    parser.add_argument("--world", help="a folder to keep models and audio in, for the next run")
    args = parser.parse_args()
    os.chdir(Path(__file__).parent.parent)
    if args.profile:
        os.environ["PROFILE_MICRO_STEP"] = str(args.profile)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(args.world or tempfile.mkdtemp())
    durations = make_durations(args.seconds, 2048 if device == "cuda" else 64)
    if not (folder / "opus.jsonl").exists():
        folder.mkdir(exist_ok=True)
        build_world(folder, args.llm, args.whisper, durations, device)
        torch.cuda.empty_cache()
    peak_rate = matmul_rate(device)
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{args.llm}, Whisper {args.whisper}, mean {durations.mean():.1f} s, {card}, ", end="")
    print(f"matmul {peak_rate / 1e12:.2f} TFLOP/s", flush=True)
    for (task, (script, flags, amount)), window, kind in product(
        TASKS.items(), ("full", "audio"), ("wav", "opus")
    ):
        name = f"{task}, {window} window, {kind}"
        wanted = args.only_window in (None, window) and args.only_format in (None, kind)
        if args.only not in name or not wanted:
            continue
        flags = f"{flags} {args.extra}"
        if device == "cpu" and script == "train.py":  # enough to see that it runs
            small = " --gradient_accumulation_steps 1 --per_device_train_batch_size 4"
            amount, flags = 4, flags + small
        elif device == "cpu":
            amount = 24
        start = time.perf_counter()
        utterances, peak = measure(folder, script, flags, amount, window, kind, args.gpus)
        whole = time.perf_counter() - start
        flops = necessary_flops(args.llm, args.whisper, durations, script == "train.py", window)
        share = 100 * utterances * flops / peak_rate / args.gpus
        print(
            f"{name:50} {utterances:7.1f} utt/s  RTFx {utterances * durations.mean():7.0f}  "
            f"peak {peak:>8}  {share:4.1f} % of matmul  ({whole:.0f} s in all)",
            flush=True,
        )


if __name__ == "__main__":
    main()
