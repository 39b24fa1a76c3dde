"""Triton kernels compiled ahead of time, for GPUs that need not be there: what each one needs."""
