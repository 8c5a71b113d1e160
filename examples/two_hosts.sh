#!/usr/bin/env bash
# Train on two machines that this one can reach by ssh:
#
#     ./two_hosts.sh node-a node-b 10.0.0.0/24 mnist-mlp --workers 2
#
# The third argument is the network between the two; the rest is passed to `samestep train`.
# Both need samestep on the PATH and this directory, where each of them writes the run.
set -euo pipefail

hosts=("$1" "$2")
network=$3
shift 3

train=(
    samestep train "$@" --nodes 2 --rdzv-endpoint "${hosts[0]}:29400" --interface "$network"
    --out "runs/two-hosts"
)
command="cd $(printf %q "$PWD") && exec $(printf '%q ' "${train[@]}")"

# With a terminal (-tt), the training ends with a checkpoint when its ssh ends.
connections=()
trap 'kill "${connections[@]}" 2>/dev/null || true' EXIT
for host in "${hosts[@]}"; do
    ssh -tt "$host" "$command" < /dev/null &
    connections+=($!)
done
wait -n
wait -n
