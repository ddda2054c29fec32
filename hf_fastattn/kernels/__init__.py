"""The Triton kernels and their launchers, one file per op; imported on first use, since importing Triton takes time."""
