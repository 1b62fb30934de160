"""Trains the projector between a frozen Whisper encoder and a frozen LLM.

One GPU:   python train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \\
               --whisper_model_name_or_path large --data_path train.jsonl --bf16 --output_dir out
8 GPUs:    torchrun --standalone --nnodes=1 --nproc_per_node=8 train.py ... \\
               --deepspeed ds_config_zero3.json
2 nodes:   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_id=west --rdzv_backend=c10d \\
               --rdzv_endpoint=HOST:29400 train.py ...        (the same line on each node)

Besides the flags below, every flag of transformers.TrainingArguments works, but for its
--train_sampling_strategy group_by_length.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.trainer_utils import get_last_checkpoint

from dataset import InputError, Utterances, explain, parse_flags, training_set
from model import ModelArguments, gathered, load_speech_llm


@dataclass(kw_only=True)
class TrainingArguments(transformers.TrainingArguments):
    data_path: str  # jsonl of {"wav": ..., "txt": ...}
    eval_data_path: str | None = None  # likewise, for the evaluation's loss and token accuracy
    model_max_length: int = 512  # of a row, in tokens and speech embeddings
    compile: bool = torch.cuda.is_available()  # the LLM's layers, but not under DeepSpeed
    evaluation_strategy: str | None = None  # these two are gone from transformers 5, not from
    warmup_ratio: float | None = None  # its users' recipes
    remove_unused_columns: bool = False  # "wav" and "txt" are no arguments of the model
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self):
        # Without a GPU, transformers would let torchrun's processes each train alone
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.eval_strategy = self.evaluation_strategy or self.eval_strategy
        self.warmup_steps = self.warmup_steps or self.warmup_ratio or 0  # below 1: a ratio
        super().__post_init__()


class ProjectorTrainer(transformers.Trainer):
    """A Trainer whose checkpoints hold the projector and what resuming needs, nothing frozen."""

    def save_model(self, output_dir=None, _internal_call=False):
        output_dir = output_dir or self.args.output_dir
        with gathered(list(self.model.projector.parameters())):  # on every rank
            tensors = {name: value.cpu().clone() for name, value in self.model.state_dict().items()}
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            metadata = {"format": "pt", "west": json.dumps(self.model.settings)}
            save_file(tensors, os.path.join(output_dir, "model.safetensors"), metadata)
        if self.args.push_to_hub and not _internal_call:  # the final model, with a model card
            self.push_to_hub(tags=["west", "automatic-speech-recognition"])

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.is_deepspeed_enabled:  # else DeepSpeed adds each rank's part of the frozen LLM
            engine = self.model_wrapped
            engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # before trainer_state.json, see newest_checkpoint

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Sums per utterance, so that token_metrics' averages do not depend on the batches."""
        with torch.no_grad():
            sums = model(**self._prepare_inputs(inputs))["token_sums"]
        return None, sums, sums


def token_metrics(prediction):
    loss, n_targets, n_right = prediction.predictions.sum(axis=0, dtype=float)
    return {"loss": loss / n_targets, "token_accuracy": n_right / n_targets}


def newest_checkpoint(output_dir):
    """The newest checkpoint-N that is complete, or None. One torn by a kill is put aside.

    trainer_state.json is written last, when all ranks have written theirs: it must be whole.
    """
    while os.path.isdir(output_dir) and (newest := get_last_checkpoint(output_dir)):
        checkpoint = Path(newest)
        try:
            return json.loads((checkpoint / "trainer_state.json").read_text()) and newest
        except (OSError, ValueError):
            aside = checkpoint.with_name("incomplete-" + checkpoint.name)
            print(f"Warning: {checkpoint} is incomplete, moved to {aside}", file=sys.stderr)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


def main():
    model_args, args = parse_flags(ModelArguments, TrainingArguments)
    args._n_gpu = 1  # a process drives one GPU; without torchrun Trainer would drive them all
    paths = [path for path in (args.data_path, args.eval_data_path) if path]
    sets = [Utterances(path, training=True) for path in paths]
    if args.deepspeed:
        import deepspeed  # takes seconds

        deepspeed.init_distributed()  # which Trainer does not do with --use_cpu
    with args.main_process_first(local=args.save_on_each_node):
        checkpoint = args.resume_from_checkpoint or newest_checkpoint(args.output_dir)
    if checkpoint:
        model_args.projector_model_path = os.path.join(checkpoint, "model.safetensors")
        n = len(list(Path(checkpoint).glob("rng_state*.pth")))
        if args.deepspeed and n != args.world_size:  # each has saved a part of the optimizer
            raise InputError(f"{checkpoint}: start {n} processes, or give another --output_dir")
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model, rows = load_speech_llm(model_args, args.device, dtype, args.seed)
    if args.compile and not args.deepspeed:
        with explain("--compile: needs a C compiler and Python's headers; or add --compile False"):
            torch.compile(torch.sin)(torch.ones(1, device=args.device))
        model.compile()
    kept = [training_set(utterances, rows, args.model_max_length) for utterances in sets]
    trainer = ProjectorTrainer(model, args, rows.collate, *kept, compute_metrics=token_metrics)
    if args.process_index == 0:
        for path, utterances, subset in zip(paths, sets, kept, strict=True):
            n_out = len(utterances) - len(subset)  # too long for the window or --model_max_length
            print(f"{path}: {len(subset)} utterances; {n_out} are too long and left out")
        print(f"{sum(p.numel() for p in model.projector.parameters())} parameters are trained")
        print(f"Resuming from {checkpoint}" if checkpoint else "Starting from the first step")
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
