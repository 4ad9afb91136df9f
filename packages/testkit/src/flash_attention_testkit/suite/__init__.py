"""The standard tests of a provider: one class to subclass."""

from __future__ import annotations

from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite.contract import ContractTests
from flash_attention_testkit.suite.dispatch import DispatchTests
from flash_attention_testkit.suite.parity import ParityTests
from flash_attention_testkit.suite.robustness import RobustnessTests

__all__ = ["ProviderTests"]


class ProviderTests(ContractTests, DispatchTests, ParityTests, RobustnessTests, ProviderTestsBase):
    """The standard tests of an implementation: subclass once, say its name, get them all.

    In the provider's repository, ``tests/test_standard.py``::

        import pytest
        from flash_attention_testkit import ProviderTests

        class TestStandard(ProviderTests):
            @pytest.fixture
            def provider(self):
                return "my-impl"

    ``my-impl`` is what users activate. If no installed distribution offers it yet, the fixture
    registers it before it returns the name. The fixture may also stand in the module or in a
    ``conftest.py``. Then::

        pytest tests/test_standard.py

    Without any file, an installed implementation is tested by::

        pytest --pyargs flash_attention_testkit.standalone --flash-attention-impl my-impl

    What is tested:

    * **Contract**: the name is registered, and may be registered again; activating, a failed
      activation of another one, and going back to stock leave the right kernels, stock's bit for
      bit; handles can be removed twice; the distribution's entry point, versions and imports are
      as the registry needs them.
    * **Dispatch**: every op of torch by which attention comes serves, in every schema that this
      torch has: strides, shapes and dtypes of all results are as torch's meta functions declare
      them, arguments mean what they say, memory is shared with nobody, a shortcut for SDPA
      (``HeadsFirst``) gives the bits of ``forward``, and what is declined gives torch's own bits.
      The CUDA ops are called without a GPU too, if the kernels take CPU tensors.
    * **Parity**: out, lse and gradients of a grid of cases are as right as their dtype allows,
      masks are exact, calls repeat.
    * **Robustness**: any strides, numbers that are NaN or infinite, threads, streams and CUDA
      graphs, autograd and compilers, a backward after another's forward.

    Which of it applies is read off the kernel set's own ``Capabilities``. What they declare has to
    work; what they do not declare has to be declined with a reason. An implementation that is not
    available on this machine is skipped, with its reason. It is tested on a CUDA device if it
    serves one, else on the CPU.

    A subclass may add tests. It cannot replace standard ones: a known failure is listed with its
    reason, and expected strictly, so that it is noticed when it passes::

        class TestStandard(ProviderTests):
            xfails = {"test_out_is_right[bf16-1x1x": "one query row lands in 0.4, issue 12"}

    A pattern is part of the name of tests with its parameters, and has to match some. ``xfails``
    holds in every run; for one device alone, give that a class of its own, marked ``gpu``.

    ``--flash-attention-grid`` chooses the cases: ``quick`` (by default on a CPU), ``standard`` (by
    default where there is a GPU) or ``exhaustive``.
    ``--flash-attention-seed`` gives them other numbers.
    """
