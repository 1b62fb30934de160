"""The model: Whisper encoder (frozen) -> Projector (trained) -> causal LLM (frozen).

It follows SLAM-ASR (arXiv 2402.08846) and the speech adapter of Llama 3 (arXiv 2407.21783, section
8). Shapes: B batch size, T sequence length, N speech embeddings, K target tokens, D hidden size of
the LLM, D_enc hidden size of the encoder. A frame is one output of the encoder, 20 ms of audio.
"""

import json
import math
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import whisper
from accelerate import PartialState
from more_itertools import always_iterable, batched, map_reduce
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.hf_argparser import HfArg
from transformers.modeling_utils import local_torch_dtype
from whisper.audio import HOP_LENGTH, N_FFT, N_SAMPLES_PER_TOKEN, mel_filters

from dataset import IGNORE_INDEX, PAD, SPEECH, PromptFormat, as_input_error, check_minimum


class Projector(nn.Module):
    """Maps every `stride` encoder frames to one speech embedding of the LLM."""

    def __init__(self, encoder_dim, llm_dim, hidden_dim=2048, stride=5):
        super().__init__()
        self.conv1d = nn.Conv1d(encoder_dim, encoder_dim, kernel_size=stride, stride=stride)
        self.linear1 = nn.Linear(encoder_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, llm_dim)

    def forward(self, frames):
        """Returns speech embeddings (B, N, D) of frames (B, n_frames, D_enc); N rounds down."""
        x = F.relu(self.conv1d(frames.transpose(1, 2))).transpose(1, 2)  # (B, N, D_enc)
        return self.linear2(F.relu(self.linear1(x)))  # (B, N, D)


class SpeechLLM(nn.Module):
    """A causal LLM that reads speech embeddings at the SPEECH positions of input_ids.

    Only the projector is trained, saved and loaded. The encoder and the LLM are frozen.
    `settings` says how the model was built and is saved with the projector.
    """

    # This makes Trainer pass num_items_in_batch, and the loss a mean over all target tokens
    accepts_loss_kwargs = True

    def __init__(self, encoder, projector, llm, settings):
        super().__init__()
        self.encoder, self.projector, self.settings = encoder, projector, settings
        self.llm = llm.requires_grad_(False)
        self.config = llm.config  # Trainer reads hidden_size from it, for DeepSpeed's "auto" sizes

    def embed(self, input_ids, waveforms, n_samples):
        """Returns the LLM's inputs (B, T, D): speech embeddings at SPEECH, else text embeddings.

        input_ids (B, T). waveforms: the int16 samples of the batch, concatenated. n_samples: a list
        of their B lengths.
        """
        frames = self.encoder(torch.as_tensor(waveforms), n_samples)  # (B, n_frames, D_enc)
        # The convolution drops an incomplete last stride, so zeros complete it. If nothing was
        # incomplete, the zeros give one extra embedding, which no SPEECH position uses
        frames = F.pad(frames, (0, 0, 0, self.settings["projector_stride"]))
        speech = self.projector(frames.to(next(self.projector.parameters()).dtype))  # (B, N, D)
        text = self.llm.get_input_embeddings()(input_ids.clamp(min=0))  # (B, T, D)
        is_speech = (input_ids == SPEECH)[..., None]  # (B, T, 1)
        # The n-th SPEECH position takes the n-th speech embedding
        index = (is_speech.cumsum(dim=1) - 1).clamp(min=0)
        speech = speech.to(text.dtype).take_along_dim(index, dim=1)  # (B, T, D)
        return torch.where(is_speech, speech, text)

    def forward(
        self, input_ids, waveforms, n_samples, labels, target_positions, num_items_in_batch=None
    ):
        """Returns "loss", the cross-entropy of the labels, and "token_sums".

        labels (B, K): target ids or IGNORE_INDEX. target_positions (B, K): the positions whose
        logits predict them. num_items_in_batch: the number of targets of the whole optimizer step,
        by which the summed loss is divided; by default that of this batch. token_sums (B, 3), for
        evaluation: the loss, the number of targets and the number predicted correctly.
        """
        embeds = self.embed(input_ids, waveforms, n_samples)
        # Without autocast the LLM computes in its own dtype, as in recognition
        with torch.autocast(embeds.device.type, enabled=False):
            # Only the logits that predict a target: those of all positions would take gigabytes.
            # transformers accepts (B, K) positions here; row b selects from sequence b
            output = self.llm(
                inputs_embeds=embeds, logits_to_keep=target_positions, use_cache=False
            )
        logits = output.logits.float()  # (B, K, vocabulary)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = losses.view_as(labels)  # 0 at IGNORE_INDEX
        n_targets = (labels != IGNORE_INDEX).sum(dim=1)
        n_correct = (logits.argmax(dim=-1) == labels).sum(dim=1)
        token_sums = torch.stack([losses.detach().sum(dim=1), n_targets, n_correct], dim=1)
        n_items = n_targets.sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / n_items.clamp(min=1), "token_sums": token_sums}

    @torch.no_grad()
    def generate(self, input_ids, waveforms, n_samples, **generate_kwargs):
        """Returns the new tokens (B, n_tokens) of the best hypotheses for left-padded prompts.

        generate_kwargs: those of transformers' generate.
        """
        input_ids = input_ids.to(self.encoder.device)
        embeds = self.embed(input_ids, waveforms, n_samples)
        mask = (input_ids != PAD).long()
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **generate_kwargs)

    def state_dict(self, *args, prefix="", **kwargs):
        """Returns only the projector's tensors, so that checkpoints hold no frozen weights."""
        return self.projector.state_dict(*args, prefix=prefix + "projector.", **kwargs)

    def load_state_dict(self, state_dict, strict=True):
        """Loads the projector. It must match exactly, also when Trainer says strict=False."""
        check_finite(state_dict)
        tensors = {key.removeprefix("projector."): value for key, value in state_dict.items()}
        return self.projector.load_state_dict(tensors)

    def train(self, mode=True):
        """Changes the mode only if it is another one: Trainer calls this at every step."""
        return self if mode == self.training else super().train(mode)

    def activation_checkpointing_enable(self, **kwargs):
        """Called by Trainer for --gradient_checkpointing."""
        self.llm.activation_checkpointing_enable(**kwargs)


@dataclass
class ModelArguments:
    llm_model_name_or_path: str = HfArg(help="a causal LLM with chat template: hub name or folder")
    whisper_model_name_or_path: str = HfArg(help="a model name of openai-whisper, or a file")
    projector_model_path: str | None = HfArg(
        default=None, help="a model.safetensors of train.py; in training, the one to start from"
    )


@dataclass
class ProjectorArguments:
    """How a new projector is built. A saved projector keeps its own settings."""

    projector_hidden_dim: int = HfArg(default=2048, help="hidden size of the projector")
    projector_stride: int = HfArg(default=5, help="encoder frames (20 ms) per speech embedding")
    prompt: str = HfArg(default="Transcribe the speech", help="text after the speech")
    encoder_window: Literal["full", "audio"] = HfArg(
        default="full", help="encode Whisper's 30 s, or only the audio, rounded up to 2 s"
    )

    def __post_init__(self):
        check_minimum(self, projector_hidden_dim=1, projector_stride=1)


def save_projector(model, path):
    """Saves the projector's tensors and, as metadata, the settings that it was built with."""
    metadata = {"west": json.dumps(model.settings)}
    # safetensors' save_file would make a file that only its owner can read
    Path(path).write_bytes(save(model.state_dict(), metadata))


def load_settings(args, projector_args):
    """Returns the settings saved with the projector, or those of a new one.

    The names of the LLM and of Whisper are always those of this run.
    """
    settings = vars(projector_args or ProjectorArguments())
    if path := args.projector_model_path:
        with as_input_error(f"{path}: expected a model.safetensors saved by train.py"):
            saved = json.loads(safe_open(path, "pt").metadata()["west"])
            settings = {name: saved[name] for name in (*settings, "chat")}
    names = "llm_model_name_or_path", "whisper_model_name_or_path"
    return {name: getattr(args, name) for name in names} | settings


def load_llm(name, dtype):
    """Returns (tokenizer, frozen LLM). Raises ValueError if the LLM cannot work on embeddings."""
    tokenizer, config = AutoTokenizer.from_pretrained(name), AutoConfig.from_pretrained(name)
    text_config = config.get_text_config()
    # No dropout or jitter in the frozen LLM. eval() cannot ensure this: Trainer sets training mode,
    # and gradient checkpointing in transformers works in that mode only
    rates = [key for key, value in vars(text_config).items() if isinstance(value, float)]
    text_config.update({key: 0.0 for key in rates if "drop" in key or "jitter" in key})
    llm = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype)
    if "inputs_embeds" not in signature(llm.prepare_inputs_for_generation).parameters:
        raise ValueError(f"{type(llm).__name__} cannot generate from embeddings")
    if getattr(text_config, "hidden_size_per_layer_input", 0):
        raise ValueError(f"each layer of {type(llm).__name__} needs the token ids")
    if llm.get_input_embeddings().embedding_dim != text_config.hidden_size:
        raise ValueError(f"embeddings of {type(llm).__name__} are not of its hidden size")
    return tokenizer, llm


def check_finite(tensors):
    """Raises ValueError if one of the tensors holds an infinite value or a NaN."""
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ValueError("the projector is not finite: its training has diverged")


def load_speech_llm(args, device=None, dtype=None, seed=0, projector_args=None):
    """Builds (SpeechLLM, PromptFormat) of ModelArguments, in eval mode.

    Without projector_model_path the projector is new: built as projector_args say, and initialised
    with seed. Default: bfloat16 on a GPU, else float32 on a CPU. Raises InputError if a model
    cannot be loaded or does not fit the others.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    settings, llm_name = load_settings(args, projector_args), args.llm_model_name_or_path
    # One process of each node goes first, because Whisper's download has no lock
    with PartialState().local_main_process_first():
        window = settings["encoder_window"]
        encoder = SpeechEncoder(args.whisper_model_name_or_path, window, device, dtype)
    with as_input_error(f"--llm_model_name_or_path {llm_name}: expected an LLM with chat template"):
        tokenizer, llm = load_llm(llm_name, dtype)
        embedding = llm.get_input_embeddings()
        prompts = PromptFormat(tokenizer, settings, encoder, embedding.num_embeddings)
    settings["chat"] = prompts.chat
    keep_stop_tokens_only(llm, prompts.end_of_turn_id)
    torch.manual_seed(seed)  # here, because loading may have consumed random numbers
    sizes = encoder.output_dim, embedding.embedding_dim, settings["projector_hidden_dim"]
    projector = Projector(*sizes, settings["projector_stride"])
    model = SpeechLLM(encoder, projector, llm, settings)
    if path := args.projector_model_path:
        with as_input_error(f"{path}: expected a projector for these models"):
            model.load_state_dict(load_file(path))
    return model.to(device).eval(), prompts


def keep_stop_tokens_only(llm, end_of_turn_id):
    """Replaces the LLM's generation config by one that has only stop tokens."""
    eos_ids = llm.generation_config.eos_token_id  # an id, a list or None
    stop_ids = list({end_of_turn_id, *always_iterable(eos_ids)})
    llm.generation_config = GenerationConfig(eos_token_id=stop_ids, pad_token_id=end_of_turn_id)


class SpeechEncoder:
    """Whisper's log-mel spectrogram and encoder, frozen. `name` is passed to whisper.load_model.

    Not an nn.Module, on purpose: DDP, DeepSpeed, the optimizer and checkpoints must not see it.
    Raises InputError if it cannot be loaded.

    Another encoder can replace this class. It needs the same constructor and call, and the
    attributes device, output_dim (D_enc), samples_per_frame and max_frames.
    """

    samples_per_frame = N_SAMPLES_PER_TOKEN  # 320: 20 ms at 16 kHz

    def __init__(self, name, window, device, dtype):
        expected = f"--whisper_model_name_or_path {name}: expected a Whisper model"
        # Created in dtype at once: creating it in float32 first would double the peak of memory
        with as_input_error(expected), local_torch_dtype(dtype):
            model = whisper.load_model(name, device="cpu")
        self.window, self.device, self.dtype = window, device, dtype
        self.n_mels, self.max_frames = model.dims.n_mels, model.dims.n_audio_ctx
        self.output_dim = model.dims.n_audio_state
        self.encoder = model.encoder.eval().requires_grad_(False).to(device, dtype)
        for module in self.encoder.modules():
            if isinstance(module, nn.LayerNorm):
                # Whisper's subclass casts to float32 and back; nn.LayerNorm is a single kernel
                module.__class__ = nn.LayerNorm
        self.hann_window = torch.hann_window(N_FFT).to(device)

    @torch.no_grad()
    def __call__(self, waveforms, n_samples):
        """Encodes concatenated int16 samples; returns frames (B, n_frames, D_enc), zero-padded.

        waveforms: a tensor. n_samples: a list of B lengths. Utterances with equally many frames are
        encoded together, so that the result does not depend on the rest of the batch.
        """
        waveforms = waveforms.to(self.device).float() / 32768
        waveforms = waveforms.split(n_samples)
        indices = range(len(waveforms))
        indices_by_length = map_reduce(indices, keyfunc=lambda i: self.n_frames(n_samples[i]))
        encoded = {}  # index: frames
        with torch.autocast(self.device.type, enabled=False):  # the spectrogram needs float32
            for length, same_length in indices_by_length.items():
                for chunk in batched(same_length, 64):  # bounds the memory
                    frames = self.encode([waveforms[i] for i in chunk], length)
                    encoded.update(zip(chunk, frames, strict=True))
        return pad_sequence([encoded[i] for i in indices], batch_first=True)

    def n_frames(self, n_samples):
        """Returns the number of frames: all 1500, or those of the audio, rounded up to 2 s."""
        if self.window == "full":
            return self.max_frames
        n_steps = math.ceil(n_samples / (100 * self.samples_per_frame))  # of 100 frames, or 2 s
        return min(100 * n_steps, self.max_frames)

    def encode(self, waveforms, n_frames):
        """Encodes a list of waveforms; returns their first n_frames frames (B, n_frames, D_enc).

        The spectrogram and the convolutions see 30 s, as in Whisper. The transformer blocks see
        only n_frames.
        """
        audio = pad_sequence(waveforms, batch_first=True)
        audio = whisper.pad_or_trim(audio, self.max_frames * self.samples_per_frame)
        mel = self.log_mel(audio).to(self.dtype)  # (B, n_mels, 3000)
        x = F.gelu(self.encoder.conv1(mel))
        x = F.gelu(self.encoder.conv2(x)).transpose(1, 2)  # (B, max_frames, D_enc)
        x = (x + self.encoder.positional_embedding)[:, :n_frames].contiguous()
        for block in self.encoder.blocks:
            x = block(x)
        return self.encoder.ln_post(x)

    def log_mel(self, audio):
        """Returns log-mel spectrograms (B, n_mels, 2 * max_frames) of audio (B, n_samples) of 30 s.

        They equal those of whisper.log_mel_spectrogram bit for bit. That function cannot be used
        here: it scales a whole batch by one maximum, and waits for the GPU at every call.
        """
        stft = torch.stft(audio, N_FFT, HOP_LENGTH, window=self.hann_window, return_complex=True)
        magnitudes = stft[..., :-1].abs() ** 2  # (B, 201, 2 * max_frames)
        mel = mel_filters(self.device, self.n_mels) @ magnitudes
        log_mel = mel.clamp(min=1e-10).log10()
        log_mel = torch.maximum(log_mel, log_mel.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (log_mel + 4.0) / 4.0
