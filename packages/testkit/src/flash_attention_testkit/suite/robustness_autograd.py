"""Through torch: autograd's ways of calling, autocast, checkpoints, compiled graphs, switches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flash_attention_registry import Registry
from flash_attention_testkit.inputs import SdpaInputs
from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite._findings import assert_same
from flash_attention_testkit.suite._subject import Subject
from flash_attention_testkit.suite.robustness_base import needs_backward, problem, served

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

LEAVES = ("query", "key", "value")
GRADIENTS = ("dq", "dk", "dv")

LIKENESS = 0.05
"""How far, of its root mean square, a gradient may be off that two implementations have made. It is
found whether they mean the same by out and lse; how right each of them is, other tests tell."""


class AutogradTests(ProviderTestsBase):
    """What is expected is what plain calls through torch give with the same implementation."""

    def test_inference_mode_gives_the_same_out(self, subject: Subject) -> None:
        """And ``no_grad`` too."""
        inputs = _problem(subject)
        with _flash():
            expected = attend(*_leaves(inputs, gradients=subject.has_backward)).detach()
            for mode in (torch.inference_mode, torch.no_grad):
                with mode(), served(subject, 1):
                    out = attend(inputs.query, inputs.key, inputs.value)
                assert_same({"out": out.clone()}, {"out": expected}, inputs)

    @pytest.mark.parametrize("leaf", LEAVES)
    def test_gradient_of_one_input_alone(self, subject: Subject, leaf: str) -> None:
        """Its gradient is the same if no other is wanted."""
        inputs = _differentiable(subject)
        expected = _step(subject, inputs, attend)
        place = LEAVES.index(leaf)
        leaves = _leaves(inputs, gradients=False)
        leaves[place].requires_grad_()
        with _flash(), served(subject, 2):
            out = attend(*leaves)
            (grad,) = torch.autograd.grad(out, leaves[place], inputs.grad_out)
        name = GRADIENTS[place]
        assert_same({name: grad}, {name: expected[name]}, inputs)

    def test_backward_may_run_twice(self, subject: Subject) -> None:
        """With ``retain_graph``; the first backward has spoilt nothing."""
        inputs = _differentiable(subject)
        leaves = _leaves(inputs)
        with _flash(), served(subject, 3):
            out = attend(*leaves)
            first = torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=True)
            kept = dict(zip(GRADIENTS, (grad.clone() for grad in first), strict=True))
            second = torch.autograd.grad(out, leaves, inputs.grad_out)
        assert_same(dict(zip(GRADIENTS, second, strict=True)), kept, inputs)

    def test_another_forward_may_come_before_the_backward(self, subject: Subject) -> None:
        """As in a model of two layers: nothing is kept beside what autograd saves."""
        inputs, other = _differentiable(subject), problem(subject, seed=1)
        expected = _step(subject, inputs, attend)
        leaves = _leaves(inputs)
        with _flash(), served(subject, 3):
            out = attend(*leaves)
            attend(*_leaves(other))
            grads = torch.autograd.grad(out, leaves, inputs.grad_out)
        found = {"out": out.detach(), **dict(zip(GRADIENTS, grads, strict=True))}
        assert_same(found, expected, inputs)

    def test_loss_may_be_a_sum(self, subject: Subject) -> None:
        """Its gradient is one number expanded to the shape of out."""
        inputs = _differentiable(subject)
        inputs.grad_out.fill_(1.0)
        leaves = _leaves(inputs)
        with _flash(), served(subject, 2):
            grads = torch.autograd.grad(attend(*leaves).sum(), leaves)
        expected = _step(subject, inputs, attend)
        del expected["out"]
        assert_same(dict(zip(GRADIENTS, grads, strict=True)), expected, inputs)

    def test_autocast_is_a_cast_of_the_inputs(self, subject: Subject) -> None:
        """Float32 inputs are cast to what autocast says, and their gradients back to float32."""
        inputs = _differentiable(subject)
        dtype = inputs.query.dtype
        if dtype.itemsize != 2:
            pytest.skip(f"{subject.name} declares neither bf16 nor fp16, which autocast casts to")

        def casting(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attend(query.to(dtype), key.to(dtype), value.to(dtype))

        def under_autocast(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with torch.autocast(subject.device.type, dtype=dtype):
                return attend(query, key, value)

        wide = [leaf.float() for leaf in _leaves(inputs, gradients=False)]
        expected = _step(subject, inputs, casting, leaves=wide)
        found = _step(subject, inputs, under_autocast, leaves=wide)
        assert_same(found, expected, inputs)

    @pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
    def test_activation_checkpointing_changes_nothing(
        self, subject: Subject, reentrant: bool
    ) -> None:
        """The forward runs again in the backward."""
        inputs = _differentiable(subject)

        def checkpointed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out = checkpoint(attend, query, key, value, use_reentrant=reentrant)
            assert isinstance(out, Tensor)
            return out

        expected = _step(subject, inputs, attend)
        assert_same(_step(subject, inputs, checkpointed, calls=3), expected, inputs)

    def test_compiled_graphs_give_the_same(self, subject: Subject) -> None:
        """``torch.compile`` without a graph break: by Inductor on CUDA, traced alone on a CPU."""
        inputs = _differentiable(subject)
        backend = "inductor" if subject.device.type == "cuda" else "aot_eager"
        torch._dynamo.reset()
        try:
            compiled = torch.compile(attend, fullgraph=True, backend=backend)
            _step(subject, inputs, compiled)  # traced
            found = _step(subject, inputs, compiled)
        finally:
            torch._dynamo.reset()
        assert_same(found, _step(subject, inputs, attend), inputs)

    def test_torchs_backward_may_follow(self, subject: Subject, registry: Registry) -> None:
        """Who runs a forward leaves out and lse as torch's own backward reads them."""
        inputs = _differentiable(subject)
        leaves = _leaves(inputs)
        with _flash():
            with served(subject, 1):
                out = attend(*leaves)
            registry.restore()
            grads = torch.autograd.grad(out, leaves, inputs.grad_out)
            expected = torch.autograd.grad(attend(*leaves), leaves, inputs.grad_out)
        _assert_alike(grads, expected)

    def test_torchs_forward_may_precede(self, subject: Subject, registry: Registry) -> None:
        """Who runs a backward reads out and lse as torch's own forward leaves them."""
        inputs = _differentiable(subject)
        leaves = _leaves(inputs)
        with _flash():
            registry.restore()
            out = attend(*leaves)
            registry.activate(subject.name)
            with served(subject, 1):
                grads = torch.autograd.grad(out, leaves, inputs.grad_out)
            expected = torch.autograd.grad(attend(*leaves), leaves, inputs.grad_out)
        _assert_alike(grads, expected)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's attention of `[B, S, H, D]` tensors."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)


@contextmanager
def _flash() -> Iterator[None]:
    """Torch chooses its flash attention, whose place implementations take."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


def _problem(subject: Subject) -> SdpaInputs:
    inputs = problem(subject)
    if subject.device.type == "cuda" and inputs.query.dtype.itemsize != 2:
        pytest.skip(f"torch's flash attention on CUDA takes no {inputs.query.dtype}")
    return inputs


def _differentiable(subject: Subject) -> SdpaInputs:
    needs_backward(subject)
    return _problem(subject)


def _leaves(inputs: SdpaInputs, *, gradients: bool = True) -> list[Tensor]:
    tensors = (inputs.query, inputs.key, inputs.value)
    return [tensor.detach().requires_grad_(gradients) for tensor in tensors]


def _step(
    subject: Subject,
    inputs: SdpaInputs,
    attention: Attention,
    *,
    leaves: Sequence[Tensor] | None = None,
    calls: int = 2,
) -> dict[str, Tensor]:
    """Out and gradients by autograd, all calls of torch's ops being served.

    Args:
        subject: Is active.
        inputs: Of the problem.
        attention: Is called.
        leaves: What it is called with, the problem's tensors if None.
        calls: How many ops it calls, in forward and backward together.
    """
    __tracebackhide__ = True
    leaves = _leaves(inputs) if leaves is None else [leaf.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    with _flash(), served(subject, calls):
        out = attention(*leaves)
        out.backward(inputs.grad_out)  # not autograd.grad, which reentrant checkpoints refuse
    found = {"out": out.detach()}
    for name, leaf in zip(GRADIENTS, leaves, strict=True):
        assert leaf.grad is not None
        found[name] = leaf.grad
    return found


def _assert_alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    __tracebackhide__ = True
    for name, one, other in zip(GRADIENTS, found, expected, strict=True):
        distance = (one.double() - other.double()).square().mean().sqrt()
        size = other.double().square().mean().sqrt()
        assert float(distance) <= LIKENESS * float(size), (
            f"{name} is off by {float(distance / size):.1%} of its size; out or lse (natural "
            "logarithm of the sum of the exponentials of scaled scores) mean something else here"
        )
