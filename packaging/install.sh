#!/bin/sh
# Installs vllm-proxy as a systemd service on this machine, from this checkout. Run it again to upgrade.
#   sh packaging/install.sh               the daemon, for a vLLM that is installed elsewhere (engine.command)
#   sh packaging/install.sh --vllm        and vLLM in the same environment: some 10 GB with PyTorch and CUDA
#   sh packaging/install.sh --uninstall   takes all of it away but the configuration, the state and the models
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
prefix=/opt/vllm-proxy
units=/usr/local/lib/systemd/system
config=/etc/vllm-proxy
vllm=

say() { printf '%s\n' "packaging/install.sh: $*" >&2; }

die() {
    say "$*"
    exit 1
}

. "$root/packaging/uv.sh"

# The service sees neither /root nor /home.
is_hidden() {
    case $("$1" -c 'import os, sys; print(os.path.realpath(sys.base_prefix))') in
    /root/* | /home/* | /run/user/* | /tmp/* | /var/tmp/*) return 0 ;;
    *) return 1 ;;
    esac
}

is_ours() { [ "$(readlink /usr/local/bin/vllm-proxy)" = "$prefix/venv/bin/vllm-proxy" ]; }

find_python() {
    if [ -n "${UV_PYTHON:-}" ]; then
        case $UV_PYTHON in
        3.*)
            found=$("$uv" python find --no-python-downloads --no-project "$UV_PYTHON") || die "there is no Python $UV_PYTHON"
            UV_PYTHON=$found
            ;;
        esac
        is_supported "$UV_PYTHON" || die "UV_PYTHON is no Python 3.13 or 3.14: $UV_PYTHON"
        if is_hidden "$UV_PYTHON"; then
            die "UV_PYTHON is where the service cannot see it: $UV_PYTHON"
        fi
        printf '%s\n' "$UV_PYTHON"
        return
    fi
    for candidate in $(UV_PYTHON_INSTALL_DIR=$prefix/python pythons); do
        if ! is_hidden "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "no Python 3.13 or 3.14 here that the service could see: uv downloads one into $prefix/python"
    UV_PYTHON_INSTALL_DIR=$prefix/python "$uv" python install --no-bin 3.13 >&2 ||
        die 'cannot download Python 3.13: install one, and name it in UV_PYTHON'
    UV_PYTHON_INSTALL_DIR=$prefix/python "$uv" python find --managed-python --no-project 3.13
}

install_environment() {
    uv=$(find_uv)
    python=$(find_python)
    if [ -x "$prefix/venv/bin/vllm" ]; then
        vllm='--extra vllm'
    fi
    say "installs into $prefix/venv, with $python"
    # The project itself is always built anew: uv would not see that its code has changed.
    # shellcheck disable=SC2086 # two words, or none
    UV_PROJECT_ENVIRONMENT=$prefix/venv UV_PYTHON=$python UV_LINK_MODE=${UV_LINK_MODE:-copy} "$uv" sync --quiet \
        --project "$root" --locked --no-dev --no-editable --compile-bytecode --reinstall-package vllm-proxy --extra docs $vllm
    if is_ours || [ ! -e /usr/local/bin/vllm-proxy ]; then
        mkdir -p /usr/local/bin
        ln -sf "$prefix/venv/bin/vllm-proxy" /usr/local/bin/vllm-proxy
    else
        say "left alone: /usr/local/bin/vllm-proxy, which is not ours; the command is $prefix/venv/bin/vllm-proxy"
    fi
}

install_configuration() {
    systemd-sysusers "$root/packaging/systemd/sysusers.conf"
    # The daemon writes what the REST API is told, beside the file and then in its place: the folder is its own.
    if [ ! -d "$config" ]; then
        install -d -m 755 -o vllm-proxy -g vllm-proxy "$config"
    fi
    if [ ! -e "$config/models.toml" ]; then
        runuser -u vllm-proxy -- "$prefix/venv/bin/vllm-proxy" init --config "$config/models.toml" >&2
    fi
}

# As the daemon will read it, which would not start with a file that it refuses.
is_usable() { runuser -u vllm-proxy -- "$prefix/venv/bin/vllm-proxy" check --config "$config/models.toml" >&2; }

install_units() {
    version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
    mkdir -p "$units/vllm-proxy.service.d"
    cd "$root/packaging/systemd"
    install -m 644 vllm-proxy.service vllm-proxy.socket "$units"
    if [ "$version" -ge 253 ]; then
        install -m 644 notify-reload.conf "$units/vllm-proxy.service.d"
    fi
    if [ "$version" -ge 254 ]; then
        install -m 644 delegate-subgroup.conf "$units/vllm-proxy.service.d"
    fi
    if command -v restorecon >/dev/null; then # SELinux
        restorecon -R "$prefix" "$units" "$config"
    fi
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
    fi
}

uninstall() {
    if [ -d /run/systemd/system ]; then
        systemctl disable --now vllm-proxy.socket vllm-proxy.service 2>/dev/null || true
    fi
    if [ -x "$prefix/venv/bin/vllm-proxy" ] && [ -d /var/lib/vllm-proxy ]; then # engines that were kept
        "$prefix/venv/bin/vllm-proxy" stop --all --state-dir /var/lib/vllm-proxy >&2 || say 'some engines still run'
    fi
    rm -rf "$prefix" "$units/vllm-proxy.service" "$units/vllm-proxy.socket" "$units/vllm-proxy.service.d"
    if is_ours; then
        rm -f /usr/local/bin/vllm-proxy
    fi
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
        systemctl reset-failed vllm-proxy.service vllm-proxy.socket 2>/dev/null || true
    fi
    say "uninstalled; left here: $config, /var/lib/vllm-proxy, /var/cache/vllm-proxy, the user vllm-proxy"
}

case $#${1:-} in
0) ;;
1--vllm) vllm='--extra vllm' ;;
1--uninstall) ;;
*)
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
[ "$(id -u)" = 0 ] || die 'needs root: sudo sh packaging/install.sh'
command -v systemctl >/dev/null || die 'needs systemd'
umask 022

if [ "${1:-}" = --uninstall ]; then
    uninstall
    exit
fi
install_environment
install_configuration
install_units
say "who may do what: on loopback whoever can connect may use the models and look at them, without a key;"
say "  what changes something needs a key ('sudo vllm-proxy keys new NAME --scope admin') or the control socket, by which"
say "  'sudo vllm-proxy ...' asks. On another address nothing is open without keys or [keys.anonymous] in the file"
if ! is_usable; then
    say "installed; the daemon of this version refuses $config/models.toml, as said above: correct it before it is started"
    exit 78
fi
if [ -d /run/systemd/system ] && systemctl --quiet is-active vllm-proxy.service; then
    say "installed; the daemon that runs is the old one until 'systemctl restart vllm-proxy'"
else
    say "installed; next: edit $config/models.toml, then 'systemctl enable --now vllm-proxy.socket vllm-proxy.service'"
fi
