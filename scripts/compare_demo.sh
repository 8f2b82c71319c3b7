#!/usr/bin/env bash
# Three encoders on the demo data, one table: random ViT-S, random MixMIM-tiny, pretrained MixMIM-tiny, each by a linear
# probe, nearest neighbours and fine-tuning, with the same settings for all. Needs the quickstart's checkpoint and makes
# it when it is absent. Runs that are finished are not repeated. The table: runs/compare_demo/table.md, .csv and .tex.
#
# DATA, OUT and PRETRAINED name other places; PROBE_SEEDS and FINETUNE_SEEDS are lists such as "0 1 2".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

setup_env requirements.txt
data="${DATA:-data/demo}"
out="${OUT:-runs/compare_demo}"
pretrained="${PRETRAINED:-runs/quickstart/pretrain/checkpoint.pth}"
read -r -a probe_seeds <<<"${PROBE_SEEDS:-0 1 2}"
read -r -a finetune_seeds <<<"${FINETUNE_SEEDS:-0}"

if [ ! -d "$data" ]; then
    say "demo data"
    python scripts/make_demo_data.py --out "$data"
fi
if [ ! -f "$pretrained" ]; then
    say "pretraining mixmim_tiny as the quickstart does: minutes"
    pretrain_demo "$data" "$(dirname "$pretrained")"
fi

# run NAME PROTOCOL SEED FLAGS...: one run of main_finetune.py, unless it has finished before
run() {
    local folder="$out/$2_$1_$3" name="$1" protocol="$2" seed="$3"
    shift 3
    runs+=("$folder")
    if [ -f "$folder/metrics.json" ]; then return; fi
    say "$protocol, $name, seed $seed"
    mkdir -p "$folder"
    python main_finetune.py --dataset demo --data_path "$data" --protocol "$protocol" --seed "$seed" --num_workers 0 \
        --feature_cache "$out/features" --output_dir "$folder" "$@" >"$folder/console.txt" 2>&1 ||
        die "the run failed; its last words: $(tail -n 3 "$folder/console.txt")"
    grep -E "^Training time|^Average precision" "$folder/console.txt" || true
}

# all NAME MODEL FLAGS...: every protocol and seed of one encoder
all() {
    local name="$1" model="$2" seed
    shift 2
    for seed in "${probe_seeds[@]}"; do
        run "$name" linear "$seed" --model "$model" --batch_size 64 --epochs 30 "$@"
        run "$name" knn "$seed" --model "$model" "$@"
    done
    for seed in "${finetune_seeds[@]}"; do
        run "$name" finetune "$seed" --model "$model" --batch_size 8 --epochs 12 --warmup_epochs 1 --lr 1e-3 \
            --layer_decay 0.8 --drop_path 0 "$@"
    done
}

runs=()
all mixmim_random mixmim_tiny
all mixmim_pretrained mixmim_tiny --finetune "$pretrained"
all vit_random vit_small_patch32_224 # 16 tokens of 32 px at 128 px, as MixMIM has cells: minutes on a laptop's core

say "the table"
python scripts/compare.py "${runs[@]}" --out "$out/table" --latex
