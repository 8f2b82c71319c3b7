#!/usr/bin/env bash
# From a fresh clone to a flood / no-flood model: generated SEN12-FLOOD-like zip, preparation, fine-tuning, evaluation.
# Starts from the encoder of scripts/quickstart.sh; where that has not been run, a short pretraining comes first.
# Everything lands in data/demo_flood and runs/quickstart_flood. Run it again to start over with the same result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

setup_env requirements.txt
began=$SECONDS
data=data/demo_flood
out=runs/quickstart_flood
encoder=runs/quickstart/pretrain/checkpoint.pth
side=128 # one tile, for speed; the real images have 512, 4 x 4 tiles

if [ ! -f "$encoder" ]; then
    encoder="$out/pretrain/checkpoint.pth"
    say "pretraining mixmim_tiny for 8 epochs (no $PWD/runs/quickstart)"
    python scripts/make_demo_data.py --out data/demo
    rm -rf "$out/pretrain"
    mpi_run 2 python main_pretrain.py --dataset demo --data_path data/demo --model mixmim_tiny \
        --batch_size 16 --epochs 8 --warmup_epochs 1 --lr 1e-3 --norm_pix_loss \
        --num_workers 0 --output_dir "$out/pretrain"
fi

say "a zip with the structure of SEN12FLOOD.zip: 20 + 8 places, 7 acquisitions each"
rm -rf "$data/raw" "$data/SEN12FLOOD.zip"
python scripts/make_sen12_demo.py --out "$data/raw" --train 20 --test 8 --frames 7 --size "$side" \
    --swath_edges 0.05 --zip "$data/SEN12FLOOD.zip"

say "preparation: unzip, align, pair, clean"
PYTHON=python scripts/prepare_sen12flood.sh --zip "$data/SEN12FLOOD.zip" --work "$data/work" \
    --out "$data/prepared" --layout store --size "$side" --overwrite

say "fine-tuning on 2 processes; a fifth of the training places selects the best epoch"
rm -rf "$out/finetune"
mpi_run 2 python main_finetune.py --dataset sen12flood --data_path "$data/prepared" --model mixmim_tiny \
    --input_size "$side" --finetune "$encoder" --val_frac 0.2 --epochs 8 --warmup_epochs 1 --batch_size 8 --lr 1e-3 \
    --clip_grad 1 \
    --num_workers 0 --output_dir "$out/finetune"

say "evaluation of the best checkpoint"
python main_finetune.py --dataset sen12flood --data_path "$data/prepared" --model mixmim_tiny --input_size "$side" \
    --val_frac 0.2 --eval --resume "$out/finetune/checkpoint_best.pth" --num_workers 0 --output_dir "$out/evaluation"

say "done in $((SECONDS - began)) s after installation"
cat <<EOF
checkpoint     $out/finetune/checkpoint_best.pth
metrics        $out/finetune/metrics.json
pictures       $out/finetune/pictures/ (confusion matrix, ROC, precision-recall, wrongly classified pairs)
next           docs/data_sen12flood.md: the real data
EOF
