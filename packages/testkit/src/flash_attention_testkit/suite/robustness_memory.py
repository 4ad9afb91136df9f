"""Where tensors lie: strides, padding, memory that nobody has written, offsets beyond 32 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_attention_testkit.inputs import SdpaInputs
from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite._determinism import asking_for_determinism
from flash_attention_testkit.suite._findings import assert_same
from flash_attention_testkit.suite._subject import Subject, call_of
from flash_attention_testkit.suite.robustness_base import (
    PACKED,
    assert_same_or_declined,
    assert_same_results,
    free_memory,
    masked,
    needs_backward,
    needs_cuda,
    parts,
    problem,
    run,
    run_call,
)

NAN = float("nan")


class MemoryTests(ProviderTestsBase):
    """Results do not depend on where the inputs lie, and nothing is read or written beside them.

    What is expected is what the same kernel set gives for contiguous copies.
    """

    def test_heads_may_lie_outside_of_rows(self, subject: Subject) -> None:
        """``[B, H, S, D]`` in memory, as a transposed projection lies."""
        plain = problem(subject)
        assert_same_results(subject, _laid_out(plain, _heads_first), plain)

    def test_batch_may_lie_inside_of_rows(self, subject: Subject) -> None:
        """``[S, B, H, D]`` in memory, as sequence-first models have it."""
        plain = problem(subject)
        assert_same_results(subject, _laid_out(plain, _rows_outermost), plain)

    def test_inputs_may_be_slices_of_one_projection(self, subject: Subject) -> None:
        """Query, key and value are slices of one ``[B, S, Hq + 2 Hkv, D]``."""
        plain = problem(subject, seq_q=70)
        heads = [tensor.shape[2] for tensor in (plain.query, plain.key, plain.value)]
        projection = torch.cat([plain.query, plain.key, plain.value], 2)
        query, key, value = projection.split(heads, 2)
        assert_same_results(subject, replace(plain, query=query, key=key, value=value), plain)

    def test_packed_inputs_may_be_slices_of_one_projection(self, subject: Subject) -> None:
        """Query, key and value are slices of one ``[T, Hq + 2 Hkv, D]``."""
        plain = problem(subject, lengths=((33, 33), (0, 0), (70, 70)))
        heads = [tensor.shape[1] for tensor in (plain.query, plain.key, plain.value)]
        projection = torch.cat([plain.query, plain.key, plain.value], 1)
        query, key, value = projection.split(heads, 1)
        assert_same_results(subject, replace(plain, query=query, key=key, value=value), plain)

    @pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
    def test_each_input_may_lie_in_its_own_way(self, subject: Subject, packed: bool) -> None:
        """The strides of one tensor say nothing about another's, those of key about value's."""
        if packed:
            plain = problem(subject, kv_heads=2, lengths=((33, 65), (70, 70)))
            inputs = replace(plain, key=_slice(plain.key, wider=64))
        else:
            plain = problem(subject, kv_heads=2)
            inputs = replace(plain, key=_heads_first(plain.key), value=_rows_outermost(plain.value))
        assert_same_results(subject, inputs, plain)
        inputs = replace(plain, value=inputs.key.copy_(plain.value))
        assert_same_results(subject, inputs, plain)

    def test_inputs_may_be_one_tensor(self, subject: Subject) -> None:
        """Query, key and value have one address, and gradients of their own."""
        plain = problem(subject, heads=2, kv_heads=2, seq_q=97)
        one = replace(plain, key=plain.query, value=plain.query)
        copies = replace(plain, key=plain.query.clone(), value=plain.query.clone())
        assert_same_results(subject, one, copies)

    @pytest.mark.parametrize("axis", ["batch", "rows", "heads"])
    def test_inputs_may_be_expanded(self, subject: Subject, axis: str) -> None:
        """All sequences, rows or heads are one in memory: a stride of 0."""
        plain = problem(subject, heads=2, kv_heads=2)
        place = ("batch", "rows", "heads").index(axis)

        def expand(tensor: Tensor) -> Tensor:
            return tensor.narrow(place, 0, 1).expand(tensor.shape)

        expanded = _laid_out(plain, expand)
        assert_same_results(subject, expanded, _laid_out(expanded, _contiguous))

    def test_inputs_may_be_misaligned(self, subject: Subject) -> None:
        """Tensors begin one element behind a multiple of 16 bytes; declined, or served right."""
        plain = problem(subject)
        assert_same_or_declined(subject, _laid_out(plain, lambda x: _slice(x, before=1)), plain)

    def test_rows_may_be_apart_by_odd_numbers_of_elements(self, subject: Subject) -> None:
        """No row but the first begins at a multiple of 16 bytes; declined, or served right."""
        plain = problem(subject)
        assert_same_or_declined(subject, _laid_out(plain, lambda x: _slice(x, wider=3)), plain)

    def test_grad_out_may_be_expanded(self, subject: Subject) -> None:
        """As the gradient of a mean over heads is: one head in memory."""
        needs_backward(subject)
        plain = problem(subject)
        expanded = plain.grad_out[:, :, :1].expand(plain.grad_out.shape)
        inputs = replace(plain, grad_out=expanded)
        assert_same_results(subject, inputs, replace(plain, grad_out=expanded.contiguous()))

    def test_out_may_have_any_strides(self, subject: Subject) -> None:
        """Out goes where the caller wants it, or is declined; nothing is written beside it."""
        plain = problem(subject)
        batch, rows, heads, head_dim = plain.query.shape
        around = plain.query.new_full((batch, heads, rows + 20, head_dim + 9), NAN).transpose(1, 2)
        target = around[:, 5 : 5 + rows, :, 1 : 1 + head_dim]
        call = call_of(plain, out=target)
        reason = subject.kernel_set.supports(call)
        if reason is not None:
            assert reason.strip(), f"{subject.name} declines without a reason"
            return
        with torch.no_grad():
            out, _ = subject.kernel_set.forward(call)
        assert_same({"out": out}, {"out": run(subject, plain)["out"]}, plain)
        target.fill_(NAN)
        assert around.isnan().all(), "something is written beside out"

    def test_padding_behind_the_rows_is_not_read(self, subject: Subject) -> None:
        """Behind the last row of every sequence, query or key, lies NaN."""
        plain = problem(subject)

        def pad(tensor: Tensor) -> Tensor:
            batch, rows, heads, head_dim = tensor.shape
            padded = tensor.new_full((batch, rows + 130, heads, head_dim), NAN)
            padded[:, :rows] = tensor
            return padded[:, :rows]

        assert_same_results(subject, _laid_out(plain, pad), plain)

    def test_padding_behind_the_head_dim_is_not_read(self, subject: Subject) -> None:
        """Behind the last element of every row lies NaN."""
        plain = problem(subject)
        assert_same_results(subject, _laid_out(plain, lambda x: _slice(x, wider=64)), plain)

    def test_rows_behind_the_last_packed_sequence_are_not_read(self, subject: Subject) -> None:
        """Tensors are longer than the offsets say, and NaN there."""
        plain = problem(subject, lengths=((33, 65), (1, 97), (70, 70)))

        def pad(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, torch.full_like(tensor, NAN)])

        rows, keys = len(plain.query), len(plain.key)
        own = {"out": slice(rows), "lse": slice(rows), "dq": slice(rows)}
        own |= {"dk": slice(keys), "dv": slice(keys)}
        found = parts(run(subject, _laid_out(plain, pad)), **own)
        assert_same(found, run(subject, plain), plain)

    def test_empty_sequences_change_no_other(self, subject: Subject) -> None:
        """Sequences without rows, without keys or without both lie between, before and behind."""
        full = ((33, 65), (1, 97), (70, 70))
        plain = problem(subject, lengths=full)
        more = ((0, 0), (33, 65), (0, 0), (0, 0), (1, 97), (70, 70), (0, 0))
        inputs = problem(subject, lengths=more)
        assert_same_results(subject, inputs, plain)

    @pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
    def test_sequences_may_be_many(self, subject: Subject, packed: bool) -> None:
        """Each of forty is as it is among two: more than a warp has threads."""
        shape = {"heads": 1, "kv_heads": 1}
        if packed:
            few = problem(subject, lengths=((3, 5), (1, 4)), **shape)
            inputs = problem(subject, lengths=((3, 5), (1, 4)) * 20, **shape)
        else:
            few = problem(subject, seq_q=3, seq_k=5, **shape)
            inputs = few
        many = _laid_out(inputs, lambda x: x)
        for name in ("query", "key", "value", "grad_out"):
            tensor = getattr(few, name)
            many = replace(many, **{name: tensor.repeat(20, *[1] * (tensor.dim() - 1))})
        found = run(subject, many)
        for name, tensor in run(subject, few).items():
            times = (1, 20) if packed and name == "lse" else (20, *[1] * (tensor.dim() - 1))
            assert_same({name: found[name]}, {name: tensor.repeat(times)}, many)

    def test_longest_lengths_are_bounds(self, subject: Subject) -> None:
        """``max_seqlen_query`` and ``max_seqlen_key`` may be larger than any sequence is."""
        inputs = problem(subject, lengths=PACKED, **masked(subject, causal=True))
        call = call_of(inputs)
        larger = call._replace(
            max_seqlen_query=call.max_seqlen_query + 130, max_seqlen_key=call.max_seqlen_key + 57
        )
        found = run_call(subject, larger, inputs.grad_out)
        assert_same(found, run_call(subject, call, inputs.grad_out), inputs)

    def test_rows_without_keys_are_zero(self, subject: Subject) -> None:
        """Out and dq are 0 in packed sequences without keys, dk and dv in those without rows."""
        inputs = problem(subject, lengths=((33, 65), (9, 0), (0, 5), (70, 70), (3, 0)))
        found = run(subject, inputs)
        for rows in (slice(33, 42), slice(112, 115)):
            for name, part in parts(found, out=rows, dq=rows).items():
                assert not part.any(), f"{name} of rows that see no key is not 0"
        for name, part in parts(found, dk=slice(65, 70), dv=slice(65, 70)).items():
            assert not part.any(), f"{name} of keys that no row sees is not 0"

    @pytest.mark.parametrize("lengths", ["fewer rows", "more rows", "packed"])
    def test_out_and_lse_are_written_whole(self, subject: Subject, lengths: str) -> None:
        """Whatever was in memory before, NaN or zeros."""
        inputs = _with_unseen(subject, lengths)
        zeros = call_of(inputs, out=torch.zeros_like(inputs.query))
        poisoned = call_of(inputs, out=torch.full_like(inputs.query, NAN))
        expected = subject.kernel_set.forward(zeros)
        with asking_for_determinism():
            found = subject.kernel_set.forward(poisoned)
        names = ("out", "lse")
        assert_same(
            dict(zip(names, found, strict=True)),
            dict(zip(names, expected, strict=True)),
            inputs,
        )

    @pytest.mark.parametrize("lengths", ["fewer rows", "more rows", "packed"])
    def test_gradients_are_written_whole(self, subject: Subject, lengths: str) -> None:
        """In memory that is NaN before, those of keys that no row sees and the other way round."""
        needs_backward(subject)
        if subject.capabilities.deterministic == "never":
            pytest.skip("torch fills memory with NaN only if determinism is asked for")
        inputs = _with_unseen(subject, lengths)
        with asking_for_determinism():
            found = run(subject, inputs)
        for name in ("dq", "dk", "dv"):
            assert found[name].isfinite().all(), f"{name} has elements that nobody wrote"

    @pytest.mark.parametrize("axis", ["batch", "rows", "heads"])
    def test_offsets_may_exceed_32_bits(self, subject: Subject, axis: str) -> None:
        """The last sequence, row or head begins more than 2^31 elements behind the first."""
        plain = problem(subject, batch=3, heads=3, kv_heads=3)
        free_memory(subject, 3 * plain.query.element_size() + 4)
        place = ("batch", "rows", "heads").index(axis)
        far = -(-((1 << 31) + 8) // (plain.query.shape[place] - 1) // 8) * 8 + 8
        longest = max(plain.query.shape[place], plain.key.shape[place])
        buffer = plain.query.new_zeros(far * longest)
        start = 0

        def spread(tensor: Tensor) -> Tensor:
            nonlocal start
            near = list(tensor.narrow(place, 0, 1).contiguous().stride())
            near[place] = far
            view = buffer.as_strided(tensor.shape, near, start)
            start += tensor.numel()
            return view.copy_(tensor)

        inputs = _laid_out(plain, spread)
        target = spread(torch.full_like(plain.query, NAN))
        found = run_call(subject, call_of(inputs, out=target), inputs.grad_out)
        assert_same(found, run(subject, plain), plain)

    def test_a_batch_may_exceed_16_bits(self, subject: Subject) -> None:
        """More sequences than a CUDA grid has blocks along its second and third axis."""
        needs_cuda(subject)
        few = problem(subject, seq_q=3, seq_k=5)
        many = _laid_out(few, lambda tensor: tensor.repeat(35_000, 1, 1, 1))
        tails = {name: tensor[-2:] for name, tensor in run(subject, many).items()}
        assert_same(tails, run(subject, few), few)

    @pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
    def test_tensors_may_have_more_than_2_31_elements(self, subject: Subject, packed: bool) -> None:
        """The last sequences of a huge batch are as they are alone."""
        needs_cuda(subject)
        rows, heads, last = 1024, 16, 2
        shape = {"seq_q": rows, "seq_k": rows, "heads": heads, "kv_heads": heads}
        small = problem(subject, batch=last, **shape)
        if packed:
            problem(subject, lengths=((rows, rows),))  # skips where these are not declared
        sequences = (1 << 31) // small.query[0].numel() + 2 * last
        free_memory(subject, 24 * small.query.element_size())

        def many(tensor: Tensor) -> Tensor:
            huge = tensor.new_zeros(sequences, *tensor.shape[1:])
            huge[-last:] = tensor
            return huge.flatten(0, 1) if packed else huge

        inputs = _laid_out(small, many)
        if packed:
            offsets = torch.arange(sequences + 1, dtype=torch.int32, device=subject.device) * rows
            options = inputs.options.copy()
            options["cu_seqlens_query"] = options["cu_seqlens_key"] = offsets
            inputs = replace(inputs, options=options)
        try:
            found = run_call(subject, call_of(inputs), inputs.grad_out)
        except torch.cuda.OutOfMemoryError:
            pytest.skip(f"{subject.name} needs more memory for it than this GPU has free")
        if packed:
            found["lse"] = found["lse"].unflatten(1, (sequences, rows)).transpose(0, 1)
            found |= {
                name: tensor.unflatten(0, (sequences, rows))
                for name, tensor in found.items()
                if name != "lse"
            }
        tails = {name: tensor[-last:] for name, tensor in found.items()}
        assert_same(tails, run(subject, small), small)


def _laid_out(inputs: SdpaInputs, layout: Callable[[Tensor], Tensor]) -> SdpaInputs:
    """The same problem, each of its tensors made by ``layout``."""
    query, key, value, grad_out = map(
        layout, (inputs.query, inputs.key, inputs.value, inputs.grad_out)
    )
    return SdpaInputs(query, key, value, grad_out, inputs.options)


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def _heads_first(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _rows_outermost(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def _slice(tensor: Tensor, *, wider: int = 0, before: int = 0) -> Tensor:
    """The same values in rows that are some elements wider, some elements into a buffer of NaN."""
    *rows, width = tensor.shape
    buffer = tensor.new_full((before + math.prod(rows) * (width + wider),), NAN)
    return buffer[before:].view(*rows, width + wider)[..., :width].copy_(tensor)


def _with_unseen(subject: Subject, lengths: str) -> SdpaInputs:
    """A problem with rows that see no key or keys that no row sees, if masks are declared."""
    if lengths == "packed":
        return problem(subject, lengths=PACKED, **masked(subject, causal=True, window_left=9))
    rows, keys = (33, 150) if lengths == "fewer rows" else (150, 33)
    options = masked(subject, causal=True, window_left=9)
    return problem(subject, seq_q=rows, seq_k=keys, **options)
