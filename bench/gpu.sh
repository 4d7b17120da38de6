#!/usr/bin/env bash
# Tests, conformance and benchmarks on a GPU, for machines that are there for minutes: does what fits into the time
# given, and goes on at the next call. See bench/gpu.py for options (--minutes, --only, --fresh) and exit status.
#
#   bench/gpu.sh --minutes 9
#   bench/gpu.sh --minutes 3 --only tests
#
# Tests run on all CPUs if pytest-xdist is there, and a hang costs one test if pytest-timeout is; everything else
# has the machine to itself. What was done is in build/gpu (--work): another machine goes on where that is.
#
# UNDIVIDED_PTXAS: a folder with ptxas-blackwell, to assemble with it. OUT: a folder that gets a copy of
# the results and of what was done. PYTHON: the interpreter to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}

if [[ -x "${UNDIVIDED_PTXAS:-}/ptxas-blackwell" ]]; then
    export TRITON_PTXAS_PATH="$UNDIVIDED_PTXAS/ptxas-blackwell"
fi

if ! "$python" -m pip install --quiet --no-deps --no-build-isolation -e . 2>/dev/null; then
    # No setuptools recent enough: the checkout under the package's name does as well.
    mkdir -p build/site
    ln -sfn "$PWD" build/site/undivided
    export PYTHONPATH="$PWD/build/site${PYTHONPATH:+:$PYTHONPATH}"
fi

exec "$python" -m undivided.bench.gpu "$@"
