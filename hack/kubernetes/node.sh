#!/bin/bash
# node.sh I NODES: process 1 of node I, in namespaces of its own: network, mounts, control groups, CNI, containerd and
# kubelet. control.sh starts it.
source "$(dirname -- "${BASH_SOURCE[0]}")/settings.sh"

I=$1 NODES=$2 NAME=n$1 HOME_OF=$STATE/n$1
CONTROL_GROUP=$CGROUP-$NAME

connect() {
    ip link set lo up
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done # control.sh plugs it in
    sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv6.conf.default.accept_dad=0 \
        net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0
    # A reply between two pods of one node only passes the bridge; rules have to see it to translate it back.
    local switch other
    for switch in iptables ip6tables; do
        [[ ! -e /proc/sys/net/bridge/bridge-nf-call-$switch ]] || echo 1 >/proc/sys/net/bridge/bridge-nf-call-$switch
    done
    ip addr add "$(node_ip4 "$I")/24" dev eth0
    ip addr add "$(node_ip6 "$I")/64" dev eth0 nodad
    ip link set eth0 up
    ip route add default via "$API"
    ip -6 route add default via "${NET6}1"
    for other in $(seq "$NODES"); do
        [[ $other != "$I" ]] || continue
        ip route add "$POD4.$other.0/24" via "$(node_ip4 "$other")"
        ip -6 route add "$POD6:$other::/64" via "$(node_ip6 "$other")"
    done
}

# The node's own /sys (sysfs shows the interfaces of the network namespace that mounts it), /run and /var/lib.
mount_all() {
    local folder groups=$HOME_OF/cgroup
    mkdir -p "$groups" "$HOME_OF"/{kubelet,containerd,cni,pods,containers,net.d}
    # The machine's control groups stay below the new /sys. While mounts are private: the umount of a shared rbind
    # would take the submounts out of the copy as well.
    mount --rbind /sys/fs/cgroup "$groups"
    mount -t sysfs sysfs /sys
    mount --rbind "$groups" /sys/fs/cgroup
    umount -l "$groups"
    mount -t tmpfs tmpfs /run
    mkdir -p /run/lock /run/netns
    for folder in kubelet containerd cni; do mount --bind "$HOME_OF/$folder" "/var/lib/$folder"; done
    for folder in pods containers; do mount --bind "$HOME_OF/$folder" "/var/log/$folder"; done
    mount --bind "$HOME_OF/net.d" /etc/cni/net.d
    printf '127.0.0.1 localhost\n::1 localhost\n127.0.1.1 %s\n' "$NAME" >"$HOME_OF/hosts"
    mount --bind "$HOME_OF/hosts" /etc/hosts
    echo "nameserver $API" >"$HOME_OF/resolv.conf"
    mount --make-rshared / # volumes and pods' namespaces are mounted by one process and seen by another
}

# One control group for the node in every hierarchy; containers and pods are below it.
make_control_groups() {
    local hierarchy
    if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
        mkdir -p "/sys/fs/cgroup/$CONTROL_GROUP"
        return
    fi
    for hierarchy in /sys/fs/cgroup/*/; do
        [[ -w $hierarchy/cgroup.procs ]] || continue
        mkdir -p "$hierarchy/$CONTROL_GROUP"
        if [[ -e $hierarchy/cpuset.cpus ]]; then # version 1 does not inherit these, and without them nothing starts
            cat "$hierarchy/cpuset.cpus" >"$hierarchy/$CONTROL_GROUP/cpuset.cpus"
            cat "$hierarchy/cpuset.mems" >"$hierarchy/$CONTROL_GROUP/cpuset.mems"
        fi
    done
}

write_cni() {
    cat >/etc/cni/net.d/10-bridge.conflist <<Y
{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": true, "ipMasq": false,
   "hairpinMode": true, "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam",
   "ranges": [[{"subnet": "$POD4.$I.0/24"}], [{"subnet": "$POD6:$I::/64"}]]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
Y
}

write_containerd() {
    cat >"$HOME_OF/containerd.toml" <<Y
version = 3
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'overlayfs'
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = 'localhost/pause:1'
[plugins.'io.containerd.cri.v1.runtime']
  enable_selinux = false
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ['$BIN']
    conf_dir = '/etc/cni/net.d'
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = 'runc'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = 'io.containerd.runc.v2'
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
        SystemdCgroup = false
Y
}

write_kubelet() {
    cat >"$HOME_OF/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /$CONTROL_GROUP
cgroupsPerQOS: true
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
clusterDNS: [$DNS]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
resolvConf: $HOME_OF/resolv.conf
evictionHard: {memory.available: "0%", nodefs.available: "0%", nodefs.inodesFree: "0%", imagefs.available: "0%"}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
serializeImagePulls: false
registryPullQPS: 0
eventRecordQPS: 0
kubeAPIQPS: 200
kubeAPIBurst: 400
Y
}

hostname "$NAME"
connect
mount_all
make_control_groups
write_cni
write_containerd
write_kubelet

export PATH=$BIN:$PATH
containerd -c "$HOME_OF/containerd.toml" --log-level warn >>"$STATE/log/$NAME-containerd.log" 2>&1 &
until ctr version >/dev/null 2>&1; do sleep 0.2; done
for archive in "$IMAGES" "$STATE"/images/*.tar; do
    [[ ! -e $archive ]] || ctr -n k8s.io images import "$archive"
done
kubelet --config="$HOME_OF/kubelet.yaml" --kubeconfig="$KUBECONFIG_FILE" --cert-dir="$HOME_OF/kubelet/pki" \
    --hostname-override="$NAME" --node-ip="$(node_ip4 "$I"),$(node_ip6 "$I")" \
    --node-labels="topology.kubernetes.io/zone=zone-$(((I - 1) % 3)),topology.kubernetes.io/region=region" \
    --v=1 >>"$STATE/log/$NAME-kubelet.log" 2>&1 &

while :; do wait -n || sleep 0.2; done # stay, and reap what ends
