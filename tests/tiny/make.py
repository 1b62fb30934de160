"""Make the frozen parts and the audio of the offline demo, in one run from nothing but a seed.

    python tests/tiny/make.py                                     # minutes on one GPU and 16 cores
    python tests/tiny/make.py --scale 0.01 --out /tmp/tiny        # a smoke test for a CPU

It needs espeak-ng (1.51) beside the packages of requirements.txt, and it writes into this folder:

    whisper.pt              a Whisper (2 layers of 128) with a window of 5 s, trained by phone CTC
                            on synthetic speech; its decoder is an untrained, unused filler
    llm/                    a Qwen2 (4 layers of 128), pre-trained to repeat what its prompt holds
    train.jsonl test.jsonl  lines {"wav", "txt", "voice", "set"}; test.jsonl holds two sets
    audio/*.opus            their speech
    make.log                what happened

The three parts meet for the first time in the projector that the demo trains: the encoder has never
seen the LLM, and the LLM has never seen speech. It learns to copy from noisy, stretched and gappy
embeddings of its own tokens, which is what a good projector has to supply.

Who may hear what:

- A sentence with crc32 % 5 == 0 is held out from the training of every part. Both test sets are
  made of such sentences alone, and no other set has any.
- The voices are dealt by the seed, before any score exists: four to the test set "voices", heard in
  no training; four to train.jsonl, the dev set and the test set "sentences"; the rest to the
  encoder. Variants of one family (near-copies of each other) never straddle the split.
- Choices are made on the dev set (the voices of train.jsonl, other sentences of the training rule),
  which is not shipped.

On a GPU the run is seeded, but not exact to the bit.
"""

# ruff: noqa: B905, RUF017, SIM905

import argparse
import io
import json
import math
import os
import platform
import random
import shutil
import subprocess
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jiwer
import numpy as np
import soundfile
import soxr
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import whisper
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from whisper.model import ModelDimensions, Whisper

SEED = 2026
SAMPLE_RATE = 16000
WINDOW = 5 * SAMPLE_RATE  # samples that the encoder sees
OPUS_LEVEL = 0.94  # libsndfile's compression level; about 22 kbit/s here

# --------------------------------------------------------------------------------------------------
# Texts: 38 words in three patterns, and everyday words that only the encoder and the LLM learn
# --------------------------------------------------------------------------------------------------

DIGITS = "zero one two three four five six seven eight nine".split()
VERBS = "bring find move paint drop show".split()
COLOURS = "red green blue yellow white purple".split()
OBJECTS = "box cup lamp chair ball clock spoon basket".split()
PLACES = "kitchen garden window table office river".split()
DEMO_WORDS = sorted({*DIGITS, *VERBS, *COLOURS, *OBJECTS, *PLACES, "the", "to"})
EVERYDAY_WORDS = """
the to and of in is it you that he was for on are with as his they at be this from have or by had
not but what all were when we there can an your which their said if do will each about how up out
them then she many some so these would other into has more her like him see time could no make
than first been its who now people my made over did down only way water long little very after
just name good sentence man think say great where help through much before line right too means
old any same tell boy follow came want also around form small set put end does another well large
must big even such because turn here why ask went men read need land different home us try kind
hand picture again change off play spell air away animal house point page letter mother answer
found study still learn should world high every near add food between own below country plant last
school father keep tree never start city earth eye light thought head under story saw left few
while along might close something seem next hard open example begin life always those both paper
together group often run
""".split()


def demo_text(rng):
    """A sentence of the demo: three to six digits, or one of two commands."""
    pick = rng.choice
    if rng.random() < 0.45:
        return " ".join(pick(DIGITS) for _ in range(rng.randint(3, 6)))
    if rng.random() < 0.5:
        return f"{pick(VERBS)} the {pick(COLOURS)} {pick(OBJECTS)} to the {pick(PLACES)}"
    return f"{pick(VERBS)} {pick(DIGITS)} {pick(COLOURS)} {pick(OBJECTS)} {pick(PLACES)}"


def everyday_text(rng):
    """Three to six words in no order, seven of ten from outside the demo."""
    return " ".join(
        rng.choice(EVERYDAY_WORDS if rng.random() < 0.7 else DEMO_WORDS)
        for _ in range(rng.randint(3, 6))
    )


def is_held_out(text):
    return zlib.crc32(text.encode()) % 5 == 0


def sample_text(rng, draw=demo_text, held_out=False):
    while is_held_out(text := draw(rng)) != held_out:
        pass
    return text


def distinct_texts(rng, count, held_out, taken):
    """`count` new sentences of the demo; adds them to the set `taken`."""
    texts = []
    while len(texts) < count:
        text = sample_text(rng, held_out=held_out)
        if text not in taken:
            taken.add(text)
            texts.append(text)
    return texts


# --------------------------------------------------------------------------------------------------
# Voices: accents and variants of espeak-ng
# --------------------------------------------------------------------------------------------------

ACCENTS = (
    "en-us en-gb en-gb-scotland en-gb-x-rp en-029 en-gb-x-gbclan en-us-nyc en-gb-x-gbcwmd".split()
)
# One family a line: variants with over two fifths of their definition, or their name, in common.
# Left out altogether: the whispering, croaking, robotic and other joke voices.
FAMILIES = """
Alex
Alicia
Andrea
Andy
Annie
Denis
Diogo Henrique Hugo michel miguel
Gene Gene2
Jacky
Lee
Marco
Mario Michael gustave
Mike
Nguyen m8
Storm
anika
antonio
aunty f4
belinda linda
boris
ed
f1
f2
f3
f5
grandma
grandpa john norbert
iven iven2 iven3 iven4
m1
m2
m3
m4
m5
m6
m7
marcelo
max
pablo
paul
pedro
quincy
rob robert
sandro
shelby
steph steph2 steph3
travis
victor
zac
""".strip().splitlines()
# The variants of the Klatt synthesiser, which buzz, are for the encoder alone.
KLATT = (
    "adam announcer benjamin david edward edward2 klatt klatt2 klatt3 klatt4 klatt5 klatt6".split()
)


def deal_voices():
    """Returns (test voices, projector voices, variants for the encoder)."""
    rng = random.Random(f"{SEED}/voices")
    families = [family.split() for family in FAMILIES]
    rng.shuffle(families)
    accents = ["en-us", "en-gb", "en-us", "en-gb-x-rp"] * 2
    voices = [f"{accent}+{rng.choice(f)}" for accent, f in zip(accents, families)]
    return voices[:4], voices[4:], sorted(sum(families[8:], [])) + KLATT


# --------------------------------------------------------------------------------------------------
# Audio
# --------------------------------------------------------------------------------------------------


def speech_job(rng, text, voice, wide):
    """What `synthesise` needs. `wide` draws from wider ranges, and also warps the vocal tract."""
    return {
        "text": text,
        "voice": voice,
        "speed": rng.randint(130, 200) if wide else rng.randint(135, 195),  # words per minute
        "pitch": rng.randint(15, 85) if wide else rng.randint(30, 70),  # of 0..99
        "warp": rng.uniform(0.88, 1.14) if wide and rng.random() < 0.6 else 1.0,
        "peak": rng.uniform(0.15, 0.9),
        "noise": 10 ** rng.uniform(-4, -2.7),  # standard deviation
        "lead": rng.uniform(0, 0.2),  # seconds
        "tail": rng.uniform(0, 0.15),
        "opus": not wide or rng.random() < 0.2,
        "seed": rng.getrandbits(32),
    }


def synthesise(job):
    """Speaks a job. Returns 16 kHz mono: Opus bytes if job["opus"] says so, else an int16 array."""
    command = ["espeak-ng", "-v", job["voice"], "-s", str(job["speed"]), "-p", str(job["pitch"])]
    wav = subprocess.run([*command, "--stdout", job["text"]], capture_output=True, check=True)
    speech = np.frombuffer(wav.stdout[44:], "<i2") / 32768  # after the header, 22.05 kHz
    speech = soxr.resample(speech, 22050 * job["warp"], SAMPLE_RATE)
    loud = np.flatnonzero(np.abs(speech) > 0.004)
    speech = speech[max(0, loud[0] - 800) : loud[-1] + 800]
    speech = speech * job["peak"] / np.abs(speech).max()
    speech = np.pad(speech, (int(job["lead"] * SAMPLE_RATE), int(job["tail"] * SAMPLE_RATE)))
    speech += np.random.default_rng(job["seed"]).normal(size=len(speech)) * job["noise"]
    speech = speech.clip(-1, 1).astype(np.float32)
    if not job["opus"]:
        return (speech * 32767).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(
        file, speech, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL
    )
    return file.getvalue()


def samples_of(speech):
    """The int16 samples of what `synthesise` returned."""
    if isinstance(speech, np.ndarray):
        return speech
    return soundfile.read(io.BytesIO(speech), dtype="int16")[0]


def synthesise_samples(job):
    return samples_of(synthesise(job))


def window(waveforms, device):
    """int16 arrays, each shorter than the window -> zero-padded float waveforms (B, 80000)."""
    batch = np.zeros((len(waveforms), WINDOW), np.int16)
    for row, waveform in zip(batch, waveforms):
        row[: len(waveform)] = waveform
    return torch.from_numpy(batch).to(device).float() / 32768


def log_mel(waveforms):
    """whisper.log_mel_spectrogram of each row by itself: (B, 80000) -> (B, 80, 500)."""
    hann = torch.hann_window(whisper.audio.N_FFT, device=waveforms.device)
    stft = torch.stft(
        waveforms, whisper.audio.N_FFT, whisper.audio.HOP_LENGTH, window=hann, return_complex=True
    )
    mel = whisper.audio.mel_filters(waveforms.device, 80) @ stft[..., :-1].abs() ** 2
    log_spec = mel.clamp(min=1e-10).log10()
    log_spec = log_spec.maximum(log_spec.amax((1, 2), keepdim=True) - 8.0)
    return (log_spec + 4.0) / 4.0


def features(waveforms, device):
    """int16 arrays -> half-precision log-mels (N, 80, 500), checked against Whisper's own."""
    chunks = [waveforms[i : i + 256] for i in range(0, len(waveforms), 256)]
    mels = torch.cat([log_mel(window(chunk, device)).half() for chunk in chunks])
    theirs = whisper.log_mel_spectrogram(window(waveforms[:1], device)[0], 80)
    torch.testing.assert_close(mels[0].float(), theirs, atol=2e-3, rtol=0)
    return mels


# --------------------------------------------------------------------------------------------------
# The encoder: phone CTC at 50 Hz
# --------------------------------------------------------------------------------------------------


def phone_dictionary():
    """word -> its en-us phones without stress marks, and the list of phones (0 is CTC's blank)."""
    words = sorted({*EVERYDAY_WORDS, *DEMO_WORDS})
    command = ["espeak-ng", "-q", "-v", "en-us", "-x", "--sep=_"]
    spoken = subprocess.run(command, input="\n".join(words), capture_output=True, text=True).stdout
    lines = [line.strip() for line in spoken.splitlines() if line.strip()]
    assert len(lines) == len(words), "espeak-ng must speak one line a word"
    unstressed = str.maketrans("", "", "',%:")
    phones = [[p for p in line.translate(unstressed).split("_") if p] for line in lines]
    symbols = ["blank", *sorted({p for word in phones for p in word})]
    return {w: [symbols.index(p) for p in ps] for w, ps in zip(words, phones)}, symbols


def phone_targets(texts, dictionary, device):
    """Returns padded phones (N, longest) and their counts (N,)."""
    rows = [torch.tensor([p for word in text.split() for p in dictionary[word]]) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), lengths.to(device)


def mask_bands(mels, axis, widest, count, limit):
    """Masks up to `count` random bands along an axis of (B, mels, frames) by the row's mean."""
    places = torch.arange(mels.shape[axis], device=mels.device)
    places = places.view(1, -1, 1) if axis == 1 else places.view(1, 1, -1)
    mean = mels.mean((1, 2), keepdim=True)
    for _ in range(count):
        first, width = torch.rand(2, len(mels), 1, 1, device=mels.device)
        first, width = first * limit, width * widest
        mels = torch.where((places >= first) & (places < first + width), mean, mels)
    return mels


def phone_error_rate(encoder, head, mels, targets, lengths):
    """Greedy CTC decoding; edits per phone."""
    with torch.no_grad():
        states = torch.cat([encoder(batch.float()) for batch in mels.split(256)])
    hypotheses, references = [], []
    for best, target, length in zip(head(states).argmax(-1).cpu(), targets.cpu(), lengths):
        phones = [p for p in best.unique_consecutive().tolist() if p]
        hypotheses.append(" ".join(map(str, phones)))
        references.append(" ".join(map(str, target[:length].tolist())))
    return jiwer.wer(references, hypotheses)


def learning_rate(step, steps, warmup):
    """Linear warm-up, then a cosine to 0: the factor of the peak."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def optimiser(parameters, lr, steps, warmup, **kwargs):
    adamw = torch.optim.AdamW(parameters, lr=lr, **kwargs)
    schedule = lambda step: learning_rate(step, steps, warmup)  # noqa: E731
    return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, schedule)


def train_encoder(out, log, device, waveforms, texts, evaluation, steps, batch_size=128, lr=2e-3):
    """Trains whisper.pt. `evaluation` maps a set's name to its (waveforms, texts)."""
    torch.manual_seed(SEED)
    width = {"n_audio_state": 128, "n_audio_head": 4, "n_text_state": 128, "n_text_head": 4}
    dims = ModelDimensions(
        n_mels=80,
        n_audio_ctx=250,
        n_audio_layer=2,
        n_vocab=64,
        n_text_ctx=32,
        n_text_layer=1,
        **width,
    )
    model = Whisper(dims).to(device)
    encoder = model.encoder
    dictionary, symbols = phone_dictionary()
    head = nn.Linear(dims.n_audio_state, len(symbols)).to(device)
    mels, (targets, lengths) = features(waveforms, device), phone_targets(texts, dictionary, device)
    frames = torch.tensor([len(w) / whisper.audio.HOP_LENGTH for w in waveforms], device=device)
    tests = {
        name: (features(w, device), *phone_targets(t, dictionary, device))
        for name, (w, t) in evaluation.items()
    }
    log(
        f"encoder: {len(mels)} utterances, {len(symbols) - 1} phones, {steps} steps of {batch_size}"
    )

    parameters = [*encoder.parameters(), *head.parameters()]
    adamw, schedule = optimiser(parameters, lr, steps, 200, weight_decay=0.01, betas=(0.9, 0.98))
    input_lengths = torch.full((batch_size,), dims.n_audio_ctx, device=device)
    losses, order = [], torch.empty(0, dtype=torch.long, device=device)
    for step in range(1, steps + 1):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(mels), device=device)])
        batch, order = order[:batch_size], order[batch_size:]
        inputs = mels[batch].float() + 0.1 * torch.randn(batch_size, 1, 1, device=device)
        inputs = mask_bands(inputs, axis=1, widest=10, count=2, limit=75)
        inputs = mask_bands(inputs, axis=2, widest=12, count=2, limit=frames[batch].view(-1, 1, 1))
        log_probs = head(encoder(inputs)).log_softmax(-1).transpose(0, 1)
        loss = F.ctc_loss(
            log_probs, targets[batch], input_lengths, lengths[batch], zero_infinity=True
        )
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        schedule.step()
        losses.append(loss.detach())
        if step % max(1, steps // 10) == 0:
            per = phone_error_rate(encoder, head, *tests["dev"])
            recent = torch.stack(losses[-max(1, steps // 10) :]).mean().item()
            log(f"encoder: step {step}, CTC loss {recent:.3f}, PER on dev {per:.2%}")
    for name, test in tests.items():
        log(f"encoder: PER on {name} {phone_error_rate(encoder, head, *test):.2%}")
    weights = {name: weight.half().cpu() for name, weight in model.state_dict().items()}
    torch.save({"dims": dims.__dict__, "model_state_dict": weights}, out / "whisper.pt")


# --------------------------------------------------------------------------------------------------
# The LLM: copying in embedding space
# --------------------------------------------------------------------------------------------------

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER = "<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
INSTRUCTION = "Transcribe the speech"  # as in the demo
OTHER_INSTRUCTIONS = [
    "Transcribe the speech.",
    "Transcribe speech to text.",
    "Transcribe the audio.",
    "Repeat the words.",
    "Write down what you hear.",
    "Please transcribe the speech to text.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '" + SYSTEM + "' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
).replace("\n", "\\n")
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(folder, vocab_size=640):
    """A byte-level BPE in which every word of the demo is one token."""
    rng = random.Random(f"{SEED}/tokenizer")
    corpus = [sample_text(rng) for _ in range(3000)]
    corpus += [sample_text(rng, everyday_text) for _ in range(2000)]
    corpus += ["system\nYou are a helpful assistant.\nuser\nassistant\n", INSTRUCTION] * 200
    corpus += OTHER_INSTRUCTIONS * 200
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        corpus, vocab_size=vocab_size - len(SPECIAL_TOKENS), min_frequency=2, show_progress=False
    )
    bpe.add_special_tokens(SPECIAL_TOKENS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    reloaded = AutoTokenizer.from_pretrained(folder)
    row = SYSTEM + USER + INSTRUCTION + ASSISTANT + "move the red box to the kitchen<|im_end|>"
    assert reloaded(row)["input_ids"] == tokenizer(row)["input_ids"]
    assert reloaded.decode(reloaded(row)["input_ids"]) == row
    return reloaded


def copy_prompts(tokenizer):
    """[(ids before the speech, ids after it)]: the demo's own first, then 48 others."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [(ids(SYSTEM + USER), ids(INSTRUCTION + ASSISTANT))]
    for head in (USER, SYSTEM + USER):
        for instruction in OTHER_INSTRUCTIONS:
            prompts.append((ids(head), ids(instruction + ASSISTANT)))
            prompts.append((ids(head), ids("\n" + instruction + ASSISTANT)))
            prompts.append((ids(head + instruction), ids(ASSISTANT)))
            prompts.append((ids(head + instruction + "\n"), ids(ASSISTANT)))
    return prompts


class CopyData(IterableDataset):
    """Batches (ids, labels, lengths, is_speech) for steps first, first + 1, ...; seeded by step.

    A row is  prompt | speech | instruction | text | <|im_end|>  padded on the right, where the
    speech is the text's own tokens as a projector might give them: each for 1 to 4 frames, with
    gaps (id -1) between, before and after. Only the text and its stop are labelled.
    """

    def __init__(self, tokenizer, batch_size, first, last, held_out=False):
        super().__init__()
        self.tokenizer, self.prompts = tokenizer, copy_prompts(tokenizer)
        self.batch_size, self.steps = batch_size, range(first, last)
        self.held_out = held_out
        specials = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
        self.end = specials[2]
        self.plain = [token for token in range(len(tokenizer)) if token not in specials]

    def __iter__(self):
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in self.steps[first::stride]:
            rng = random.Random(f"{SEED}/copy/{step}")
            yield self.batch(rng, difficulty(step))

    def text(self, rng):
        kind = rng.random()
        if self.held_out or kind < 0.4:
            text = sample_text(rng, held_out=self.held_out)
        elif kind < 0.55:
            text = sample_text(rng, everyday_text)
        else:  # any tokens, or three of them over and over
            few = self.plain if kind < 0.8 else [rng.choice(self.plain) for _ in range(3)]
            return [rng.choice(few) for _ in range(rng.randint(2, 10))]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def speech(self, rng, text):
        longest, widest = rng.choice([1, 2, 3, 4, 5]), rng.choice([0, 1, 2, 4])
        frames = [-1] * rng.randint(0, 6)
        for token, following in zip(text, [*text[1:], None]):
            frames += [token] * rng.randint(1, longest)
            frames += [-1] * max(rng.randint(0, widest), token == following)
        frames += [-1] * rng.randint(0, 8)
        return frames + [-1] * (50 - len(frames)) if rng.random() < 0.1 else frames

    def batch(self, rng, hard):
        rows = []
        for _ in range(self.batch_size):
            text = self.text(rng)
            speech = self.speech(rng, text) if rng.random() < 0.9 * hard else text
            before, after = self.prompts[0]
            if rng.random() < 0.5:
                before, after = rng.choice(self.prompts)
            rows.append((before, speech, after, [*text, self.end]))
        longest = max(sum(map(len, row)) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        is_speech = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            before, speech, _, answer = map(len, row)
            length = sum(map(len, row))
            ids[i, :length] = torch.tensor(sum(row, []))
            labels[i, length - answer : length] = ids[i, length - answer : length]
            is_speech[i, before : before + speech] = True
        return ids, labels, torch.tensor([sum(map(len, row)) for row in rows]), is_speech


def difficulty(step):
    """0 for the first 500 steps (plain copying), then up to 1 over the next 1000."""
    return min(1.0, max(0.0, (step - 500) / 1000))


def corrupt(embedding, ids, is_speech, hard):
    """Embeds a batch of CopyData: speech is scaled, blended and noisy, a gap is a random vector."""
    clean = embedding[ids.clamp(min=0)]
    (B, L), D, device = ids.shape, embedding.shape[1], ids.device
    rms = embedding.detach().pow(2).mean().sqrt()
    noise = torch.randn(B, L, D, device=device) * rms * 0.8 * torch.rand(B, 1, 1, device=device)
    gap = torch.randn(B, 1, D, device=device) * rms * torch.rand(B, 1, 1, device=device)
    blend = 0.4 * torch.rand(B, L, 1, device=device)
    blend = blend * (torch.rand(B, L, 1, device=device) < 0.3)
    other = embedding.detach()[torch.randint(len(embedding), (B, L), device=device)]
    loudness = 0.5 + torch.rand(B, L, 1, device=device)
    gain = torch.exp(0.4 * torch.randn(B, 1, 1, device=device))
    is_gap = (ids < 0)[..., None]
    token = loudness * ((1 - blend) * clean + blend * other)
    speech = gain * (torch.where(is_gap, gap, token) + noise)
    is_clean = torch.rand(B, 1, 1, device=device) < max(0.15, 1 - hard)
    speech = torch.where(is_clean & ~is_gap, clean, speech)
    return torch.where(is_speech[..., None], speech, clean)


def copy_step(llm, batch, hard, device):
    """Returns the loss, and which answer tokens and whole answers are right."""
    ids, labels, lengths, is_speech = (tensor.to(device, non_blocking=True) for tensor in batch)
    inputs = corrupt(llm.get_input_embeddings().weight, ids, is_speech, hard)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    hidden = llm.model(inputs_embeds=inputs, attention_mask=mask.long()).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    labelled = labels >= 0
    logits = llm.lm_head(hidden[labelled])
    right = torch.ones_like(labelled)
    right[labelled] = logits.argmax(-1) == labels[labelled]
    loss = F.cross_entropy(logits, labels[labelled])
    return loss, right[labelled].float().mean(), right.all(1).float().mean()


def train_llm(out, log, device, steps, workers, batch_size=128, lr=2e-3):
    """Makes the folder llm/."""
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    folder = out / "llm"
    tokenizer = make_tokenizer(folder)
    words = [" " + word for word in DEMO_WORDS]
    single = sum(len(tokenizer.tokenize(word)) == 1 for word in words)
    pad, _, end = tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    llm = Qwen2ForCausalLM(config).to(device)
    size = sum(parameter.numel() for parameter in llm.parameters())
    log(f"llm: {size} parameters, {len(tokenizer)} tokens, {single} of {len(words)} words are one")
    log(f"llm: {steps} steps of {batch_size}")

    parameters = list(llm.parameters())
    adamw, schedule = optimiser(parameters, lr, steps, 200, weight_decay=0.01, betas=(0.9, 0.98))
    data = CopyData(tokenizer, batch_size, 0, steps)
    losses = []
    for step, batch in enumerate(DataLoader(data, batch_size=None, num_workers=workers), 1):
        loss, _, _ = copy_step(llm, batch, difficulty(step - 1), device)
        adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        schedule.step()
        losses.append(loss.detach())
        if step % max(1, steps // 10) == 0:
            recent = torch.stack(losses[-max(1, steps // 10) :]).mean().item()
            log(f"llm: step {step}, loss {recent:.3f}")
    # Steps past 10**9 are hard, and their seeds are new.
    sets = {"all texts": False, "held-out sentences": True}
    for name, held_out in sets.items():
        data = CopyData(tokenizer, 256, 10**9, 10**9 + 4, held_out)
        with torch.no_grad():
            scores = [copy_step(llm, batch, 1.0, device)[1:] for batch in data]
        tokens, rows = torch.tensor(scores).mean(0).tolist()
        log(f"llm: copying {name}: {tokens:.2%} of the tokens, {rows:.2%} of the rows right")
    llm.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    llm.to(torch.bfloat16).save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# The check: train the demo's projector on the files just written
# --------------------------------------------------------------------------------------------------


class Projector(nn.Module):
    """The product's own: (B, 250, 128) encoder states -> (B, 50, 128) embeddings."""

    def __init__(self, encoder_dim, llm_dim):
        super().__init__()
        self.conv1d = nn.Conv1d(encoder_dim, encoder_dim, 5, 5)
        self.linear1 = nn.Linear(encoder_dim, 2048)
        self.linear2 = nn.Linear(2048, llm_dim)

    def forward(self, states):
        states = F.relu(self.conv1d(states.transpose(1, 2))).transpose(1, 2)
        return self.linear2(F.relu(self.linear1(states)))


class Check:
    """Trains the projector on train.jsonl as the demo does, and reports word error rates."""

    def __init__(self, out, device):
        self.device = device
        self.encoder = whisper.load_model(str(out / "whisper.pt"), device).encoder.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(out / "llm")
        llm = AutoModelForCausalLM.from_pretrained(out / "llm", dtype=torch.float32)
        self.llm = llm.to(device).eval()
        for parameter in [*self.encoder.parameters(), *self.llm.parameters()]:
            parameter.requires_grad_(False)
        text = "\0"
        chat = [{"role": "user", "content": text + INSTRUCTION}]
        row = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert row == SYSTEM + USER + text + INSTRUCTION + ASSISTANT, row
        self.before, self.after = (self.embed(part) for part in row.split(text))

    def ids(self, text):
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        return ids.to(self.device)

    def embed(self, text):
        return self.llm.get_input_embeddings()(self.ids(text))

    def encode(self, waveforms):
        """Returns the encoder's states (N, 250, 128) and the number of embeddings of each."""
        with torch.no_grad():
            chunks = features(waveforms, self.device).float().split(256)
            states = torch.cat([self.encoder(chunk) for chunk in chunks])
        return states, [math.ceil(len(waveform) / 1600) for waveform in waveforms]

    def train(self, waveforms, texts, seed, batch_size=8, epochs=10, lr=1e-3):
        torch.manual_seed(seed)
        dims = self.encoder.ln_post.normalized_shape[0], self.llm.config.hidden_size
        projector = Projector(*dims).to(self.device)
        states, counts = self.encode(waveforms)
        steps = epochs * (len(texts) // batch_size)
        adamw, schedule = optimiser(projector.parameters(), lr, steps, 30, weight_decay=0.0)
        rng, order = random.Random(f"{SEED}/projector/{seed}"), []
        for _ in range(steps):
            if len(order) < batch_size:
                order = rng.sample(range(len(texts)), len(texts))
            batch, order = order[:batch_size], order[batch_size:]
            rows, labels = [], []
            for speech, i in zip(projector(states[batch]), batch):
                answer = self.ids(texts[i] + "<|im_end|>")
                embedded = self.llm.get_input_embeddings()(answer)
                rows.append(torch.cat([self.before, speech[: counts[i]], self.after, embedded]))
                labels.append(F.pad(answer, (len(rows[-1]) - len(answer), 0), value=-100))
            inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
            mask = nn.utils.rnn.pad_sequence(
                [torch.ones(len(row), dtype=torch.long, device=self.device) for row in rows],
                batch_first=True,
            )
            loss = self.llm(inputs_embeds=inputs, attention_mask=mask, labels=labels).loss
            adamw.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
            adamw.step()
            schedule.step()
        return projector, loss.item()

    @torch.no_grad()
    def transcribe(self, projector, waveforms):
        states, counts = self.encode(waveforms)
        rows = [
            torch.cat([self.before, speech[:count], self.after])
            for speech, count in zip(projector(states), counts)
        ]
        longest = max(map(len, rows))
        inputs = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        mask = torch.stack(
            [torch.arange(longest, device=self.device) >= longest - len(row) for row in rows]
        )
        new = self.llm.generate(
            inputs_embeds=inputs, attention_mask=mask.long(), max_new_tokens=24, do_sample=False
        )
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def report(self, log, title, projector, waveforms, jobs):
        """Logs the word error rate of a set, and that of each of its voices."""
        references = [job["text"] for job in jobs]
        hypotheses = self.transcribe(projector, waveforms)
        exact = sum(r == h for r, h in zip(references, hypotheses)) / len(references)
        voices = []
        for voice in sorted({job["voice"] for job in jobs}):
            mine = [i for i, job in enumerate(jobs) if job["voice"] == voice]
            rate = jiwer.wer([references[i] for i in mine], [hypotheses[i] for i in mine])
            voices.append(f"{voice} {rate:.2%}")
        rate = jiwer.wer(references, hypotheses)
        log(f"check: {title}: WER {rate:.2%}, {exact:.0%} exact ({', '.join(voices)})")


# --------------------------------------------------------------------------------------------------


class Log:
    """Prints a line with the seconds since the start, and appends it to the log file."""

    def __init__(self, path):
        self.path, self.start = path, time.time()
        path.write_text("")

    def __call__(self, message):
        line = f"[{time.time() - self.start:6.1f} s] {message}"
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def plan_audio(count):
    """Jobs of each set: {"train", "dev", "sentences", "voices", "encoder": [job]}."""
    unheard, heard, variants = deal_voices()
    taken, jobs = set(), {}
    sets = {
        "train": (count(400), heard, False),
        "dev": (count(300), heard, False),
        "sentences": (count(75), heard, True),
        "voices": (count(75), unheard, True),
    }
    for name, (size, voices, held_out) in sets.items():
        rng = random.Random(f"{SEED}/{name}")
        texts = distinct_texts(rng, size, held_out, taken)
        jobs[name] = [
            speech_job(rng, text, voices[i % len(voices)], wide=False)
            for i, text in enumerate(texts)
        ]
    rng = random.Random(f"{SEED}/encoder")
    jobs["encoder"] = []
    for _ in range(count(40000)):
        text = sample_text(rng, everyday_text if rng.random() < 0.35 else demo_text)
        voice = f"{rng.choice(ACCENTS)}+{rng.choice(variants)}"
        jobs["encoder"].append(speech_job(rng, text, voice, wide=True))
    return jobs


def write_audio(out, jobs, speech):
    """Writes audio/*.opus, train.jsonl and test.jsonl."""
    shutil.rmtree(out / "audio", ignore_errors=True)
    (out / "audio").mkdir()
    lines = {"train": [], "test": []}
    for name in ("train", "sentences", "voices"):
        for i, (job, opus) in enumerate(zip(jobs[name], speech[name])):
            wav = f"audio/{name}-{i:03d}.opus"
            (out / wav).write_bytes(opus)
            line = {"wav": wav, "txt": job["text"], "voice": job["voice"], "set": name}
            lines["train" if name == "train" else "test"].append(json.dumps(line) + "\n")
    for name, rows in lines.items():
        (out / f"{name}.jsonl").write_text("".join(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts and steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    def count(n):
        return max(8, round(n * args.scale))

    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    log = Log(args.out / "make.log")
    espeak = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True).stdout
    log(f"seed {SEED}, scale {args.scale}, on {args.device}, {os.cpu_count()} cores")
    log(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, whisper {whisper.__version__}, soundfile "
        f"{soundfile.__version__}, espeak-ng {espeak.split(':')[1].split()[0]}"
    )
    unheard, heard, variants = deal_voices()
    log(f"voices of the test set 'voices', in no training: {' '.join(unheard)}")
    log(f"voices of train, dev and 'sentences': {' '.join(heard)}")
    log(
        f"variants for the encoder, {len(variants)} in {len(ACCENTS)} accents: {' '.join(variants)}"
    )

    # The LLM needs no audio: it trains beside the synthesis and the encoder.
    spawn = get_context("spawn")
    loaders = min(4, os.cpu_count() // 2)
    llm = spawn.Process(target=train_llm, args=(args.out, log, args.device, count(9000), loaders))
    llm.start()
    jobs = plan_audio(count)
    with ProcessPoolExecutor(max(1, os.cpu_count() - loaders), get_context("fork")) as pool:
        shipped = ("train", "dev", "sentences", "voices")
        speech = {name: list(pool.map(synthesise, jobs[name], chunksize=8)) for name in shipped}
        heard_by_encoder = list(pool.map(synthesise_samples, jobs["encoder"], chunksize=64))
    write_audio(args.out, jobs, speech)
    samples = {name: [samples_of(s) for s in speech[name]] for name in shipped}
    longest = max(len(s) for sets in samples.values() for s in sets)
    assert longest <= WINDOW, f"an utterance of {longest} samples is longer than the window"
    fits = [len(s) <= WINDOW for s in heard_by_encoder]
    hours = sum(map(len, heard_by_encoder)) / SAMPLE_RATE / 3600
    log(f"audio: encoder: {len(fits)} utterances, {hours:.1f} h, {fits.count(False)} too long")
    for name in shipped:
        seconds = sum(map(len, samples[name])) / SAMPLE_RATE
        size = sum(map(len, speech[name]))
        log(
            f"audio: {name}: {len(samples[name])} utterances, {seconds:.0f} s, {size} bytes of Opus"
        )

    texts = {name: [job["text"] for job in jobs[name]] for name in jobs}
    train_encoder(
        args.out,
        log,
        args.device,
        [s for s, fit in zip(heard_by_encoder, fits) if fit],
        [text for text, fit in zip(texts["encoder"], fits) if fit],
        {name: (samples[name], texts[name]) for name in ("dev", "sentences", "voices")},
        count(12000),
    )
    log("encoder: done")
    llm.join()
    if llm.exitcode:
        raise RuntimeError(f"the training of the LLM failed with exit code {llm.exitcode}")

    torch.set_float32_matmul_precision("highest")
    check = Check(args.out, args.device)
    torch.manual_seed(SEED)
    untrained = Projector(128, 128).to(args.device)
    check.report(log, "untrained projector on dev", untrained, samples["dev"], jobs["dev"])
    for seed in (0, 1):
        projector, loss = check.train(samples["train"], texts["train"], seed)
        log(f"check: projector of seed {seed}: last loss {loss:.4f}")
        for name in ("dev", "sentences", "voices"):
            title = f"projector of seed {seed} on {name}"
            check.report(log, title, projector, samples[name], jobs[name])

    for name in ("whisper.pt", "llm", "audio", "train.jsonl", "test.jsonl"):
        path = args.out / name
        files = [path] if path.is_file() else list(path.iterdir())
        log(f"size: {name}: {sum(f.stat().st_size for f in files)} bytes in {len(files)} files")


if __name__ == "__main__":
    main()
