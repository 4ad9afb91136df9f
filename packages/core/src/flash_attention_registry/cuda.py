"""CUDA must not be initialised by `import torch`: how a check waits until it may be.

A process that has initialised CUDA cannot use it in forked children, and has fixed which devices it
sees. `FLASH_ATTENTION_IMPL` is honoured at the end of `import torch`, when neither may happen, and
whether a GPU fits can only be asked of CUDA. So a provider's `availability` and `recommended` say
when they are about to ask::

    def why_unavailable():
        if triton_is_missing():
            return "..."                 # known without CUDA, so known at once
        before_using_cuda()
        if torch.cuda.get_device_capability() < (8, 0):
            return "..."

At the end of `import torch` the second line raises, and the registry asks the check again at the
first attention call on a GPU, by which time the program itself has initialised CUDA.
"""

from __future__ import annotations

import _thread  # threading would double the time that importing this package takes

from flash_attention_registry.errors import CudaNeededError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class _Thread(_thread._local):
    """How many blocks of `WithoutCuda` this thread is in."""

    blocks = 0


_here = _Thread()


def before_using_cuda() -> None:
    """Return if a check may use CUDA now; to be called before its first use of `torch.cuda`.

    `torch.cuda.is_available()` and `torch.cuda.device_count()` are such uses.

    Raises:
        CudaNeededError: Not yet. Let it pass: the registry catches it and asks again.
    """
    if _here.blocks:
        raise CudaNeededError(
            "Whether this implementation can be used depends on the GPU, and CUDA must not be "
            "initialised yet: it is asked again at the first attention call on the GPU."
        )


class WithoutCuda:
    """A context manager in which `before_using_cuda` raises, in this thread."""

    def __enter__(self) -> None:
        """Begin."""
        _here.blocks += 1

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End."""
        _here.blocks -= 1
