"""Two matrix products and a softmax, as an implementation of the flash-attention registry."""


def register() -> None:
    """Make `plain` known; torch is imported when somebody activates it."""
    from flash_attention_registry import register_flash_attention_impl

    register_flash_attention_impl("plain", register_fn=install)


def install() -> object:
    """Serve torch's attention on the CPU; return the handle that takes it back."""
    from flash_attention_registry.sdpa import install as install_kernels
    from plain_attention.kernels import PlainKernels

    return install_kernels(PlainKernels(), "cpu")
