#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces joined by a cable, a torchrun in each.
#
#     two_hosts.sh PYTHON SCRIPT [ARGUMENT …]     runs SCRIPT, one rank a host; 10.77.0.1 is host 0
#     two_hosts.sh --check                        tells whether this machine allows it, by its exit status
#
# Needs no right but that to make namespaces: root, or user namespaces. Nothing outlives it, however it ends: the
# processes go with the namespace of process ids that they live in, and the network with its last process.
set -euo pipefail

if [ -z "${TWO_HOSTS_INSIDE-}" ]; then
    namespaces=(--net --pid --fork --mount-proc --kill-child)
    unshare "${namespaces[@]}" true 2>/dev/null || namespaces+=(--user --map-root-user)
    TWO_HOSTS_INSIDE=1 setpriv --pdeathsig KILL unshare "${namespaces[@]}" "$0" "$@" &
    inside=$!
    trap 'kill -KILL "$inside" 2>/dev/null || true' EXIT
    trap 'exit 143' TERM INT
    wait "$inside"
    exit
fi

# From here on this is process 1, and when it ends, so does everything below.
unshare --net sleep infinity &
other=$!
disown # nobody waits for it
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do
    sleep 0.01
    kill -0 "$other" # or there is none to wait for
done
on_other() { nsenter --net=/proc/$other/ns/net "$@"; }

ip link add cable0 type veth peer name cable1
ip link set cable1 netns "$other"
ip address add 10.77.0.1/24 dev cable0
on_other ip address add 10.77.0.2/24 dev cable1
for device in lo cable0; do ip link set "$device" up; done
for device in lo cable1; do on_other ip link set "$device" up; done
if [ "$1" = --check ]; then exit; fi

python=$1
shift
torchrun=("$python" -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --master-addr=10.77.0.1 --master-port=29500)
GLOO_SOCKET_IFNAME=cable0 "${torchrun[@]}" --node-rank=0 "$@" &
GLOO_SOCKET_IFNAME=cable1 on_other "${torchrun[@]}" --node-rank=1 "$@" &
wait -n # for either; a failure ends the other
wait -n
