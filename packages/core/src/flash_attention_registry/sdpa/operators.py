"""A kernel set as an operator of its own, for those who call its kernels by name.

An operator is opaque to `torch.compile`, so that a graph which calls it does not break, and carries
its own shapes and derivative. Providers build `flash_attn_func` and `flash_attn_varlen_func` of it:

    _attention = make_operator("my_kernels", MyKernels())

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, ...):
        check_options("my-kernels", dropout_p, softcap, alibi_slopes)
        return attend(_attention, q, k, v, softmax_scale, causal, window_size, ...)

What is not served raises instead of running something else: whoever calls a kernel by its name
wants that kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .allocation import empty_like, empty_lse
from .call import AttentionCall
from .capabilities import KernelSet
from .direct import check_dense, check_packed, mask_of, not_served, with_unit_stride

__all__ = ["Operator", "attend", "attend_packed", "make_operator"]

Operator: TypeAlias = Callable[..., Any]
"""What `make_operator` returns: the arguments of `AttentionCall` to `(out, lse)`."""

_operators: dict[str, tuple[Operator, type[KernelSet]]] = {}
"""By namespace. Torch frees what a second definition replaces, in use or not."""


def make_operator(namespace: str, kernels: KernelSet) -> Operator:
    """Define `<namespace>::attention` and `<namespace>::attention_backward`.

    Once in a process for each namespace; the operators stay, and are returned again to a module
    that is loaded again.

    Args:
        namespace: Such as `"fa4_triton"`.
        kernels: What runs them. An empty call never comes to it: out and gradients are zeros, and
            lse is -inf. If its gradients repeat bit for bit `"on_request"`, its `backward` takes
            the keyword `deterministic=True` from a call that asks for it, even where torch does
            not.

    Returns:
        `attention(query, key, value, cu_seqlens_query, cu_seqlens_key, max_seqlen_query,
        max_seqlen_key, scale, causal, window_left, window_right, deterministic)`, whose arguments
        are those of `AttentionCall`, and for the last: whether the gradients are to repeat bit for
        bit. It returns out, like `query`, and lse, float32 `[B, Hq, Sq]`, or `[Hq, Tq]` of packed
        sequences, which is not differentiable. It raises `NotImplementedError` for what the kernel
        set declines, in either direction.

    Raises:
        ValueError: The namespace has operators already, which run a kernel set of another class.
    """
    if namespace in _operators:
        operator, known = _operators[namespace]
        if _full_name(known) == _full_name(type(kernels)):  # a module that is loaded again
            return operator
        raise ValueError(
            f"the operators of {namespace!r} are there already, for {_full_name(known)}; give "
            f"{_full_name(type(kernels))} a namespace of its own"
        )

    def served(
        tensors: tuple[Tensor, Tensor, Tensor],
        sequences: tuple[Tensor | None, Tensor | None, int, int],
        scale: float,
        mask: tuple[bool, int | None, int | None],
    ) -> AttentionCall:
        query, key, value = tensors
        cu_seqlens_query, cu_seqlens_key, max_seqlen_query, max_seqlen_key = sequences
        call = AttentionCall(
            query,
            key,
            value,
            scale,
            *mask,
            cu_seqlens_query,
            cu_seqlens_key,
            max_seqlen_query,
            max_seqlen_key,
        )
        reason = kernels.supports(call)
        if reason is not None:
            raise not_served(kernels.name, reason)
        return call

    @torch.library.custom_op(f"{namespace}::attention", mutates_args=())
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_query: Tensor | None,
        cu_seqlens_key: Tensor | None,
        max_seqlen_query: int,
        max_seqlen_key: int,
        scale: float,
        causal: bool,
        window_left: int | None,
        window_right: int | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        call = served(
            (query, key, value),
            (cu_seqlens_query, cu_seqlens_key, max_seqlen_query, max_seqlen_key),
            scale,
            (causal, window_left, window_right),
        )
        if _is_empty(call):
            return torch.zeros_like(query), empty_lse(query).fill_(-math.inf)
        with torch.cuda.device_of(query):
            return kernels.forward(call)

    @torch.library.custom_op(f"{namespace}::attention_backward", mutates_args=())
    def attention_backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seqlens_query: Tensor | None,
        cu_seqlens_key: Tensor | None,
        max_seqlen_query: int,
        max_seqlen_key: int,
        scale: float,
        causal: bool,
        window_left: int | None,
        window_right: int | None,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = served(
            (query, key, value),
            (cu_seqlens_query, cu_seqlens_key, max_seqlen_query, max_seqlen_key),
            scale,
            (causal, window_left, window_right),
        )
        declared = kernels.capabilities
        reason = declared.reason_to_decline_backward()
        if deterministic and declared.deterministic == "never":
            reason = "deterministic gradients are not supported"
        if reason is not None:
            raise not_served(kernels.name, reason)
        if _is_empty(call):
            return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        with torch.cuda.device_of(query):
            grad_out, out = with_unit_stride(grad_out), with_unit_stride(out)
            backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = kernels.backward
            if deterministic and declared.deterministic == "on_request":
                backward = partial(backward, deterministic=True)
            return backward(call, grad_out, out, lse)

    @attention.register_fake
    def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return empty_like(query), empty_lse(query)

    @attention_backward.register_fake
    def _(
        grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object
    ) -> tuple[Tensor, ...]:
        return empty_like(query), empty_like(key), empty_like(value)

    def differentiate(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, cu_seqlens_query, cu_seqlens_key = ctx.saved_tensors
        offsets = (cu_seqlens_query, cu_seqlens_key)
        grads = attention_backward(grad_out, *tensors, *offsets, *ctx.options)
        return (*grads, *[None] * (2 + len(ctx.options)))

    attention.register_autograd(differentiate, setup_context=_save_for_backward)
    _operators[namespace] = attention, type(kernels)
    return attention


def attend(
    operator: Operator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    deterministic: bool,
    return_attn_probs: bool,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of a dense batch, as `flash_attn_func` of flash-attn 2 is called.

    Args:
        operator: What `make_operator` returned.
        q: `[B, Sq, Hq, D]`, any strides; a last dimension that is not contiguous is copied.
        k: `[B, Sk, Hkv, D]`, Hkv a divisor of Hq.
        v: Like `k`.
        softmax_scale: Factor of the scores; None for `D ** -0.5`.
        causal: Hides the keys after the diagonal, which is aligned at the last row and key.
        window_size: (left, right): keys seen before and after the diagonal, -1 for all.
        deterministic: Whether the gradients are to repeat bit for bit.
        return_attn_probs: Whether to return lse too.

    Returns:
        out `[B, Sq, Hq, D]`; or `(out, lse, None)` with lse float32 `[B, Hq, Sq]`.

    Raises:
        TypeError: An argument is no tensor, or no number, where one is needed.
        ValueError: The tensors do not fit together.
        NotImplementedError: The kernel set declines the call.
    """
    check_dense(q, k, v)
    nothing: tuple[None, None, int, int] = (None, None, 0, 0)
    return _run(
        operator,
        (q, k, v),
        nothing,
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
    )


def attend_packed(
    operator: Operator,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    deterministic: bool,
    return_attn_probs: bool,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of packed sequences, as `flash_attn_varlen_func` of flash-attn 2 is called.

    Args:
        operator: What `make_operator` returned.
        q: `[Tq, Hq, D]`, strides as for `attend`, as are all options.
        k: `[Tk, Hkv, D]`, Hkv a divisor of Hq.
        v: Like `k`.
        cu_seqlens: `[B + 1]` int32 offsets of the queries and of the keys, on the device of `q`.
        max_seqlens: Length of the longest sequence of either, or more.
        softmax_scale: Factor of the scores; None for `D ** -0.5`.
        causal: Hides the keys after the diagonal, which is aligned at each sequence's end.
        window_size: (left, right): keys seen before and after the diagonal, -1 for all.
        deterministic: Whether the gradients are to repeat bit for bit.
        return_attn_probs: Whether to return lse too.

    Returns:
        out `[Tq, Hq, D]`; or `(out, lse, None)` with lse float32 `[Hq, Tq]`.

    Raises:
        TypeError: An argument is no tensor, or no number, where one is needed.
        ValueError: The tensors do not fit together.
        NotImplementedError: The kernel set declines the call.
    """
    check_packed(q, k, v, cu_seqlens, max_seqlens)
    offsets = (cu_seqlens[0].contiguous(), cu_seqlens[1].contiguous())
    return _run(
        operator,
        (q, k, v),
        (*offsets, *max_seqlens),
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
    )


def _run(
    operator: Operator,
    tensors: tuple[Tensor, Tensor, Tensor],
    sequences: tuple[Tensor | None, Tensor | None, int, int],
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    deterministic: bool,
    return_attn_probs: bool,
) -> Tensor | tuple[Tensor, Tensor, None]:
    if isinstance(softmax_scale, str):
        raise TypeError(f"softmax_scale must be a number or None, but is {softmax_scale!r}")
    scale = tensors[0].shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    mask = mask_of(causal, window_size)
    readable = map(with_unit_stride, tensors)
    out, lse = operator(*readable, *sequences, scale, *mask, deterministic)
    return (out, lse, None) if return_attn_probs else out


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_empty(call: AttentionCall) -> bool:
    """Whether there is nothing to launch for."""
    return call.query.numel() == 0 or call.key.numel() == 0


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens_query, cu_seqlens_key, *options = inputs
    out, lse = output
    ctx.save_for_backward(query, key, value, out, lse, cu_seqlens_query, cu_seqlens_key)
    ctx.options = options
    # lse is for reading: its derivative is not computed, and must not pass for zero.
    ctx.mark_non_differentiable(lse)
