#!/usr/bin/env bash
# The C++ kernels' tests on a build with AddressSanitizer: no read or write beside a tensor (about three minutes, g++).
#
#   bash tools/proof/sanitize.sh     says what it saw, and keeps it in sanitize.txt
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/setup_env.sh
setup_env dev
source tools/proof/keep.sh
keep sanitize 8 "$PYTHON" -m tools.proof.sanitize
