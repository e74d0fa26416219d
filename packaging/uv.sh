# Sourced by `dev` and `install.sh`: finds uv, or puts one into a private virtual environment, and finds a Python.
# shellcheck shell=sh

uv_version='uv>=0.9,<1'
private=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/vllm-proxy/uv

find_uv() {
    for candidate in uv "${HOME:-}/.local/bin/uv" "${HOME:-}/.cargo/bin/uv" "$private/bin/uv"; do
        if "$candidate" --version >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    for python in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if "$python" -m venv "$private" >/dev/null 2>&1 && "$private/bin/pip" install --quiet "$uv_version" >&2; then
            say "put uv into $private"
            printf '%s\n' "$private/bin/uv"
            return
        fi
    done
    say 'cannot find or install uv: install it by hand (https://docs.astral.sh/uv), or a Python 3 with venv and pip'
    return 1
}

# A shim on PATH (pyenv) may answer for a version that it cannot run, so each candidate must really run.
is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 13) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1
}

# Every Python of this machine that will do, one a line; 3.13 first, with which vLLM is tested the most.
pythons() {
    for version in 3.13 3.14; do
        managed=$("$uv" python find --managed-python --no-python-downloads --no-project $version 2>/dev/null || true)
        for candidate in $managed "python$version" "/usr/bin/python$version" "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$version"*"/bin/python$version"; do
            if is_supported "$candidate"; then
                "$candidate" -c 'import sys; print(sys.executable)'
            fi
        done
    done
}
