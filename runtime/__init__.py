"""Build, cache and launch kernels."""
