"""WeST's model: Whisper encoder (frozen) -> Projector (trained) -> causal LLM (frozen).

After SLAM-ASR (arXiv 2402.08846) and the speech adapter of Llama 3.1 (arXiv 2407.21783, section 8).
In shape comments B: utterances, T: positions in a row, N: speech embeddings, D: the LLM's width.
"""

import inspect
import json
import pickle
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
import whisper
from accelerate import PartialState
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import local_torch_dtype
from whisper.audio import HOP_LENGTH, N_FFT, N_SAMPLES_PER_TOKEN, mel_filters

from dataset import IGNORE, PAD, SPEECH, InputError, RowFormat, render_chat, user_error


@dataclass
class ModelArguments:
    llm_model_name_or_path: str  # a causal LLM with a chat template
    whisper_model_name_or_path: str  # openai-whisper's name of a model, or its file
    projector_model_path: str | None = None  # a checkpoint's model.safetensors, which brings along:
    projector_hidden_dim: int = 2048
    projector_stride: int = 5  # encoder states, of 20 ms, per speech embedding
    prompt: str = "Transcribe the speech"  # follows the speech in the user turn
    all_speech_embeddings: bool = False  # the whole window's, not only those that cover audio
    encoder_window: Literal["full", "audio"] = "full"  # 30 s, or as long as the audio


class Projector(nn.Module):
    """Encoder states -> speech embeddings, one for `stride` of them.

    (B, n, encoder_dim) -> (B, n // stride, llm_dim)
    """

    def __init__(self, encoder_dim, llm_dim, hidden_dim=2048, stride=5):
        super().__init__()
        self.conv1d = nn.Conv1d(encoder_dim, encoder_dim, kernel_size=stride, stride=stride)
        self.linear1 = nn.Linear(encoder_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, llm_dim)

    def forward(self, x):
        x = F.relu(self.conv1d(x.transpose(1, 2))).transpose(1, 2)  # (B, N, encoder_dim)
        return self.linear2(F.relu(self.linear1(x)))  # (B, N, llm_dim)


class SpeechEncoder:
    """Whisper's frozen log-mel and encoder; `name` is what whisper.load_model takes.

    Not an nn.Module, so that DDP, DeepSpeed, the optimizer and checkpoints never see it. Every
    process holds it whole, in `dtype`. Raises InputError.
    """

    def __init__(self, name, window, device, dtype):
        errors = (RuntimeError, OSError, EOFError, LookupError, pickle.UnpicklingError)
        expected = f"--whisper_model_name_or_path {name}: expected a Whisper"
        # In float32, the default dtype, Whisper would take twice the memory
        with user_error(expected, *errors), local_torch_dtype(dtype):
            whole = whisper.load_model(name, device="cpu")
        self.dims, self.window, self.device, self.dtype = whole.dims, window, device, dtype
        self.encoder = whole.encoder.eval().requires_grad_(False).to(device, dtype)
        self.hann = torch.hann_window(N_FFT).to(device)

    @torch.no_grad()
    def __call__(self, waveforms, n_samples):
        """(all samples,) int16 at 16 kHz -> encoder states (B, n, n_audio_state).

        n is that of 30 s, or of the longest audio. Shorter utterances are padded with zeros.
        """
        waveforms = (waveforms.float() / 32768).split(n_samples)
        by_length = sorted(range(len(waveforms)), key=n_samples.__getitem__)
        states = {}
        with torch.autocast(self.device.type, enabled=False):  # the log-mel needs its float32
            for k in range(0, len(waveforms), 64):  # bounds the memory
                part = by_length[k : k + 64]
                states |= zip(part, self.encode([waveforms[i] for i in part]), strict=True)
        return pad_sequence([states[i] for i in range(len(waveforms))], batch_first=True)

    def encode(self, waveforms):
        """Waveforms (n_samples,) -> the states (n, n_audio_state) of each.

        The log-mel and the convolutions are always those of 30 s. With the window "audio" only the
        states of the whole 2 s that hold the audio enter the blocks, where each utterance attends
        to itself alone: so its states depend on no other.
        """
        encoder, n_ctx = self.encoder, self.dims.n_audio_ctx
        padded = pad_sequence(waveforms, batch_first=True)
        padded = F.pad(padded, (0, n_ctx * N_SAMPLES_PER_TOKEN - padded.shape[1]))
        x = F.gelu(encoder.conv1(self.log_mel(padded).to(self.dtype)))
        x = F.gelu(encoder.conv2(x)).transpose(1, 2) + encoder.positional_embedding
        step = n_ctx if self.window == "full" else 100  # 30 s, or 2 s
        n_steps = [-(-len(waveform) // (step * N_SAMPLES_PER_TOKEN)) for waveform in waveforms]
        n_states = [min(n * step, n_ctx) for n in n_steps]
        x = torch.cat([row[:n] for row, n in zip(x, n_states, strict=True)])  # (all states, D_enc)
        groups = [(len(list(group)), n) for n, group in groupby(n_states)]
        # cuDNN's attention is 7 % faster, but plans anew for each length
        torch.backends.cuda.enable_cudnn_sdp(self.window == "full")
        norm = nn.LayerNorm.forward  # one kernel, float32 inside; Whisper's own casts around it
        for block in encoder.blocks:
            x = x + attend(block.attn, norm(block.attn_ln, x), groups)
            x = x + block.mlp(norm(block.mlp_ln, x))
        torch.backends.cuda.enable_cudnn_sdp(False)
        return norm(encoder.ln_post, x).split(n_states)

    def log_mel(self, waveforms):
        """(B, samples) -> (B, n_mels, frames): whisper.log_mel_spectrogram of each, bit for bit.

        Whisper's own would scale the whole batch by one maximum, and wait for the GPU each time.
        """
        # (B, 201, frames + 1)
        stft = torch.stft(waveforms, N_FFT, HOP_LENGTH, window=self.hann, return_complex=True)
        powers = mel_filters(self.device, self.dims.n_mels) @ stft[..., :-1].abs() ** 2
        log_mel = powers.clamp(min=1e-10).log10()
        log_mel = torch.maximum(log_mel, log_mel.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (log_mel + 4.0) / 4.0


def attend(attn, x, groups):
    """Whisper's self-attention, of each utterance to itself: (all states, D_enc) -> the same shape.

    groups: (number of utterances, states of each), of neighbours that have equally many.
    """
    sizes = [n_utterances * n for n_utterances, n in groups]
    qkv = [layer(x).split(sizes) for layer in (attn.query, attn.key, attn.value)]
    outputs = []
    for group, *parts in zip(groups, *qkv, strict=True):
        q, k, v = (part.view(*group, attn.n_head, -1).transpose(1, 2) for part in parts)
        heads = F.scaled_dot_product_attention(q, k, v)  # (utterances, n_head, n, D_head)
        outputs.append(heads.transpose(1, 2).flatten(0, 1).flatten(1))
    return attn.out(torch.cat(outputs))


class SpeechLLM(nn.Module):
    """Speech in, text out. `settings` says what built it, and is saved in every checkpoint."""

    accepts_loss_kwargs = True  # makes Trainer give forward num_items_in_batch: a mean over tokens

    def __init__(self, encoder, projector, llm, settings):
        super().__init__()
        self.encoder, self.projector, self.settings = encoder, projector, settings
        self.llm = llm.requires_grad_(False)
        self.config = llm.config  # DeepSpeed sizes its "auto" buckets by config.hidden_size

    def embed(self, input_ids, waveforms, n_samples):
        """inputs_embeds (B, T, D), of tokens and, where SPEECH stands, of speech.

        input_ids (B, T); waveforms (all samples,) int16; n_samples: of each of the B utterances.
        """
        text = self.llm.get_input_embeddings()(input_ids.clamp(min=0))  # (B, T, D)
        states = self.encoder(waveforms, n_samples)
        stride = self.settings["projector_stride"]
        n_ctx = self.encoder.dims.n_audio_ctx if self.settings["all_speech_embeddings"] else 0
        n_missing = max(n_ctx - states.shape[1], 0) + stride  # audio may end within the last stride
        states = F.pad(states, (0, 0, 0, n_missing))  # (B, n, n_audio_state)
        dtype = next(self.projector.parameters()).dtype  # float32, but for what DeepSpeed casts
        speech = self.projector(states.to(dtype)).to(text.dtype)  # (B, N, D)
        is_speech = (input_ids == SPEECH)[..., None]  # (B, T, 1)
        speech_index = (is_speech.cumsum(1) - 1).clamp(min=0)  # which of the N is due
        return torch.where(is_speech, speech.take_along_dim(speech_index, dim=1), text)

    def forward(self, input_ids, waveforms, n_samples, labels, places, num_items_in_batch=None):
        """Cross-entropy of the labels, summed, over num_items_in_batch.

        labels (B, K): targets, or IGNORE; places (B, K): where in a row, padded on the right, each
        is predicted. token_sums (B, 3): an utterance's loss, its number of targets, and how many of
        them the model ranks first.
        """

        def select_places(head, inputs):  # the logits of all places would take gigabytes
            return (inputs[0].take_along_dim(places[..., None], dim=1),)

        embeds = self.embed(input_ids, waveforms, n_samples)
        with (
            self.llm.get_output_embeddings().register_forward_pre_hook(select_places),
            torch.autocast(embeds.device.type, enabled=False),  # the LLM runs as when it decodes
        ):
            logits = self.llm(inputs_embeds=embeds, use_cache=False).logits.float()  # (B, K, vocab)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = losses.view_as(labels)  # 0 where there is no target
        n_targets = (labels != IGNORE).sum(1)
        n_right = (logits.argmax(-1) == labels).sum(1)
        count = n_targets.sum() if num_items_in_batch is None else num_items_in_batch
        token_sums = torch.stack([losses.detach().sum(1), n_targets, n_right], dim=1)
        return {"loss": losses.sum() / count.clamp(min=1), "token_sums": token_sums}

    @torch.no_grad()
    def generate(self, input_ids, waveforms, n_samples, **flags):
        """Ids (B, new tokens) of the best hypotheses of rows that are padded on the left.

        A batch may come from any device. flags are those of transformers' generate.
        """
        input_ids = input_ids.to(self.encoder.device)
        embeds = self.embed(input_ids, waveforms.to(self.encoder.device), n_samples)
        mask = (input_ids != PAD).long()
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **flags)

    def state_dict(self, *args, prefix="", **kwargs):
        """The projector's alone: nothing frozen is saved, neither by Trainer nor by DeepSpeed."""
        return self.projector.state_dict(*args, prefix=prefix + "projector.", **kwargs)

    def load_state_dict(self, state_dict, strict=True):
        tensors = {key.removeprefix("projector."): value for key, value in state_dict.items()}
        return self.projector.load_state_dict(tensors)  # always strict

    def train(self, mode=True):
        """Puts only the projector into training mode: dropout in the frozen LLM never runs.

        Checkpointed layers, though not what is in them, go with it: transformers wants it.
        """
        super().train(mode)
        self.llm.eval()
        for layer in llm_layers(self.llm):
            layer.training = mode and layer.gradient_checkpointing
        return self

    def gradient_checkpointing_enable(self, **kwargs):
        self.llm.gradient_checkpointing_enable(**kwargs)


def projector_settings(args):
    """What a new projector is built with, or what the one of projector_model_path was."""
    given = dict(vars(args))
    if not (path := given.pop("projector_model_path")):
        return given
    expected = f"--projector_model_path {path}: expected a model.safetensors of train.py"
    with user_error(expected, OSError, SafetensorError, LookupError, TypeError, ValueError):
        saved = {"encoder_window": "full"} | json.loads(safe_open(path, "pt").metadata()["west"])
    for name, trained in saved.items():
        now = given.get(name, trained)
        is_model = name.endswith("_name_or_path")  # which may have moved to another folder
        used = now if is_model else trained
        if now != trained and not (is_model and Path(now).name == Path(trained).name):
            message = f"Warning: --{name} was {trained} in training, not {now}; {used} is used"
            PartialState().print(message, file=sys.stderr)
    return given | saved


def load_speech_llm(args, device=None, dtype=None, seed=0):
    """(SpeechLLM, RowFormat) of ModelArguments, in evaluation mode. Raises InputError.

    Without a projector_model_path, a new projector is drawn from seed. By default on a GPU in
    bfloat16, or on a CPU in float32.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    settings = projector_settings(args)
    name, window = args.llm_model_name_or_path, settings["encoder_window"]
    # One process of a node downloads. The LLM needs no such care: the hub's downloads lock, and
    # under ZeRO-3 all processes load it together
    with PartialState().local_main_process_first():
        encoder = SpeechEncoder(args.whisper_model_name_or_path, window, device, dtype)
    expected = f"--llm_model_name_or_path {name}: expected a causal LLM with a chat template"
    with user_error(expected, OSError, ValueError, TemplateError, SafetensorError):
        tokenizer = AutoTokenizer.from_pretrained(name)
        settings["chat"] = settings.get("chat") or render_chat(tokenizer, settings["prompt"])
        llm = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if "inputs_embeds" not in inspect.signature(llm.prepare_inputs_for_generation).parameters:
        raise InputError(f"{expected}, not {type(llm).__name__}, which cannot decode embeddings")
    rows = RowFormat(tokenizer, settings, encoder.dims.n_audio_ctx)
    torch.manual_seed(seed)  # loading may have drawn random numbers
    sizes = encoder.dims.n_audio_state, llm.config.get_text_config().hidden_size
    projector = Projector(*sizes, settings["projector_hidden_dim"], settings["projector_stride"])
    model = SpeechLLM(encoder, projector, llm, settings)
    if path := args.projector_model_path:
        expected = f"--projector_model_path {path}: expected models of its sizes"
        with user_error(expected, RuntimeError):
            model.load_state_dict(load_file(path))
    # Decoding inherits nothing of the LLM's own generation config but its stop tokens
    stops = llm.generation_config.eos_token_id
    stops = {rows.end_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    llm.generation_config = GenerationConfig(eos_token_id=list(stops), pad_token_id=rows.end_id)
    llm.get_output_embeddings().register_forward_pre_hook(make_contiguous)
    return model.to(device).eval(), rows


# For speed alone: what follows changes no result, and can be deleted together with its calls.


def llm_layers(llm):
    """The LLM's repeated layers, whatever its family."""
    return [module for module in llm.modules() if isinstance(module, GradientCheckpointingLayer)]


def make_contiguous(module, inputs):
    """The logits of the last places, a strided slice of 1280 prompts, took 204 ms; so under 1."""
    return (inputs[0].contiguous(),)


# transformers asks the GPU at each step whether a row is packed of several; ours never are
transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None


def compile_layers(llm, recompute):
    """torch.compile of each LLM layer by itself: in seconds, since one graph serves them all."""
    if recompute:
        torch._functorch.config.activation_memory_budget = 0
    for layer in llm_layers(llm):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def fetch_whole_layers(llm):
    """Makes ZeRO-3 fetch a layer's weights at once, not those of each small module by hooks."""
    import deepspeed  # takes seconds, and only runs with --deepspeed come here

    deepspeed.utils.set_z3_leaf_modules(llm, [GradientCheckpointingLayer])
