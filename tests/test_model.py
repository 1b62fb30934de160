"""The model: Whisper's encoder, the Projector and the LLM, each alone and the three together."""

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
import whisper
from conftest import (
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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dataset import PAD, SPEECH, InputError, Utterances
from model import ModelArguments, Projector, SpeechEncoder, compile_layers, load_speech_llm

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def default_dtype():
    """No test inherits a default dtype that another has left behind."""
    yield
    torch.set_default_dtype(torch.float32)


def load(llm, whisper_file, dtype=torch.float32, **flags):
    return load_speech_llm(ModelArguments(llm, whisper_file, **flags), "cpu", dtype)


def load_in_float64(llm, whisper_file, **flags):
    """For gradients of one thing computed in two ways: in float32 an activation next to 0 may be
    on the other side of ReLU's kink, and its whole gradient with it."""
    model, rows = load(llm, whisper_file, torch.float64, **flags)
    model.projector.double()
    return model, rows


def make_batch(rows, folder, seconds, texts=None):
    """(training batch, its [(waveform, target ids)]) of utterances of noise."""
    utterances = Utterances(make_jsonl(folder, seconds, texts), training=True)
    items = [utterances[i] for i in range(len(utterances))]
    items.sort(key=lambda item: len(item["waveform"]))  # as collate does
    pairs = [
        (torch.from_numpy(item["waveform"]), [*rows.tokenize(item["txt"]), rows.end_id])
        for item in items
    ]
    batch = rows.collate(items)
    assert batch.pop("errors") == []
    return batch, pairs


def noise(n_samples, seed=0, loudness=3000):
    """int16 audio (n_samples,), drawn from a seed."""
    samples = torch.randn(n_samples, generator=torch.Generator().manual_seed(seed))
    return (samples * loudness).clamp(-32768, 32767).short()


def encode(encoder, waveforms):
    """The encoder's states of a list of int16 waveforms."""
    return encoder(torch.cat(waveforms), [len(waveform) for waveform in waveforms])


def gradients(model, batch):
    model.zero_grad()
    model(**batch)["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


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


@pytest.mark.parametrize("stride", [1, 4, 5, 7])
def test_projector_shape(stride):
    """(B, n, encoder_dim) becomes (B, n // stride, llm_dim)."""
    projector = Projector(encoder_dim=8, llm_dim=24, hidden_dim=16, stride=stride)
    assert projector(torch.randn(2, 30, 8)).shape == (2, 30 // stride, 24)


# The encoder


@pytest.fixture(scope="module")
def whisper_files(tmp_path_factory):
    """{n_mels: a Whisper}, whose window is 5.5 s: not a whole number of the audio window's 2 s."""
    folder = tmp_path_factory.mktemp("whispers")
    return {
        n_mels: make_whisper(folder / f"{n_mels}.pt", n_mels, n_audio_ctx=275, n_audio_state=24)
        for n_mels in (80, 128)
    }


def mel_by_whisper(waveform, n_mels, n_audio_ctx=275):
    samples = whisper.pad_or_trim(waveform.float() / 32768, n_audio_ctx * 320)
    return whisper.log_mel_spectrogram(samples, n_mels)


@pytest.mark.parametrize("n_mels", [80, 128])
@given(
    loudness=st.lists(st.sampled_from([0, 1, 30, 3000, 60000]), min_size=1, max_size=9),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_log_mel_is_whisper_s(whisper_files, n_mels, loudness, seed):
    """The log-mel of a batch is Whisper's own of each utterance, bit for bit: the maximum that one
    is scaled by is its own, however loud its neighbours are."""
    encoder = SpeechEncoder(whisper_files[n_mels], "full", CPU, torch.float32)
    waveforms = torch.stack([noise(275 * 320, seed + k, v) for k, v in enumerate(loudness)])
    log_mel = encoder.log_mel(waveforms.float() / 32768)
    assert log_mel.shape == (len(loudness), n_mels, 550)
    for k, waveform in enumerate(waveforms):
        assert torch.equal(log_mel[k], mel_by_whisper(waveform, n_mels))


class DeviceRecorder(TorchDispatchMode):
    """Lists operations, and the kinds of device that their tensors are on."""

    def __init__(self):
        super().__init__()
        self.operations, self.devices = [], set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append(str(operation))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
        self.devices |= {tensor.device.type for tensor in tensors}
        return result


def test_log_mel_waits_for_nothing(whisper_file):
    """The log-mel takes as many operations for 64 utterances as for one, all on the device.

    Whisper's own copies a Hann window from the host for each utterance, and the host waits for it:
    training ran at a tenth of its speed. The meta device has no values that one could wait for."""
    encoder = SpeechEncoder(whisper_file, "full", torch.device("meta"), torch.bfloat16)
    encoder.log_mel(torch.empty(1, 32000, device="meta"))  # the filters are made once
    operations = []
    for n_utterances in (1, 64):
        with DeviceRecorder() as recorder:
            encoder.log_mel(torch.empty(n_utterances, 32000, device="meta"))
        assert recorder.devices == {"meta"}
        operations.append(recorder.operations)
    assert operations[0] == operations[1]


@pytest.mark.parametrize("n_mels", [80, 128])
def test_full_window_is_whisper_s(whisper_files, n_mels):
    """Mels, window and width are the checkpoint's, and the states are those of Whisper itself,
    whatever the audio's length."""
    encoder = SpeechEncoder(whisper_files[n_mels], "full", CPU, torch.float32)
    waveforms = [noise(n, seed=n) for n in (1, 16000, 30001, 275 * 320)]
    states = encode(encoder, waveforms)
    assert states.shape == (4, 275, 24)
    whole = whisper.load_model(whisper_files[n_mels], device="cpu")
    mels = torch.stack([mel_by_whisper(waveform, n_mels) for waveform in waveforms])
    torch.testing.assert_close(states, whole.embed_audio(mels))


@torch.no_grad()
def states_by_whisper(whole, waveform, n_states):
    """The states of one utterance whose first n_states alone enter Whisper's own blocks."""
    encoder = whole.encoder
    x = mel_by_whisper(waveform, whole.dims.n_mels, whole.dims.n_audio_ctx)[None]
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(x)))).permute(0, 2, 1)
    x = (x + encoder.positional_embedding)[:, :n_states]
    for block in encoder.blocks:
        x = block(x)
    return encoder.ln_post(x)[0]


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize(
    ("n_samples", "n_states"),
    [
        (1, 100),
        (16000, 100),
        (32000, 100),  # 2 s exactly
        (32001, 200),
        (64000, 200),
        (64001, 275),  # the window's end
        (88000, 275),
    ],
)
def test_audio_window(whisper_files, n_mels, n_samples, n_states):
    """With --encoder_window audio the blocks see the states of the whole 2 s that hold the audio;
    log-mel and convolutions are those of the full window."""
    encoder = SpeechEncoder(whisper_files[n_mels], "audio", CPU, torch.float32)
    whole, waveform = whisper.load_model(whisper_files[n_mels], device="cpu"), noise(n_samples)
    states = encode(encoder, [waveform])
    assert states.shape == (1, n_states, 24)
    torch.testing.assert_close(states[0], states_by_whisper(whole, waveform, n_states))


@pytest.mark.parametrize("window", ["full", "audio"])
@given(
    utterances=st.lists(
        st.tuples(st.integers(1, 88000), st.sampled_from([1, 30, 3000])), min_size=2, max_size=6
    )
)
@settings(max_examples=30)
def test_states_do_not_depend_on_the_batch(whisper_files, window, utterances):
    """Neighbours of any number, length and loudness, in any order, leave an utterance's states as
    they are; behind them stands 0."""
    encoder = SpeechEncoder(whisper_files[80], window, CPU, torch.float32)
    waveforms = [noise(n, k, loudness) for k, (n, loudness) in enumerate(utterances)]
    together = encode(encoder, waveforms)
    for row, waveform in zip(together, waveforms, strict=True):
        [alone] = encode(encoder, [waveform])
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-5, atol=1e-5)
        assert not row[len(alone) :].any()


@pytest.mark.parametrize("window", ["full", "audio"])
def test_many_utterances_at_once(whisper_files, window):
    """More than the 64 utterances that are encoded at a time come out in their order."""
    encoder = SpeechEncoder(whisper_files[80], window, CPU, torch.float32)
    waveforms = [noise(16000 + 500 * k, k) for k in range(70)]
    together = encode(encoder, waveforms)
    for k in (0, 31, 32, 63, 64, 69):
        [alone] = encode(encoder, waveforms[k : k + 1])
        torch.testing.assert_close(together[k, : len(alone)], alone, rtol=1e-5, atol=1e-5)


def test_full_window_is_the_default(llm, whisper_file):
    """Without a flag the encoder sees the whole window, as Whisper's own does."""
    model, _ = load(llm, whisper_file)
    assert model.settings["encoder_window"] == "full"
    assert encode(model.encoder, [noise(100)]).shape == (1, 100, 32)


@pytest.mark.parametrize("window", ["full", "audio"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_ignores_autocast(whisper_file, window, dtype):
    """Autocast, with which Trainer surrounds the model, changes no bit of the encoder's states."""
    encoder = SpeechEncoder(whisper_file, window, CPU, dtype)
    alone = encode(encoder, [noise(16000), noise(20000)])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(encoder, [noise(16000), noise(20000)]), alone)
    assert alone.dtype == dtype and not alone.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_precision_is_the_same_weights(whisper_file, dtype):
    """A Whisper that is built in half precision holds its own weights, rounded once, and leaves
    the default dtype as it was."""
    half, whole = (
        SpeechEncoder(whisper_file, "full", CPU, precision).encoder.state_dict()
        for precision in (dtype, torch.float32)
    )
    assert torch.get_default_dtype() == torch.float32
    assert_same_bits(half, {name: value.to(dtype) for name, value in whole.items()})


def test_default_dtype_outlives_a_wrong_whisper(tmp_path):
    """A Whisper that cannot be loaded leaves the default dtype as it was, for whoever goes on."""
    with pytest.raises(InputError, match=r"--whisper_model_name_or_path .*absent"):
        SpeechEncoder(str(tmp_path / "absent.pt"), "full", CPU, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


MEASURE_PEAK = """
import gc, re, sys
import torch
from model import SpeechEncoder

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1])

start = peak()
for dtype in (torch.bfloat16, torch.float32):
    SpeechEncoder(sys.argv[1], "full", torch.device("cpu"), dtype)
    gc.collect()
    print(peak() - start)
"""


def test_peak_memory_of_loading(tmp_path):
    """In bfloat16 no process ever holds Whisper, with its decoder, in float32.

    Large took 9 GB of each process's memory. What the file holds comes on top in both."""
    path = make_whisper(tmp_path / "whisper.pt", n_audio_state=1024)
    checkpoint = torch.load(path)
    weights = checkpoint["model_state_dict"]
    checkpoint["model_state_dict"] = {name: w.half() for name, w in weights.items()}  # as OpenAI's
    torch.save(checkpoint, path)
    printed = run(sys.executable, "-c", MEASURE_PEAK, path).stdout.split()
    bfloat16, float32 = (int(kilobytes) / 1024 for kilobytes in printed[-2:])
    size = sum(w.numel() for w in weights.values()) * 4 / 2**20
    print(
        f"peak of loading {size:.0f} MiB: {float32:.0f} MiB in float32, {bfloat16:.0f} in bfloat16"
    )
    assert bfloat16 < float32 - size / 4  # of the size / 2 that is expected


# The whole


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, whisper_file, family):
    """An LLM of any family trains, the projector alone, and stops where its turns end."""
    model, rows = load(make_llm(tmp_path / "llm", family), whisper_file)
    batch, _ = make_batch(rows, tmp_path, [0.7, 1.3, 0.2])
    loss = model.train()(**batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"projector.{name}" for name, _ in model.projector.named_parameters()}
    assert all(parameter.grad.any() for parameter in model.projector.parameters())
    end_id = rows.tokenizer.convert_tokens_to_ids(FAMILIES[family][-1])
    assert end_id in model.llm.generation_config.eos_token_id
    assert rows.tokenizer.eos_token_id in model.llm.generation_config.eos_token_id


def outputs_by_hand(model, rows, pairs):
    """token_sums of rows of (waveform, target) that are fed one by one, without any padding, to the
    LLM's full logits."""
    embed, sums = model.llm.get_input_embeddings(), []
    for waveform, target in pairs:
        states = encode(model.encoder, [waveform])
        speech = model.projector(states)[0, : -(-len(waveform) // 1600)]  # one for 0.1 s
        pieces = [embed(torch.tensor(rows.prefix_ids)), speech]
        pieces += [embed(torch.tensor(rows.suffix_ids)), embed(torch.tensor(target))]
        logits = model.llm(inputs_embeds=torch.cat(pieces)[None]).logits[0]
        log_probs = logits[-len(target) - 1 : -1].log_softmax(-1)
        losses = [-log_probs[k, token] for k, token in enumerate(target)]
        n_right = sum(log_probs[k].argmax() == token for k, token in enumerate(target))
        sums.append(torch.stack([sum(losses), torch.tensor(len(target)), n_right]))
    return torch.stack(sums)


SECONDS = [2.7, 1.3, 0.2, 5.4]
TEXTS = ["one", "two three", "three one two", "two"]


def assert_loss_by_hand(model, rows, folder):
    """The loss and the gradients of a padded batch are those of its rows one by one."""
    batch, pairs = make_batch(rows, folder, SECONDS, TEXTS)
    model.train().zero_grad()
    expected = outputs_by_hand(model, rows, pairs)
    expected_loss = expected[:, 0].sum() / expected[:, 1].sum()
    expected_loss.backward()
    expected_gradients = {name: p.grad for name, p in model.projector.named_parameters()}
    model.zero_grad(set_to_none=True)
    outputs = model(**batch)
    token_sums, loss = expected.detach().float(), expected_loss.float()
    torch.testing.assert_close(outputs["token_sums"], token_sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["loss"], loss)
    outputs["loss"].backward()
    for name, parameter in model.projector.named_parameters():
        error = (parameter.grad - expected_gradients[name]).norm()
        assert error <= 1e-5 * expected_gradients[name].norm(), name
    halved = model(**batch, num_items_in_batch=2 * token_sums[:, 1].sum())["loss"]
    torch.testing.assert_close(halved, outputs["loss"] / 2)
    evaluated = model.eval()(**batch)
    assert torch.equal(evaluated["token_sums"], outputs["token_sums"])
    assert torch.equal(evaluated["loss"], outputs["loss"])


@pytest.mark.parametrize("window", ["full", "audio"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_the_targets(tmp_path, whisper_files, family, window):
    """The loss of a padded batch is the mean, over the transcripts' tokens and the turns' ends, of
    the cross-entropies that each unpadded row's full logits give; the gradients are theirs too."""
    llm = make_llm(tmp_path / "llm", family)
    model, rows = load_in_float64(llm, whisper_files[80], encoder_window=window)
    assert_loss_by_hand(model, rows, tmp_path)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def save_llm(folder, model_class, config_class, **sizes):
    """Saves a small random LLM of a class of transformers with Gemma's tokenizer."""
    tokenizer = make_tokenizer("gemma")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(vocab_size=len(tokenizer), **ids, **sizes)
    getattr(transformers, model_class)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("model_class", "config_class", "sizes"),
    [
        ("Gemma2ForCausalLM", "Gemma2Config", SMALL | {"sliding_window": 8}),  # caps its logits
        ("Gemma3ForCausalLM", "Gemma3TextConfig", SMALL | {"sliding_window": 8}),
        ("MistralForCausalLM", "MistralConfig", SMALL | {"sliding_window": 8}),
        ("Qwen3ForCausalLM", "Qwen3Config", SMALL),
        ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    ],
)
def test_other_architectures(tmp_path, whisper_files, model_class, config_class, sizes):
    """Padding on the right needs no mask, also where attention is local, positions are learned or
    logits are capped."""
    llm = save_llm(tmp_path / "llm", model_class, config_class, initializer_range=0.2, **sizes)
    model, rows = load_in_float64(llm, whisper_files[80])
    assert_loss_by_hand(model, rows, tmp_path)


def test_embeddings(tmp_path, llm, whisper_file):
    """Speech embeddings stand in order at the SPEECH places, and tokens' at theirs."""
    model, rows = load(llm, whisper_file)
    batch, pairs = make_batch(rows, tmp_path, [0.25, 0.5], ["one", "one"])
    embeds = model.embed(batch["input_ids"], batch["waveforms"], batch["n_samples"])
    tokens, target = model.llm.get_input_embeddings().weight, pairs[0][1]
    for row, (waveform, _), n_speech in zip(embeds, pairs, (3, 5), strict=True):
        speech = model.projector(encode(model.encoder, [waveform]))[0]
        behind = 3 + n_speech + 12  # <|im_start|> user \n | speech | the suffix's 12 tokens
        assert torch.equal(row[:3], tokens[rows.prefix_ids])
        torch.testing.assert_close(row[3 : 3 + n_speech], speech[:n_speech], rtol=1e-5, atol=1e-6)
        assert torch.equal(row[3 + n_speech : behind], tokens[rows.suffix_ids])
        assert torch.equal(row[behind : behind + len(target)], tokens[target])


@pytest.mark.parametrize("all_speech", [False, True])
@pytest.mark.parametrize("stride", [5, 7])
def test_all_speech_embeddings(tmp_path, llm, whisper_file, all_speech, stride):
    """--all_speech_embeddings feeds the LLM the window's n_audio_ctx // stride embeddings."""
    flags = {"all_speech_embeddings": all_speech, "projector_stride": stride}
    model, rows = load(llm, whisper_file, **flags)
    batch, _ = make_batch(rows, tmp_path, [0.7])
    expected = 100 // stride if all_speech else -(-11200 // (320 * stride))
    assert (batch["input_ids"] == SPEECH).sum() == expected
    assert model(**batch)["loss"].isfinite()


@pytest.mark.parametrize("window", ["full", "audio"])
def test_all_speech_embeddings_of_short_audio(tmp_path, llm, whisper_files, window):
    """With --all_speech_embeddings an utterance that is shorter than the window trains, alone and
    beside a longer one, with the same loss."""
    flags = {"all_speech_embeddings": True, "encoder_window": window}
    model, rows = load(llm, whisper_files[80], **flags)
    batch, pairs = make_batch(rows, tmp_path, [0.7, 4.5])
    assert (batch["input_ids"] == SPEECH).sum(1).tolist() == [55, 55]
    together = model(**batch)["token_sums"]
    for row, (waveform, target) in zip(together, pairs, strict=True):
        alone = model(**rows.batch([waveform.numpy()], [target]))["token_sums"]
        torch.testing.assert_close(row[None], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_pad_token_that_is_the_stop_token(tmp_path, whisper_file, family):
    """Where the LLM pads with its stop token, the stop token is a target all the same."""
    folder = make_llm(tmp_path / "llm", family)
    tokenizer = make_tokenizer(family)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    model, rows = load(folder, whisper_file)
    assert rows.tokenizer.pad_token_id == rows.tokenizer.eos_token_id == rows.end_id
    batch, pairs = make_batch(rows, tmp_path, [0.5, 0.5], ["one", "two three"])
    n_tokens = [len(target) for _, target in pairs]
    last_labels = [batch["labels"][k, n - 1].item() for k, n in enumerate(n_tokens)]
    assert last_labels == [rows.end_id] * 2
    assert model(**batch)["token_sums"][:, 1].tolist() == n_tokens
    assert (batch["input_ids"] == PAD).sum(1).tolist() == [max(n_tokens) - n for n in n_tokens]


@pytest.mark.parametrize("num_items_in_batch", [None, torch.tensor(0), torch.tensor(7)])
def test_batch_without_targets(tmp_path, llm, whisper_file, num_items_in_batch):
    """A batch of which nothing could be read has a loss of 0, and gradients of 0: never a NaN."""
    model, rows = load(llm, whisper_file)
    line = json.dumps({"wav": "gone.wav", "txt": "one", "duration": 1})
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}\n")
    utterances = Utterances(str(tmp_path / "a.jsonl"), training=True)
    batch = rows.collate([utterances[0], utterances[1]])
    assert len(batch.pop("errors")) == 2
    outputs = model.train()(**batch, num_items_in_batch=num_items_in_batch)
    assert outputs["loss"].item() == 0
    assert outputs["token_sums"].tolist() == [[0, 0, 0]] * 2
    outputs["loss"].backward()
    for parameter in model.projector.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_unreadable_neighbour(tmp_path, llm, whisper_file):
    """An utterance that cannot be read changes neither the loss nor the gradients of the others."""
    model, rows = load_in_float64(llm, whisper_file)
    utterances = Utterances(make_jsonl(tmp_path, [0.7, 0.5, 1.3]), training=True)
    (tmp_path / "data-1.wav").unlink()
    items = [utterances[i] for i in range(3)]
    batch, readable = rows.collate(items), rows.collate([items[0], items[2]])
    assert len(batch.pop("errors")) == 1 and readable.pop("errors") == []
    torch.testing.assert_close(model(**batch)["loss"], model(**readable)["loss"])
    expected = gradients(model, readable)
    for name, gradient in gradients(model, batch).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_training_leaves_the_frozen_parts_alone(tmp_path, llm, whisper_file):
    """Optimizer steps over all parameters change the projector, and no bit of LLM or encoder."""
    model, rows = load(llm, whisper_file)
    batch, _ = make_batch(rows, tmp_path, [0.7, 1.3])
    parts = {"llm": model.llm, "encoder": model.encoder.encoder, "projector": model.projector}
    before = {
        part: {name: value.clone() for name, value in module.state_dict().items()}
        for part, module in parts.items()
    }
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        gradients(model, batch)
        optimizer.step()
    assert_same_bits(model.llm.state_dict(), before["llm"])
    assert_same_bits(model.encoder.encoder.state_dict(), before["encoder"])
    assert len(optimizer.state) == len(before["projector"]) == 6
    for name, value in model.projector.state_dict().items():
        assert not torch.equal(value, before["projector"][name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_dropout(tmp_path, whisper_file, checkpointing):
    """The frozen LLM's dropout never runs, neither when training nor with checkpointing."""
    model, rows = load(make_llm(tmp_path / "llm", attention_dropout=0.5), whisper_file)
    batch, _ = make_batch(rows, tmp_path, [0.7, 1.3])
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    assert_same_bits(gradients(model, batch), gradients(model, batch))
    model.llm.train()  # what would happen otherwise
    assert not torch.equal(model(**batch)["loss"], model(**batch)["loss"])


def test_gradient_checkpointing(tmp_path, llm, whisper_file):
    """Checkpointing runs each layer's forward again in the backward pass; the gradients stay."""
    model, rows = load(llm, whisper_file)
    batch, _ = make_batch(rows, tmp_path, [0.7, 1.3])
    runs = []
    for layer in model.llm.model.layers:  # the hooks of a layer itself are outside its checkpoint
        layer.self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    plain = gradients(model.train(), batch)
    assert len(runs) == 2
    model.gradient_checkpointing_enable()
    runs.clear()
    checkpointed = gradients(model.train(), batch)
    assert len(runs) == 4
    assert_same_bits(plain, checkpointed)


def test_decoding_after_checkpointing(llm, whisper_file):
    """A model that was trained with gradient checkpointing decodes as one that was not.

    transformers drops the KV cache of layers that checkpoint and are in training mode: from the
    second token on, generate would see nothing but the last one."""
    model, rows = load(llm, whisper_file)
    batch = rows.batch([noise(16000).numpy(), noise(3000).numpy()])
    expected = model.generate(**batch, max_new_tokens=12)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(model.eval().generate(**batch, max_new_tokens=12), expected)


@pytest.fixture
def fresh_compiler(monkeypatch):
    """Undoes what compile_layers sets for the whole process."""
    monkeypatch.setattr(torch._functorch.config, "activation_memory_budget", 1.0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_layers(tmp_path, llm, whisper_file, fresh_compiler):
    """Compiled layers keep losses and gradients, with recomputation too, which keeps less for the
    backward pass."""
    bytes_kept = {}
    for recompute in (False, True):
        model, rows = load(llm, whisper_file)
        batch, _ = make_batch(rows, tmp_path, [0.7, 1.3])
        expected_loss = model.train()(**batch)["loss"]
        expected = gradients(model, batch)
        compile_layers(model.llm, recompute)
        torch._dynamo.reset()  # forget what was compiled to keep more
        sizes = {}  # of what is kept, but for weights, by address

        def pack(tensor, sizes=sizes):
            is_weight = isinstance(tensor, torch.nn.Parameter)
            sizes[tensor.data_ptr()] = 0 if is_weight else tensor.nbytes
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch)["loss"]
        loss.backward()
        bytes_kept[recompute] = sum(sizes.values())
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
        for name, parameter in model.projector.named_parameters():
            gradient = expected[f"projector.{name}"]
            assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm(), name
    print(f"bytes kept for the backward pass: {bytes_kept}")
    assert bytes_kept[True] < bytes_kept[False]


# What is saved and loaded


def test_state_dict_is_the_projector(llm, whisper_file):
    """A checkpoint of the model holds the projector's six tensors; a frozen one is refused."""
    model, _ = load(llm, whisper_file)
    names = [f"projector.{layer}.{kind}" for layer in ("conv1d", "linear1", "linear2")
             for kind in ("weight", "bias")]  # fmt: skip
    state = model.state_dict()
    assert list(state) == names
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: state[name] for name in names[1:]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state | {"llm.lm_head.weight": torch.zeros(1)})


def save_projector(model, path, **settings):
    """Saves a projector as train.py does; settings are those to replace, None to leave out."""
    settings = {k: v for k, v in (model.settings | settings).items() if v is not None}
    save_file(model.state_dict(), path, {"west": json.dumps(settings)})
    return str(path)


def warnings_of(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("Warning")]


def test_projector_path(tmp_path, llm, whisper_file):
    """A projector file brings its weights and settings with it, in fp32 and in bf16."""
    flags = {"prompt": "one two", "projector_stride": 4, "projector_hidden_dim": 64}
    flags |= {"encoder_window": "audio", "all_speech_embeddings": False}
    path = save_projector(load(llm, whisper_file, **flags)[0], tmp_path / "p.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model, rows = load(llm, whisper_file, dtype, projector_model_path=path)
        assert_same_bits(model.state_dict(), load_file(path))
        assert model.settings.items() >= flags.items()
        assert model.encoder.window == "audio" and not model.training
        assert rows.prompt(16000).count(SPEECH) == 13
        assert rows.tokenize("one two")[0] in rows.suffix_ids


@pytest.mark.parametrize(
    ("flag", "trained", "given"),
    [
        ("prompt", "one two", "three"),
        ("prompt", "one two", "three/one two"),  # no path, of which the last part would do
        ("projector_stride", 4, 8),
        ("projector_hidden_dim", 64, 32),
        ("all_speech_embeddings", False, True),
        ("encoder_window", "audio", "full"),
    ],
)
def test_flag_that_differs_from_training(tmp_path, llm, whisper_file, capsys, flag, trained, given):
    """A flag that differs from the trained projector's is one warning; the trained one is used."""
    flags = {"prompt": "one two", "projector_stride": 4, "projector_hidden_dim": 64}
    flags |= {"all_speech_embeddings": False, "encoder_window": "audio"}
    path = save_projector(load(llm, whisper_file, **flags)[0], tmp_path / "p.safetensors")
    capsys.readouterr()
    args = flags | {flag: given, "projector_model_path": path}
    model, rows = load(llm, whisper_file, **args)
    warning = f"Warning: --{flag} was {trained} in training, not {given}; {trained} is used"
    assert warnings_of(capsys) == [warning]
    assert model.settings[flag] == trained
    assert rows.prompt(16000).count(SPEECH) == 13
    load(llm, whisper_file, **flags, projector_model_path=path)
    assert warnings_of(capsys) == []


@pytest.mark.parametrize("slash", ["", "/"])
def test_models_of_another_name(tmp_path, whisper_file, capsys, slash):
    """Another name of LLM or Whisper is one warning; the same name in another folder is none,
    whether or not the shell has added a slash."""
    paths = {}
    for folder in ("trained", "moved"):
        for name in ("a", "b"):
            paths[folder, name] = make_llm(tmp_path / folder / name) + slash
    other_whisper = make_whisper(tmp_path / "other.pt")
    model, _ = load(paths["trained", "a"], whisper_file)
    path = save_projector(model, tmp_path / "p.safetensors")
    capsys.readouterr()
    for llm in (paths["moved", "a"], paths["moved", "a"].rstrip("/")):
        load(llm, whisper_file, projector_model_path=path)
        assert warnings_of(capsys) == []
    load(paths["moved", "b"], whisper_file, projector_model_path=path)
    [warning] = warnings_of(capsys)
    assert warning == (
        f"Warning: --llm_model_name_or_path was {paths['trained', 'a']} in training, "
        f"not {paths['moved', 'b']}; {paths['moved', 'b']} is used"
    )
    load(paths["trained", "a"], other_whisper, projector_model_path=path)
    [warning] = warnings_of(capsys)
    assert warning.startswith("Warning: --whisper_model_name_or_path was ")


def test_projector_of_other_sizes(tmp_path, llm, whisper_file):
    """A projector for an LLM or a Whisper of another width is refused, as is any other file."""
    path = save_projector(load(llm, whisper_file)[0], tmp_path / "p.safetensors")
    other_llm = make_llm(tmp_path / "llm", hidden_size=32)
    other_whisper = make_whisper(tmp_path / "whisper.pt", n_audio_state=24)
    for parts in ((other_llm, whisper_file), (llm, other_whisper)):
        with pytest.raises(InputError, match=rf"^--projector_model_path {path}: .*sizes") as error:
            load(*parts, projector_model_path=path)
        assert "\n" not in str(error.value)
    save_file(load_file(path), tmp_path / "bare.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("bare.safetensors", "text.safetensors", "absent.safetensors"):
        with pytest.raises(InputError, match=rf"--projector_model_path .*{name}: expected"):
            load(llm, whisper_file, projector_model_path=str(tmp_path / name))


def edit_template(llm, edit):
    """Writes another chat template to an LLM's folder."""
    file = Path(llm) / "chat_template.jinja"
    file.write_text(edit(file.read_text()))


def test_saved_chat_outlives_the_template(tmp_path, whisper_file):
    """Recognition sees the prompt of training, though the tokenizer's template now says something
    else, and even where it cannot be rendered any more."""
    llm = make_llm(tmp_path / "llm")
    model, rows = load(llm, whisper_file, prompt="one two")
    expected = rows.prompt(16000)
    path = save_projector(model, tmp_path / "p.safetensors")
    for edit in (lambda text: "Knowledge cutoff: never\n" + text, lambda text: ""):
        edit_template(llm, edit)
        again, rows = load(llm, whisper_file, prompt="one two", projector_model_path=path)
        assert (rows.prompt(16000), rows.end_id) == (expected, 2)
        assert list(again.settings["chat"]) == list(model.settings["chat"])
    with pytest.raises(InputError, match=r"--llm_model_name_or_path .*chat template"):
        load(llm, whisper_file, prompt="one two")


def test_prompt_does_not_change_with_the_calendar(tmp_path, whisper_file, monkeypatch):
    """A template that holds today's date is rendered once, at the start of training."""
    llm = make_llm(tmp_path / "llm")
    edit_template(llm, lambda text: "Today: {{ strftime_now('%d %B %Y') }}\n" + text)
    model, rows = load(llm, whisper_file)
    expected = rows.prompt(16000)
    path = save_projector(model, tmp_path / "p.safetensors")

    class Later(transformers.utils.chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 12, 24, tzinfo=tz)

    monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Later)
    _, rows = load(llm, whisper_file, projector_model_path=path)
    assert rows.prompt(16000) == expected
    _, rows = load(llm, whisper_file)  # a new projector is of its own day
    assert rows.tokenizer.decode(rows.prefix_ids).startswith("Today: 24 December 2031\n")
    assert rows.prompt(16000) != expected


def test_old_checkpoint(tmp_path, llm, whisper_file, capsys):
    """A checkpoint of before there were "chat" and "encoder_window" loads, without a warning, and
    means the full window and the template's chat."""
    model, rows = load(llm, whisper_file, prompt="one two")
    old = {"chat": None, "encoder_window": None, "fingerprint": "e8424a442ac6eb3c"}
    path = save_projector(model, tmp_path / "p.safetensors", **old)
    assert "chat" not in json.loads(safe_open(path, "pt").metadata()["west"])
    capsys.readouterr()
    again, rows_again = load(llm, whisper_file, prompt="one two", projector_model_path=path)
    assert warnings_of(capsys) == []
    assert again.encoder.window == "full"
    assert rows_again.prompt(16000) == rows.prompt(16000)
    assert_same_bits(again.state_dict(), model.state_dict())


def test_bundled_checkpoint_loads(capsys, monkeypatch):
    """The projector that the repository ships loads with the models it was trained with."""
    monkeypatch.chdir(ROOT)
    paths = (str(TINY.relative_to(ROOT) / name) for name in ("llm", "whisper.pt"))
    model, _ = load(*paths, projector_model_path=str(TINY / "projector.safetensors"))
    assert warnings_of(capsys) == []
    assert_same_bits(model.state_dict(), load_file(TINY / "projector.safetensors"))


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def save_gemma3(folder):
    """gemma-3-4b-it in small: AutoModelForCausalLM gives its class that sees."""
    tokenizer = make_tokenizer("gemma")
    config = transformers.Gemma3Config(
        text_config={**SMALL, "vocab_size": len(tokenizer)},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=7,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_falcon_h1(folder):
    sizes = {name: size for name, size in SMALL.items() if name != "head_dim"}
    sizes |= {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    return save_llm(folder, "FalconH1ForCausalLM", "FalconH1Config", **sizes)


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_gemma3, "Gemma3ForConditionalGeneration"),
        (save_falcon_h1, "FalconH1ForCausalLM"),
    ],
)
def test_llm_that_cannot_decode(tmp_path, whisper_file, save, name):
    """An LLM that would train, but whose generate takes no embeddings, is refused in one line."""
    folder = save(tmp_path / "llm")
    llm = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="inputs_embeds"):  # or there is nothing to refuse
        llm.generate(inputs_embeds=torch.zeros(1, 3, 32), max_new_tokens=2)
    with pytest.raises(InputError, match=f"^--llm_model_name_or_path {folder}: ") as error:
        load(folder, whisper_file)
    assert name in str(error.value) and "\n" not in str(error.value)


def spoil_llm(folder, spoil):
    """An LLM's folder in which one thing is not as it should be."""
    llm = Path(make_llm(folder))
    if spoil == "no weights":
        (llm / "model.safetensors").unlink()
    elif spoil == "torn weights":
        (llm / "model.safetensors").write_bytes(bytes(100))
    elif spoil == "no template":
        (llm / "chat_template.jinja").unlink()
    elif spoil == "no config":
        (llm / "config.json").unlink()
    elif spoil == "a template that drops the user's turn":
        edit_template(llm, lambda text: "{{ messages[-1]['role'] }}")
    elif spoil == "a template that raises":
        edit_template(llm, lambda text: "{{ raise_exception('only for images') }}")
    elif spoil == "a template that is none":
        edit_template(llm, lambda text: "{% if %}")
    return str(llm)


@pytest.mark.parametrize(
    "spoil",
    [
        "no weights",
        "torn weights",
        "no template",
        "no config",
        "a template that drops the user's turn",
        "a template that raises",
        "a template that is none",
    ],
)
def test_wrong_llm(tmp_path, whisper_file, spoil):
    """What is no LLM with a chat template is named, in one line, with its flag."""
    folder = spoil_llm(tmp_path / "llm", spoil)
    with pytest.raises(InputError, match=f"^--llm_model_name_or_path {folder}: expec") as error:
        load(folder, whisper_file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["", "<speech>", " padded "])
def test_odd_prompts(tmp_path, whisper_file, family, prompt):
    """Any prompt stands behind the speech, in one user turn; one that holds the mark by which the
    speech is found is refused."""
    llm = make_llm(tmp_path / "llm", family)
    if prompt == "<speech>":
        with pytest.raises(InputError, match="chat template"):
            load(llm, whisper_file, prompt=prompt)
    else:
        _, rows = load(llm, whisper_file, prompt=prompt)
        assert prompt.strip() in rows.tokenizer.decode(rows.suffix_ids)


def test_wrong_whisper(tmp_path, llm, whisper_file):
    """What is no Whisper is named, in one line, with its flag."""
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "torn.pt").write_bytes(Path(whisper_file).read_bytes()[:5000])
    for name in ("text.pt", "other.pt", "torn.pt", "absent.pt", "."):
        expected = f"^--whisper_model_name_or_path {tmp_path / name}: expected a Whisper "
        with pytest.raises(InputError, match=expected) as error:
            load(llm, str(tmp_path / name))
        assert "\n" not in str(error.value)


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (whisper.Whisper, "load_state_dict"),
        (transformers.Qwen2ForCausalLM, "from_pretrained"),
        (Projector, "load_state_dict"),
    ],
)
def test_out_of_memory_is_no_wrong_flag(tmp_path, llm, whisper_file, monkeypatch, owner, name):
    """A GPU without room for a model says so in its own words, wherever in loading that happens."""
    path = save_projector(load(llm, whisper_file)[0], tmp_path / "p.safetensors")
    monkeypatch.setattr(owner, name, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        load(llm, whisper_file, projector_model_path=path)


def test_seed(llm, whisper_file):
    """A new projector depends on the seed alone, not on what was drawn before."""
    args, projectors = ModelArguments(llm, whisper_file), []
    for seed in (0, 0, 1):
        torch.rand(len(projectors) + 1)
        projectors.append(load_speech_llm(args, "cpu", torch.float32, seed)[0].state_dict())
    assert_same_bits(projectors[0], projectors[1])
    assert not torch.equal(*(p["projector.linear1.weight"] for p in projectors[1:]))


def test_loaded_model_is_ready(llm, whisper_file):
    """load_speech_llm needs no more than names: on a CPU it is float32, and in evaluation mode."""
    model, rows = load_speech_llm(ModelArguments(llm, whisper_file))
    expected = {"cpu": torch.float32, "cuda": torch.bfloat16}
    assert model.llm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert model.llm.dtype == expected[model.llm.device.type]
    assert model.encoder.dtype == model.llm.dtype and not model.training
    assert next(model.projector.parameters()).dtype == torch.float32  # it trains so
    batch = rows.batch([noise(16000).numpy()])
    waveforms, n_samples = batch["waveforms"].to(model.llm.device), batch["n_samples"]
    ids = model.generate(
        batch["input_ids"].to(model.llm.device), waveforms, n_samples, max_new_tokens=3
    )
    assert ids.shape == (1, 3)


DOWNLOAD = """
import sys
import whisper
from accelerate import PartialState
from model import ModelArguments, load_speech_llm

url, llm = sys.argv[1:]
whisper._MODELS["remote"], whisper._ALIGNMENT_HEADS["remote"] = url, None
PartialState(cpu=True)
model, _ = load_speech_llm(ModelArguments(llm, "remote"))
print(f"loaded {model.encoder.dims.n_audio_state}\\n", end="", flush=True)
"""


def test_one_process_downloads(tmp_path, llm, whisper_file):
    """Of the processes of a node one downloads a Whisper, and the others find it: openai-whisper's
    download has no lock, and two of them would write into one file."""
    content = Path(whisper_file).read_bytes()
    downloads = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            downloads.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        digest = hashlib.sha256(content).hexdigest()
        url = f"http://localhost:{server.server_port}/{digest}/remote.pt"
        (tmp_path / "script.py").write_text(DOWNLOAD)
        env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        process = run(*torchrun(2), tmp_path / "script.py", url, llm, env=env)
        server.shutdown()
    assert process.stdout.count("loaded 32") == 2
    assert len(downloads) == 1
