#!/usr/bin/env bash
# The whole system in two commands on bundled synthetic speech: train a projector, transcribe
# held-out utterances. No network, no GPU; about two minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-$(mktemp -d)}
set -x

torchrun --standalone --nnodes=1 --nproc_per_node=2 train.py --use_cpu \
    --llm_model_name_or_path tests/tiny/llm --whisper_model_name_or_path tests/tiny/whisper.pt \
    --data_path tests/tiny/train.jsonl --output_dir "$out" --num_train_epochs 10 \
    --per_device_train_batch_size 4 --learning_rate 1e-3 --lr_scheduler_type cosine \
    --warmup_ratio 0.06 --logging_steps 50 --save_steps 500 --report_to none

python recognize.py \
    --llm_model_name_or_path tests/tiny/llm --whisper_model_name_or_path tests/tiny/whisper.pt \
    --projector_model_path "$out/model.safetensors" \
    --data_path tests/tiny/test.jsonl --result_path "$out/result.txt"
