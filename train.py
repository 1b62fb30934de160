"""Trains the projector between a frozen Whisper encoder and a frozen LLM.

One GPU:   python train.py --llm_model_name_or_path Qwen2-1.5B-Instruct \\
               --whisper_model_name_or_path large --data_path train.jsonl --bf16 --output_dir out
8 GPUs:    torchrun --standalone --nnodes=1 --nproc_per_node=8 train.py ... \\
               --deepspeed ds_config_zero3.json
2 nodes:   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_id=west --rdzv_backend=c10d \\
               --rdzv_endpoint=HOST:29400 train.py ...        (the same line on each node)

It also takes the flags of transformers.TrainingArguments, except those in UNSUPPORTED. The same
command started again goes on from the newest complete checkpoint of --output_dir.
"""

import contextlib
import gc
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save_file
from transformers.trainer_pt_utils import LengthGroupedSampler

from dataset import InputError, Utterances, parse_flags
from model import ModelArguments, compile_layers, fetch_whole_layers, load_speech_llm

UNSUPPORTED = "label_smoothing_factor", "neftune_noise_alpha", "batch_eval_metrics"


@dataclass(kw_only=True)
class TrainingArguments(transformers.TrainingArguments):
    data_path: str  # jsonl of {"wav": ..., "txt": ...}
    eval_data_path: str | None = None  # likewise, for the evaluation's loss and token accuracy
    model_max_length: int = 512  # of a row, in tokens and speech embeddings
    compile: bool = torch.cuda.is_available()  # the LLM's layers
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "random"
    # Recipes still use the names of transformers 4. A warm-up below 1 is a ratio
    eval_strategy: str = field(default="no", metadata={"aliases": "--evaluation_strategy"})
    warmup_steps: float = field(default=0, metadata={"aliases": "--warmup_ratio"})
    remove_unused_columns: bool = False  # "wav" and "txt" are not arguments of the model
    ddp_find_unused_parameters: bool | None = False
    logging_nan_inf_filter: bool = False  # would wait for the GPU at each step, and hide a NaN

    def __post_init__(self):
        for name in UNSUPPORTED:
            if getattr(self, name):
                raise ValueError(f"--{name} does not work with this model")
        # Without a GPU, transformers would let torchrun's processes each train alone
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        self.accelerator_config.non_blocking = self.dataloader_pin_memory
        self._n_gpu = 1  # a process drives one GPU; without torchrun Trainer would drive them all


class LengthSampler(LengthGroupedSampler):
    """Its order depends on the seed and the epoch alone, so that a resumed run repeats it."""

    def __init__(self, trainer):
        self.args, self.trainer = trainer.args, trainer
        n_grouped = self.args.train_batch_size * self.args.gradient_accumulation_steps
        super().__init__(n_grouped, lengths=trainer.train_dataset.seconds)

    def __iter__(self):
        epoch = int(self.trainer.state.epoch or 0)
        self.generator = torch.Generator().manual_seed(self.args.seed + epoch)
        return super().__iter__()


class ProjectorTrainer(transformers.Trainer):
    """A Trainer whose checkpoints hold the projector and what resuming needs, nothing frozen."""

    unreadable = frozenset()  # what was said of audio files that were skipped

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy == "group_by_length":
            return LengthSampler(self)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset):  # Trainer's would look for lengths of input_ids
        return torch.utils.data.SequentialSampler(eval_dataset)

    def _prepare_inputs(self, inputs):
        for error in set(inputs.pop("errors")) - self.unreadable:
            print(f"Warning: skipped {error}", file=sys.stderr)
            self.unreadable |= {error}
        return super()._prepare_inputs(inputs)

    def save_model(self, output_dir=None, _internal_call=False):
        folder = Path(output_dir or self.args.output_dir)
        whole = contextlib.nullcontext()
        if self.is_deepspeed_enabled:  # ZeRO-3 has partitioned the projector over all processes
            import deepspeed

            whole = deepspeed.zero.GatheredParameters(list(self.model.projector.parameters()))
        with whole:
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                metadata = {"west": json.dumps(self.model.settings)}
                save_file(self.model.state_dict(), folder / "model.safetensors", metadata)
        if self.args.push_to_hub and not _internal_call:  # the final model, with a model card
            self.push_to_hub(tags=["west", "automatic-speech-recognition"])

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.is_deepspeed_enabled:  # else DeepSpeed adds each rank's part of the frozen LLM
            engine = self.model_wrapped
            engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # so that trainer_state.json is the last of all


def token_metrics(prediction):
    """Per target token, whatever the batches were: predictions (utterances, 3) are token_sums."""
    loss, n_targets, n_right = prediction.predictions.sum(axis=0, dtype=float)
    return {"loss": loss / n_targets, "token_accuracy": n_right / n_targets}


def step_to_resume(checkpoint):
    """The step of a checkpoint, or 0 if something that resuming needs is missing.

    trainer_state.json is written last; --save_only_model leaves out scheduler.pt.
    """
    with contextlib.suppress(OSError, ValueError):
        if Path(checkpoint, "scheduler.pt").exists():
            return json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"]
    return 0


def checkpoint_to_resume(args):
    """--resume_from_checkpoint, or the newest whole checkpoint of --output_dir, or "".

    Raises InputError where not all processes can resume from it.
    """
    whole = filter(step_to_resume, Path(args.output_dir).glob("checkpoint-*"))
    newest = max(whole, key=step_to_resume, default="")
    checkpoint = str(args.resume_from_checkpoint or newest)
    found = gather_object([(checkpoint, step_to_resume(checkpoint))])  # by each process
    if len(set(found)) > 1 or (checkpoint and not step_to_resume(checkpoint)):
        raise InputError(
            f"{checkpoint or args.output_dir}: expected a whole checkpoint that every process can "
            "read. Nodes must share --output_dir; --save_only_model saves too little to resume"
        )
    n_saved = len(list(Path(checkpoint).glob("rng_state*.pth"))) if checkpoint else args.world_size
    if args.deepspeed and n_saved != args.world_size:
        raise InputError(f"{checkpoint}: saved by {n_saved} processes: start the same number")
    return checkpoint


def main():
    model_args, args = parse_flags(ModelArguments, TrainingArguments)
    if args.deepspeed:
        import deepspeed  # takes seconds

        deepspeed.init_distributed()  # which Trainer does not do with --use_cpu
    paths = [path for path in (args.data_path, args.eval_data_path) if path]
    sets = [Utterances(path, training=True) for path in paths]
    checkpoint = checkpoint_to_resume(args)
    log = PartialState().print  # on a node's first process
    if checkpoint:
        model_args.projector_model_path = f"{checkpoint}/model.safetensors"
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model, rows = load_speech_llm(model_args, args.device, dtype, args.seed)
    for utterances in sets:
        n_out = utterances.leave_out_long(rows, args.model_max_length)
        log(f"{utterances.path}: {len(utterances)} utterances; {n_out} are too long and left out")
    log(f"{sum(p.numel() for p in model.projector.parameters())} parameters are trained")
    log(f"Resuming from {checkpoint}" if checkpoint else "Starting from the first step")
    if args.deepspeed:
        fetch_whole_layers(model.llm)
    if args.compile:
        compile_layers(model.llm, recompute=args.gradient_checkpointing)
        # One flag by two names, which Trainer would act upon once more
        args.gradient_checkpointing = args.activation_checkpointing = False
    trainer = ProjectorTrainer(model, args, rows.collate, *sets, compute_metrics=token_metrics)
    trainer.train(resume_from_checkpoint=checkpoint or None)
    trainer.save_model()
    if unreadable := set(gather_object(list(trainer.unreadable))):
        log(f"skipped audio files: {len(unreadable)}")


if __name__ == "__main__":
    main()
    gc.collect()  # DDP must go first, or gloo's threads may wait for ever
    PartialState().destroy_process_group()  # else they may abort the process as it exits
