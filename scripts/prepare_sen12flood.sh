#!/usr/bin/env bash
# SEN12-FLOOD: from the zip to pairs. All options: scripts/prepare_sen12flood.sh --help
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m sarwmix.sen12flood.prepare "$@"
