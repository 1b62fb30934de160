"""Trains the projector between a frozen Whisper encoder and a frozen LLM.

One GPU:   python train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \\
               --whisper_model_name_or_path large --data_path train.jsonl --bf16 --output_dir out
8 GPUs:    torchrun --standalone --nnodes=1 --nproc_per_node=8 train.py ... \\
               --deepspeed ds_config_zero3.json
2 nodes:   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_id=west --rdzv_backend=c10d \\
               --rdzv_endpoint=HOST:29400 train.py ...        (the same line on each node)

Besides the flags below, every flag of transformers.TrainingArguments works.
"""

import glob
import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from safetensors.torch import save_file
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from dataset import Utterances, explain, parse_flags, training_set
from model import ModelArguments, gathered, load_settings, load_speech_llm


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
        self.eval_strategy = self.evaluation_strategy or self.eval_strategy
        self.warmup_steps = self.warmup_steps or self.warmup_ratio or 0  # below 1: a ratio
        super().__post_init__()


class LengthSampler(LengthGroupedSampler):
    """Batches of utterances of like duration, in an order that a resumed epoch finds again."""

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(int(self.trainer.state.epoch or 0))
        return super().__iter__()


class ProjectorTrainer(Trainer):
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

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        utterances, kept = self.train_dataset.dataset, self.train_dataset.indices
        sampler = LengthSampler(size, lengths=utterances.seconds[kept].tolist())
        sampler.trainer = self
        return sampler

    def _get_eval_sampler(self, eval_dataset):
        return torch.utils.data.SequentialSampler(eval_dataset)  # in order, however one trains

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
    while os.path.isdir(output_dir) and (checkpoint := get_last_checkpoint(output_dir)):
        try:
            with open(os.path.join(checkpoint, "trainer_state.json")) as file:
                return json.load(file) and checkpoint
        except (OSError, ValueError):
            aside = os.path.join(output_dir, "incomplete-" + os.path.basename(checkpoint))
            print(f"Warning: {checkpoint} is incomplete, moved to {aside}", file=sys.stderr)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(checkpoint, aside)


def main():
    model_args, args = parse_flags(ModelArguments, TrainingArguments)
    args._n_gpu = 1  # a process drives one GPU; without torchrun Trainer would drive them all
    paths = [path for path in (args.data_path, args.eval_data_path) if path]
    sets = [Utterances(path, training=True) for path in paths]
    if args.deepspeed:
        import deepspeed  # takes seconds

        deepspeed.init_distributed()  # which Trainer does not do with --use_cpu
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model, rows = load_speech_llm(model_args, args.device, dtype, args.seed)
    if args.compile and not args.deepspeed:
        with explain("--compile: needs a C compiler and Python's headers; or add --compile False"):
            torch.compile(torch.sin)(torch.ones(1, device=args.device))
        model.compile()
    kept = [training_set(utterances, rows, args.model_max_length) for utterances in sets]
    trainer = ProjectorTrainer(model, args, rows.collate, *kept, compute_metrics=token_metrics)
    with args.main_process_first(local=args.save_on_each_node):
        checkpoint = args.resume_from_checkpoint or newest_checkpoint(args.output_dir)
    if checkpoint:
        with explain(f"cannot resume from {checkpoint}, mend it or give another --output_dir"):
            saved = load_settings(os.path.join(checkpoint, "model.safetensors"))
            same = saved["fingerprint"] == model.settings["fingerprint"]
            assert same, "it was trained with another LLM or Whisper"
            n = len(glob.glob(os.path.join(glob.escape(checkpoint), "rng_state*.pth")))
            # under DeepSpeed each process has saved a part of the optimizer's state
            assert n == args.world_size or not args.deepspeed, f"it is of {n} processes: start {n}"
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
