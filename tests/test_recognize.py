"""Decoding: the same transcripts however they are batched, all the audio, and no night lost."""

import ast
import itertools
import json
import multiprocessing
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import pytest
import soundfile
import soxr
import torch
from conftest import (
    ROOT,
    TINY,
    make_jsonl,
    make_llm,
    make_whisper,
    outlive,
    run,
    torchrun,
    wait_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import recognize
from dataset import InputError, load_audio, render_chat
from model import ModelArguments, load_speech_llm

DEMO = {
    "llm_model_name_or_path": TINY / "llm",
    "whisper_model_name_or_path": TINY / "whisper.pt",
    "projector_model_path": TINY / "projector.safetensors",
}


def untrained(parts, folder):
    """A projector fresh from its initialisation, saved for these models as train.py saves one."""
    given = {name: str(part) if isinstance(part, Path) else part for name, part in parts.items()}
    model, _ = load_speech_llm(ModelArguments(**given), "cpu", torch.float32)
    path, metadata = folder / "untrained.safetensors", {"west": json.dumps(model.settings)}
    save_file(model.state_dict(), path, metadata)
    return {**parts, "projector_model_path": path}


def demo_projector(path, **settings):
    """Saves the bundled projector as if it had been trained with other settings."""
    bundled = DEMO["projector_model_path"]
    metadata = json.loads(safe_open(bundled, "pt").metadata()["west"]) | settings
    save_file(load_file(bundled), path, {"west": json.dumps(metadata)})
    return path


def arguments(parts, data, result, **flags):
    """recognize.py's command line, as strings."""
    flags = {**parts, "data_path": data, "result_path": result, "use_cpu": True, **flags}
    words = ([f"--{name}"] + [value] * (value is not True) for name, value in flags.items())
    return [str(word) for word in itertools.chain(*words)]


def recognized(parts, data, result, **flags):
    """Runs recognize.py's main() in this process; returns the lines of its result file."""
    argv = ["recognize.py", *arguments(parts, data, result, **{"num_workers": 0, **flags})]
    with patch.object(sys, "argv", argv):
        recognize.main()
    return Path(result).read_text("utf-8").split("\n")[:-1]


def full_report(result):
    return Path(f"{result}.report").read_text("utf-8")


def records_of(result):
    """The whole records that a run has left so far beside its result, by the line they are of."""
    records = {}
    for path in result.parent.iterdir():
        if path.name.startswith(f"{result.name}.records-"):
            for line in path.read_bytes().split(b"\n"):
                with suppress(ValueError):  # a kill may have torn it
                    record = json.loads(line)
                    records[record["index"]] = record
    return records


@contextmanager
def inputs_of(kind, call=None):
    """The shapes of the first input of each call of modules of a class, as they come."""
    shapes = []

    def hook(module, inputs):
        if type(module).__name__ == kind:
            shapes.append(tuple(inputs[0].shape))
            if call:
                call(len(shapes))

    handle = register_module_forward_pre_hook(hook)
    try:
        yield shapes
    finally:
        handle.remove()


def demo_lines(n=None):
    """Utterances of tests/tiny/test.jsonl, spread over it, with absolute paths."""
    lines = (TINY / "test.jsonl").read_text("utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    lines = lines[:: len(lines) // n][:n] if n else lines
    return [{"wav": str(TINY / line["wav"]), "txt": line["txt"]} for line in lines]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def random_models(tmp_path_factory):
    """A random LLM, which never stops by itself, and a random Whisper with a window of 6 s."""
    folder = tmp_path_factory.mktemp("models")
    llm = make_llm(folder / "llm", "llama3")
    whisper = make_whisper(folder / "whisper.pt", n_audio_ctx=300)
    return {"llm_model_name_or_path": llm, "whisper_model_name_or_path": whisper}


@pytest.fixture(scope="module")
def random_parts(tmp_path_factory, random_models):
    return untrained(random_models, tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def random_jsonl(tmp_path_factory):
    """Noise around the 2 s steps of the window that follows the audio, and one over the window."""
    seconds = [0.05, 1.9, 0.4, 2.0, 0.9, 8.3, 0.1, 2.1, 0.4, 4.0, 5.9]
    return make_jsonl(tmp_path_factory.mktemp("noise"), seconds)


@pytest.fixture(scope="module")
def demo_jsonl(tmp_path_factory):
    """23 of the demo's utterances, and one that is longer than the encoder's window."""
    folder, lines = tmp_path_factory.mktemp("demo"), demo_lines(23)
    long = np.concatenate([load_audio(line["wav"]) for line in lines[:5]])
    soundfile.write(folder / "long.flac", long, 16000)
    long_line = {"wav": str(folder / "long.flac"), "txt": " ".join(u["txt"] for u in lines[:5])}
    return write_jsonl(folder / "test.jsonl", [*lines[:7], long_line, *lines[7:]])


@pytest.fixture(scope="module")
def demo_transcripts(demo_jsonl):
    """What one process makes of demo_jsonl, greedily."""
    return recognized(DEMO, demo_jsonl, demo_jsonl.parent / "result.txt", batch_size=8)


def error_rate(parts, data, result, **flags):
    recognized(parts, data, result, **flags)
    return float(re.match(r"WER ([\d.]+)/", full_report(result))[1])


def test_the_untrained_projector_says_nothing(tmp_path, demo_jsonl):
    """Without training the demo's WER is at least 90 %: its frozen parts do not do it alone."""
    frozen = {name: path for name, path in DEMO.items() if "projector" not in name}
    assert error_rate(untrained(frozen, tmp_path), demo_jsonl, tmp_path / "result.txt") >= 90


def test_an_old_checkpoint_transcribes_held_out_speech(tmp_path):
    """The user's command prints 1.11 % as `WER a/b`, counts, RTFx and progress.

    The bundled projector was saved before its settings held the window and the rendered chat.
    """
    result = tmp_path / "result.txt"
    argv = arguments(DEMO, TINY / "test.jsonl", result)
    done = run(sys.executable, "recognize.py", *argv)
    rates = re.match(r"WER (\d+\.\d\d)/(\d+\.\d\d) % .*\b(\d+) in the references", done.stdout)
    assert rates[1] == "1.11" and float(rates[2]) <= float(rates[1])
    assert int(rates[3]) == sum(len(line["txt"].split()) for line in demo_lines())
    errors = re.search(r"(\d+) substitutions, (\d+) deletions, (\d+) insertions", done.stdout)
    assert abs(sum(map(int, errors.groups())) / int(rates[3]) * 100 - float(rates[1])) < 0.01
    assert re.search(r"^flagged: ", done.stdout, re.M) and re.search(
        r"^RTFx \d+", done.stdout, re.M
    )
    assert "3/3" in done.stderr  # the progress bar
    assert "Warning: --" not in done.stderr  # its models have the names of training
    assert len(result.read_text("utf-8").splitlines()) == 150
    report = full_report(result)
    assert report.startswith(done.stdout) and "num_beams=1" in report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.txt", "result.txt.report"]


def test_the_command_of_the_design_works_as_it_stands(tmp_path):
    """Run in a folder that holds its files; the names of the models are local paths there."""
    command = """
    python recognize.py \\
        --llm_model_name_or_path Qwen2-1.5B-Instruct --whisper_model_name_or_path ./tiny \\
        --projector_model_path Qwen-1.5B-Instruct-whisper-tiny/checkpoint-600/model.safetensors \\
        --data_path test.jsonl --result_path result.txt
    """
    checkpoint = tmp_path / "Qwen-1.5B-Instruct-whisper-tiny" / "checkpoint-600"
    checkpoint.mkdir(parents=True)
    for name, target in {
        "recognize.py": ROOT / "recognize.py",
        "Qwen2-1.5B-Instruct": TINY / "llm",
        "tiny": TINY / "whisper.pt",
    }.items():
        (tmp_path / name).symlink_to(target)
    demo_projector(checkpoint / "model.safetensors")
    write_jsonl(tmp_path / "test.jsonl", demo_lines(20))
    words = shlex.split(command.replace("\\\n", ""))
    assert words[0] == "python"
    done = run(sys.executable, *words[1:], cwd=tmp_path)
    assert float(re.match(r"WER ([\d.]+)/", done.stdout)[1]) <= 10
    assert len((tmp_path / "result.txt").read_text("utf-8").splitlines()) == 20


def test_five_lines_of_python(demo_jsonl, demo_transcripts):
    """Two imports, the models, transcribe() on a list of files, print: no made-up arguments."""
    lines = [json.loads(line) for line in demo_jsonl.read_text("utf-8").splitlines()]
    files = [line["wav"] for line in lines]
    script = (
        "from model import ModelArguments, load_speech_llm\n"
        "from recognize import transcribe\n"
        f"model, rows = load_speech_llm(ModelArguments(*{[str(part) for part in DEMO.values()]}))\n"
        f"transcripts = transcribe(model, rows, {files})\n"
        "print(transcripts)\n"
    )
    done = run(sys.executable, "-c", script, env={"CUDA_VISIBLE_DEVICES": ""})
    assert ast.literal_eval(done.stdout) == [(text, None) for text in demo_transcripts]


def test_transcribe_takes_paths_and_waveforms(demo_jsonl, demo_transcripts):
    """A str, a pathlib.Path and int16 samples are the same audio; a bad file is named."""
    model, rows = load_speech_llm(ModelArguments(**DEMO), "cpu", torch.float32)
    wav = json.loads(demo_jsonl.read_text("utf-8").splitlines()[0])["wav"]
    expected = [(demo_transcripts[0], None)]
    assert recognize.transcribe(model, rows, [wav]) == expected
    assert recognize.transcribe(model, rows, [load_audio(wav)]) == expected
    assert recognize.transcribe(model, rows, []) == []
    with pytest.raises(InputError, match=r"nowhere\.wav: cannot be decoded"):
        recognize.transcribe(model, rows, [wav, "nowhere.wav"])
    assert recognize.transcribe(model, rows, [Path(wav), load_audio(wav)]) == expected * 2


def assert_independent_of_batches(parts, data, folder, **flags):
    """Batch sizes 1, 3, 8, 32 and a shuffled jsonl give the same hypotheses, which it returns."""
    result = folder / "result.txt"
    sizes = 1, 3, 8, 32
    first, *others = (recognized(parts, data, result, batch_size=n, **flags) for n in sizes)
    assert all(transcripts == first for transcripts in others)
    lines = [json.loads(line) for line in Path(data).read_text("utf-8").splitlines()]
    lines = [line | {"wav": str(Path(data).parent / line["wav"])} for line in lines]
    order = np.random.default_rng(7).permutation(len(lines))
    shuffled = write_jsonl(folder / "shuffled.jsonl", [lines[i] for i in order])
    transcripts = recognized(parts, shuffled, result, batch_size=8, **flags)
    assert transcripts == [first[i] for i in order]
    return first


def encodes_whole_windows(gelu_inputs):
    """Whether the demo's encoder saw all 250 states, of 5 s, of each utterance."""
    return {shape[-2] % 250 for shape in gelu_inputs} == {0}


@pytest.mark.parametrize("num_beams", [1, 5])
@pytest.mark.parametrize("window", ["full", "audio"])
def test_demo_transcripts_depend_on_no_batch(
    tmp_path, demo_jsonl, demo_transcripts, window, num_beams
):
    """In fp32 neither batch size nor order changes a hypothesis, whichever window is encoded.

    The window is the projector's own: recognize.py is not told.
    """
    projector = demo_projector(tmp_path / "model.safetensors", encoder_window=window)
    parts = {**DEMO, "projector_model_path": projector}
    with inputs_of("GELU") as encoded:
        transcripts = assert_independent_of_batches(
            parts, demo_jsonl, tmp_path, num_beams=num_beams
        )
    assert encodes_whole_windows(encoded) == (window == "full")
    assert len(set(transcripts)) > 20
    assert (num_beams, window) != (1, "full") or transcripts == demo_transcripts


@pytest.mark.parametrize("num_beams", [1, 5])
@pytest.mark.parametrize("window", ["full", "audio"])
def test_random_transcripts_depend_on_no_batch(
    tmp_path, random_models, random_jsonl, window, num_beams
):
    """An LLM that never stops is cut at each row's own limit, whichever rows share its batch."""
    parts = untrained({**random_models, "encoder_window": window}, tmp_path)
    flags = {"num_beams": num_beams}
    transcripts = assert_independent_of_batches(parts, random_jsonl, tmp_path, **flags)
    assert len(set(transcripts)) > 5  # it does not say the same whatever it hears
    assert "no stop" in full_report(tmp_path / "result.txt")


def test_all_speech_embeddings_of_the_audio_window(tmp_path, random_models, random_jsonl):
    """The two flags exclude each other in one line, or decode alike in any batch; never a crash."""
    flags = {"encoder_window": "audio", "all_speech_embeddings": True}
    try:
        parts = untrained({**random_models, **flags}, tmp_path)
    except InputError as error:
        assert "--all_speech_embeddings" in str(error) and "\n" not in str(error)
    else:
        assert_independent_of_batches(parts, random_jsonl, tmp_path)


def test_two_processes_equal_one(tmp_path, demo_jsonl, demo_transcripts):
    """torchrun's result is one process' byte for byte, with an odd number of lines for 2 ranks.

    Other settings than those of training are warned of by one process alone, once each.
    """
    lines = demo_jsonl.read_text("utf-8").splitlines()
    odd = tmp_path / "odd.jsonl"
    odd.write_text("\n".join([*lines, lines[0]]) + "\n", "utf-8")
    chat = render_chat(AutoTokenizer.from_pretrained(TINY / "llm"), "Transcribe the speech")
    settings = {"prompt": "Say it", "encoder_window": "full", "chat": chat}
    settings |= {"llm_model_name_or_path": "hub/Qwen2-7B"}
    projector = demo_projector(tmp_path / "model.safetensors", **settings)
    parts, result = {**DEMO, "projector_model_path": projector}, tmp_path / "result.txt"
    argv = arguments(parts, odd, result, batch_size=4, encoder_window="audio")
    script = tmp_path / "script.py"  # gloo's threads would abort a process that keeps its group
    script.write_text(
        "import runpy, sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'recognize.py')!r}, run_name='__main__')\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    done = run(*torchrun(2), script, *argv)
    expected = "".join(f"{line}\n" for line in [*demo_transcripts, demo_transcripts[0]])
    assert result.read_bytes() == expected.encode()
    assert done.stdout.count("WER") == 1  # one process reports
    assert "4/4" in done.stderr  # and does its half: 4 of 7 batches, the long file alone in one
    assert not [path.name for path in tmp_path.iterdir() if "records" in path.name]
    warnings = re.findall("^Warning: (--[a-z_]+) ", done.stderr, re.M)
    assert sorted(warnings) == ["--encoder_window", "--llm_model_name_or_path", "--prompt"]


@pytest.mark.parametrize(
    ("name", "trained", "given"),
    [
        ("encoder_window", "full", "audio"),
        ("prompt", "Say it", "Transcribe the speech"),
        ("prompt", "Write it in English/French", "Write it in German/French"),
        ("projector_stride", 5, 4),
        ("llm_model_name_or_path", "Qwen/Qwen2-1.5B-Instruct", TINY / "llm"),
        ("whisper_model_name_or_path", "large-v3", TINY / "whisper.pt"),
    ],
)
def test_another_setting_than_in_training_is_one_warning(
    tmp_path, demo_jsonl, demo_transcripts, capsys, name, trained, given
):
    """What was trained is used, but for the models, which may have moved; the warning has both."""
    chat = render_chat(AutoTokenizer.from_pretrained(TINY / "llm"), "Transcribe the speech")
    projector = demo_projector(tmp_path / "model.safetensors", chat=chat, **{name: trained})
    flags = {**DEMO, "projector_model_path": projector, name: given}
    with inputs_of("GELU") as encoded:
        assert recognized(flags, demo_jsonl, tmp_path / "result.txt") == demo_transcripts
    assert encodes_whole_windows(encoded)
    [warning] = re.findall("^Warning: --.*$", capsys.readouterr().err, re.M)
    assert f"--{name}" in warning and str(trained) in warning and str(given) in warning


def test_the_same_models_are_no_warning(tmp_path, demo_jsonl, capsys):
    """Another folder, or the slash that a shell's completion adds, is not another model."""
    llm = tmp_path / "elsewhere" / "llm"
    shutil.copytree(TINY / "llm", llm)
    flags = {**DEMO, "llm_model_name_or_path": f"{llm}/"}
    recognized(flags, demo_jsonl, tmp_path / "result.txt")
    assert "Warning: --" not in capsys.readouterr().err


def test_the_prompt_is_that_of_training(tmp_path, demo_jsonl, demo_transcripts):
    """A template that has changed since, as one that holds the date does, changes no transcript."""
    llm = tmp_path / "llm"
    shutil.copytree(TINY / "llm", llm)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    chat = render_chat(tokenizer, "Transcribe the speech")
    tokenizer.chat_template = "<|im_end|>{{ strftime_now('%f') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(llm)
    projector = demo_projector(tmp_path / "model.safetensors", chat=chat)
    parts = {**DEMO, "llm_model_name_or_path": llm, "projector_model_path": projector}
    assert recognized(parts, demo_jsonl, tmp_path / "result.txt") == demo_transcripts


def test_batch_size_and_cache_reach_the_model(tmp_path, random_parts, random_jsonl):
    """batch_size bounds the rows of a forward pass; behind the prompt each pass has one place."""
    for batch_size in 2, 5:
        with inputs_of("Projector") as encoded, inputs_of("LlamaMLP") as decoded:
            recognized(random_parts, random_jsonl, tmp_path / "r.txt", batch_size=batch_size)
        assert max(shape[0] for shape in encoded) == batch_size
        # Each batch has one pass over its prompts and the KV cache makes the rest single steps
        prompts = [shape for shape in decoded if shape[1] > 1]
        assert len(prompts) == 2 * len(encoded)  # 2 layers
        assert len(decoded) > 20 * len(prompts)


@pytest.mark.parametrize("stride", [5, 20])
def test_the_limit_follows_the_seconds(tmp_path, random_models, stride):
    """20 tokens and 10 a second, whatever the stride, or what --max_new_tokens says.

    At a stride of 20 a limit of one token per speech embedding cut what people say.
    """
    parts = untrained({**random_models, "projector_stride": stride}, tmp_path)
    data = make_jsonl(tmp_path, [1.5])
    for flags, expected in ({}, 35), ({"max_new_tokens": 3}, 3):
        with inputs_of("LlamaMLP") as decoded:
            recognized(parts, data, tmp_path / "r.txt", **flags)
        assert len(decoded) == 2 * expected  # 2 layers
        assert "no stop" in full_report(tmp_path / "r.txt")


def test_generation_config_is_not_inherited(tmp_path, random_parts, random_jsonl):
    """Of the LLM's own generation_config.json only the stop tokens act."""
    plain = recognized(random_parts, random_jsonl, tmp_path / "r.txt")
    folder = tmp_path / "llm"
    shutil.copytree(random_parts["llm_model_name_or_path"], folder)
    parts = {**random_parts, "llm_model_name_or_path": folder}
    own = {"repetition_penalty": 1.8, "temperature": 0.2, "top_p": 0.3, "do_sample": True}
    own |= {"num_beams": 4, "no_repeat_ngram_size": 1, "max_new_tokens": 2, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(own), "utf-8")
    assert recognized(parts, random_jsonl, tmp_path / "r.txt") == plain
    everything = list(range(300))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": everything}))
    assert not any(recognized(parts, random_jsonl, tmp_path / "r.txt"))


def make_wordy_llm(folder, words, seed=0):
    """A random LLM that knows nothing but a few words and one stop token."""
    vocabulary = {"<|im_end|>": 0, "<unk>": 1, **{word: i for i, word in enumerate(words, 2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    )
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def exhaustive(model, rows, waveform, n_tokens):
    """{ids: log probability} of all hypotheses of at most n_tokens, the stop token counted."""
    hypotheses = {
        (*words, 0)[:n_tokens]
        for length in range(n_tokens + 1)
        for words in itertools.product(range(1, model.config.vocab_size), repeat=length)
    }
    hypotheses = sorted(hypotheses)
    batch = rows.batch([waveform] * len(hypotheses), [list(ids) for ids in hypotheses])
    with torch.no_grad():
        embeds = model.embed(batch["input_ids"], batch["waveforms"], batch["n_samples"])
        logs = model.llm(inputs_embeds=embeds).logits.log_softmax(-1)  # padded on the right
    scores = {}
    for ids, row, places in zip(hypotheses, logs, batch["places"], strict=True):
        scores[ids] = sum(row[place, i].item() for i, place in zip(ids, places, strict=False))
    return scores


def test_beam_search_reproduces_an_exhaustive_search(tmp_path, whisper_file):
    """With beams for all, the winner has the best log probability / length ** length_penalty."""
    winners, greedy = {}, 0
    for seed in range(4):
        llm = make_wordy_llm(tmp_path / f"llm{seed}", ["a", "b", "c"], seed)
        model, rows = load_speech_llm(ModelArguments(str(llm), whisper_file), "cpu", torch.float32)
        noise = (np.random.default_rng(seed).normal(size=16000) * 3000).astype(np.int16)
        scores = exhaustive(model, rows, noise, n_tokens=4)
        assert len(scores) == 1 + 4 + 16 + 64 + 256
        for penalty in -2.0, 0.0, 1.0, 3.0:
            best = max(scores, key=lambda ids: scores[ids] / len(ids) ** penalty)
            text = rows.tokenizer.decode([i for i in best if i != 0])
            expected = [(text, None if best[-1] == 0 else "no stop")]
            flags = {"length_penalty": penalty, "max_new_tokens": 4}
            assert recognize.transcribe(model, rows, [noise], num_beams=64, **flags) == expected
            greedy += recognize.transcribe(model, rows, [noise], num_beams=1, **flags) == expected
            winners[seed, penalty] = best
    assert greedy < len(winners)  # so num_beams mattered
    assert any(len(winners[s, -2.0]) < len(winners[s, 3.0]) for s in range(4))  # length_penalty too


def test_repetition_flags_change_what_a_looping_llm_says(tmp_path, whisper_file):
    """--repetition_penalty and --no_repeat_ngram_size reach generate: a loop is said no more."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    llm = make_wordy_llm(tmp_path / "llm", words, seed=4)
    parts = {"llm_model_name_or_path": llm, "whisper_model_name_or_path": whisper_file}
    parts, result = untrained(parts, tmp_path), tmp_path / "result.txt"
    data = make_jsonl(tmp_path, [1.0, 1.4, 1.8])
    looping = recognized(parts, data, result, max_new_tokens=40)
    assert "flagged: 3 loop" in full_report(result)
    for num_beams in 1, 3:
        flags = {"max_new_tokens": 40, "num_beams": num_beams}
        said = recognized(parts, data, result, no_repeat_ngram_size=2, **flags)
        pairs = [list(itertools.pairwise(text.split())) for text in said]
        assert all(len(set(row)) == len(row) for row in pairs) and sum(map(len, pairs)) > 10
    penalised = recognized(parts, data, result, repetition_penalty=3.0, max_new_tokens=40)
    assert "loop" not in full_report(result)
    for before, after in zip(looping, penalised, strict=True):
        assert len(set(after.split())) > len(set(before.split()))


def test_a_hypothesis_stays_on_its_line(tmp_path, whisper_file):
    """Line breaks of any kind in what the LLM says become spaces; the file is UTF-8."""
    words = ["one\ntwo", "three\u2028four", "fünf\r\nsechs", "七\x85八"]
    llm = make_wordy_llm(tmp_path / "llm", words, seed=1)
    parts = {"llm_model_name_or_path": llm, "whisper_model_name_or_path": whisper_file}
    parts = untrained(parts, tmp_path)
    data = make_jsonl(tmp_path, [1.0, 1.1, 1.2, 1.3, 1.4])
    recognized(parts, data, tmp_path / "result.txt", length_penalty=9, num_beams=5)
    text = (tmp_path / "result.txt").read_bytes().decode("utf-8")
    assert len(text.splitlines()) == 5 == text.count("\n")
    said = re.findall("one two|three four|fünf sechs|七 八", text)
    assert len(set(said)) >= 2  # it did say words that hold line breaks


@given(st.integers(0, 60_000), st.integers(9_600, 40_000), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_split_at_pauses_loses_nothing(n_samples, window, seed):
    """Pieces are at most a window long and join to the waveform, whatever it is."""
    waveform = (np.random.default_rng(seed).normal(size=n_samples) * 9000).clip(-32768, 32767)
    waveform = waveform.astype(np.int16)
    pieces = recognize.split_at_pauses(waveform, window)
    assert all(0 < len(piece) <= window for piece in pieces) or n_samples == 0
    assert np.array_equal(np.concatenate(pieces), waveform)
    # All but the last fill most of the window, so that no more decoding is done than needed
    assert all(len(piece) >= window * 5 // 6 for piece in pieces[:-1])


@given(st.lists(st.floats(0.5, 4.0), min_size=10, max_size=60), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_split_at_pauses_cuts_in_a_pause(words, seed):
    """A tone with pauses of 0.25 s is cut in them, wherever one is in the window's last sixth."""
    rate, window, parts, loud = 16000, 30 * 16000, [], []
    for seconds in words:
        n = round(seconds * rate)
        parts += [np.sin(np.arange(n) * 0.1), np.zeros(rate // 4)]
        loud += [np.ones(n, bool), np.zeros(rate // 4, bool)]
    waveform = np.concatenate(parts) * 32000
    waveform += np.random.default_rng(seed).normal(size=len(waveform)) * 32
    waveform = waveform.clip(-32768, 32767).astype(np.int16)
    loud, place = np.concatenate(loud), 0
    for piece in recognize.split_at_pauses(waveform, window)[:-1]:
        place += len(piece)  # no word is longer than 4 s, so the last 5 s hold a pause
        assert not loud[place - 400 : place + 400].any()


def test_files_of_a_few_windows_share_batches(tmp_path):
    """A batch may hold as much audio as its windows do: of 7.5 s, two in a batch of 4 x 5 s."""
    speech = [load_audio(line["wav"]) for line in demo_lines(8)]
    for i, samples in enumerate(speech):
        soundfile.write(tmp_path / f"{i}.flac", np.resize(samples, 120_000), 16000)
    data = write_jsonl(tmp_path / "data.jsonl", [{"wav": f"{i}.flac"} for i in range(8)])
    batches = []
    for batch_size in 1, 4:
        flags = {"batch_size": batch_size, "num_workers": 0}
        result = tmp_path / f"{batch_size}.txt"
        done = run(sys.executable, "recognize.py", *arguments(DEMO, data, result, **flags))
        batches.append(re.findall(r"(\d+)/\1 ", done.stderr)[-1])
    assert batches == ["8", "4"]
    assert (tmp_path / "1.txt").read_text("utf-8") == (tmp_path / "4.txt").read_text("utf-8")


def test_ten_minutes_lose_nothing_and_need_little_memory(tmp_path):
    """A 10-minute file gives what its utterances give alone, in memory bounded by its samples."""
    period, faint = 68_000, np.random.default_rng(0)  # 4.25 s, in a window of 5 s
    slots = []
    for line in demo_lines(12):
        speech = load_audio(line["wav"])
        slot = (faint.normal(size=period) * 3).astype(np.int16)
        slot[: len(speech)] += speech
        slot[:1600] = slot[-1600:] = 0  # the quietest place is where the next utterance begins
        soundfile.write(tmp_path / f"{len(slots)}.flac", slot, 16000)
        slots.append(slot)
    short = write_jsonl(tmp_path / "short.jsonl", [{"wav": f"{i}.flac"} for i in range(12)])
    soundfile.write(tmp_path / "long.flac", np.concatenate(slots * 12), 16000)
    long = write_jsonl(tmp_path / "long.jsonl", [{"wav": "long.flac"}])
    script = (
        "import resource, sys, recognize\n"
        "for argv in sys.argv[1].split('|'):\n"
        "    sys.argv = ['recognize.py', *argv.split()]\n"
        "    recognize.main()\n"
        "    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    flags = {"batch_size": 12, "num_workers": 0}
    commands = [arguments(DEMO, data, f"{data}.txt", **flags) for data in (short, long)]
    done = run(sys.executable, "-c", script, "|".join(map(" ".join, commands)))
    alone = Path(f"{short}.txt").read_text("utf-8").split("\n")[:-1]
    assert all(alone)
    assert Path(f"{long}.txt").read_text("utf-8") == " ".join(alone * 12) + "\n"
    assert "flagged: none" in done.stdout.split("peak")[1]  # windows are judged one by one
    before, after = map(int, re.findall(r"peak (\d+)", done.stdout))
    print(f"peak memory: {before} MiB, then with 10 minutes {after} MiB")
    assert after - before < 250  # MiB; the samples alone are 18


def test_what_can_be_known_before_stops_the_run(tmp_path):
    """Missing files: the first ten with their lines and the count of all, before any model."""
    lines = [{"wav": f"missing-{i}.wav"} for i in range(25)]
    lines[3] = {"wav": demo_lines(1)[0]["wav"]}
    data = write_jsonl(tmp_path / "data.jsonl", lines)
    nothing = dict.fromkeys(DEMO, "/nowhere")
    argv = arguments(nothing, data, tmp_path / "result.txt")
    done = run(sys.executable, "recognize.py", *argv, check=False)
    assert done.returncode == 1 and done.stdout == ""
    *named, count = done.stderr.splitlines()
    for i, message in zip([1, 2, 3, *range(5, 12)], named, strict=True):
        assert message.startswith(f"{data}:{i}: {tmp_path / f'missing-{i - 1}.wav'}: cannot be ")
        assert "No such file" in message
    assert count == f"{data}: expected valid lines; 24 of 25 are invalid"
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_declared_duration_is_believed(tmp_path, demo_jsonl, demo_transcripts):
    """The file of a line with "duration" is not opened at the start, but decoded whole later.

    One that is missing costs its own line alone, and is named at the end.
    """
    lines = [json.loads(line) for line in demo_jsonl.read_text("utf-8").splitlines()]
    declared = [line | {"duration": 0.5 + i % 3} for i, line in enumerate(lines)]
    data, result = write_jsonl(tmp_path / "data.jsonl", declared), tmp_path / "result.txt"
    assert recognized(DEMO, data, result, batch_size=8) == demo_transcripts
    declared[4]["wav"] = str(tmp_path / "missing.wav")
    write_jsonl(data, declared)
    with pytest.raises(InputError, match=f"{data}:5: {tmp_path}/missing.wav: .*No such file"):
        recognized(DEMO, data, result, batch_size=8)
    expected = [text if i != 4 else "" for i, text in enumerate(demo_transcripts)]
    assert result.read_text("utf-8").split("\n")[:-1] == expected


def test_bad_audio_does_not_cost_a_night(tmp_path, demo_jsonl, demo_transcripts, capsys):
    """What fails while decoding is an empty line, named on stderr; the others are right."""
    lines = [json.loads(line) for line in demo_jsonl.read_text("utf-8").splitlines()]
    speech = load_audio(lines[2]["wav"])
    soundfile.write(tmp_path / "cut.flac", speech, 16000)
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])  # its header is good
    speech = speech / np.float32(32768)
    speech[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", speech, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "gone.wav", np.zeros(800), 16000)  # the shortest, so the last
    for i, name in (2, "cut.flac"), (9, "nan.wav"), (20, "gone.wav"):
        lines[i]["wav"] = str(tmp_path / name)
    data, result = write_jsonl(tmp_path / "data.jsonl", lines), tmp_path / "result.txt"
    vanish = lambda n: (tmp_path / "gone.wav").unlink(missing_ok=True)  # noqa: E731
    with inputs_of("Projector", vanish), pytest.raises(SystemExit) as stopped:
        recognized(DEMO, data, result, batch_size=4)
    message = str(stopped.value)  # Python prints it on stderr and exits with status 1
    for i, name in (3, "cut.flac"), (10, "nan.wav"), (21, "gone.wav"):
        assert f"{data}:{i}: {tmp_path / name}: " in message
    assert message.count(str(data)) == 3
    transcripts = result.read_text("utf-8").split("\n")[:-1]
    expected = [text if i not in (2, 9, 20) else "" for i, text in enumerate(demo_transcripts)]
    assert transcripts == expected
    assert "3 unreadable" in capsys.readouterr().out
    assert f"\n{data}:10: unreadable: {tmp_path / 'nan.wav'}: " in full_report(result)


def test_a_killed_run_goes_on(tmp_path):
    """kill -9 leaves readable records, which nothing but --resume touches.

    Without it the same command refuses in one line and leaves them; with it, at another batch size
    too, only the rest is decoded, to the same result.
    """
    data = write_jsonl(tmp_path / "data.jsonl", demo_lines(40))
    expected = recognized(DEMO, data, tmp_path / "whole.txt", batch_size=1)
    folder = tmp_path / "run"
    folder.mkdir()
    result = folder / "result.txt"
    argv = arguments(DEMO, data, result, batch_size=1, num_workers=1)
    process = subprocess.Popen(
        [sys.executable, "recognize.py", *argv], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: len(records_of(result)) >= 5, process)
    loaders = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    [path] = folder.iterdir()  # no result.txt
    left, records = path.read_bytes(), records_of(result)
    assert 5 <= len(records) < 40
    for index, record in records.items():  # readable, and right
        assert record["hypothesis"] == expected[index]
    for batch_size in 1, 16:
        with inputs_of("Projector") as encoded, pytest.raises(InputError) as refused:
            recognized(DEMO, data, result, batch_size=batch_size)
        assert f"{result}.records-" in str(refused.value) and "--resume" in str(refused.value)
        assert "\n" not in str(refused.value) and not encoded
        assert [path.read_bytes() for path in folder.iterdir()] == [left]
    for batch_size in 1, 16:
        path.write_bytes(left)
        with inputs_of("Projector") as encoded:
            assert recognized(DEMO, data, result, batch_size=batch_size, resume=True) == expected
        assert sum(shape[0] for shape in encoded) == 40 - len(records)
        assert max(shape[0] for shape in encoded) == min(batch_size, 40 - len(records))
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["result.txt", "result.txt.report"]
    assert loaders and not outlive(loaders)


def test_torn_records_do_no_harm(tmp_path, random_parts, random_jsonl):
    """Cut off three times, each time within a line: what follows a torn line is read.

    The result's name holds what a shell would take for patterns.
    """
    expected = recognized(random_parts, random_jsonl, tmp_path / "whole.txt", batch_size=2)
    result = tmp_path / "res[u]lt*.txt"

    def interrupt(n):
        if n == 4:
            raise KeyboardInterrupt

    n_whole = 0
    for _ in range(3):
        with inputs_of("Projector", interrupt), pytest.raises(KeyboardInterrupt):
            recognized(random_parts, random_jsonl, result, batch_size=1, resume=True)
        [path] = tmp_path.glob("res*.records-*")
        whole = records_of(result)
        assert len(whole) > n_whole
        path.write_bytes(path.read_bytes()[:-20])  # the last record is torn
        n_whole = len(records_of(result))
        assert n_whole == len(whole) - 1
    with inputs_of("Projector") as encoded:
        again = recognized(random_parts, random_jsonl, result, batch_size=2, resume=True)
    assert again == expected
    # 8.3 s are two windows, and were the first that was decoded
    assert sum(shape[0] for shape in encoded) == len(expected) - n_whole
    assert not list(tmp_path.glob("res*.records-*"))


def test_a_record_may_be_torn_at_any_byte(tmp_path):
    """Wherever a kill cuts the last record, all before it and all behind it are read."""
    result, path = tmp_path / "result.txt", tmp_path / "result.txt.records-0"
    texts = ["one", '转写 } \u2028 \\ "quoted" é', "two"]
    records = [{"index": i, "hypothesis": text, "flag": None} for i, text in enumerate(texts)]
    first, torn, last = ("\n" + json.dumps(r, ensure_ascii=False) for r in records)
    torn = torn.encode()
    for n_bytes in range(len(torn)):
        path.write_bytes(first.encode() + torn[:n_bytes] + last.encode())
        assert recognize.read_records(result) == {0: records[0], 2: records[2]}
        path.write_bytes(first.encode() + torn[:n_bytes])
        assert recognize.read_records(result) == {0: records[0]}
    path.write_bytes(first.encode() + torn + last.encode())
    assert recognize.read_records(result) == dict(enumerate(records))


def test_a_run_killed_before_its_end_is_joined(tmp_path, demo_jsonl, demo_transcripts):
    """Where all has been decoded, by whichever number of processes, --resume just writes it."""
    lines = [json.loads(line) for line in demo_jsonl.read_text("utf-8").splitlines()]
    result = tmp_path / "result.txt"
    for i, text in enumerate(demo_transcripts):
        with open(f"{result}.records-{i % 11}", "a", encoding="utf-8") as file:
            record = lines[i] | {"index": i, "line": f"{demo_jsonl}:{i + 1}", "hypothesis": text}
            record |= {"flag": "loop" if i == 4 else None, "error": None}
            file.write("\n" + json.dumps(record))
    with inputs_of("Projector") as encoded:
        assert recognized(DEMO, demo_jsonl, result, resume=True) == demo_transcripts
    assert not encoded and "\nflagged: 1 loop\n" in full_report(result)
    assert f"\n{demo_jsonl}:5: loop: {demo_transcripts[4]}\n" in full_report(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.txt", "result.txt.report"]


@pytest.mark.parametrize("n_lines", [3, 24])
def test_records_of_other_data_are_refused(tmp_path, demo_jsonl, demo_transcripts, n_lines):
    """--resume never joins what was decoded of another jsonl: longer, or in another order."""
    lines = [json.loads(line) for line in demo_jsonl.read_text("utf-8").splitlines()]
    result = tmp_path / "result.txt"
    record = lines[5] | {"index": 5, "line": "other.jsonl:6", "hypothesis": "one", "flag": None}
    Path(f"{result}.records-0").write_text(json.dumps(record | {"error": None}))
    data = write_jsonl(tmp_path / "data.jsonl", lines[::-1][:n_lines])
    with inputs_of("Projector") as encoded, pytest.raises(InputError) as refused:
        recognized(DEMO, data, result, resume=True)
    assert str(refused.value) == f"{result}.records-*: not of {data}; delete them"
    assert not encoded and Path(f"{result}.records-0").exists() and not result.exists()


def test_hypotheses_of_another_run_are_never_mixed_in(tmp_path, demo_jsonl, demo_transcripts):
    """A run is cut off, its projector trained on: the same command once gave a mixture of both.

    It refuses, and after the old records are deleted all hypotheses are the new projector's.
    """
    frozen = {name: path for name, path in DEMO.items() if "projector" not in name}
    parts, result = untrained(frozen, tmp_path), tmp_path / "result.txt"

    def interrupt(n):
        if n == 3:
            raise KeyboardInterrupt

    with inputs_of("Projector", interrupt), pytest.raises(KeyboardInterrupt):
        recognized(parts, demo_jsonl, result, batch_size=4)
    assert records_of(result)
    shutil.copy(DEMO["projector_model_path"], parts["projector_model_path"])
    with pytest.raises(InputError, match="--resume"):
        recognized(parts, demo_jsonl, result, batch_size=4)
    assert not result.exists()
    other = tmp_path / "other" / "result.txt"  # another result has nothing to do with them
    other.parent.mkdir()
    assert recognized(parts, demo_jsonl, other, batch_size=4, resume=True) == demo_transcripts
    for path in tmp_path.glob("result.txt.records-*"):
        path.unlink()
    assert recognized(parts, demo_jsonl, result, batch_size=4) == demo_transcripts


def test_workers_end_with_their_launcher(tmp_path, demo_jsonl, demo_transcripts):
    """kill -9 of torchrun alone ends both ranks and their loaders; one process can go on.

    They once stayed, decoding into the files of the run that was started after them.
    """
    lines = demo_jsonl.read_text("utf-8").splitlines()
    data, result = tmp_path / "data.jsonl", tmp_path / "result.txt"
    data.write_text("\n".join(lines * 6), "utf-8")
    argv = arguments(DEMO, data, result, batch_size=1, num_workers=1)
    command = [*torchrun(2), "recognize.py", *argv]
    launcher = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(tmp_path.glob("*.records-*"))) == 2 and records_of(result), launcher)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    assert len(workers) >= 4
    launcher.send_signal(signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    assert not outlive(workers)
    n_records = len(records_of(result))
    assert 0 < n_records < len(lines) * 6 and not result.exists()
    with inputs_of("Projector") as encoded:
        transcripts = recognized(DEMO, data, result, batch_size=32, resume=True)
    assert transcripts == demo_transcripts * 6
    assert sum(shape[0] for shape in encoded) >= len(lines) * 6 - n_records
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["data.jsonl", "result.txt", "result.txt.report"]


def test_an_error_of_decoding_keeps_its_traceback(tmp_path, demo_jsonl):
    """An exhausted GPU or a killed loader is no user's mistake, and is not told as one."""

    def exhaust(n):
        if n == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with inputs_of("Projector", exhaust), pytest.raises(torch.OutOfMemoryError) as stopped:
        recognized(DEMO, demo_jsonl, tmp_path / "exhausted.txt", batch_size=4)
    assert stopped.traceback[-1].name == "exhaust" and stopped.value.__cause__ is None
    # What had been decoded is not lost, and fits into memory at a smaller batch size
    assert records_of(tmp_path / "exhausted.txt")

    def kill_loaders(n):
        for process in multiprocessing.active_children():
            process.kill()

    with inputs_of("Projector", kill_loaders), pytest.raises(RuntimeError, match="DataLoader work"):
        recognized(DEMO, demo_jsonl, tmp_path / "killed.txt", batch_size=1, num_workers=1)


def clip(name, path):
    """One of the demo's utterances as a user may have it."""
    speech = load_audio(demo_lines(1)[0]["wav"]) / np.float32(32768)
    at = lambda rate: soxr.resample(speech, 16000, rate)  # noqa: E731
    stereo = lambda rate: np.stack([at(rate) * 1.5, at(rate) * 0.5], axis=1)  # noqa: E731
    if name in ("zero bytes", "text", "m4a"):  # a box of m4a's, where nothing can make a whole one
        content = {"zero bytes": b"", "text": b"not audio\n" * 99}
        path.write_bytes(content.get(name, b"\0\0\0\x1cftypM4A " + b"\0" * 64))
        if name == "m4a" and shutil.which("ffmpeg"):
            soundfile.write(path.with_suffix(".wav"), speech, 16000)
            source = ["-i", path.with_suffix(".wav")]
            subprocess.run(["ffmpeg", "-y", *source, path], check=True, capture_output=True)
        return
    samples, rate, options = {
        "8 kHz telephone": (at(8000), 8000, {"subtype": "ULAW"}),
        "mu-law": (speech, 16000, {"subtype": "ULAW"}),
        "16 kHz": (speech, 16000, {}),
        "44.1 kHz": (at(44100), 44100, {}),
        "48 kHz stereo": (stereo(48000), 48000, {}),
        "24 bit": (speech, 16000, {"subtype": "PCM_24"}),
        "float": (speech, 16000, {"subtype": "FLOAT"}),
        "mp3": (at(44100), 44100, {"format": "MP3"}),
        "opus": (stereo(48000), 48000, {"format": "OGG", "subtype": "OPUS"}),
        "flac": (speech, 16000, {"format": "FLAC"}),
        "flac of a stream": (speech, 16000, {"format": "FLAC"}),
        "no samples": (speech[:0], 16000, {}),
        "NaN": (np.where(np.arange(len(speech)) == 9, np.nan, speech), 16000, {"subtype": "FLOAT"}),
        "clipped": ((speech * 30).clip(-1, 1), 16000, {}),
        "DC offset": (speech + 0.2, 16000, {"subtype": "FLOAT"}),
        "0.05 s": (speech[8000:8800], 16000, {}),
        "silence": (speech * 0, 16000, {}),
        "raw": (speech, 16000, {"format": "RAW", "subtype": "PCM_16"}),
    }[name]
    soundfile.write(path, samples, rate, **({"format": "WAV"} | options))
    if name == "flac of a stream":  # whose header does not tell its length
        content = bytearray(path.read_bytes())
        content[21:26] = content[21] & 0xF0, 0, 0, 0, 0
        path.write_bytes(content)


SAME = ["16 kHz", "44.1 kHz", "48 kHz stereo", "24 bit", "float", "mu-law", "mp3", "opus", "flac"]
TRANSCRIBED = ["8 kHz telephone", "clipped", "DC offset", "0.05 s", "silence"]
BAD = ["zero bytes", "text", "no samples", "NaN", "raw"]
EITHER = ["m4a", "flac of a stream"]  # with ffmpeg, or without


@pytest.mark.parametrize("name", SAME + TRANSCRIBED + BAD + EITHER)
def test_any_sound_is_transcribed_or_named(tmp_path, demo_transcripts, name):
    """Re-encoded speech keeps its transcript; other sound is decoded, or named as bad."""
    suffix = {"m4a": ".m4a", "raw": ".raw"}.get(name, ".audio")
    path, result = tmp_path / f"clip{suffix}", tmp_path / "result.txt"
    clip(name, path)
    data = write_jsonl(tmp_path / "data.jsonl", [{"wav": path.name}])
    if name in BAD or (name in EITHER and not shutil.which("ffmpeg")):
        with pytest.raises(SystemExit, match=re.escape(f"{data}:1: {path}: ")):
            recognized(DEMO, data, result)
        return
    lines = recognized(DEMO, data, result)
    assert len(lines) == 1
    if name not in TRANSCRIBED:
        assert lines[0] == demo_transcripts[0]


def test_a_jsonl_as_it_may_come(tmp_path, demo_jsonl, demo_transcripts):
    """Without txt there is no score; extra keys, a BOM and Windows line ends do no harm.

    Nor do blank lines at the end. One in the middle would shift the result, and is named.
    """
    lines = [json.loads(line) for line in demo_jsonl.read_text("utf-8").splitlines()]
    lines = [json.dumps({"wav": line["wav"], "speaker": 7, "好": []}) for line in lines]
    data, text = tmp_path / "data.jsonl", b"\xef\xbb\xbf" + "\r\n".join(lines).encode()
    for end in b"", b"\r\n\r\n \n\n":
        data.write_bytes(text + end)
        assert recognized(DEMO, data, tmp_path / "result.txt", batch_size=8) == demo_transcripts
        report = full_report(tmp_path / "result.txt")
        assert report.startswith("flagged: none\nRTFx ") and "WER" not in report
    data.write_text("\n".join([*lines[:3], "", *lines[3:]]), "utf-8")
    with pytest.raises(InputError, match=f"{data}:4: expected "):
        recognized(DEMO, data, tmp_path / "result.txt")


def test_normalize_reaches_the_report(tmp_path, demo_jsonl):
    """References as printed in books have a WER of 100 %, and normalised that of the words."""
    lines = [json.loads(line) for line in demo_jsonl.read_text("utf-8").splitlines()]
    lines = [line | {"txt": ", ".join(line["txt"].upper().split())} for line in lines]
    data, result = write_jsonl(tmp_path / "data.jsonl", lines), tmp_path / "result.txt"
    assert error_rate(DEMO, data, result) >= 90
    plain = error_rate(DEMO, demo_jsonl, result)
    assert plain <= 15
    assert error_rate(DEMO, data, result, normalize="basic") == plain
    assert error_rate(DEMO, data, result, normalize="english") <= 15  # it writes digits together


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data_path": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read"),
        ({"data_path": "/dev/null"}, "/dev/null: expected valid lines"),
        ({"beams": 5}, "wrong flags .*--beams"),
        ({"batch_size": 0}, "--batch_size 0: expected 1 or more"),
        ({"num_beams": 0}, "--num_beams.*: expected"),
        ({"num_beams": -1}, "--num_beams.*: expected"),
        ({"repetition_penalty": 0}, "--repetition_penalty.*: expected"),
        ({"max_new_tokens": -1}, "--max_new_tokens.*expected"),
        ({"no_repeat_ngram_size": -1}, "--no_repeat_ngram_size.*expected"),
        ({"num_workers": -1}, "--num_workers.*expected"),
        ({"result_path": "no/such/folder/r.txt"}, "--result_path .*a folder that exists"),
        ({"projector_model_path": "nowhere"}, "--projector_model_path nowhere: expected a model"),
        ({"projector_model_path": TINY / "llm/model.safetensors"}, "--projector_model_path"),
        ({"whisper_model_name_or_path": "huge"}, "--whisper_model_name_or_path .*'tiny'"),
        (
            {"llm_model_name_or_path": TINY / "audio"},
            "--llm_model_name_or_path .*: expected a causal LLM",
        ),
    ],
)
def test_a_wrong_argument_is_named(tmp_path, demo_jsonl, flags, message):
    """A user's mistake ends before any decoding, with one line that names the flag."""
    with inputs_of("Projector") as encoded, pytest.raises(InputError, match=message) as stopped:
        recognized({**DEMO, **flags}, demo_jsonl, tmp_path / "r.txt", **flags)
    assert not encoded and "\n" not in str(stopped.value)  # so Python exits with status 1
    assert not list(tmp_path.iterdir())


def test_a_folder_as_result_is_named(tmp_path, demo_jsonl):
    """It once was an error after everything had been decoded."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with inputs_of("Projector") as encoded, pytest.raises(InputError) as stopped:
        recognized(DEMO, demo_jsonl, folder)
    assert f"--result_path {folder}: expected a file" in str(stopped.value)
    assert not encoded and "\n" not in str(stopped.value)
    assert list(tmp_path.rglob("*")) == [folder]


def test_no_projector_is_named(tmp_path, demo_jsonl):
    """An untrained projector transcribes nothing: decoding does not begin without one."""
    frozen = {name: path for name, path in DEMO.items() if "projector" not in name}
    with pytest.raises(InputError, match=r"^--projector_model_path: expected a model"):
        recognized(frozen, demo_jsonl, tmp_path / "r.txt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [None, 0.5])
def test_an_llm_without_its_weights_is_named(tmp_path, demo_jsonl, size):
    """No weights, or half of them, as a cut-off download leaves them: one line, no traceback."""
    llm = tmp_path / "llm"
    shutil.copytree(TINY / "llm", llm)
    weights = llm / "model.safetensors"
    if size:
        weights.write_bytes(weights.read_bytes()[: int(size * weights.stat().st_size)])
    else:
        weights.unlink()
    with inputs_of("Projector") as encoded, pytest.raises(InputError) as stopped:
        parts = {**DEMO, "llm_model_name_or_path": llm}
        recognized(parts, demo_jsonl, tmp_path / "r.txt")
    assert str(stopped.value).startswith(f"--llm_model_name_or_path {llm}: expected a causal LLM")
    assert not encoded and "\n" not in str(stopped.value)
    assert [path.name for path in tmp_path.iterdir()] == ["llm"]


@pytest.mark.parametrize("part", ["llm_model_name_or_path", "whisper_model_name_or_path"])
def test_a_projector_of_models_of_another_size_is_refused(tmp_path, demo_jsonl, part):
    """A projector that does not fit between the two models is an error that names it."""
    if part.startswith("llm"):
        other = make_llm(tmp_path / "llm", hidden_size=64)
    else:
        other = make_whisper(tmp_path / "whisper.pt", n_audio_state=64)
    with pytest.raises(
        InputError, match=r"--projector_model_path .*: expected models of its sizes"
    ):
        recognized({**DEMO, part: other}, demo_jsonl, tmp_path / "result.txt")


@pytest.mark.parametrize("flags", [{"metric": "bleu"}, {"dtype": "float33"}, {"normalize": "no"}])
def test_a_choice_is_checked_before_decoding(tmp_path, demo_jsonl, capsys, flags):
    """A metric, dtype or normaliser that does not exist is refused at once, not after a night."""
    with pytest.raises(SystemExit) as stopped:
        recognized(DEMO, demo_jsonl, tmp_path / "result.txt", **flags)
    assert stopped.value.code == 2 and "invalid choice" in capsys.readouterr().err
