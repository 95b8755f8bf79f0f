# shellcheck shell=bash
# What the scripts of the real cluster share: its addresses, where its files are, and the way into its namespaces.
#
# The cluster is one process, `unshare`, whose namespaces hold everything else: control.sh is process 1 there, its
# network is the control plane's, and node.sh is process 1 of each node below it. Ending that one process ends the
# whole cluster, with all links, addresses, rules and mounts; the machine's own namespaces never see any of them.
# shellcheck disable=SC2034 # the constants are used by the scripts that source this one
set -euo pipefail

HACK=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=hack/lib.sh
source "$HACK/lib.sh"

KUBERNETES=$(sed -n 's/^require k8s.io\/kubernetes //p' "$ROOT/tests/kubernetes/go.mod")
CONTAINERD=v2.2.9 CNI=v1.9.1 COREDNS=v1.14.3
CACHE=${MINIPROXY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/miniproxy}/k8s-$KUBERNETES # hack/build-kubernetes' as well
BIN=$CACHE/bin                                         # all programs; build.sh puts them there
IMAGES=$CACHE/images.tar                               # what the e2e tests' pods run; images.py makes it
STATE=${MINIPROXY_CLUSTER:-/var/lib/miniproxy-cluster} # everything a cluster writes

NET4=172.30.0 NET6=fd00:30::              # control plane .1 and ::1, node I .(10+I) and ::(10+I)
POD4=10.244 POD6=fd00:244:0               # node I: 10.244.I.0/24 and fd00:244:0:I::/64
CLUSTER_CIDR=$POD4.0.0/16,fd00:244::/48
SERVICE_CIDR=10.96.0.0/12,fd00:10:96::/112
API=$NET4.1 DNS=10.96.0.10
KUBECONFIG_FILE=$STATE/kubeconfig
CGROUP=miniproxy-cluster                  # prefix of the nodes' control groups

node_ip4() { printf '%s.%d' "$NET4" $((10 + $1)); }
node_ip6() { printf '%s%d' "$NET6" $((10 + $1)); }

# The host's id of process 1 of the cluster; fails where no cluster runs. The file names `unshare`, its parent, with
# the time it began: a number alone could be somebody else's process by now.
cluster_pid() {
    local pid began
    read -r pid began 2>/dev/null <"$STATE/cluster.pid" && [[ $(began "$pid") == "$began" ]] && pgrep -P "$pid"
}

began() { cut -d' ' -f22 "/proc/$1/stat" 2>/dev/null; }

# in_control COMMAND...: run it in the control plane's namespaces.
in_control() {
    local pid
    pid=$(cluster_pid) || die "no cluster is up: hack/cluster up"
    nsenter -t "$pid" -m -n -u -p -- "$@"
}

# in_node I COMMAND...: run it in node I's namespaces (its number counts where control.sh lives, hence the two steps).
in_node() {
    local pid
    pid=$(cat "$STATE/n$1/pid" 2>/dev/null) || die "there is no node n$1: hack/cluster status"
    in_control nsenter -t "$pid" -m -n -u -p -- "${@:2}"
}

kubectl() { in_control "$BIN/kubectl" --kubeconfig="$KUBECONFIG_FILE" "$@"; }

nodes() { cat "$STATE/nodes"; }
