#!/usr/bin/env bash
# Environment of a multi-node NCCL job over InfiniBand, sourced by the Slurm scripts. A variable that is
# already set keeps its value. `NCCL_DEBUG=INFO` prints what NCCL selects.

# Adapters that carry data: a prefix of their names (`ibstat -l`), `=` for exact ones. One per GPU
# is usual. Without this, NCCL may take a slow management adapter.
export NCCL_IB_HCA="${NCCL_IB_HCA:-mlx5}"

# Interface for the bootstrap traffic of NCCL and torchrun (addresses, no tensors): any that all nodes
# share. `^` excludes: this is any interface that is neither loopback nor a container bridge.
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}"

# How long an adapter waits for an acknowledgement: 4.096 us x 2^22, about 17 s before one retry.
# The default of 20 is too short for a switch to reroute.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"

# Queue pairs per connection: more than one spreads a flow over several paths of a fat tree.
export NCCL_IB_QPS_PER_CONNECTION="${NCCL_IB_QPS_PER_CONNECTION:-4}"

# GPUDirect RDMA between GPU and adapter on the same CPU (PHB); further apart, a copy through host memory
# is faster.
export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL:-PHB}"

# A rank whose peer is lost exits with an error instead of waiting forever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# Warnings only.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# One hardware queue: kernels start in the order in which they were issued, so that a collective
# issued before a GEMM really overlaps it (tensor and sequence parallelism count on that).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Eight ranks share the cores of a node.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
