"""Trains the projector between a frozen Whisper encoder and a frozen LLM.

One GPU:   python train.py --llm_model_name_or_path Qwen/Qwen2-1.5B-Instruct \\
               --whisper_model_name_or_path large-v2 --data_path train.jsonl --bf16 \\
               --learning_rate 1e-3 --warmup_steps 200 --output_dir out
8 GPUs:    torchrun --standalone --nnodes=1 --nproc_per_node=8 train.py ...
2 nodes:   torchrun --nnodes=2 --nproc_per_node=8 --rdzv_id=west --rdzv_backend=c10d \\
               --rdzv_endpoint=HOST:29400 train.py ...        (the same line on each node)

Add --deepspeed ds_config_zero3.json for an LLM that does not fit on one GPU. The flags of
transformers.TrainingArguments work too, except those in REQUIRED_VALUES. The same command, started
again, resumes from the latest complete checkpoint in --output_dir.
"""

import contextlib
import gc
import json
import math
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_pt_utils import LengthGroupedSampler

from dataset import InputError, SpeechDataset, as_input_error, check_minimum
from model import ModelArguments, ProjectorArguments, check_finite, load_speech_llm, save_projector

# Flags that would change or hide the loss, which the model computes itself
REQUIRED_VALUES = {
    "label_smoothing_factor": 0,
    "neftune_noise_alpha": None,
    "batch_eval_metrics": False,
    "prediction_loss_only": False,
    "eval_do_concat_batches": True,
}


@dataclass(kw_only=True)
class TrainingArguments(transformers.TrainingArguments):
    data_path: str = HfArg(help='jsonl of {"wav": path, "txt": transcript, "duration": seconds}')
    eval_data_path: str | None = HfArg(default=None, help="jsonl for evaluation, of the same form")
    model_max_length: int = HfArg(default=512, help="skip longer sequences of text and speech")
    compile: bool = HfArg(default=torch.cuda.is_available(), help="torch.compile the LLM")

    def __post_init__(self):
        check_minimum(self, per_device_train_batch_size=1, per_device_eval_batch_size=1)
        check_minimum(self, gradient_accumulation_steps=1)
        for name, value in REQUIRED_VALUES.items():
            if getattr(self, name) != value:
                raise ValueError(f"--{name} {getattr(self, name)} does not work with this model")
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError("--train_sampling_strategy batch_rebalance is not supported")
        if self.eval_strategy != "no" and not self.eval_data_path:
            raise ValueError(f"--eval_strategy {self.eval_strategy} needs --eval_data_path")
        if Path(self.output_dir or "").is_file():
            raise ValueError(f"--output_dir {self.output_dir} is a file")
        if self.resume_from_checkpoint == "True":
            self.resume_from_checkpoint = None  # the default is the latest checkpoint
        # Without a GPU, torchrun's processes would not form a group and would each train alone
        self.use_cpu |= not torch.accelerator.is_available()
        super().__post_init__()
        # Copies of pinned batches need not wait for the GPU
        self.accelerator_config.non_blocking = self.dataloader_pin_memory
        self._n_gpu = 1  # one GPU per process; without torchrun, Trainer would use them all


def parse_flags():
    """Returns (ModelArguments, ProjectorArguments, TrainingArguments) from the command line."""
    parser = HfArgumentParser((ModelArguments, ProjectorArguments, TrainingArguments))
    # The names of two flags in transformers 4. A warmup_steps below 1 is a share of all steps
    parser.add_argument("--evaluation_strategy", dest="eval_strategy", help="as --eval_strategy")
    parser.add_argument("--warmup_ratio", dest="warmup_steps", type=float, help="as --warmup_steps")
    parser.set_defaults(
        remove_unused_columns=False,  # the data collator needs "wav" and "txt"
        logging_nan_inf_filter=False,  # it would hide a NaN, and wait for the GPU at every step
        ddp_find_unused_parameters=False,
    )
    with as_input_error("wrong flags"):
        return parser.parse_args_into_dataclasses()


class ProjectorTrainer(transformers.Trainer):
    """A Trainer whose checkpoints hold the projector and its training state, no frozen weights."""

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy == "group_by_length":
            return EpochLengthSampler(self)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset):  # Trainer's would look for the lengths of input_ids
        return torch.utils.data.SequentialSampler(eval_dataset)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # Log before every save: log() ends the run if the loss is not finite
        self.control.should_log |= self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        # With fp16 a gradient may overflow: its scaler then skips the step
        names = ["loss", "eval_loss", "train_loss"] + ([] if self.args.fp16 else ["grad_norm"])
        for name in names:
            if not math.isfinite(logs.get(name, 0)):
                raise InputError(
                    f"step {self.state.global_step}: {name} is {logs[name]}: training has diverged;"
                    " lower --learning_rate, or use --bf16 instead of --fp16"
                )

    def save_model(self, output_dir=None, _internal_call=False):
        folder = Path(output_dir or self.args.output_dir)
        gathered = contextlib.nullcontext()
        if self.is_deepspeed_enabled:  # ZeRO-3 has partitioned the projector over all processes
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(self.model.projector.parameters())
        with gathered:
            with as_input_error(f"{folder}: not saved"):
                check_finite(self.model.state_dict())
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                save_projector(self.model, folder / "model.safetensors")
        if self.args.push_to_hub and not _internal_call:  # the final model, with a model card
            self.push_to_hub(tags=["west", "automatic-speech-recognition"])

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.is_deepspeed_enabled:  # else every process also saves its part of the frozen LLM
            engine = self.model_wrapped
            engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # Trainer writes trainer_state.json next. By then every process has saved its part, so that
        # this file marks a complete checkpoint
        self.accelerator.wait_for_everyone()


def compute_metrics(prediction):
    """Returns loss and accuracy per target token, whatever the batches were.

    prediction.predictions (utterances, 3): token_sums of SpeechLLM.forward.
    """
    loss, n_targets, n_correct = prediction.predictions.sum(axis=0, dtype=float)
    if n_targets == 0:
        raise InputError("--eval_data_path: no utterance could be read")
    # "loss" replaces Trainer's own eval_loss, which is a mean over batches
    return {"loss": loss / n_targets, "token_accuracy": n_correct / n_targets}


def saved_step(checkpoint):
    """Returns the step of a checkpoint, or 0 if it lacks something that resuming needs."""
    with contextlib.suppress(OSError, ValueError):
        # --save_only_model writes neither file. "latest" is DeepSpeed's
        if any(Path(checkpoint, name).exists() for name in ("scheduler.pt", "latest")):
            # Written last
            return json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"]
    return 0


def find_checkpoint(args):
    """Returns the checkpoint to resume from and its step, or ("", 0).

    It is --resume_from_checkpoint, or else the latest complete one of --output_dir. Raises
    InputError unless every process can resume from it.
    """
    complete = filter(saved_step, Path(args.output_dir).glob("checkpoint-*"))
    latest = max(complete, key=saved_step, default="")
    checkpoint = str(args.resume_from_checkpoint or latest)
    step = saved_step(checkpoint) if checkpoint else 0
    seen_by_processes = set(gather_object([(checkpoint, step)]))
    if len(seen_by_processes) > 1 or (checkpoint and not step):
        raise InputError(
            f"{checkpoint or args.output_dir}: expected a complete checkpoint that every process "
            "can read. Nodes must share --output_dir; --save_only_model saves too little to resume"
        )
    if checkpoint and args.deepspeed:
        n_processes = len(list(Path(checkpoint).glob("rng_state*.pth")))
        if n_processes != args.world_size:
            raise InputError(
                f"{checkpoint}: saved by {n_processes} processes of DeepSpeed; resume with as many"
            )
    return checkpoint, step


def main():
    model_args, projector_args, args = parse_flags()
    if args.deepspeed:
        import deepspeed  # slow to import

        deepspeed.init_distributed()  # Trainer does not do this with --use_cpu
    print_once = PartialState().print  # on one process per node
    paths = filter(None, [args.data_path, args.eval_data_path])
    datasets = [SpeechDataset(path, require_text=True) for path in paths]
    checkpoint, step = find_checkpoint(args)
    if checkpoint:
        model_args.projector_model_path = f"{checkpoint}/model.safetensors"
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model, prompts = load_speech_llm(model_args, args.device, dtype, args.seed, projector_args)
    for dataset in datasets:
        n_dropped = dataset.drop_long(prompts, args.model_max_length)
        print_once(f"{dataset.path}: {len(dataset)} utterances, {n_dropped} skipped as too long")
    prepare_llm(model.llm, args)
    trainer = ProjectorTrainer(
        model, args, prompts.collate, *datasets, compute_metrics=compute_metrics
    )
    n_parameters = trainer.get_num_trainable_parameters()
    print_once(f"Training {n_parameters:,} parameters; settings: {model.settings}")
    # Trainer would train a finished run for one more step
    *_, max_steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    if step < max_steps:
        print_once(f"Resuming from {checkpoint}" if checkpoint else "Starting from step 0")
        trainer.train(resume_from_checkpoint=checkpoint or None)
    else:
        print_once(f"Training is finished: {checkpoint} is at step {step} of {max_steps}")
    if step < max_steps or not Path(args.output_dir, "model.safetensors").exists():
        trainer.save_model()


# EpochLengthSampler and prepare_llm are for speed only. They can be deleted with their calls.


class EpochLengthSampler(LengthGroupedSampler):
    """Makes batches of similar length, in an order that depends only on the seed and the epoch.

    So a run that resumes in the middle of an epoch repeats the order of that epoch.
    """

    def __init__(self, trainer):
        self.trainer, args = trainer, trainer.args
        batch_size = args.train_batch_size * args.gradient_accumulation_steps
        self.seed = args.seed if args.data_seed is None else args.data_seed
        super().__init__(batch_size, lengths=trainer.train_dataset.seconds)

    def __iter__(self):
        # The epoch is Trainer's: accelerate does not call set_epoch in an epoch that is resumed
        epoch = int(self.trainer.state.epoch or 0)
        self.generator = torch.Generator().manual_seed(self.seed + epoch)
        return super().__iter__()


def prepare_llm(llm, args):
    """Compiles each of the LLM's layers, and lets ZeRO-3 gather the weights of a layer together."""
    # In every forward pass transformers asks the GPU whether sequences are packed. While the host
    # waits for the answer it cannot launch the LLM's layers. Our sequences are never packed
    transformers.masking_utils.find_packed_sequence_indices = lambda position_ids: None
    if args.deepspeed:
        import deepspeed

        deepspeed.utils.set_z3_leaf_modules(llm, [GradientCheckpointingLayer])
    if args.compile:
        if args.gradient_checkpointing:
            # Compiled layers recompute activations by themselves, so turn Trainer's flag off, by
            # both of its names
            torch._functorch.config.activation_memory_budget = 0
            args.gradient_checkpointing = args.activation_checkpointing = False
        for layer in llm.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = torch.compile(layer.forward, dynamic=True)  # all share one graph


if __name__ == "__main__":
    # torch announces the new names of its collectives at every gather of DeepSpeed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    main()
    gc.collect()  # frees DDP before its process group, or gloo's threads may hang
    PartialState().destroy_process_group()  # else they may crash the process at its exit
