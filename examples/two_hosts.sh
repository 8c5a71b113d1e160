#!/usr/bin/env bash
# Trains on two machines that this one reaches by ssh:
#
#     ./two_hosts.sh node-a node-b 10.0.0.0/24 mnist-mlp --workers 2
#
# The third argument is the network between the two; the rest is for `samestep train`.
# On both, samestep is on the PATH and this directory exists: the run is written there,
# on each of them.
set -euo pipefail

hosts=("$1" "$2")
network=$3
shift 3

train=(
    samestep train "$@" --nodes 2 --endpoint "${hosts[0]}:29400" --interface "$network"
    --out "runs/two-hosts"
)
command="cd $(printf %q "$PWD") && exec $(printf '%q ' "${train[@]}")"

# With a terminal (-tt) the training there ends, with a checkpoint, if its ssh does.
connections=()
trap 'kill "${connections[@]}" 2>/dev/null || true' EXIT
for host in "${hosts[@]}"; do
    ssh -tt "$host" "$command" < /dev/null &
    connections+=($!)
done
wait -n
wait -n
