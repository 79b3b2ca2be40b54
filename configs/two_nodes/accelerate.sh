#!/usr/bin/env bash
# On both nodes, with NODE_RANK 0 and 1; CONFIG may name another file of configs/accelerate:
#   NODE_RANK=0 MASTER_ADDR=<address of node 0> PROCESSES_PER_NODE=8 configs/two_nodes/accelerate.sh train.py [arguments]
set -euo pipefail
exec accelerate launch --config_file "${CONFIG:-configs/accelerate/zero2.yaml}" --num_machines 2 --machine_rank "$NODE_RANK" \
    --num_processes "$((2 * PROCESSES_PER_NODE))" --main_process_ip "$MASTER_ADDR" --main_process_port "${MASTER_PORT:-29500}" "$@"
