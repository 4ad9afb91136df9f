"""The Triton kernels; `blocks` holds what they share."""
