#!/usr/bin/env bash
# The whole system in two commands on bundled synthetic speech: trains a projector, transcribes
# held-out utterances. No network, no GPU; about a minute on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-$(mktemp -d)}
export OMP_NUM_THREADS=1
set -x

torchrun --standalone --nnodes=1 --nproc_per_node=2 train.py --use_cpu \
    --llm_model_name_or_path tests/tiny/llm --whisper_model_name_or_path tests/tiny/whisper.pt \
    --data_path tests/tiny/train.jsonl --output_dir "$out" --num_train_epochs 10 \
    --per_device_train_batch_size 4 --learning_rate 1e-3 --lr_scheduler_type cosine \
    --warmup_ratio 0.06 --logging_steps 50 --save_steps 250 --report_to none

python recognize.py \
    --llm_model_name_or_path tests/tiny/llm --whisper_model_name_or_path tests/tiny/whisper.pt \
    --projector_model_path "$out/checkpoint-500/model.safetensors" \
    --data_path tests/tiny/test.jsonl --result_path "$out/result.txt"

{ set +x; } 2> /dev/null
python - tests/tiny/test.jsonl "$out/result.txt" <<'END'
import json, sys, jiwer
lines = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
texts = open(sys.argv[2], encoding="utf-8").read().splitlines()
for name, what in ("sentences", "new sentences, voices seen in training"), ("voices", "new sentences in new voices"):
    pairs = [(u["txt"], text) for u, text in zip(lines, texts, strict=True) if u["set"] == name]
    print(f"\n{len(pairs)} {what}: WER {100 * jiwer.wer(*map(list, zip(*pairs))):.2f} %")
    for reference, hypothesis in pairs[:4]:
        print(f"  reference   {reference}\n  hypothesis  {hypothesis}")
END
