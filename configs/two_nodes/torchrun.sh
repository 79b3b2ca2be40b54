#!/usr/bin/env bash
# On both nodes, with NODE_RANK 0 and 1:
#   NODE_RANK=0 MASTER_ADDR=<address of node 0> PROCESSES_PER_NODE=8 configs/two_nodes/torchrun.sh train.py [arguments]
set -euo pipefail
exec torchrun --nnodes 2 --node_rank "$NODE_RANK" --nproc_per_node "$PROCESSES_PER_NODE" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@"
