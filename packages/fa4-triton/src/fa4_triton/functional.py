"""The functions known from flash-attn 2, with autograd and under `torch.compile`.

What is not served raises instead of running something else: whoever calls a kernel by its name
wants that kernel.
"""

from __future__ import annotations

from torch import Tensor

from fa4_triton import interpreter
from fa4_triton.kernel_set import TritonKernels
from fa4_triton.provider import NAME
from flash_attention_registry.sdpa.direct import check_options
from flash_attention_registry.sdpa.operators import attend, attend_packed, make_operator

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]

interpreter.repair()

_attention = make_operator("fa4_triton", TritonKernels())


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of a dense batch, `softmax(scale * Q K^T + mask) V`.

    Query row `i` stands at key `d = i + Sk - Sq` (aligned at the last row and key) and sees the
    keys from `d - left` to `d + right`. Rows that see no key give 0. Query head `h` reads key head
    `h // (Hq // Hkv)`.

    Args:
        q: `[B, Sq, Hq, D]`, float16 or bfloat16, D a multiple of 8 up to 256, any strides; a last
            dimension that is not contiguous is copied.
        k: `[B, Sk, Hkv, D]`, Hkv a divisor of Hq.
        v: Like `k`.
        dropout_p: Must be 0.
        softmax_scale: Factor of the scores, of any sign or zero; `D ** -0.5` by default.
        causal: Hides the keys after the diagonal.
        window_size: (left, right): keys seen before and after the diagonal, -1 for all.
        softcap: Must be 0.
        alibi_slopes: Must be None.
        deterministic: Whether the gradients are to repeat bit for bit, which is slower on Hopper.
            They do as well under `torch.use_deterministic_algorithms(True)`; out and lse always do.
        return_attn_probs: Whether to return lse too.

    Returns:
        out `[B, Sq, Hq, D]`; or, with `return_attn_probs`, `(out, lse, None)` with lse float32
        `[B, Hq, Sq]`, the natural logarithm of the softmax's denominator, -inf for rows that see no
        key. lse is not differentiable. None stands where a kernel with dropout returns its mask.

    Raises:
        TypeError: An argument is no tensor, or no number, where one is needed.
        ValueError: The tensors do not fit together.
        NotImplementedError: The kernels do not serve such a call.
    """
    check_options(NAME, dropout_p, softcap, alibi_slopes)
    return attend(
        _attention,
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of sequences of different lengths, packed one after another.

    Sequence `b` owns the rows `cu_seqlens[b]` to `cu_seqlens[b + 1]`, and may be empty. Each is
    aligned at its own end, as `flash_attn_func` says.

    Args:
        q: `[Tq, Hq, D]`; dtype, head dimension and strides as for `flash_attn_func`.
        k: `[Tk, Hkv, D]`, Hkv a divisor of Hq.
        v: Like `k`.
        cu_seqlens_q: `[B + 1]` int32, rising from 0 to Tq, on the device of `q`.
        cu_seqlens_k: `[B + 1]` int32, rising from 0 to Tk.
        max_seqlen_q: Length of the longest sequence of queries, or more. Neither it nor the offsets
            are checked against one another, which would make the host wait for the device.
        max_seqlen_k: Likewise for the keys.
        dropout_p: Must be 0.
        softmax_scale: As for `flash_attn_func`, as are all that follow but `block_table`.
        causal: Hides the keys after the diagonal.
        window_size: (left, right): keys seen before and after the diagonal, -1 for all.
        softcap: Must be 0.
        alibi_slopes: Must be None.
        deterministic: Whether the gradients are to repeat bit for bit.
        return_attn_probs: Whether to return lse too.
        block_table: Must be None.

    Returns:
        out `[Tq, Hq, D]`; or, with `return_attn_probs`, `(out, lse, None)` with lse float32
        `[Hq, Tq]`.

    Raises:
        TypeError: An argument is no tensor, or no number, where one is needed.
        ValueError: The tensors do not fit together.
        NotImplementedError: The kernels do not serve such a call.
    """
    check_options(NAME, dropout_p, softcap, alibi_slopes, block_table)
    return attend_packed(
        _attention,
        q,
        k,
        v,
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
    )
