#!/usr/bin/env bash
# Environment of a multi-node NCCL job over InfiniBand. Sourced by the Slurm scripts; each value can
# be set beforehand and is then kept. `NCCL_DEBUG=INFO` prints what NCCL chose in the end.

# Adapters that carry data: a prefix of their names (`ibstat -l`), `=` for exact ones. One per GPU
# is usual. Without this, NCCL may take a slow management adapter.
export NCCL_IB_HCA="${NCCL_IB_HCA:-mlx5}"

# Interface for NCCL's and torchrun's start-up traffic (addresses, no tensors): any that all nodes
# share. `^` excludes, so this takes whatever is neither loopback nor a container bridge.
export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-^lo,docker,virbr}"

# How long an adapter waits for an acknowledgement: 4.096 us x 2^22, about 17 s before one retry.
# The default of 20 gives up during a switch's rerouting.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"

# Queue pairs per connection: more than one spreads a flow over several paths of a fat tree.
export NCCL_IB_QPS_PER_CONNECTION="${NCCL_IB_QPS_PER_CONNECTION:-4}"

# GPU and adapter exchange data directly if they hang on the same CPU (PHB); further apart the copy
# through host memory is the faster one.
export NCCL_NET_GDR_LEVEL="${NCCL_NET_GDR_LEVEL:-PHB}"

# A rank whose peer is lost ends with an error rather than wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"

# Print warnings of NCCL, but not its routine.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# One hardware queue: kernels start in the order in which they were issued, so that a collective
# issued before a GEMM really overlaps it (tensor and sequence parallelism count on that).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Eight ranks share the cores of a node.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
