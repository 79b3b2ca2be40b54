#!/usr/bin/env bash
# On both nodes, with NODE_RANK 0 and 1 and the nodes' names in configs/two_nodes/hostfile (drop --no_ssh --node_rank to start
# both from node 0 over ssh):
#   NODE_RANK=0 MASTER_ADDR=<address of node 0> PROCESSES_PER_NODE=8 configs/two_nodes/deepspeed.sh train.py --deepspeed configs/deepspeed/zero2.json
set -euo pipefail
exec deepspeed --hostfile "$(dirname "$0")/hostfile" --no_ssh --node_rank "$NODE_RANK" --num_gpus "$PROCESSES_PER_NODE" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@"
