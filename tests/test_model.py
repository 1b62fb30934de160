"""The model: Whisper's encoder, the Projector and the LLM, each alone and the three together."""

import json

import pytest
import torch
import torch.nn.functional as F
import whisper
from conftest import FAMILIES, make_jsonl, make_llm, make_tokenizer, make_whisper
from safetensors.torch import load_file, save_file

from dataset import PAD, SPEECH, InputError, load_audio
from model import ModelArguments, Projector, SpeechEncoder, load_speech_llm


def load(llm, whisper_file, dtype=torch.float32, **flags):
    return load_speech_llm(ModelArguments(llm, whisper_file, **flags), "cpu", dtype)


def make_batch(rows, folder, seconds, texts=None):
    """(training batch, [(waveform, target ids)]) of utterances of noise."""
    with open(make_jsonl(folder, seconds, texts), encoding="utf-8") as file:
        utterances = [json.loads(line) for line in file]
    utterances = [u | {"wav": str(folder / u["wav"])} for u in utterances]
    pairs = [
        (load_audio(u["wav"]), [*rows.tokenize(u["txt"]), rows.end_id])  # as a training row is
        for u in utterances
    ]
    return rows.collate(utterances), pairs


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
    """(B, n_audio_ctx, encoder_dim) becomes (B, n_audio_ctx // stride, llm_dim)."""
    projector = Projector(encoder_dim=8, llm_dim=24, hidden_dim=16, stride=stride)
    assert projector(torch.randn(2, 30, 8)).shape == (2, 30 // stride, 24)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_any_whisper(tmp_path, n_mels):
    """Mels, window and width are the checkpoint's, and the states are those of Whisper itself."""
    path = make_whisper(tmp_path / "w.pt", n_mels=n_mels, n_audio_ctx=75, n_audio_state=24)
    waveform = torch.randn(16000) * 0.1
    states = SpeechEncoder(path, "cpu", torch.float32)(waveform[None])
    assert states.shape == (1, 75, 24)
    whole = whisper.load_model(path, device="cpu")
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(waveform, 75 * 320), n_mels)
    torch.testing.assert_close(states, whole.embed_audio(mel[None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_ignores_autocast(whisper_file, dtype):
    """Autocast, with which Trainer surrounds the model, changes no bit of the encoder's states."""
    encoder = SpeechEncoder(whisper_file, "cpu", dtype)
    waveforms = torch.randn(2, 16000) * 0.1
    alone = encoder(waveforms)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(waveforms), alone)
    assert alone.dtype == dtype and not alone.requires_grad


def test_features_do_not_depend_on_the_batch(whisper_file):
    """A loud and longer neighbour leaves an utterance's features as they are."""
    encoder = SpeechEncoder(whisper_file, "cpu", torch.float32)
    quiet, loud = torch.randn(16000) * 0.001, torch.randn(32000)
    together = encoder(torch.stack([F.pad(quiet, (0, 16000)), loud]))
    torch.testing.assert_close(together[0], encoder(quiet[None])[0], rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_the_targets(tmp_path, whisper_file, family):
    """The loss of a padded batch is the mean, over the transcripts' tokens and the turns' ends, of
    the cross-entropies that each unpadded row's full logits give."""
    model, rows = load(make_llm(tmp_path / "llm", family), whisper_file)
    batch, pairs = make_batch(
        rows, tmp_path, [0.7, 1.3, 0.2], ["one", "two three", "three one two"]
    )
    outputs = model.eval()(**batch)
    embed, sums = model.llm.get_input_embeddings(), []
    for waveform, target in pairs:
        states = model.encoder(torch.from_numpy(waveform)[None])
        speech = model.projector(states)[0, : -(-len(waveform) // 1600)]  # one for 0.1 s
        pieces = [embed(torch.tensor(rows.prefix_ids)), speech]
        pieces += [embed(torch.tensor(rows.suffix_ids)), embed(torch.tensor(target))]
        logits = model.llm(inputs_embeds=torch.cat(pieces)[None]).logits[0]
        log_probs = logits[-len(target) - 1 : -1].log_softmax(-1)
        losses = [-log_probs[k, token] for k, token in enumerate(target)]
        n_right = sum(log_probs[k].argmax() == token for k, token in enumerate(target))
        sums.append(torch.stack([sum(losses), torch.tensor(len(target)), n_right]))
    expected = torch.stack(sums)
    torch.testing.assert_close(outputs["token_sums"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["loss"], expected[:, 0].sum() / expected[:, 1].sum())
    halved = model(**batch, num_items_in_batch=2 * expected[:, 1].sum())["loss"]
    torch.testing.assert_close(halved, outputs["loss"] / 2)


def test_embeddings_and_mask(tmp_path, llm, whisper_file):
    """Speech embeddings stand in order at the SPEECH places, tokens' at theirs, and the mask leaves
    out the padding alone."""
    model, rows = load(llm, whisper_file)
    batch, pairs = make_batch(rows, tmp_path, [0.25, 0.5], ["one", "one"])
    embeds, mask = model.embed(batch["input_ids"], batch["waveforms"])
    assert mask.tolist() == [[0, 0, *[1] * 20], [1] * 22]  # 3 or 5 speech embeddings
    speech = model.projector(model.encoder(torch.from_numpy(pairs[0][0])[None]))[0]
    torch.testing.assert_close(embeds[0, 5:8], speech[:3], rtol=1e-5, atol=1e-6)
    tokens = model.llm.get_input_embeddings().weight
    assert torch.equal(embeds[0, 2:5], tokens[rows.prefix_ids])
    assert torch.equal(embeds[0, 8:20], tokens[rows.suffix_ids])


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


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_pad_token_that_is_the_stop_token(tmp_path, whisper_file, family):
    """Where the LLM pads with its stop token, the stop token is a target, seen by attention."""
    folder = make_llm(tmp_path / "llm", family)
    tokenizer = make_tokenizer(family)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    model, rows = load(folder, whisper_file)
    assert rows.tokenizer.pad_token_id == rows.tokenizer.eos_token_id == rows.end_id
    batch, pairs = make_batch(rows, tmp_path, [0.5, 0.5], ["one", "two three"])
    assert batch["labels"][:, -1].tolist() == [rows.end_id] * 2
    n_tokens = [len(target) for _, target in pairs]
    assert model.eval()(**batch)["token_sums"][:, 1].tolist() == n_tokens
    assert (batch["input_ids"] == PAD).sum(1).tolist() == [max(n_tokens) - n for n in n_tokens]


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
    runs.clear()
    model.eval()(**batch)
    assert len(runs) == 2


def test_compiled_layers_checkpoint_themselves(tmp_path, llm, whisper_file, monkeypatch):
    """Compiled, gradients stay; with checkpointing too, and then less is kept for the backward."""
    monkeypatch.setattr(torch._functorch.config, "activation_memory_budget", 1.0)
    model, rows = load(llm, whisper_file)
    batch, _ = make_batch(rows, tmp_path, [0.7, 1.3])
    plain, kept = gradients(model.train(), batch), {}
    model.compile()
    for checkpointing in False, True:
        if checkpointing:
            torch._dynamo.reset()  # forget what was compiled to keep more
            model.gradient_checkpointing_enable()
        sizes = {}  # of what is kept, but for weights, by address

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel() * (not isinstance(tensor, torch.nn.Parameter))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch)["loss"]
        kept[checkpointing] = sum(sizes.values())
        model.zero_grad()
        loss.backward()
        for name, parameter in model.projector.named_parameters():
            expected = plain[f"projector.{name}"]
            assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm(), name
    assert kept[True] < kept[False]


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


def save_projector(model, path):
    save_file(model.state_dict(), path, {"west": json.dumps(model.settings)})
    return str(path)


def test_projector_path(tmp_path, llm, whisper_file):
    """A projector file brings its weights and settings with it, in fp32 and in bf16."""
    flags = {"prompt": "one two", "projector_stride": 4, "projector_hidden_dim": 64}
    path = save_projector(load(llm, whisper_file, **flags)[0], tmp_path / "p.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model, rows = load(llm, whisper_file, dtype, projector_model_path=path)
        assert_same_bits(model.state_dict(), load_file(path))
        assert model.settings.items() >= flags.items()
        assert rows.n_speech(16000) == 13 and rows.tokenize("one two")[0] in rows.suffix_ids


def test_projector_of_other_models(tmp_path, llm, whisper_file):
    """A projector of another LLM or Whisper of the same sizes is refused, as is any other file."""
    path = save_projector(load(llm, whisper_file)[0], tmp_path / "p.safetensors")
    other_llm = make_llm(tmp_path / "llm", seed=1)
    other_whisper = make_whisper(tmp_path / "whisper.pt", seed=1)
    for parts in ((other_llm, whisper_file), (llm, other_whisper)):
        with pytest.raises(InputError, match=r"--projector_model_path .*other models") as error:
            load(*parts, projector_model_path=path)
        assert llm in str(error.value)  # the one that it was made for
    save_file(load_file(path), tmp_path / "bare.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("bare.safetensors", "text.safetensors", "absent.safetensors"):
        with pytest.raises(InputError, match=rf"--projector_model_path .*{name}: expected"):
            load(llm, whisper_file, projector_model_path=str(tmp_path / name))


def test_seed(llm, whisper_file):
    """A new projector depends on the seed alone, not on what was drawn before."""
    args, projectors = ModelArguments(llm, whisper_file), []
    for seed in (0, 0, 1):
        torch.rand(len(projectors) + 1)
        projectors.append(load_speech_llm(args, "cpu", torch.float32, seed)[0].state_dict())
    assert_same_bits(projectors[0], projectors[1])
    assert not torch.equal(*(p["projector.linear1.weight"] for p in projectors[1:]))
