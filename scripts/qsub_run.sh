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
  --pbs_group G      PBS_GROUP      project that pays (qsub -P)       (needed to submit; none: the site has no projects)
  --pbs_queue Q      PBS_QUEUE      queue                             (default rt_HF; none: that of the site)
  --pbs_select R     PBS_SELECT     what a node must have, e.g. ncpus=96:ngpus=8:mem=900gb
                                                                      (default: nothing but mpiprocs, which is added)
  --qsub_flags F     QSUB_FLAGS     further flags of qsub, e.g. "-m ae -l place=scatter"
  --nodes N          NODES          nodes                             (default 1)
  --gpus_per_node N  GPUS_PER_NODE  processes a node                  (default: submitting 8; in the job nvidia-smi)
  --walltime H:M:S   WALLTIME       time limit                        (default 12:00:00; a job asks qstat for its own)
  --save_margin S    SAVE_MARGIN    stop and save S seconds before it (default 300)
  --chain N          CHAIN          N jobs, one after the other; those after the one that finishes, is refused (2) or
                                    meets numbers that are not finite (3) do nothing (default 1)
EOF
}

load_site_file
parse_flags "$@"
prepare_settings
: "${PBS_SELECT:=}" "${QSUB_FLAGS:=}"
: "${PBS_QUEUE:=rt_HF}" "${NODES:=1}" "${GPUS_PER_NODE:=}" "${WALLTIME:=12:00:00}" "${SAVE_MARGIN:=300}" "${CHAIN:=1}"
whole_number NODES 1
whole_number SAVE_MARGIN 0
whole_number CHAIN 1
if [ -n "$GPUS_PER_NODE" ]; then whole_number GPUS_PER_NODE 1; fi
limit="$(seconds "$WALLTIME")"

submit() {
    local job previous="" number queue_command
    local -a submitted=()
    need PBS_GROUP "the project that pays (qsub -P; none where the site has no projects)"
    [ "$limit" -gt "$SAVE_MARGIN" ] ||
        die "WALLTIME $WALLTIME is not longer than SAVE_MARGIN $SAVE_MARGIN s; nothing could be trained in it"
    job="$OUT/job.pbs"
    local -a inside=(bash "$REPO_ROOT/scripts/qsub_run.sh")
    local name
    # The whole setting goes into the job file, so that a later edit of site.env does not change a waiting job.
    for name in TASK_TYPE MODEL EPOCH DATASET DATA_PATH OUT CHECKPOINT NPROC GPUS_PER_NODE WALLTIME SAVE_MARGIN \
        PYTHON MPIRUN MPIRUN_FLAGS MPI_EXPORT SITE_SETUP; do
        if [ -n "${!name:-}" ]; then inside+=("--${name,,}" "${!name}"); fi
    done
    inside+=(-- "${PROGRAM_FLAGS[@]}")
    local text select="$NODES${PBS_SELECT:+:$PBS_SELECT}"
    case ":$PBS_SELECT" in *:mpiprocs=*) ;; *) select+=":mpiprocs=${GPUS_PER_NODE:-8}" ;; esac
    text="#!/bin/bash"
    if [ "$PBS_GROUP" != none ]; then text+=$'\n'"#PBS -P $PBS_GROUP"; fi
    if [ "$PBS_QUEUE" != none ]; then text+=$'\n'"#PBS -q $PBS_QUEUE"; fi
    text+="
#PBS -l select=$select
#PBS -l walltime=$WALLTIME
#PBS -N ${TASK_TYPE}_${MODEL}
#PBS -j oe
#PBS -k oed
cd $(printf '%q' "$PWD")"
    # What it exports is read when the job starts.
    if [ -n "${SITE_FILE:-}" ]; then text+=$'\n'"export SITE_FILE=$(printf '%q' "$(realpath "$SITE_FILE")")"; fi
    text+=$'\n'"exec $(quoted "${inside[@]}")"
    split_words QSUB_FLAGS
    if [ "$DRY_RUN" = 1 ]; then
        printf '# %s\n%s\n# submitted by\n' "$job" "$text"
    else
        command -v qsub >/dev/null || die "qsub not found; run this on a login node of the cluster (or use --dry_run)"
        mkdir -p "$OUT"
        rm -f "$OUT/job.exit"
        printf '%s\n' "$text" >"$job"
    fi
    for ((number = 1; number <= CHAIN; number++)); do
        queue_command=(qsub "${WORDS[@]}")
        # afterany, and the job looks how its predecessor ended: with afternotok the first success would delete the
        # second job, and what becomes of those that wait for a deleted one differs between versions and sites.
        if [ -n "$previous" ]; then queue_command+=(-W "depend=afterany:$previous" -v CHAINED=1); fi
        queue_command+=("$job")
        if [ "$DRY_RUN" = 1 ]; then
            quoted "${queue_command[@]}"
            previous="JOB$number"
        else
            previous="$("${queue_command[@]}")"
            submitted+=("$previous")
            say "submitted $previous ($number of $CHAIN): $job"
        fi
    done
    if [ "${#submitted[@]}" -gt 1 ]; then say "to end the whole chain: qdel ${submitted[*]}"; fi
}

# seconds_left: what the queue system still gives this job; fails when it does not say.
seconds_left() {
    local facts total started used=""
    [ -n "${PBS_JOBID:-}" ] && command -v qstat >/dev/null || return 1
    facts="$(timeout 30 qstat -f "$PBS_JOBID" 2>/dev/null)" || return 1
    total="$(sed -n 's/^[[:space:]]*Resource_List\.walltime = //p' <<<"$facts")"
    [[ "$total" =~ ^[0-9]+(:[0-9]+){0,2}$ ]] || return 1
    # The start is exact; the time used is counted every few minutes only.
    started="$(sed -n 's/^[[:space:]]*stime = //p' <<<"$facts")"
    if [ -n "$started" ] && started="$(date -d "$started" +%s 2>/dev/null)"; then
        used=$(($(date +%s) - started))
    else
        used="$(sed -n 's/^[[:space:]]*resources_used\.walltime = //p' <<<"$facts")"
        [[ "$used" =~ ^[0-9]+(:[0-9]+){0,2}$ ]] || return 1
        used="$(seconds "$used")"
    fi
    total="$(seconds "$total")"
    echo $((used > 0 && used < total ? total - used : used < 0 ? total : 0))
}

# look_at_predecessor: a job of a chain does nothing when the one before it has finished, or failed for good.
look_at_predecessor() {
    local code
    [ -n "${CHAINED:-}" ] && [ -f "$OUT/job.exit" ] || return 0
    code="$(<"$OUT/job.exit")"
    [[ "$code" =~ ^[0-9]+$ ]] || return 0
    if ! another_run_helps "$code"; then
        if [ "$code" = 0 ]; then
            say "an earlier job of this chain has finished the run; nothing is left to do"
        else
            say "an earlier job of this chain ended with exit code $code, which another run does not mend"
        fi
        exit "$code"
    fi
}

inside_job() {
    local -a hosts
    local gpus processes host specification="" code=0 left after
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
    # In a job mpirun takes slots from $PBS_NODEFILE, one for each line, and the numbers after the hosts do not raise
    # them; oversubscribe: a host that stands there once takes all its processes nevertheless.
    LAUNCHER+=(--host "$specification" --map-by "ppr:$gpus:node:oversubscribe")
    if [ "$DRY_RUN" = 1 ]; then
        printf 'OMP_NUM_THREADS=%s ' "$OMP_NUM_THREADS"
        quoted "${LAUNCHER[@]}" "${COMMAND[@]}"
        return 0
    fi
    look_at_predecessor
    mkdir -p "$OUT"
    rm -f "$OUT/job.exit"
    left="$(seconds_left)" || left="$limit"
    after="$(time_to_save "$left")"
    say "$TASK_TYPE on ${#hosts[@]} node(s) x $gpus process(es); $left s are left, asked to save after $after s"
    run_and_forward "$after" "${LAUNCHER[@]}" "${COMMAND[@]}" || code=$?
    echo "$code" >"$OUT/job.exit"
    explain_exit "$code"
    exit "$code"
}

if [ -n "${PBS_NODEFILE:-}" ]; then inside_job; else submit; fi
