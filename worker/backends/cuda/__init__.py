"""NVIDIA GPUs: our own kernels, FlashInfer's attention, cuBLAS, CUDA graphs, virtual memory."""
