"""The kernel set under test, and the two ways to it: called directly, and through torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attention_registry.sdpa import (
    AttentionCall,
    Capabilities,
    KernelSet,
    dispatch_counts,
)
from flash_attention_registry.sdpa.checks import normalised_window
from flash_attention_testkit.cases import SdpaCase
from flash_attention_testkit.inputs import SdpaInputs, make_inputs
from flash_attention_testkit.reference import AttentionOptions, SdpaResult

if TYPE_CHECKING:
    from typing_extensions import Unpack  # torch depends on it; typing has it from Python 3.11 on


@dataclass(frozen=True, slots=True)
class Subject:
    """An active implementation.

    Attributes:
        name: The implementation's name.
        kernel_set: What it has installed for ``device``.
        device: Where it is tested: a CUDA device if it serves one that is there, else the CPU.
        seed: Of the numbers that it is tested with.
    """

    name: str
    kernel_set: KernelSet
    device: torch.device
    seed: int = 0

    @property
    def capabilities(self) -> Capabilities:
        """What the kernel set declares."""
        return self.kernel_set.capabilities

    @property
    def has_backward(self) -> bool:
        """Whether it declares gradients."""
        return "backward" in self.capabilities.features


def call_of(inputs: SdpaInputs, *, out: Tensor | None = None) -> AttentionCall:
    """The call that a router would make of a case's inputs.

    Args:
        inputs: Tensors and options.
        out: Where the forward is to write, shaped like the query; None in a backward, or to let
            the kernel set allocate.
    """
    query, key, options = inputs.query, inputs.key, inputs.options
    edges_query = options.get("cu_seqlens_query")
    edges_key = options.get("cu_seqlens_key")
    longest_query = longest_key = 0
    seq_lens = query.shape[1], key.shape[1]
    if edges_query is not None and edges_key is not None:
        longest_query, longest_key = longest_of(edges_query), longest_of(edges_key)
        seq_lens = longest_query, longest_key
    causal, window_left, window_right = normalised_window(
        options.get("causal", False),
        options.get("window_left"),
        options.get("window_right"),
        *seq_lens,
    )
    scale = options.get("scale")
    return AttentionCall(
        query,
        key,
        inputs.value,
        query.shape[-1] ** -0.5 if scale is None else scale,
        causal,
        window_left,
        window_right,
        edges_query,
        edges_key,
        longest_query,
        longest_key,
        out,
    )


def reason_to_decline(subject: Subject, inputs: SdpaInputs) -> str | None:
    """Why the kernel set declines a case, or None if it serves it."""
    return subject.kernel_set.supports(call_of(inputs))


def run_kernels(subject: Subject, inputs: SdpaInputs, *, grads: bool = True) -> SdpaResult:
    """Call the kernel set directly, as a router would, on an output that is NaN before.

    Args:
        subject: Whose kernel set.
        inputs: On the subject's device.
        grads: Whether gradients are wanted; there are none if they are not declared.

    Returns:
        out, lse (-inf for rows that see no key) and, if wanted and declared, gradients.

    Raises:
        AssertionError: The kernel set declines the call.
    """
    __tracebackhide__ = True
    target = torch.full_like(inputs.query, float("nan"))
    call = call_of(inputs, out=target)
    reason = subject.kernel_set.supports(call)
    assert reason is None, f"{subject.name} declines a call that it has to serve: {reason}"
    with torch.no_grad():
        out, lse = subject.kernel_set.forward(call)
        if not grads or not subject.has_backward:
            return SdpaResult(out, lse)
        backward_call = call._replace(out=None)
        return SdpaResult(
            out, lse, *subject.kernel_set.backward(backward_call, inputs.grad_out, out, lse)
        )


def usual_form(subject: Subject) -> tuple[int, torch.dtype]:
    """A head_dim and a dtype that the subject declares; near 64, and bf16 if that is among them."""
    declared = subject.capabilities
    preference = (torch.bfloat16, torch.float16, torch.float32)
    dtype = next((dtype for dtype in preference if dtype in declared.dtypes), None)
    if dtype is None:
        dtype = min(declared.dtypes, key=str)
    return min(declared.head_dims, key=lambda dim: (abs(dim - 64), dim)), dtype


def plain_inputs(subject: Subject, *, rows: int = 33) -> SdpaInputs:
    """What every kernel set has to serve: a dense batch, no mask, as many heads for all."""
    case = SdpaCase(2, 2, 2, rows, rows, *usual_form(subject))
    return make_inputs(case, subject.seed, subject.device)


def assert_serves(subject: Subject) -> None:
    """Insist that a plain call through torch reaches the kernel set, whatever it returns."""
    __tracebackhide__ = True
    inputs = plain_inputs(subject)
    run_sdpa(subject, inputs.query, inputs.key, inputs.value)


def can_run_sdpa(subject: Subject, case: SdpaCase) -> bool:
    """Whether some op of torch on the subject's device expresses a case.

    The CPU's op takes dense batches without windows, and aligns causal masks of unequal lengths
    otherwise; the CUDA ops take every case.
    """
    if subject.device.type == "cuda":
        return True
    window = case.window_left is not None or case.window_right is not None
    return not window and case.lengths is None and (not case.causal or case.seq_q == case.seq_k)


def run_sdpa(
    subject: Subject,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grad_out: Tensor | None = None,
    **options: Unpack[AttentionOptions],
) -> SdpaResult:
    """Attend through torch while the subject is active, and insist that it has served.

    ``F.scaled_dot_product_attention``, bound to flash attention, where torch's own rules let that
    express the call; else, on CUDA, ``aten::_flash_attention_forward`` and ``…_backward``.

    Args:
        subject: Is active.
        query: ``[B, S, H, D]``, or ``[T, H, D]`` with ``cu_seqlens``; on the subject's device.
        key: Likewise.
        value: Likewise.
        grad_out: Shaped like the query. Without it, or if the subject declares no gradients, none
            are computed.
        **options: As for ``reference_sdpa``.

    Returns:
        out and gradients in the shapes of the tensors; lse from the ops that are called directly,
        where rows that see no key read +inf.

    Raises:
        AssertionError: A call went to torch's own kernel.
        ValueError: No op of the device expresses the call; see ``can_run_sdpa``.
    """
    __tracebackhide__ = True
    gradient = grad_out if subject.has_backward else None
    before = dispatch_counts()
    if _sdpa_expresses(subject.device, query, key, value, gradient is not None, options):
        result = _through_sdpa(query, key, value, gradient, options)
    elif subject.device.type == "cuda":
        result = _through_flash_ops(query, key, value, gradient, options)
    else:
        raise ValueError(f"no op on {subject.device} expresses attention with {options}")
    after = dispatch_counts()
    served, declined = after.served - before.served, after.declined - before.declined
    wanted = 1 if gradient is None else 2
    assert (served, declined) == (wanted, 0), (
        f"{subject.name} served {served} of {wanted} calls and {declined} went to torch's own "
        f"kernels; since the last reset:\n{after}"
    )
    return result


def _sdpa_expresses(
    device: torch.device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    with_gradients: bool,
    options: AttentionOptions,
) -> bool:
    """Whether ``F.scaled_dot_product_attention`` bound to flash attention takes the call."""
    causal = options.get("causal", False)
    windows = options.get("window_left"), options.get("window_right")
    if query.dim() != 4 or any(bound not in (None, -1) for bound in windows):
        return False
    if causal and query.shape[1] != key.shape[1]:
        return False  # its causal masks are aligned to the first row and key
    if device.type != "cuda":
        return True
    if query.shape[-1] % 8:
        return False  # it would pad them, to a head_dim that may not be declared
    grouped = query.shape[2] != key.shape[2]
    q, k, v = (tensor.detach().transpose(1, 2) for tensor in (query, key, value))
    for leaf in (q, k, v):
        leaf.requires_grad_(with_gradients)
    params: Any = torch.backends.cuda.SDPAParams  # its type stub lacks enable_gqa
    params = params(q, k, v, None, 0.0, causal, grouped)
    return torch.backends.cuda.can_use_flash_attention(params)


def _through_sdpa(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None, options: AttentionOptions
) -> SdpaResult:
    leaves = [tensor.detach() for tensor in (query, key, value)]
    for leaf in leaves:
        leaf.requires_grad_(grad_out is not None)
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=options.get("causal", False),
            scale=options.get("scale"),
            enable_gqa=query.shape[2] != key.shape[2],
        ).transpose(1, 2)
    if grad_out is None:
        return SdpaResult(out)
    return SdpaResult(out.detach(), None, *torch.autograd.grad(out, leaves, grad_out))


def _through_flash_ops(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None, options: AttentionOptions
) -> SdpaResult:
    edges = options.get("cu_seqlens_query"), options.get("cu_seqlens_key")
    if edges[0] is None or edges[1] is None:
        longest = query.shape[1], key.shape[1]
    else:
        longest = longest_of(edges[0]), longest_of(edges[1])
    causal = options.get("causal", False)
    keywords = {
        "scale": options.get("scale"),
        "window_size_left": options.get("window_left"),
        "window_size_right": options.get("window_right"),
    }
    with torch.no_grad():
        out, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, *edges, *longest, 0.0, causal, False, **keywords
        )
        if grad_out is None:
            return SdpaResult(out, lse)
        grads = torch.ops.aten._flash_attention_backward(
            *(grad_out, query, key, value, out, lse, *edges, *longest, 0.0, causal),
            *(rng_state, unused),
            **keywords,
        )
    return SdpaResult(out, lse, *grads)


def longest_of(edges: Tensor) -> int:
    """The longest of the sequences between these offsets."""
    return int(edges.diff().max())
