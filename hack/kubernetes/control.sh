#!/bin/bash
# control.sh NODES: process 1 of the cluster, in network, mount and process namespaces of its own: makes the network,
# starts the control plane and the nodes, and stays. hack/cluster starts it; see settings.sh.
source "$(dirname -- "${BASH_SOURCE[0]}")/settings.sh"

NODES=$1
declare -A NAMES # process id → what it is

# start NAME COMMAND...: in the background, with a log.
start() {
    "${@:2}" >>"$STATE/log/$1.log" 2>&1 </dev/null &
    NAMES[$!]=$1
}

# until_true SECONDS WHAT COMMAND...
until_true() {
    local tries=$(($1 * 5))
    until "${@:3}" >/dev/null 2>&1; do
        ((tries-- > 0)) || die "waited $1 s for $2: see $STATE/log"
        sleep 0.2
    done
}

kubectl() { "$BIN/kubectl" --kubeconfig="$KUBECONFIG_FILE" "$@"; }

prepare() {
    mount -t tmpfs tmpfs /run # names of network namespaces, sockets: ours
    hostname control
    ip link set lo up
    sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.default.accept_dad=0
    # The bridge is a switch: what passes it must not meet rules.
    local switch
    for switch in iptables ip6tables arptables; do
        [[ ! -e /proc/sys/net/bridge/bridge-nf-call-$switch ]] || echo 0 >/proc/sys/net/bridge/bridge-nf-call-$switch
    done
    ip link add br0 type bridge
    ip addr add "$API/24" dev br0
    ip addr add "${NET6}1/64" dev br0 nodad
    ip link set br0 up
}

# The authority, the API server's certificate, the key of service accounts, and the administrator's kubeconfig.
certify() {
    local names token
    mkdir -p "$STATE/pki"
    cd "$STATE/pki"
    names=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:localhost
    names+=,IP:127.0.0.1,IP:$API,IP:10.96.0.1,IP:fd00:10:96::1
    openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj /CN=miniproxy-cluster -keyout ca.key -out ca.crt
    openssl genrsa -out sa.key 2048
    openssl req -newkey rsa:2048 -nodes -subj /CN=kube-apiserver -keyout api.key -out api.csr
    openssl x509 -req -in api.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out api.crt \
        -extfile <(echo "subjectAltName=$names")
    token=$(openssl rand -hex 16)
    echo "$token,admin,1,system:masters" >tokens.csv
    write_kubeconfig "$KUBECONFIG_FILE" "$token"
    cd /
} 2>>"$STATE/log/openssl.log"

write_kubeconfig() {
    cat >"$1" <<Y
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://$API:6443", certificate-authority: "$STATE/pki/ca.crt"}}]
users: [{name: u, user: {token: "$2"}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
Y
}

start_control_plane() {
    start etcd "$BIN/etcd" --data-dir "$STATE/etcd" --unsafe-no-fsync --log-level warn \
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
        --listen-peer-urls http://127.0.0.1:2380
    local pki=$STATE/pki
    start kube-apiserver "$BIN/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 \
        --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$pki/sa.key" \
        --service-account-signing-key-file="$pki/sa.key" --service-cluster-ip-range="$SERVICE_CIDR" \
        --tls-cert-file="$pki/api.crt" --tls-private-key-file="$pki/api.key" --cert-dir="$pki" \
        --client-ca-file="$pki/ca.crt" --token-auth-file="$pki/tokens.csv" --authorization-mode=Node,RBAC \
        --bind-address=0.0.0.0 --secure-port=6443 --advertise-address="$API" \
        --allow-privileged=true --enable-priority-and-fairness=false --kubelet-preferred-address-types=InternalIP
    until_true 60 "the API server" kubectl get --raw /readyz
    local fast=(--kubeconfig="$KUBECONFIG_FILE" --leader-elect=false --kube-api-qps=200 --kube-api-burst=400)
    start kube-controller-manager "$BIN/kube-controller-manager" "${fast[@]}" --cert-dir="$pki" \
        --service-account-private-key-file="$pki/sa.key" --root-ca-file="$pki/ca.crt"
    start kube-scheduler "$BIN/kube-scheduler" "${fast[@]}"
}

# Names are resolved by a process beside the API server, behind a Service without selector: they pass the proxy too.
start_dns() {
    cat >"$STATE/Corefile" <<Y
.:53 {
  bind $API ${NET6}1
  errors
  kubernetes cluster.local in-addr.arpa ip6.arpa {
    kubeconfig $KUBECONFIG_FILE x
    pods insecure
    ttl 5
  }
}
Y
    start coredns "$BIN/coredns" -conf "$STATE/Corefile"
    kubectl apply -f - >/dev/null <<Y
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec:
  clusterIP: $DNS
  ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kube-dns-control, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
addressType: IPv4
ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
endpoints: [{addresses: [$API], conditions: {ready: true}}]
Y
}

# start_node I: its namespaces, with node.sh as process 1, and a cable to the bridge.
start_node() {
    local pid
    mkdir -p "$STATE/n$1"
    start "n$1" unshare --net --mount --uts --pid --fork --kill-child --mount-proc --propagation private -- \
        bash "$HACK/kubernetes/node.sh" "$1" "$NODES"
    until_true 10 "node n$1" pgrep -P $!
    pid=$(pgrep -P $!)
    echo "$pid" >"$STATE/n$1/pid"
    ip link add "n$1" type veth peer name eth0 netns "$pid"
    ip link set "n$1" master br0 up
    ip route add "$POD4.$1.0/24" via "$(node_ip4 "$1")"
    ip -6 route add "$POD6:$1::/64" via "$(node_ip6 "$1")"
}

# The kubelet makes its Node; which pod addresses the node has, a cloud would say.
furnish_node() {
    until_true 60 "Node n$1" kubectl get node "n$1"
    kubectl patch node "n$1" --type=merge -p \
        "{\"spec\": {\"podCIDR\": \"$POD4.$1.0/24\", \"podCIDRs\": [\"$POD4.$1.0/24\", \"$POD6:$1::/64\"]}}" >/dev/null
}

prepare
certify
start_control_plane
start_dns
for i in $(seq "$NODES"); do start_node "$i"; done
for i in $(seq "$NODES"); do furnish_node "$i"; done
touch "$STATE/ready"

while wait -n -p ended; do :; done # nothing ends by itself
say "${NAMES[${ended:-0}]:-a process} ended: see $STATE/log"
while :; do wait -n || sleep 1; done # stay, to reap what ends and for a look at what happened
