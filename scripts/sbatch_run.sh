#!/usr/bin/env bash
# Train or evaluate on nodes of a SLURM cluster. On a login node it writes a job file into the output folder and submits
# it; inside a job (also an salloc shell) it starts the processes with srun.
#   bash scripts/sbatch_run.sh --nodes 2 --gpus_per_node 8 --sbatch_partition gpu --data_path D -- --norm_pix_loss
set -euo pipefail
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

usage() {
    cat <<EOF
usage: bash scripts/sbatch_run.sh [settings] [-- flags of the program]

$LAUNCH_HELP
SLURM:
  --sbatch_account A    SBATCH_ACCOUNT    account, where the site wants one
  --sbatch_partition P  SBATCH_PARTITION  partition                         (default: that of the site)
  --nodes N             NODES             nodes                             (default 1)
  --gpus_per_node N     GPUS_PER_NODE     processes a node                  (needed to submit; 0: CPU, --nproc a node)
  --cpus_per_task N     CPUS_PER_TASK     cores of a process, with its loader workers
                                                                            (default 8 with a GPU, 1 without; 0: open)
  --sbatch_flags F      SBATCH_FLAGS      further flags of sbatch, e.g. "--mem=0 --qos=high --exclusive"
  --walltime H:M:S      WALLTIME          time limit                        (default 12:00:00; a job asks squeue)
  --save_margin S       SAVE_MARGIN       stop and save S seconds before it (default 300)
  --chain N             CHAIN             run at most N times: requeued while it does not finish (default 1)
  --srun_mpi TYPE       SRUN_MPI          srun --mpi=TYPE, e.g. pmix (default: that of the site; without PMIx the
                                          processes find each other through SLURM's variables)
EOF
}

load_site_file
parse_flags "$@"
prepare_settings
: "${SBATCH_ACCOUNT:=}" "${SBATCH_PARTITION:=}" "${NODES:=1}" "${GPUS_PER_NODE:=}" "${WALLTIME:=12:00:00}"
: "${SAVE_MARGIN:=300}" "${CHAIN:=1}" "${SRUN_MPI:=}" "${CPUS_PER_TASK:=}" "${SBATCH_FLAGS:=}"
whole_number NODES 1
whole_number SAVE_MARGIN 0
whole_number CHAIN 1
if [ -n "$GPUS_PER_NODE" ]; then whole_number GPUS_PER_NODE 0; fi
if [ -n "$CPUS_PER_TASK" ]; then whole_number CPUS_PER_TASK 0; fi
limit="$(seconds "$WALLTIME")"

submit() {
    local job text name tasks
    local -a inside=(bash "$REPO_ROOT/scripts/sbatch_run.sh")
    need GPUS_PER_NODE "processes on a node"
    [ "$limit" -gt "$SAVE_MARGIN" ] ||
        die "WALLTIME $WALLTIME is not longer than SAVE_MARGIN $SAVE_MARGIN s; nothing could be trained in it"
    case "$OUT" in *[\"\\]*) die "OUT is '$OUT'; a quote or backslash in it cannot be told to sbatch" ;; esac
    tasks="$GPUS_PER_NODE"
    if [ "$tasks" = 0 ]; then tasks="${NPROC:-1}"; fi
    if [ -z "$CPUS_PER_TASK" ]; then CPUS_PER_TASK=$((GPUS_PER_NODE > 0 ? 8 : 1)); fi
    job="$OUT/job.slurm"
    for name in TASK_TYPE MODEL EPOCH DATASET DATA_PATH OUT CHECKPOINT NPROC GPUS_PER_NODE CPUS_PER_TASK SAVE_MARGIN \
        CHAIN PYTHON SITE_SETUP SRUN_MPI; do
        if [ -n "${!name:-}" ]; then inside+=("--${name,,}" "${!name}"); fi
    done
    inside+=(-- "${PROGRAM_FLAGS[@]}")
    text="#!/bin/bash
#SBATCH --job-name=${TASK_TYPE}_${MODEL}
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$tasks
#SBATCH --time=$WALLTIME
#SBATCH --signal=USR1@$SAVE_MARGIN
#SBATCH --output=\"${OUT//%/%%}/slurm-%j.out\"
#SBATCH --open-mode=append"
    if [ "$CPUS_PER_TASK" -gt 0 ]; then text+=$'\n'"#SBATCH --cpus-per-task=$CPUS_PER_TASK"; fi
    if [ "$GPUS_PER_NODE" -gt 0 ]; then text+=$'\n'"#SBATCH --gpus-per-node=$GPUS_PER_NODE"; fi
    if [ "$CHAIN" -gt 1 ]; then text+=$'\n'"#SBATCH --requeue"; fi
    if [ -n "$SBATCH_ACCOUNT" ]; then text+=$'\n'"#SBATCH --account=$SBATCH_ACCOUNT"; fi
    if [ -n "$SBATCH_PARTITION" ]; then text+=$'\n'"#SBATCH --partition=$SBATCH_PARTITION"; fi
    text+=$'\n'"cd $(printf '%q' "$PWD")"
    # What it exports is read when the job starts.
    if [ -n "${SITE_FILE:-}" ]; then text+=$'\n'"export SITE_FILE=$(printf '%q' "$(realpath "$SITE_FILE")")"; fi
    text+=$'\n'"export SIGNAL_FROM_SLURM=1"$'\n'"exec $(quoted "${inside[@]}")"
    split_words SBATCH_FLAGS
    if [ "$DRY_RUN" = 1 ]; then
        printf '# %s\n%s\n# submitted by\n' "$job" "$text"
        quoted sbatch "${WORDS[@]}" "$job"
        return 0
    fi
    command -v sbatch >/dev/null || die "sbatch not found; run this on a login node of the cluster (or use --dry_run)"
    mkdir -p "$OUT"
    printf '%s\n' "$text" >"$job"
    sbatch "${WORDS[@]}" "$job"
}

# seconds_left: what the queue system still gives this job; fails when it does not say.
seconds_left() {
    local left days=0
    left="$(timeout 30 squeue -h -j "$SLURM_JOB_ID" -o %L 2>/dev/null)" || return 1
    left="${left//[[:space:]]/}"
    if [[ "$left" =~ ^([0-9]+)-(.*)$ ]]; then days="${BASH_REMATCH[1]}" left="${BASH_REMATCH[2]}"; fi
    [[ "$left" =~ ^[0-9]+(:[0-9]+){0,2}$ ]] || return 1
    echo $((86400 * 10#$days + $(seconds "$left")))
}

inside_job() {
    local code=0 tasks nodes="${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}" after=0 left
    find_programs
    training_command
    tasks="${GPUS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${NPROC:-$(count_gpus)}}}"
    if [ "$tasks" = 0 ]; then tasks="${NPROC:-1}"; fi
    set_threads "$tasks"
    # --kill-on-bad-exit: a lost process ends the step instead of leaving the others waiting.
    # Tasks and cores are said again: srun takes the number of tasks from salloc -n, and no cores from sbatch.
    LAUNCHER=(srun --kill-on-bad-exit=1 --cpu-bind=none --ntasks=$((nodes * tasks)) --ntasks-per-node="$tasks")
    if [ -n "$CPUS_PER_TASK" ] && [ "$CPUS_PER_TASK" -gt 0 ]; then LAUNCHER+=(--cpus-per-task="$CPUS_PER_TASK"); fi
    if [ -n "$SRUN_MPI" ]; then LAUNCHER+=(--mpi="$SRUN_MPI"); fi
    if [ "$DRY_RUN" = 1 ]; then
        printf 'OMP_NUM_THREADS=%s ' "$OMP_NUM_THREADS"
        quoted "${LAUNCHER[@]}" "${COMMAND[@]}"
        return 0
    fi
    command -v srun >/dev/null || die "srun not found although SLURM_JOB_ID is set; run this on a node of the job"
    # In a job of ours SLURM itself sends SIGUSR1 before the limit (--signal above); others need the timer.
    if [ -z "${SIGNAL_FROM_SLURM:-}" ] && left="$(seconds_left)"; then
        after="$(time_to_save "$left")"
        say "$left s are left; asked to save after $after s"
    fi
    run_and_forward "$after" "${LAUNCHER[@]}" "${COMMAND[@]}" || code=$?
    explain_exit "$code"
    # SIGTERM to this script is scancel or a preemption: the user's or SLURM's decision what becomes of the job.
    if another_run_helps "$code" && [ "$TERMINATED" = 0 ] && [ $((${SLURM_RESTART_COUNT:-0} + 1)) -lt "$CHAIN" ]; then
        say "requeueing (run $((${SLURM_RESTART_COUNT:-0} + 2)) of $CHAIN)"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}

if [ -n "${SLURM_JOB_ID:-}" ]; then inside_job; else submit; fi
