"""The Triton kernels; `blocks` holds what the portable ones share, `hopper` what Hopper's do."""
