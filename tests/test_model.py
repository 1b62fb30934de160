"""The model: the projector, Whisper's encoder and the LLM, each alone and the three together."""

import copy
import hashlib
import json
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import whisper
from conftest import (
    CHATML,
    FAMILIES,
    ROOT,
    TINY,
    make_jsonl,
    make_llm,
    make_tokenizer,
    make_whisper,
    run,
    torchrun,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataset import PAD, SPEECH, InputError, SpeechDataset
from model import (
    ModelArguments,
    Projector,
    ProjectorArguments,
    SpeechEncoder,
    load_speech_llm,
    save_projector,
)
from train import TrainingArguments, prepare_llm

CPU = torch.device("cpu")


def load(llm, whisper_file, projector=None, dtype=torch.float32, **projector_flags):
    args = ModelArguments(llm, whisper_file, projector)
    return load_speech_llm(args, "cpu", dtype, projector_args=ProjectorArguments(**projector_flags))


def assert_refused(expected, *models):
    """Loading must end in one line."""
    with pytest.raises(InputError, match=expected) as error:
        load(*models)
    assert "\n" not in str(error.value)


def save(model, path):
    save_projector(model, path)
    return str(path)


def noise(n_samples, seed=0, loudness=3000):
    """Returns an int16 waveform (n_samples,), drawn from a seed."""
    samples = np.random.default_rng(seed).normal(size=n_samples) * loudness
    return samples.clip(-32768, 32767).astype(np.int16)


def encode(encoder, waveforms):
    """Returns the encoder's frames of a list of waveforms."""
    return encoder(
        torch.from_numpy(np.concatenate(waveforms)), [len(waveform) for waveform in waveforms]
    )


def training_batch(prompts, seconds=(0.7, 1.3), texts=("one", "two three")):
    """Returns a batch of noise, and its list of (waveform, target ids)."""
    waveforms = [noise(round(16000 * n), seed) for seed, n in enumerate(seconds)]
    targets = [prompts.target_ids(text) for text in texts]
    return prompts.training_batch(waveforms, targets), list(zip(waveforms, targets, strict=True))


def gradients(model, batch):
    model.zero_grad()
    model(**batch)["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_close_gradients(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-5 * b[name].norm(), name


@pytest.mark.parametrize(
    ("encoder_dim", "llm_dim", "published"),
    [
        (384, 4096, 9.46),  # Llama 3 8B with tiny, small, large
        (768, 4096, 12.32),
        (1280, 4096, 18.32),
        (1280, 896, 12.07),  # Qwen2 0.5B, 1.5B, 7B with large
        (1280, 1536, 13.32),
        (1280, 3584, 17.32),
        (384, 1536, 4.5),  # Qwen2 1.5B with tiny, small
        (768, 1536, 7.3),
    ],
)
def test_published_sizes(encoder_dim, llm_dim, published):
    """The projector has the published number of parameters, in units of 2**20."""
    projector = Projector(encoder_dim, llm_dim)
    size = sum(parameter.numel() for parameter in projector.parameters()) / 2**20
    decimals = len(str(published).split(".")[1])  # the table gives two, but 4.5 and 7.3
    assert round(size, decimals) == published


# The encoder


@pytest.fixture(scope="module")
def whisper_files(tmp_path_factory):
    """{n_mels: a Whisper} with a window of 5.5 s, which is no multiple of the 2 s of "audio"."""
    folder = tmp_path_factory.mktemp("whispers")
    return {
        n_mels: make_whisper(folder / f"{n_mels}.pt", n_mels, n_audio_ctx=275, n_audio_state=24)
        for n_mels in (80, 128)
    }


def noise_like(n_samples):
    """Returns a waveform for each length, some of them silent, quiet or clipped."""
    loudness = [3000, 0, 1, 60000, 30]
    return [noise(n, seed=k, loudness=loudness[k % 5]) for k, n in enumerate(n_samples)]


@torch.no_grad()
def frames_by_whisper(whisper_file, waveforms, n_frames):
    """Returns frames by Whisper's own functions and blocks, which see the first n_frames alone."""
    model = whisper.load_model(whisper_file, device="cpu")
    audio = [whisper.pad_or_trim(torch.from_numpy(w).float() / 32768, 88000) for w in waveforms]
    mel = torch.stack([whisper.log_mel_spectrogram(a, model.dims.n_mels) for a in audio])
    if n_frames == model.dims.n_audio_ctx:
        return model.embed_audio(mel)
    x = F.gelu(model.encoder.conv2(F.gelu(model.encoder.conv1(mel)))).permute(0, 2, 1)
    x = (x + model.encoder.positional_embedding)[:, :n_frames]
    for block in model.encoder.blocks:
        x = block(x)
    return model.encoder.ln_post(x)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize(
    ("window", "n_samples", "n_frames"),
    [
        ("full", [1, 16000, 30001, 64000, 88000], 275),
        ("audio", [1, 100, 32000, 16000, 31999], 100),  # up to 2 s
        ("audio", [32001, 64000, 40000, 50000, 33000], 200),
        ("audio", [64001, 88000, 70000, 80000, 65000], 275),
    ],
)
def test_frames_are_whispers(whisper_files, n_mels, window, n_samples, n_frames):
    """Frames are Whisper's own, bit for bit in float32, for audio of any length and loudness beside
    any other. In the window "audio" the blocks see the audio alone, rounded up to 2 s."""
    encoder = SpeechEncoder(whisper_files[n_mels], window, CPU, torch.float32)
    waveforms = noise_like(n_samples)
    frames = encode(encoder, waveforms)
    assert frames.shape == (5, n_frames, encoder.output_dim) and encoder.max_frames == 275
    assert torch.equal(frames, frames_by_whisper(whisper_files[n_mels], waveforms, n_frames))


class Recorder(TorchDispatchMode):
    """Records operations, their devices, and the number of float32 values in their results."""

    def __enter__(self):
        self.operations, self.devices, self.n_float32 = [], set(), 0
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append(str(operation))
        for tensor in filter(torch.is_tensor, tree_leaves((args, kwargs, result))):
            self.devices.add(tensor.device.type)
        for tensor in tree_leaves(result):
            self.n_float32 += tensor.numel() if tensor.dtype == torch.float32 else 0
        return result


def test_log_mel_waits_for_nothing(whisper_file):
    """The log-mel takes as many operations for 64 utterances as for one, all on the device.

    Whisper's own copies a Hann window from the host for each utterance, and the host waits for it:
    training ran at a tenth of its speed. The meta device has no values that one could wait for."""
    encoder = SpeechEncoder(whisper_file, "full", torch.device("meta"), torch.bfloat16)
    encoder.log_mel(torch.empty(1, 32000, device="meta"))  # the filters are made once
    with Recorder() as one:
        encoder.log_mel(torch.empty(1, 32000, device="meta"))
    with Recorder() as many:
        encoder.log_mel(torch.empty(64, 32000, device="meta"))
    assert one.operations == many.operations and many.devices == {"meta"}


@pytest.mark.parametrize("window", ["full", "audio"])
def test_frames_do_not_depend_on_the_batch(whisper_files, window):
    """Neighbours of any number, length and loudness leave the frames of an utterance as they are;
    zeros follow them. 150 utterances are more than are encoded at a time, also of one length."""
    encoder = SpeechEncoder(whisper_files[80], window, CPU, torch.float32)
    waveforms = noise_like(np.random.default_rng(0).integers(1, 88001, 150))
    together = encode(encoder, waveforms)
    for frames, waveform in zip(together, waveforms, strict=True):
        [alone] = encode(encoder, [waveform])
        torch.testing.assert_close(frames[: len(alone)], alone, rtol=1e-5, atol=1e-5)
        assert not frames[len(alone) :].any()


@pytest.mark.parametrize("window", ["full", "audio"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_ignores_autocast(whisper_file, window, dtype):
    """Autocast, with which Trainer surrounds the model, changes no bit of the encoder's frames."""
    encoder = SpeechEncoder(whisper_file, window, CPU, dtype)
    alone = encode(encoder, [noise(16000), noise(20000)])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(encoder, [noise(16000), noise(20000)]), alone)
    assert alone.dtype == dtype and not alone.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    """A Whisper in half precision holds its own weights, rounded once, and no process ever holds it
    in float32: large took 9 GB each. The default dtype stays, also when loading fails."""
    path = make_whisper(tmp_path / "whisper.pt", n_audio_state=128)
    checkpoint = torch.load(path)
    weights = {name: w.half() for name, w in checkpoint["model_state_dict"].items()}
    torch.save({**checkpoint, "model_state_dict": weights}, path)  # as OpenAI's
    with Recorder() as recorder:
        half = SpeechEncoder(path, "full", CPU, dtype).encoder.state_dict()
    assert recorder.n_float32 < sum(w.numel() for w in weights.values()) / 4
    for name, weight in half.items():
        assert torch.equal(weight, weights[f"encoder.{name}"].to(dtype)), name
    with pytest.raises(InputError, match=r"--whisper_model_name_or_path .*absent"):
        SpeechEncoder(str(tmp_path / "absent.pt"), "full", CPU, dtype)
    assert torch.get_default_dtype() == torch.float32


SAMPLES_PER_FRAME = {25: 640, 50: 320, 100: 160}


def made_up_encoder(rate):
    """Returns an encoder class with a window of 2 s, whose frames are the samples themselves."""

    class Frames:
        samples_per_frame = output_dim = SAMPLES_PER_FRAME[rate]
        max_frames = 2 * rate

        def __init__(self, name, window, device, dtype):
            self.device = device

        def __call__(self, waveforms, n_samples):
            waveforms = waveforms.float().split(n_samples)
            waveforms = [F.pad(w, (0, -len(w) % self.output_dim)) for w in waveforms]
            audio = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
            return audio.view(len(waveforms), -1, self.output_dim) / 32768

    return Frames


@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("rate", SAMPLES_PER_FRAME)
def test_replaced_encoder(llm, monkeypatch, rate, stride):
    """An encoder of another frame rate takes SpeechEncoder's place as README shows. The speech
    embeddings are then as many as the audio needs, and every sample of the audio is in them."""
    monkeypatch.setattr("model.SpeechEncoder", made_up_encoder(rate))
    model, prompts = load(llm, "any name", projector_stride=stride)
    samples = stride * SAMPLES_PER_FRAME[rate]
    n_samples = [1, samples, samples + 1, 16001]
    batch, pairs = training_batch(prompts, [n / 16000 for n in n_samples], ["one"] * 4)
    embeds = model.embed(batch["input_ids"], batch["waveforms"], n_samples)
    token_embeddings = model.llm.get_input_embeddings()
    for ids, sequence, (waveform, target) in zip(batch["input_ids"], embeds, pairs, strict=True):
        audio = F.pad(torch.from_numpy(waveform) / 32768, (0, -len(waveform) % samples))
        speech = model.projector(audio.view(1, -1, SAMPLES_PER_FRAME[rate]))[0]
        assert (ids == SPEECH).sum() == len(speech) == -(-len(waveform) // samples)
        before, after = torch.tensor(prompts.prefix_ids), torch.tensor(prompts.suffix_ids + target)
        expected = torch.cat([token_embeddings(before), speech, token_embeddings(after)])
        torch.testing.assert_close(sequence[: len(expected)], expected, rtol=1e-5, atol=1e-5)
    assert all(gradient.any() for gradient in gradients(model.train(), batch).values())
    longest = [noise(prompts.max_samples)]
    assert len(longest[0]) == 32000
    model.eval().generate(**prompts.recognition_batch(longest), max_new_tokens=2)


# The whole


def sums_by_hand(model, prompts, pairs):
    """Returns the token_sums of (waveform, target) that the LLM reads one by one, without padding,
    from its logits at all positions."""
    embed, sums = model.llm.get_input_embeddings(), []
    for waveform, target in pairs:
        frames = encode(model.encoder, [waveform]).double()
        speech = model.projector(frames)[0, : -(-len(waveform) // 1600)]  # one for 0.1 s
        pieces = [embed(torch.tensor(prompts.prefix_ids)), speech]
        pieces += [embed(torch.tensor(prompts.suffix_ids)), embed(torch.tensor(target))]
        logits = model.llm(inputs_embeds=torch.cat(pieces)[None]).logits[0, -len(target) - 1 : -1]
        ids = torch.tensor(target)
        loss = F.cross_entropy(logits, ids, reduction="sum")
        sums.append(torch.stack([loss, torch.tensor(len(ids)), (logits.argmax(-1) == ids).sum()]))
    return torch.stack(sums)


def assert_loss_by_hand(llm, whisper_file, **projector_flags):
    """The loss and the gradients of a padded batch are those of its utterances one by one.

    In float64: in float32 an activation next to 0 may be on the other side of ReLU's kink."""
    model, prompts = load(llm, whisper_file, dtype=torch.float64, **projector_flags)
    model.projector.double()
    texts = ["one", "two three", "three one two", "two"]
    batch, pairs = training_batch(prompts, [2.7, 1.3, 0.2, 5.4], texts)
    expected = sums_by_hand(model.train(), prompts, pairs)
    (expected[:, 0].sum() / expected[:, 1].sum()).backward()
    by_hand = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(by_hand) == list(model.state_dict())  # the projector's alone
    model.zero_grad(set_to_none=True)
    assert_close_gradients(gradients(model, batch), by_hand)
    outputs, token_sums = model(**batch), expected.detach().float()
    torch.testing.assert_close(outputs["token_sums"], token_sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["loss"], token_sums[:, 0].sum() / token_sums[:, 1].sum())
    halved = model(**batch, num_items_in_batch=2 * token_sums[:, 1].sum())["loss"]
    torch.testing.assert_close(halved, outputs["loss"] / 2)
    evaluated = model.eval()(**batch)
    assert all(torch.equal(evaluated[name], outputs[name]) for name in outputs)
    return model, prompts, batch


@pytest.mark.parametrize("window", ["full", "audio"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_the_targets(tmp_path, whisper_files, family, window):
    """The loss of a padded batch is the mean cross-entropy of the transcripts' tokens and the
    end-of-turn tokens; the projector alone has gradients, and decoding stops where turns end."""
    llm = make_llm(tmp_path / "llm", family)
    model, prompts, _ = assert_loss_by_hand(llm, whisper_files[80], encoder_window=window)
    stop_tokens = {FAMILIES[family][-1], prompts.tokenizer.eos_token}
    stop_ids = set(prompts.tokenizer.convert_tokens_to_ids(list(stop_tokens)))
    assert set(model.llm.generation_config.eos_token_id) == stop_ids


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
LOCAL = SMALL | {"sliding_window": 8}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
OPT_350M, OPT = OPT | {"word_embed_proj_dim": 16}, OPT | {"word_embed_proj_dim": 32}


def save_llm(folder, model_class, config_class, sizes):
    """Saves a small LLM of a class of transformers, of which every parameter is random, with
    Gemma's tokenizer."""
    tokenizer = make_tokenizer("gemma")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    sizes = {"vocab_size": len(tokenizer), **{n: getattr(tokenizer, n) for n in names}, **sizes}
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("model_class", "config_class", "sizes"),
    [
        ("Gemma2ForCausalLM", "Gemma2Config", LOCAL),  # caps its logits
        ("Gemma3ForCausalLM", "Gemma3TextConfig", LOCAL),
        ("MistralForCausalLM", "MistralConfig", LOCAL),
        ("Qwen3ForCausalLM", "Qwen3Config", SMALL),
        ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
        ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
        ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2}),
        ("OPTForCausalLM", "OPTConfig", OPT),
    ],
)
def test_other_architectures(tmp_path, whisper_files, model_class, config_class, sizes):
    """Right padding needs no mask, also where attention is local, positions are learned, logits
    are capped or layers are recurrent. Logits at the targets are those of all logits."""
    llm = save_llm(tmp_path / "llm", model_class, config_class, sizes)
    model, _, batch = assert_loss_by_hand(llm, whisper_files[80])
    positions = batch["target_positions"]
    with torch.no_grad():
        embeds = model.embed(batch["input_ids"], batch["waveforms"], batch["n_samples"])
        full = model.llm(inputs_embeds=embeds).logits
        kept = model.llm(inputs_embeds=embeds, logits_to_keep=positions).logits
    torch.testing.assert_close(kept, full.take_along_dim(positions[..., None], dim=1))


@pytest.mark.parametrize("num_items_in_batch", [None, torch.tensor(0), torch.tensor(7)])
def test_batch_without_targets(llm, whisper_file, num_items_in_batch):
    """A batch without a readable utterance has a loss of 0, and gradients of 0: never a NaN."""
    model, prompts = load(llm, whisper_file)
    batch = prompts.training_batch([noise(1), noise(1)], [[], []])
    outputs = model.train()(**batch, num_items_in_batch=num_items_in_batch)
    assert outputs["loss"].item() == 0
    assert outputs["token_sums"].tolist() == [[0, 0, 0]] * 2
    outputs["loss"].backward()
    assert not any(parameter.grad.any() for parameter in model.projector.parameters())


def test_unreadable_neighbour(tmp_path, llm, whisper_file):
    """An utterance that cannot be read changes neither the loss nor the gradients of the others."""
    model, prompts = load(llm, whisper_file, dtype=torch.float64)
    model.projector.double()
    dataset = SpeechDataset(make_jsonl(tmp_path, [0.7, 0.5, 1.3]), require_text=True)
    (tmp_path / "data-1.wav").unlink()
    items = [dataset[i] for i in range(3)]
    batch, readable = prompts.collate(items), prompts.collate([items[0], items[2]])
    torch.testing.assert_close(model(**batch)["loss"], model(**readable)["loss"])
    assert_close_gradients(gradients(model, batch), gradients(model, readable))


def test_training_leaves_the_frozen_parts_alone(llm, whisper_file):
    """Optimizer steps over all parameters change the projector, and no bit of LLM or encoder."""
    model, prompts = load(llm, whisper_file)
    batch, _ = training_batch(prompts)
    parts = [model.llm, model.encoder.encoder, model.projector]
    before = copy.deepcopy([part.state_dict() for part in parts])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        gradients(model, batch)
        optimizer.step()
    for part, frozen in zip(parts[:2], before[:2], strict=True):
        assert_same_bits(part.state_dict(), frozen)
    for name, value in model.projector.state_dict().items():
        assert not torch.equal(value, before[2][name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("Llama", SMALL | {"attention_dropout": 0.5}), ("OPT", OPT | {"dropout": 0.5})],
)
def test_no_dropout(tmp_path, whisper_file, name, sizes, checkpointing):
    """The frozen LLM's dropout never runs, whether in modules of its own or, as OPT's, in a layer
    that is checkpointed."""
    llm = save_llm(tmp_path / "llm", f"{name}ForCausalLM", f"{name}Config", sizes)
    model, prompts = load(llm, whisper_file)
    batch, _ = training_batch(prompts)
    if checkpointing:
        model.activation_checkpointing_enable()
    loss = model.train()(**batch)["loss"]
    assert_same_bits(gradients(model, batch), gradients(model, batch))
    assert torch.equal(model.eval()(**batch)["loss"], loss)


def test_gradient_checkpointing(llm, whisper_file):
    """Checkpointing runs each layer's forward again in the backward pass, also if it is enabled
    after train(); the gradients stay as they are, and so does decoding in eval mode.

    transformers drops the KV cache of layers that checkpoint and are in training mode: from the
    second token on, generate would see nothing but the last one."""
    model, prompts = load(llm, whisper_file)
    batch, _ = training_batch(prompts)
    recognition = prompts.recognition_batch([noise(16000), noise(3000)])
    tokens = model.generate(**recognition, max_new_tokens=12)
    runs = []
    for layer in model.llm.model.layers:  # the hooks of a layer itself are outside its checkpoint
        layer.self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    plain, n_runs = gradients(model.train(), batch), len(runs)
    model.activation_checkpointing_enable()
    assert_same_bits(gradients(model.train(), batch), plain)
    assert (n_runs, len(runs)) == (2, 2 + 4)
    assert torch.equal(model.eval().generate(**recognition, max_new_tokens=12), tokens)


def test_train_walks_nothing_when_nothing_changes(llm, whisper_file, monkeypatch):
    """Trainer calls train() at every step. Only a change of mode reaches the modules."""
    model, _ = load(llm, whisper_file)
    calls, train = [], torch.nn.Module.train

    def counted(module, mode=True):
        calls.append(module)
        return train(module, mode)

    monkeypatch.setattr(torch.nn.Module, "train", counted)
    for change, mode in [(False, False), (True, True), (False, True), (True, False)]:
        calls.clear()
        assert model.train(mode) is model
        assert bool(calls) == change
        assert {module.training for module in model.modules()} == {mode}


def test_recomputing_layers(tmp_path, llm, whisper_file, monkeypatch):
    """With --gradient_checkpointing compiled layers keep less for the backward pass."""
    monkeypatch.setattr(torch._functorch.config, "activation_memory_budget", 1.0)  # to restore it
    bytes_kept = []
    for recompute in (False, True):
        flags = {"compile": True, "gradient_checkpointing": recompute, "use_cpu": True}
        args = TrainingArguments(data_path="none", output_dir=str(tmp_path), **flags)
        model, prompts = load(llm, whisper_file)
        torch._dynamo.reset()
        prepare_llm(model.train().llm, args)
        sizes = {}  # of all that is kept but weights, by address

        def pack(tensor, sizes=sizes):
            is_weight = isinstance(tensor, torch.nn.Parameter)
            sizes[tensor.data_ptr()] = 0 if is_weight else tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradients(model, training_batch(prompts)[0])
        bytes_kept.append(sum(sizes.values()))
    assert bytes_kept[1] < bytes_kept[0]
    torch._dynamo.reset()


# What is saved and loaded


def test_state_dict_is_the_projector(llm, whisper_file):
    """A checkpoint of the model holds the projector's six tensors; no other set of them loads."""
    model, _ = load(llm, whisper_file)
    state = model.state_dict()
    layers = ("conv1d", "linear1", "linear2")
    names = [f"projector.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert list(state) == names
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: state[name] for name in names[1:]}, strict=False)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state | {"llm.lm_head.weight": torch.zeros(1)}, strict=False)


def test_saved_settings_win(tmp_path, llm, whisper_file, capsys):
    """A projector brings its weights and settings with it, in float32 and bfloat16; other
    ProjectorArguments, as in a resumed training, change nothing and print nothing."""
    flags = {"projector_stride": 4, "projector_hidden_dim": 64, "prompt": "one two"}
    flags |= {"encoder_window": "audio"}
    path = save(load(llm, whisper_file, **flags)[0], tmp_path / "p.safetensors")
    others = {"projector_stride": 8, "projector_hidden_dim": 32, "prompt": "three"}
    others |= {"encoder_window": "full"}
    capsys.readouterr()
    for dtype in (torch.float32, torch.bfloat16):
        model, prompts = load(llm, whisper_file, path, dtype, **others)
        assert_same_bits(model.state_dict(), load_file(path))
        assert model.settings.items() >= flags.items()
        assert model.encoder.window == "audio" and not model.training
        assert prompts.prompt_ids(16000).count(SPEECH) == 13
        assert prompts.tokenize("one two")[0] in prompts.suffix_ids
    captured = capsys.readouterr()
    assert captured.out == "" and "projector" not in captured.err


def settings_in(path):
    return json.loads(safe_open(path, "pt").metadata()["west"])


def test_checkpoint_names_the_models_of_its_own_run(tmp_path, llm, whisper_file):
    """A projector records the LLM and the Whisper that it was last trained with, not those that
    the projector names from which its training started."""
    first = save(load(llm, whisper_file)[0], tmp_path / "first.safetensors")
    other_llm = make_llm(tmp_path / "llm")
    other_whisper = make_whisper(tmp_path / "whisper.pt")
    model, _ = load(other_llm, other_whisper, first)
    second = settings_in(save(model, tmp_path / "second.safetensors"))
    names = "llm_model_name_or_path", "whisper_model_name_or_path"
    assert [settings_in(first)[name] for name in names] == [llm, whisper_file]
    assert second == settings_in(first) | dict(zip(names, (other_llm, other_whisper), strict=True))


def test_saved_file_follows_the_umask(tmp_path, llm, whisper_file):
    """Others may read model.safetensors if the umask of its owner lets them."""
    model, _ = load(llm, whisper_file)
    before = os.umask(0)
    for umask in (0o022, 0o002, 0o077):
        os.umask(umask)
        save_projector(model, tmp_path / f"{umask}.safetensors")
    os.umask(before)
    modes = [(tmp_path / f"{umask}.safetensors").stat().st_mode for umask in (0o022, 0o002, 0o077)]
    assert [mode & 0o777 for mode in modes] == [0o644, 0o664, 0o600]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_projector_that_is_not_finite(tmp_path, llm, whisper_file, value):
    """A projector whose training has diverged is refused in one line: it would decode nonsense."""
    model, _ = load(llm, whisper_file)
    model.projector.linear1.bias.data[3] = value
    path = save(model, tmp_path / "p.safetensors")
    assert_refused(f"^{path}: .*diverged", llm, whisper_file, path)


def test_projector_of_other_sizes(tmp_path, llm, whisper_file):
    """A projector for an LLM or a Whisper of another hidden size is refused in one line, as is any
    other file."""
    path = save(load(llm, whisper_file)[0], tmp_path / "p.safetensors")
    other_llm = make_llm(tmp_path / "llm", hidden_size=32)
    other_whisper = make_whisper(tmp_path / "whisper.pt", n_audio_state=24)
    save_file(load_file(path), tmp_path / "bare.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    wrong = [(other_llm, whisper_file, path), (llm, other_whisper, path)]
    for name in ("bare.safetensors", "text.safetensors", "absent.safetensors"):
        wrong.append((llm, whisper_file, str(tmp_path / name)))
    for parts in wrong:
        assert_refused(f"^{parts[-1]}: expected a ", *parts)


def test_saved_chat_outlives_the_template(tmp_path, whisper_file):
    """Recognition sees the prompt of training, though the template now renders something else, as
    one with today's date does, and even where it cannot be rendered any more."""
    llm = make_llm(tmp_path / "llm")
    model, prompts = load(llm, whisper_file, prompt="one two")
    expected = prompts.prompt_ids(16000)
    path = save(model, tmp_path / "p.safetensors")
    for template in (f"Today: {{{{ strftime_now('%d %B %Y') }}}}{CHATML}", ""):
        Path(llm, "chat_template.jinja").write_text(template)
        again, prompts = load(llm, whisper_file, path)
        assert (prompts.prompt_ids(16000), prompts.end_of_turn_id) == (expected, 2)
        assert list(again.settings["chat"]) == list(model.settings["chat"])
    assert_refused("--llm_model_name_or_path .*chat template", llm, whisper_file)


def test_bundled_checkpoint(monkeypatch):
    """The projector that the repository ships loads, and carries what a new one carries."""
    monkeypatch.chdir(ROOT)
    models = [str(TINY.relative_to(ROOT) / name) for name in ("llm", "whisper.pt")]
    path = str(TINY / "projector.safetensors")
    model, _ = load(*models, path)
    assert_same_bits(model.state_dict(), load_file(path))
    assert settings_in(path) == json.loads(json.dumps(load(*models)[0].settings))


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
GEMMA_3 = {"text_config": SMALL | {"vocab_size": 300}, "vision_config": VISION}
PER_LAYER = LOCAL | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300}
GEMMA_3N = PER_LAYER | {"laurel_rank": 4, "num_kv_shared_layers": 0}
GEMMA_3N |= {"activation_sparsity_pattern": [0.0, 0.0], "layer_types": ["full_attention"] * 2}
FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
FALCON_H1 |= {name: size for name, size in SMALL.items() if name != "head_dim"}
NO_GENERATE, PER_LAYER_IDS = "{} cannot generate from", "each layer of {} needs the"


@pytest.mark.parametrize(
    ("model_class", "config_class", "sizes", "reason"),
    [
        ("Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA_3, NO_GENERATE),
        ("FalconH1ForCausalLM", "FalconH1Config", FALCON_H1, NO_GENERATE),
        ("Gemma3nForCausalLM", "Gemma3nTextConfig", GEMMA_3N, PER_LAYER_IDS),
        ("Gemma4ForCausalLM", "Gemma4TextConfig", PER_LAYER, PER_LAYER_IDS),  # as E2B and E4B
        ("OPTForCausalLM", "OPTConfig", OPT_350M, "embeddings of {} are not of"),
    ],
)
def test_unfit_llm(tmp_path, whisper_file, model_class, config_class, sizes, reason):
    """An LLM that would fail on speech embeddings, or silently be wrong, is refused in one line."""
    folder = save_llm(tmp_path / "llm", model_class, config_class, sizes)
    llm, ids = transformers.AutoModelForCausalLM.from_pretrained(folder), torch.arange(9)[None]
    if model_class == "Gemma3nForCausalLM":  # or there would be nothing to refuse
        embeds = llm.get_input_embeddings()(ids)
        assert (llm(inputs_embeds=embeds).logits - llm(ids).logits).abs().max() > 0.1
    else:
        with pytest.raises((ValueError, RuntimeError)):
            llm.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2)
    assert_refused(
        f"^--llm_model_name_or_path {folder}: .*{reason.format(model_class)}", folder, whisper_file
    )


TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}"
ANSWER_ENDS = TURNS.replace("{% endfor", "{{ '<new>' if m.role == 'assistant' }}{% endfor")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("model.safetensors", None, ""),
        ("model.safetensors", "\0" * 100, ""),
        ("config.json", None, ""),
        ("chat_template.jinja", None, "chat_template"),
        ("chat_template.jinja", "{% if %}", ""),
        ("chat_template.jinja", "{{ raise_exception('only for images') }}", "only for images"),
        ("chat_template.jinja", "{{ messages[-1].role }}", "drops the user's turn"),
        ("chat_template.jinja", TURNS, "no token ends an answer"),
        ("chat_template.jinja", f"<new>{CHATML}", "no embedding for its token '<new>'"),
        ("chat_template.jinja", ANSWER_ENDS, "no embedding for its token '<new>'"),
    ],
)
def test_wrong_llm(tmp_path, whisper_file, file, content, reason):
    """What is no LLM with a chat template, or lacks an embedding for a token of its template, is
    refused in one line."""
    llm, tokenizer = make_llm(tmp_path / "llm"), make_tokenizer("qwen2")
    tokenizer.add_tokens(["<new>"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(llm)
    Path(llm, file).unlink() if content is None else Path(llm, file).write_text(content)
    expected = f"^--llm_model_name_or_path {llm}: expected an LLM with chat template .*{reason}"
    assert_refused(expected, llm, whisper_file)


def test_wrong_whisper(tmp_path, llm, whisper_file):
    """What is no Whisper is named, in one line, with its flag."""
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "torn.pt").write_bytes(Path(whisper_file).read_bytes()[:5000])
    for name in ("text.pt", "other.pt", "torn.pt", "absent.pt", "."):
        expected = f"^--whisper_model_name_or_path {tmp_path / name}: expected a Whisper "
        assert_refused(expected, llm, str(tmp_path / name))


def test_seed(llm, whisper_file):
    """A new projector depends on the seed alone, not on what was drawn before."""
    args, projectors = ModelArguments(llm, whisper_file), []
    for seed in (0, 0, 1):
        torch.rand(len(projectors) + 1)
        projectors.append(load_speech_llm(args, "cpu", torch.float32, seed)[0].state_dict())
    assert_same_bits(projectors[0], projectors[1])
    assert not torch.equal(*(p["projector.linear1.weight"] for p in projectors[1:]))


def test_loaded_model_is_ready(llm, whisper_file):
    """load_speech_llm needs names only: on a CPU the model is float32, and it is in eval mode."""
    model, prompts = load_speech_llm(ModelArguments(llm, whisper_file))
    expected = {"cpu": torch.float32, "cuda": torch.bfloat16}
    assert model.llm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert model.llm.dtype == expected[model.llm.device.type]
    assert model.encoder.dtype == model.llm.dtype and not model.training
    assert next(model.projector.parameters()).dtype == torch.float32  # it trains so
    assert model.encoder.window == model.settings["encoder_window"] == "full"
    batch = prompts.recognition_batch([noise(16000), noise(100)])
    assert (batch["input_ids"] == PAD).sum() == 9  # 10 and 1 speech embeddings
    assert model.generate(**batch, max_new_tokens=3).shape == (2, 3)


DOWNLOAD = """
import sys
import whisper
from accelerate import PartialState
from model import ModelArguments, load_speech_llm

url, llm = sys.argv[1:]
whisper._MODELS["remote"], whisper._ALIGNMENT_HEADS["remote"] = url, None
PartialState(cpu=True)
model, _ = load_speech_llm(ModelArguments(llm, "remote"))
print(f"loaded {model.encoder.output_dim}\\n", end="", flush=True)
"""


def test_one_process_downloads(tmp_path, llm, whisper_file):
    """Of the processes of a node one downloads a Whisper, and the others find it: openai-whisper's
    download has no lock, and two of them would write into one file."""
    content, downloads = Path(whisper_file).read_bytes(), []
    remote = tmp_path / hashlib.sha256(content).hexdigest() / "remote.pt"
    remote.parent.mkdir()
    remote.write_bytes(content)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            downloads.append(self.path)

    handler = partial(Handler, directory=tmp_path)
    with ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://localhost:{server.server_port}/{remote.relative_to(tmp_path)}"
        (tmp_path / "script.py").write_text(DOWNLOAD)
        env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        process = run(*torchrun(2), tmp_path / "script.py", url, llm, env=env)
        server.shutdown()
    assert process.stdout.count("loaded 32") == 2
    assert len(downloads) == 1
