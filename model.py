"""WeST's model: Whisper encoder (frozen) -> Projector (trained) -> causal LLM (frozen).

After SLAM-ASR (arXiv 2402.08846) and the speech adapter of Llama 3.1 (arXiv 2407.21783, section 8).
In shape comments B: utterances, T: places in a row, N: speech embeddings, D: the LLM's width.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import whisper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from whisper.audio import N_SAMPLES_PER_TOKEN

from dataset import IGNORE, PAD, SPEECH, Rows, explain


@dataclass
class ModelArguments:
    llm_model_name_or_path: str  # a causal LLM with a chat template
    whisper_model_name_or_path: str  # openai-whisper's name of a model, or its file
    projector_model_path: str | None = None  # a checkpoint's; the flags below are for a new one
    projector_hidden_dim: int = 2048
    projector_stride: int = 5  # encoder states, of 20 ms, per speech embedding
    prompt: str = "Transcribe the speech"  # follows the speech in the user turn
    all_speech_embeddings: bool = False  # the whole window's, not only those that cover audio


class Projector(nn.Module):
    """Encoder states -> speech embeddings, one for `stride` of them.

    (B, n_audio_ctx, encoder_dim) -> (B, n_audio_ctx // stride, llm_dim)
    """

    def __init__(self, encoder_dim, llm_dim, hidden_dim=2048, stride=5):
        super().__init__()
        self.conv1d = nn.Conv1d(encoder_dim, encoder_dim, kernel_size=stride, stride=stride)
        self.linear1 = nn.Linear(encoder_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, llm_dim)

    def forward(self, x):
        x = F.relu(self.conv1d(x.transpose(1, 2))).transpose(1, 2)  # (B, N, encoder_dim)
        return self.linear2(F.relu(self.linear1(x)))  # (B, N, llm_dim)


def contiguous(module, args):
    """A forward pre-hook: many kernels are slower on views that are transposed or sliced."""
    return args[0].contiguous(), *args[1:]


class SpeechEncoder:
    """Whisper's frozen encoder and log-mel; `name` is what whisper.load_model takes.

    No nn.Module, so that DDP, DeepSpeed, the optimizer and checkpoints never see it. Every process
    holds it whole, in `dtype`.
    """

    def __init__(self, name, device, dtype):
        model = whisper.load_model(name, device="cpu")  # the decoder is freed on return
        self.dims, self.dtype = model.dims, dtype  # n_mels, n_audio_ctx, n_audio_state, ...
        self.encoder = model.encoder.eval().requires_grad_(False).to(device, dtype)
        # The convolutions hand on a transposed view, which the blocks' additions would keep
        self.encoder.blocks[0].register_forward_pre_hook(contiguous)
        for module in self.encoder.modules():
            if isinstance(module, nn.LayerNorm):  # PyTorch's own computes in fp32 too, without
                module.__class__ = nn.LayerNorm  # Whisper's kernels to cast to it and back

    @torch.no_grad()
    def __call__(self, waveforms):
        """(B, samples) float32 at 16 kHz, 0 behind their ends -> (B, n_audio_ctx, n_audio_state).

        Each log-mel (n_mels, 2 * n_audio_ctx) is of one utterance: it is scaled by its maximum.
        """
        waveforms = whisper.pad_or_trim(waveforms, self.dims.n_audio_ctx * N_SAMPLES_PER_TOKEN)
        with torch.autocast(waveforms.device.type, enabled=False):  # the log-mel needs its fp32
            mels = [whisper.log_mel_spectrogram(wav, self.dims.n_mels) for wav in waveforms]
            # cuDNN's attention is the fastest here, where all have one shape. For a new shape, as
            # each of the LLM's is, it plans for a second.
            torch.backends.cuda.enable_cudnn_sdp(True)
            batches = torch.stack(mels).to(self.dtype).split(64)  # bounds the memory
            states = torch.cat([self.encoder(mel) for mel in batches])
            torch.backends.cuda.enable_cudnn_sdp(False)
            return states


class SpeechLLM(nn.Module):
    """Speech in, text out. `settings` says what built it, and stands in every checkpoint."""

    accepts_loss_kwargs = True  # Trainer, give forward num_items_in_batch: it averages over tokens

    def __init__(self, encoder, projector, llm, settings):
        super().__init__()
        self.encoder, self.projector, self.settings = encoder, projector, settings
        self.llm = llm.requires_grad_(False)
        self.config = llm.config  # DeepSpeed sizes its "auto" buckets by config.hidden_size
        self.compiled = False

    def state_dict(self, *args, prefix="", **kwargs):
        """The projector's alone: nothing frozen is saved, by Trainer nor by DeepSpeed."""
        return self.projector.state_dict(*args, prefix=prefix + "projector.", **kwargs)

    def load_state_dict(self, state_dict, strict=True):
        tensors = {key.removeprefix("projector."): value for key, value in state_dict.items()}
        return self.projector.load_state_dict(tensors)  # always strict

    def compile(self):
        """torch.compile of each LLM layer by itself: in seconds, and one graph serves them all."""
        for layer in self.llm.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(dynamic=True)
        self.compiled = True

    def gradient_checkpointing_enable(self, **kwargs):
        if self.compiled:  # a layer's graph keeps its inputs alone, and computes the rest again
            torch._functorch.config.activation_memory_budget = 0
        else:
            self.llm.gradient_checkpointing_enable(**kwargs)

    def train(self, mode=True):
        """Only the projector trains: dropout in the frozen LLM never runs.

        The LLM's checkpointed layers, though not what is in them, are put into training mode too,
        because transformers checkpoints nothing elsewhere.
        """
        self.training = self.projector.train(mode).training
        for module in self.llm.modules():
            module.training = mode and getattr(module, "gradient_checkpointing", False)
        return self

    def embed(self, input_ids, waveforms):
        """inputs_embeds (B, T, D), of tokens and, where SPEECH stands, of speech; the mask (B, T).

        input_ids (B, T); waveforms (B, samples) float32 viewed as int32.
        """
        text = self.llm.get_input_embeddings()(input_ids.clamp(min=0))  # (B, T, D)
        states = self.encoder(waveforms.view(torch.float32))  # (B, n_audio_ctx, n_audio_state)
        dtype = next(self.projector.parameters()).dtype  # fp32, but for what DeepSpeed casts
        speech = self.projector(states.to(dtype)).to(text.dtype)  # (B, N, D)
        is_speech = (input_ids == SPEECH)[..., None]  # (B, T, 1)
        nth = (is_speech.cumsum(1) - 1).clamp(min=0)  # which of a row's N embeddings stands at t
        embeds = torch.where(is_speech, speech.gather(1, nth.expand_as(text)), text)
        return embeds, (input_ids != PAD).long()

    def forward(self, input_ids, waveforms, labels, num_items_in_batch=None):
        """Cross-entropy of the targets, summed, over num_items_in_batch.

        Rows are padded on the left, so that the targets stand at their ends: the logits are
        computed for the K places of labels (B, K) alone. In eval mode token_sums (B, 3) is each
        utterance's loss, number of targets, and number of them that the model ranks first.
        """
        embeds, mask = self.embed(input_ids, waveforms)
        places = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.autocast(embeds.device.type, enabled=False):  # the LLM runs as when it decodes
            kept = {"use_cache": False, "logits_to_keep": labels.shape[1]}
            logits = self.llm(inputs_embeds=embeds, **places, **kept).logits[:, :-1].float()
        targets = labels[:, 1:]  # place t predicts the token at t + 1
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses = losses.view_as(targets)  # 0 where the target is IGNORE
        n_targets = (targets != IGNORE).sum(1)
        count = n_targets.sum() if num_items_in_batch is None else num_items_in_batch
        outputs = {"loss": losses.sum() / count}
        if not self.training:
            n_right = (logits.argmax(-1) == targets).sum(1)
            outputs["token_sums"] = torch.stack([losses.sum(1), n_targets, n_right], dim=1)
        return outputs

    @torch.no_grad()
    def generate(self, input_ids, waveforms, **flags):
        """Ids (B, new tokens) of the best hypotheses; flags are those of transformers' generate."""
        embeds, mask = self.embed(input_ids, waveforms)
        return self.llm.generate(inputs_embeds=embeds, attention_mask=mask, **flags)


def gathered(parameters):
    """Context in which parameters that ZeRO-3 has partitioned are whole; all ranks must enter."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed  # takes seconds, and only runs with --deepspeed come here

    return deepspeed.zero.GatheredParameters(parameters)


def fingerprint(*weights):
    """Tells one pair of frozen models from another; the same in whichever dtype they are loaded."""
    with gathered(weights):
        signs = [weight[:1024].detach().signbit().cpu().numpy() for weight in weights]
    return hashlib.sha256(b"".join(signs)).hexdigest()[:16]


def load_speech_llm(args, device, dtype, seed=0):
    """(SpeechLLM, Rows) of ModelArguments; without a projector_model_path seed makes a new one.

    Raises InputError where a part is not what it should be, or does not belong to the others.
    """
    llm_name, whisper_name = args.llm_model_name_or_path, args.whisper_model_name_or_path
    path, settings = args.projector_model_path, vars(args)
    if path:  # a trained projector keeps the settings that it was trained with
        with explain(f"--projector_model_path {path}: expected a model.safetensors of train.py"):
            settings = json.loads(safe_open(path, "pt").metadata()["west"])
    with explain(f"--llm_model_name_or_path {llm_name}: expected an LLM with a chat template"):
        tokenizer = AutoTokenizer.from_pretrained(llm_name)
        tokenizer.get_chat_template()
        llm_dim = AutoConfig.from_pretrained(llm_name).get_text_config().hidden_size
    with explain(f"--whisper_model_name_or_path {whisper_name}: expected a Whisper"):
        encoder = SpeechEncoder(whisper_name, device, dtype)
    torch.manual_seed(seed)  # loading may have drawn random numbers
    stride, hidden_dim = settings["projector_stride"], settings["projector_hidden_dim"]
    projector = Projector(encoder.dims.n_audio_state, llm_dim, hidden_dim, stride)
    llm = AutoModelForCausalLM.from_pretrained(llm_name, dtype=dtype)
    llm.get_output_embeddings().register_forward_pre_hook(contiguous)  # a slice: logits_to_keep
    identity = fingerprint(encoder.encoder.conv1.weight, llm.get_input_embeddings().weight)
    model = SpeechLLM(encoder, projector, llm, settings | {"fingerprint": identity})
    if path:
        with explain(f"--projector_model_path {path}: made for other models than these"):
            assert settings["fingerprint"] == identity, settings["llm_model_name_or_path"]
            model.load_state_dict(load_file(path))
    prompt, all_speech = settings["prompt"], settings["all_speech_embeddings"]
    with explain(f"--llm_model_name_or_path {llm_name}: its chat template cannot hold --prompt"):
        rows = Rows(tokenizer, prompt, encoder.dims.n_audio_ctx, stride, all_speech)
    # Decoding inherits nothing of the LLM's own generation config but its stop tokens
    stops = llm.generation_config.eos_token_id
    stops = {rows.end_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    llm.generation_config = GenerationConfig(eos_token_id=list(stops), pad_token_id=rows.end_id)
    return model, rows
