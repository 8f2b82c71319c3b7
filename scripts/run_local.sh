#!/usr/bin/env bash
# Train or evaluate on this machine: one process per GPU, or on the CPU when there is none.
#   DATA_PATH=/data/BigEarthNet-S1 bash scripts/run_local.sh
#   bash scripts/run_local.sh --task_type finetune --data_path D --checkpoint runs/.../checkpoint.pth --epoch 50
set -euo pipefail
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

usage() {
    printf 'usage: bash scripts/run_local.sh [settings] [-- flags of the program]\n\n%s\n' "$LAUNCH_HELP"
}

load_site_file
parse_flags "$@"
prepare_settings
find_programs
training_command

gpus="$(count_gpus)"
processes="${NPROC:-$gpus}"
if [ "$processes" = 0 ]; then processes=1; fi
set_threads "$processes"
LAUNCHER=()
if [ "$processes" -gt 1 ]; then
    need_mpirun
    mpirun_prefix "$processes"
    if [ "$gpus" = 0 ]; then LAUNCHER+=(--oversubscribe); fi
fi
if [ "$DRY_RUN" = 1 ]; then
    printf 'OMP_NUM_THREADS=%s ' "$OMP_NUM_THREADS"
    quoted "${LAUNCHER[@]}" "${COMMAND[@]}"
    exit 0
fi
say "$TASK_TYPE on $processes process(es), $gpus GPU(s)"
code=0
run_and_forward 0 "${LAUNCHER[@]}" "${COMMAND[@]}" || code=$?
explain_exit "$code"
exit "$code"
