# shellcheck shell=bash
# What .ci/run and .ci/full share: steps with their times, and the commands that README.md gives.
# Sourced from the root of a checkout.

work=$PWD/.ci/work
closing_line=""
current="" started=0

# The Triton that the tiles were chosen with; the newest one has a step of its own. For CPU builds of
# PyTorch, which ask for none: a CUDA build brings its own.
export PIP_CONSTRAINT=$PWD/.ci/constraints.txt
export CI=true PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_QUIET=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two workers on two cores
# pip takes PyTorch from the index it is configured with. Where that offers CUDA builds and a CPU build is
# wanted, TORCH_INDEX names the index that has it: its "+cpu" version is the higher one.
if [[ -n ${TORCH_INDEX:-} ]]; then export PIP_EXTRA_INDEX_URL=$TORCH_INDEX; fi

# step NAME: what follows belongs to it, until the next step.
step() {
    finish_step
    current=$1 started=$SECONDS
    printf '\n==> %s\n' "$current"
}

finish_step() {
    if [[ -n $current ]]; then printf -- '--- %s: %d s\n' "$current" $((SECONDS - started)); fi
    current=""
}

# The last words: which step failed, or the total and pytest's closing line.
finish() {
    local status=$?
    if ((status != 0)); then
        printf '\nFAILED in step "%s" (exit status %d)\n' "${current:-start}" "$status" >&2
    else
        finish_step
        printf '\nAll steps passed in %d s\n%s\n' "$SECONDS" "$closing_line"
    fi
}
trap finish EXIT
exec </dev/null

# clean_copy NAME: the checkout without anything a build or a run left in it, at $work/NAME; prints the path.
clean_copy() {
    rm -rf "${work:?}/$1"
    mkdir -p "$work/$1"
    tar --exclude=./.ci/work --exclude=./.git --exclude=./.venv --exclude=./build --exclude=./dist \
        --exclude='*.egg-info' --exclude=__pycache__ --exclude='.*_cache' -cf - . | tar -xf - -C "$work/$1"
    printf '%s\n' "$work/$1"
}

# readme_command NAME: the shell commands in README.md's code fence after <!-- command:NAME -->.
readme_command() {
    awk -v marker="<!-- command:$1 -->" '
        $0 == marker { wanted = 1; next }
        wanted && /^```/ { if (inside) exit; inside = 1; next }
        inside { print; found = 1 }
        END { if (!found) { print "README.md has no " marker > "/dev/stderr"; exit 1 } }' README.md
}

# run_readme_command NAME FOLDER: run them as a reader would, in that copy of the checkout.
run_readme_command() {
    local commands
    commands=$(readme_command "$1")
    printf '%s\n' "$commands"
    (cd "$2" && bash -euo pipefail -c "$commands")
}

# keep_closing_line LOG: remember how pytest's run in that log ended.
keep_closing_line() {
    closing_line=$(grep -E '^=+ .*(passed|failed|error).* in [0-9.]+s' "$1" | tail -n 1)
}
