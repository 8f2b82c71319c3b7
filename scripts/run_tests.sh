#!/usr/bin/env bash
# Install what the tests need and run the default suite in two processes; arguments go to pytest (e.g. -m slow, -k masks,
# -n 0 for one process).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

setup_env requirements-dev.txt
exec python -m pytest -n 2 "$@"
