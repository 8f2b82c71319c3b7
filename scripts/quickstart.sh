#!/usr/bin/env bash
# From a fresh clone to a model that was pretrained, fine-tuned and compared with one that was not: environment, demo
# data, pretraining on two processes, pictures, fine-tuning from pretrained and from random weights.
# Everything lands in data/demo and runs/quickstart. Run it again to start over with the same result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

setup_env requirements.txt
began=$SECONDS
data=data/demo
out=runs/quickstart

say "demo data: generated Sentinel-1 patches in the layout of BigEarthNet v2"
python scripts/make_demo_data.py --out "$data"

say "pretraining mixmim_tiny with mpirun -np 2"
rm -rf "$out/pretrain"
pretrain_demo "$data" "$out/pretrain"

say "reconstruction pictures: after 1 epoch and at the end"
python main_pretrain.py --dataset demo --data_path "$data" --split test --model mixmim_tiny --batch_size 4 --seed 5 \
    --inference "$out/pretrain/checkpoint_1.pth" "$out/pretrain/checkpoint.pth" --output_dir "$out/pretrain"

say "fine-tuning on the demo's labels, from the pretrained and from random weights, side by side"
rm -rf "$out/finetune"
python scripts/demo_result.py --data_path "$data" --pretrained "$out/pretrain/checkpoint.pth" \
    --output_dir "$out/finetune" --protocols finetune --seeds 0

say "done in $((SECONDS - began)) s after installation"
cat <<EOF
checkpoint        $out/pretrain/checkpoint.pth
loss per epoch    $out/pretrain/log.txt   (tensorboard --logdir $out/pretrain/tensorboard)
pictures          $out/pretrain/reconstructions/
fine-tuning       $out/finetune/*/   (console.txt, metrics.json, precision-recall curves)
next              README.md: your own data, fine-tuning, clusters
EOF
