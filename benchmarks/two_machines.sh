#!/bin/bash
# Runs a program under torchrun on two "machines": network namespaces on this one, with a cable of a given rate between
# them. They share this machine's processors, so that only the cable is a real machine's. Needs Linux and root.
#
#   benchmarks/two_machines.sh 10gbit benchmarks/shard_group.py --groups 4 2
#
# RANKS is the number of ranks on each machine (default 2). All of it is gone when the program ends.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 RATE PROGRAM [ARGUMENT...], with a rate of tc(8), such as 10gbit" >&2
    exit 2
fi
if [ -z "${TWO_MACHINES_INSIDE:-}" ]; then
    TWO_MACHINES_INSIDE=1 exec unshare --net -- "$0" "$@"
fi
PATH="$PATH:/usr/sbin:/sbin"
rate=$1
shift
unshare --net sleep infinity &
second=$!
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link add name eth0 type veth peer name eth0 netns $second

# A machine's end of the cable: its address, and the rate at which it sends.
plug_in() {
    ip addr add "10.77.0.$1/24" dev eth0
    ip link set lo up
    ip link set eth0 up
    tc qdisc add dev eth0 root tbf rate "$2" burst 8mb latency 100ms
}
export -f plug_in
plug_in 1 "$rate"
nsenter --target $second --net bash -c "plug_in 2 $rate"
export GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
start=(torchrun --nnodes 2 --nproc_per_node "${RANKS:-2}" --master_addr 10.77.0.1 --master_port 29500)
nsenter --target $second --net "${start[@]}" --node_rank 1 "$@" &
"${start[@]}" --node_rank 0 "$@"
wait $!
