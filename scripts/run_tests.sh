#!/usr/bin/env bash
# Install what the tests need and run the default suite; arguments go to pytest (e.g. -m slow, -k masks).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

setup_env requirements-dev.txt
exec python -m pytest "$@"
