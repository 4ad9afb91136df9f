"""The Triton kernels. Each module is one kernel and the helpers only it uses; `tiles` is shared."""
