# shellcheck shell=bash
# The service proxy of the cluster's nodes, exchangeable while the cluster runs. hack/cluster sources this.
#
#   process     miniproxy, a process on each node, with the rights of deploy/'s ServiceAccount and no more
#   daemonset   miniproxy, deployed as deploy/ has it, from the image that hack/image made
#   kube-proxy  the real one, a process on each node, to compare with

# start_proxy KIND MODE
start_proxy() {
    echo "$1 $2" >"$STATE/proxy"
    case $1 in
        process) allow_agent && start_processes "$2" "$VENV/bin/miniproxy" run ;;
        kube-proxy) start_processes "$2" "$BIN/kube-proxy" ;;
        daemonset) start_daemonset "$2" ;;
        none) ;;
        *) die "there is no proxy $1: process, daemonset, kube-proxy or none" ;;
    esac
}

# End what start_proxy started; the rules stay, unless the caller flushes them.
stop_proxy() {
    local i kind mode
    read -r kind mode <"$STATE/proxy"
    [[ $kind != daemonset ]] ||
        kubectl delete --ignore-not-found --cascade=foreground -k "$ROOT/deploy/overlays/$mode" >/dev/null
    for i in $(seq "$(nodes)"); do
        [[ -e $STATE/n$i/proxy.pid ]] || continue
        in_node "$i" bash -c "kill $(cat "$STATE/n$i/proxy.pid")" 2>/dev/null || true
        rm -f "$STATE/n$i/proxy.pid"
    done
}

# All rules, sets and tracked connections of all nodes.
flush() {
    local i
    for i in $(seq "$(nodes)"); do
        in_node "$i" bash -c '
            for command in iptables-nft ip6tables-nft iptables-legacy ip6tables-legacy; do
                for table in nat filter mangle raw; do
                    $command -t $table -F
                    $command -t $table -X
                done
            done
            nft flush ruleset
            conntrack -F' >/dev/null 2>&1 || true
    done
}

# start_processes MODE COMMAND...: on each node, with the same configuration file for either agent.
start_processes() {
    local i mode=$1 kubeconfig=$KUBECONFIG_FILE
    shift
    [[ $1 == "$BIN/kube-proxy" ]] || kubeconfig=$STATE/agent.kubeconfig
    for i in $(seq "$(nodes)"); do
        cat >"$STATE/n$i/proxy.yaml" <<Y
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: $mode
clientConnection: {kubeconfig: "$kubeconfig"}
hostnameOverride: n$i
clusterCIDR: $CLUSTER_CIDR
conntrack: {maxPerCore: 0}
Y
        in_node "$i" setsid bash -c "echo \$\$ >$STATE/n$i/proxy.pid; exec $* --config=$STATE/n$i/proxy.yaml" \
            >>"$STATE/log/n$i-proxy.log" 2>&1 </dev/null &
    done
}

# The ServiceAccount and the rights of deploy/, and a kubeconfig with its token.
allow_agent() {
    kubectl apply -f "$ROOT/deploy/base/rbac.yaml" >/dev/null
    sed "s/token: .*/token: $(kubectl -n kube-system create token miniproxy --duration=24h) }}]/" \
        "$KUBECONFIG_FILE" >"$STATE/agent.kubeconfig"
}

# The overlay of that mode as it is; only the address of the API server is this cluster's.
start_daemonset() {
    kubectl -n kube-system create configmap miniproxy-api-server --dry-run=client -o yaml \
        --from-literal=KUBERNETES_SERVICE_HOST="$API" --from-literal=KUBERNETES_SERVICE_PORT=6443 |
        kubectl apply -f - >/dev/null
    kubectl apply -k "$ROOT/deploy/overlays/$1" >/dev/null
    kubectl -n kube-system rollout status daemonset/miniproxy --timeout=120s
}
