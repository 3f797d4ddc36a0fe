"""Models: loading, adapters, one frozen base with many roles, and kernels."""
