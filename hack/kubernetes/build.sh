#!/bin/bash
# build.sh: build those of the cluster's programs that are not in the cache yet, from their Go modules, and make the
# archive of images. The first time takes about 12 minutes on 2 cores, a look whether all are there nothing.
source "$(dirname -- "${BASH_SOURCE[0]}")/settings.sh"

missing() {
    local program
    for program; do [[ -x $BIN/$program ]] || return 0; done
    return 1
}

# build NAME COMMAND...: one line; all the output only if it fails. At low priority: it takes a while.
build() {
    say "building $1"
    nice "${@:2}" >"$CACHE/build.log" 2>&1 || die "building $1 failed: see $CACHE/build.log"
}

kubernetes_programs() {
    local kubernetes=k8s.io/kubernetes small=(-ldflags "-s -w")
    local stamped=(-ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$KUBERNETES")
    cd "$CACHE/module" # build_kubernetes made it of tests/kubernetes/go.mod
    export GOFLAGS="-mod=mod -trimpath -buildvcs=false"
    if missing kubelet kube-scheduler; then
        build "kubelet and kube-scheduler" "$GO" build "${stamped[@]}" -o "$BIN/" $kubernetes/cmd/{kubelet,kube-scheduler}
    fi
    if missing e2e.test; then
        build "the e2e tests" "$GO" test -c "${stamped[@]}" -o "$BIN/e2e.test" $kubernetes/test/e2e
    fi
    if missing agnhost regression-issue-74839 ginkgo; then
        build "what the e2e tests run" "$GO" build "${small[@]}" -o "$BIN/" \
            $kubernetes/test/images/{agnhost,regression-issue-74839} github.com/onsi/ginkgo/v2/ginkgo
    fi
}

other_programs() {
    local containerd=github.com/containerd/containerd/v2/cmd plugins=github.com/containernetworking/plugins/plugins
    export GOFLAGS=-trimpath GOBIN=$BIN
    if missing containerd containerd-shim-runc-v2 ctr; then
        build containerd "$GO" install -ldflags "-s -w" \
            $containerd/{containerd,containerd-shim-runc-v2,ctr}@"$CONTAINERD"
    fi
    if missing bridge loopback host-local portmap; then
        build "CNI plugins" "$GO" install -ldflags "-s -w" \
            $plugins/{main/bridge,main/loopback,ipam/host-local,meta/portmap}@"$CNI"
    fi
    if missing coredns; then
        mkdir -p "$CACHE/coredns"
        cd "$CACHE/coredns"
        cp "$HACK/kubernetes/coredns.go" main.go
        printf 'module coredns.local\n\ngo 1.26\n' >go.mod
        build "CoreDNS's modules" sh -c "$GO get github.com/coredns/coredns@$COREDNS && $GO mod tidy"
        build CoreDNS "$GO" build -ldflags "-s -w" -o "$BIN/coredns" .
    fi
}

make_images() {
    [[ ! -e $IMAGES || $HACK/kubernetes/images.py -nt $IMAGES ]] || return 0
    say "making the images of the e2e tests"
    "$VENV/bin/python" "$HACK/kubernetes/images.py" "$BIN" "$IMAGES"
}

build_kubernetes || die "the Kubernetes programs could not be built. Is this machine offline?"
GO=$(find_go) || GO=$CACHE/go/go/bin/go # build_kubernetes got one where the machine has none
export CGO_ENABLED=0 GOTOOLCHAIN=local GOWORK=off
kubernetes_programs
other_programs
make_images
