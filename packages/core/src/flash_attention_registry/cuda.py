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
from flash_attention_registry.indivisible import call_and_finish

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")


class _Thread(_thread._local):
    """Whether this thread may use CUDA in a check."""

    may_use_cuda = True


_here = _Thread()


def before_using_cuda() -> None:
    """Return if a check may use CUDA now; to be called before its first use of `torch.cuda`.

    `torch.cuda.is_available()` and `torch.cuda.device_count()` are such uses.

    Raises:
        CudaNeededError: Not yet. Let it pass: the registry catches it and asks again.
    """
    if not _here.may_use_cuda:
        raise CudaNeededError(
            "Whether this implementation can be used depends on the GPU, and CUDA must not be "
            "initialised yet: it is asked again at the first attention call on the GPU."
        )


def without_cuda(action: Callable[[], T]) -> T:
    """Return `action()`, in which `before_using_cuda` raises, in this thread."""
    before = _here.may_use_cuda

    def forbidding() -> T:
        _here.may_use_cuda = False
        return action()

    return call_and_finish(forbidding, lambda: setattr(_here, "may_use_cuda", before))
