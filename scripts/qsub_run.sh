#!/usr/bin/env bash
# Train or evaluate on nodes of a PBS cluster (ABCI 3.0: queue rt_HF, 8 H200 a node).
# On a login node it writes a job file into the output folder and submits it; inside a job (also an interactive one) it
# starts the processes on the hosts of $PBS_NODEFILE.
#   PBS_GROUP=gab12345 bash scripts/qsub_run.sh --nodes 4 --walltime 24:00:00 --data_path D -- --norm_pix_loss
set -euo pipefail
# shellcheck source=scripts/launch.sh
. "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

usage() {
    cat <<EOF
usage: bash scripts/qsub_run.sh [settings] [-- flags of the program]

$LAUNCH_HELP
PBS:
  --pbs_group G      PBS_GROUP      project that pays (qsub -P)       (needed to submit)
  --pbs_queue Q      PBS_QUEUE      queue                             (default rt_HF)
  --nodes N          NODES          nodes                             (default 1)
  --gpus_per_node N  GPUS_PER_NODE  processes a node                  (default: submitting 8; in the job nvidia-smi)
  --walltime H:M:S   WALLTIME       time limit                        (default 12:00:00)
  --save_margin S    SAVE_MARGIN    stop and save S seconds before it (default 300)
  --chain N          CHAIN          N jobs, each started when its predecessor did not finish (default 1)
EOF
}

load_site_file
parse_flags "$@"
prepare_settings
: "${PBS_QUEUE:=rt_HF}" "${NODES:=1}" "${GPUS_PER_NODE:=}" "${WALLTIME:=12:00:00}" "${SAVE_MARGIN:=300}" "${CHAIN:=1}"
whole_number NODES 1
whole_number SAVE_MARGIN 0
whole_number CHAIN 1
if [ -n "$GPUS_PER_NODE" ]; then whole_number GPUS_PER_NODE 1; fi
limit="$(seconds "$WALLTIME")"

submit() {
    local job previous="" number queue_command
    need PBS_GROUP "the project that pays (qsub -P)"
    [ "$limit" -gt "$SAVE_MARGIN" ] ||
        die "WALLTIME $WALLTIME is not longer than SAVE_MARGIN $SAVE_MARGIN s; nothing could be trained in it"
    job="$OUT/job.pbs"
    local -a inside=(bash "$REPO_ROOT/scripts/qsub_run.sh")
    local name
    # The whole setting goes into the job file, so that a later edit of site.env does not change a waiting job.
    for name in TASK_TYPE MODEL EPOCH DATASET DATA_PATH OUT CHECKPOINT NPROC GPUS_PER_NODE WALLTIME SAVE_MARGIN \
        PYTHON MPIRUN MPIRUN_FLAGS SITE_SETUP; do
        if [ -n "${!name:-}" ]; then inside+=("--${name,,}" "${!name}"); fi
    done
    inside+=(-- "${PROGRAM_FLAGS[@]}")
    local text
    text="#!/bin/bash
#PBS -P $PBS_GROUP
#PBS -q $PBS_QUEUE
#PBS -l select=$NODES:mpiprocs=${GPUS_PER_NODE:-8}
#PBS -l walltime=$WALLTIME
#PBS -N ${TASK_TYPE}_${MODEL}
#PBS -j oe
#PBS -k oed
cd $(printf '%q' "$PWD")
exec $(quoted "${inside[@]}")"
    if [ "$DRY_RUN" = 1 ]; then
        printf '# %s\n%s\n# submitted by\n' "$job" "$text"
    else
        command -v qsub >/dev/null || die "qsub not found; run this on a login node of the cluster (or use --dry_run)"
        mkdir -p "$OUT"
        printf '%s\n' "$text" >"$job"
    fi
    for ((number = 1; number <= CHAIN; number++)); do
        queue_command=(qsub)
        # afternotok: a job that ran out of time ends with 75 and hands over; one that finished ends the chain.
        if [ -n "$previous" ]; then queue_command+=(-W "depend=afternotok:$previous"); fi
        queue_command+=("$job")
        if [ "$DRY_RUN" = 1 ]; then
            quoted "${queue_command[@]}"
            previous="JOB$number"
        else
            previous="$("${queue_command[@]}")"
            say "submitted $previous ($number of $CHAIN): $job"
        fi
    done
}

inside_job() {
    local -a hosts
    local gpus processes host specification="" code=0 margin
    [ -s "$PBS_NODEFILE" ] || die "PBS_NODEFILE=$PBS_NODEFILE is missing or empty; expected one host a line"
    # A host stands there once or once for each process, as the site likes; the order is kept.
    mapfile -t hosts < <(awk 'NF && !seen[$1]++ { print $1 }' "$PBS_NODEFILE")
    find_programs
    need_mpirun
    training_command
    gpus="${GPUS_PER_NODE:-${NPROC:-$(count_gpus)}}"
    if [ "$gpus" = 0 ]; then gpus=1; fi
    set_threads "$gpus"
    processes=$((${#hosts[@]} * gpus))
    for host in "${hosts[@]}"; do specification+="${specification:+,}$host:$gpus"; done
    mpirun_prefix "$processes"
    LAUNCHER+=(--host "$specification")
    margin=$((limit > SAVE_MARGIN ? limit - SAVE_MARGIN : 0))
    if [ "$DRY_RUN" = 1 ]; then
        printf 'OMP_NUM_THREADS=%s ' "$OMP_NUM_THREADS"
        quoted "${LAUNCHER[@]}" "${COMMAND[@]}"
        return 0
    fi
    say "$TASK_TYPE on ${#hosts[@]} node(s) x $gpus process(es); asked to save after $margin s"
    run_and_forward "$margin" "${LAUNCHER[@]}" "${COMMAND[@]}" || code=$?
    explain_exit "$code"
    exit "$code"
}

if [ -n "${PBS_NODEFILE:-}" ]; then inside_job; else submit; fi
