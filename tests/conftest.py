"""What the tests share: tiny models in their real formats, audio files, and the scripts' commands.

Everything is made here or bundled in tests/tiny: no test needs a network, a GPU or ffmpeg.
"""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from whisper.model import ModelDimensions, Whisper

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny"
sys.path.insert(0, str(ROOT))
settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Special tokens, from id 0 on
IM_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>"]  # pad is eos
LLAMA3_TOKENS += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]  # the pad id is 0
MISTRAL_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]  # no pad token
# family: (chat template, special tokens, bos, eos, pad, the token that ends a turn)
FAMILIES = {
    "qwen2": (CHATML, IM_TOKENS, None, "<|im_end|>", "<|endoftext|>", "<|im_end|>"),
    "llama3": (LLAMA3, LLAMA3_TOKENS, *LLAMA3_TOKENS[:2], "<|end_of_text|>", "<|eot_id|>"),
    "gemma": (GEMMA, GEMMA_TOKENS, "<bos>", "<eos>", "<pad>", "<end_of_turn>"),
    "mistral": (MISTRAL, MISTRAL_TOKENS, "<s>", "</s>", None, "</s>"),
}


def make_tokenizer(family):
    """A byte-level BPE tokenizer with the special tokens and chat template of a family."""
    template, special, bos, eos, pad, _ = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["one two three transcribe the speech user assistant"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad
    )
    fast.chat_template = template
    return fast


def make_llm(folder, family="qwen2", tied=True, seed=0, **sizes):
    """Saves a random LLM of a family with its tokenizer to a folder, in Hugging Face's format."""
    tokenizer = make_tokenizer(family)
    config_class, model_class = (
        (Qwen2Config, Qwen2ForCausalLM) if family == "qwen2" else (LlamaConfig, LlamaForCausalLM)
    )
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        **sizes,
    }
    config = config_class(
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_whisper(path, n_mels=80, n_audio_ctx=100, n_audio_state=32, seed=0):
    """Saves a random Whisper, whose window is n_audio_ctx / 50 seconds, in openai's format."""
    dims = ModelDimensions(
        n_mels=n_mels,
        n_audio_ctx=n_audio_ctx,
        n_audio_state=n_audio_state,
        n_audio_head=4,
        n_audio_layer=2,
        n_vocab=64,
        n_text_ctx=16,
        n_text_state=n_audio_state,
        n_text_head=4,
        n_text_layer=1,
    )
    torch.manual_seed(seed)
    model = Whisper(dims)
    torch.save(
        {"dims": dataclasses.asdict(dims), "model_state_dict": model.state_dict()}, str(path)
    )
    return str(path)


def make_jsonl(folder, seconds, texts=None, name="data.jsonl", seed=0):
    """Saves noise of the given durations as wav files, and the jsonl that lists them."""
    random, folder = np.random.default_rng(seed), Path(folder)
    texts = texts or [
        " ".join(random.choice(["one", "two", "three"], 1 + i % 4)) for i in range(len(seconds))
    ]
    with open(folder / name, "w", encoding="utf-8") as file:
        for i, (duration, text) in enumerate(zip(seconds, texts, strict=True)):
            samples = random.normal(size=round(16000 * duration)).astype(np.float32) * 0.1
            soundfile.write(folder / f"{Path(name).stem}-{i}.wav", samples, 16000)
            line = {"wav": f"{Path(name).stem}-{i}.wav", "txt": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return str(folder / name)


def run(*command, env=None, check=True, timeout=300, cwd=ROOT):
    """Runs a script of the repository as a user does; returns the finished process."""
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and process.returncode != 0:
        raise AssertionError(f"{command} failed:\n{process.stdout}\n{process.stderr}")
    return process


def free_endpoint():
    """HOST:PORT of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def torchrun(n_processes):
    """The launcher's part of a command: the real torchrun, on a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc_per_node={n_processes}"]


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    return make_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def whisper_file(tmp_path_factory):
    return make_whisper(tmp_path_factory.mktemp("whisper") / "whisper.pt")


def wait_for(condition, process):
    """Returns when a condition is true; a process that ends before is a failure."""
    while not condition():
        assert process.poll() is None
        time.sleep(0.001)


def is_alive(process):
    """Whether a psutil.Process has not ended; a zombie has, and its new parent will notice."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE


def outlive(processes):
    """Those that do not end within 30 s after their parent. Ends them, and returns them."""
    deadline = time.monotonic() + 30
    while (left := list(filter(is_alive, processes))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        process.kill()
    return left
