"""A CUDA card that isn't there, for Linux: everything happens on it, but that kernels compute.

PyTorch and Triton find a runtime, a driver and cuBLAS of ours in place of NVIDIA's: an H100 whose
memory is the host's, where copies copy and launches are counted and forgotten. Kernels are compiled
as for the real card and handed over with their arguments. So what runs through streams, events,
graphs, processes, compilers and the choice of implementations can be rehearsed; results are zeros,
or whatever lay in memory.

    python -m tests.pretend python script.py
    python -m tests.pretend python -m benchmarks gpu --steps kernels tune --out build/gpu
    python -m tests.pretend python -m pytest -m gpu -p tests.pretend.plugin tests/test_gpu.py

It needs gcc, nm, and PyTorch's build for CUDA 13. What it can't do: NCCL, cuDNN, PyTorch's fused
attention kernels, the profiler's view of the card, and whatever goes by the values of results.
"""
