// Rows of dQ, dK and dV that came out NaN, once more: from the pairs of a query and a key that see
// each other, and nothing else.
//
// The main kernel multiplies whole tiles, with P = dS = 0 where a query does not see a key. Where
// K, Q or dO is Inf or NaN there, or lse or delta, the row of the result becomes NaN though it has
// nothing to do with them. Nothing short of reading all of them can tell before, and it happens to
// nobody without Inf or NaN: so rows that came out NaN are computed again, slowly, each by a warp.
// Those that depend on what is not finite stay as they are. That is asked first: where a training
// has failed all rows are NaN, and a step of loss scaling may well be one of these.
#pragma once

#include "backward_work.cuh"
#include "epilogue.cuh"
#include "nan_watch.cuh"

namespace fa4 {

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

__device__ __forceinline__ uint4 load_16_bytes(const uint16_t* address) {
  return *reinterpret_cast<const uint4*>(address);
}

template <Element kElement>
__device__ __forceinline__ float dot(uint4 a, uint4 b) {
  float sum = 0.f;
  const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = ptx::unpack<kElement>(as[i]), y = ptx::unpack<kElement>(bs[i]);
    sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
  }
  return sum;
}

template <Element kElement>
__device__ __forceinline__ float row_product(const uint16_t* a, const uint16_t* b, int head_dim) {
  float sum = 0.f;
#pragma unroll 1
  for (int d = 0; d < head_dim; d += 8)
    sum += dot<kElement>(load_16_bytes(a + d), load_16_bytes(b + d));
  return sum;
}

// P and dS of a query and a key, from rows of Q and K, dO and V.
template <Element kElement>
__device__ __forceinline__ float2 weights_of(const BackwardParams& params, const uint16_t* q,
                                             const uint16_t* k, const uint16_t* grad_out,
                                             const uint16_t* v, float negative_lse, float delta) {
  const float s = row_product<kElement>(q, k, params.head_dim);
  const float dp = row_product<kElement>(grad_out, v, params.head_dim);
  const float p = ptx::exp2(fmaf(s, params.scale_log2, negative_lse));
  return {p, p * (dp - delta)};
}

// A row of a gradient: eight columns of each lane, as far as there are any.
template <Element kElement>
struct GradientRow {
  float sum[8] = {};

  // weight * row for `count` rows, whose weights the lanes have.
  __device__ __forceinline__ void add(float weight, const uint16_t* rows, int64_t stride, int count,
                                      int head_dim, int lane) {
    rows += 8 * lane;
#pragma unroll 1
    for (int i = 0; i < count; ++i, rows += stride) {
      const float factor = __shfl_sync(~0u, weight, i);
      if (8 * lane < head_dim) {
        const uint4 columns = load_16_bytes(rows);
        const uint32_t pairs[4] = {columns.x, columns.y, columns.z, columns.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float2 values = ptx::unpack<kElement>(pairs[c]);
          sum[2 * c] = fmaf(factor, values.x, sum[2 * c]);
          sum[2 * c + 1] = fmaf(factor, values.y, sum[2 * c + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void store(uint16_t* row, float scale, int head_dim, int lane) const {
    uint32_t pairs[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      pairs[c] = ptx::pack<kElement>(sum[2 * c] * scale, sum[2 * c + 1] * scale);
    if (8 * lane < head_dim)
      *reinterpret_cast<uint4*>(row + 8 * lane) =
          make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
};

// Of a warp's sixteen rows, from first_row on, those of which a thread says has_nan(r), one after
// the other: repair(row). Row r of a thread's two is that of its quad, 8 r further on.
template <class HasNan, class Repair>
__device__ __forceinline__ void repair_rows(const HasNan& has_nan, int first_row,
                                            const Repair& repair) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t quads = __ballot_sync(~0u, has_nan(r));
    __syncwarp();  // all of a row is written before it is written again
#pragma unroll 1
    while (quads != 0) {
      const int quad = (__ffs(quads) - 1) >> 2;
      quads &= ~(0xFu << (4 * quad));
      repair(first_row + quad + 8 * r);
    }
  }
}

// Of rows with NaN: dQ of a query.
template <Element kElement>
__device__ __forceinline__ void repair_query(const BackwardParams& params, int sequence_number,
                                             int head, int query, int64_t workspace_row, int lane) {
  const Sequence sequence(params, sequence_number);
  const int diagonal = query + sequence.seq_k - sequence.seq_q;
  const int begin = max(0, diagonal - params.window_left);
  const int end = min(sequence.seq_k, diagonal + params.window_right + 1);
  const float negative_lse = params.negative_lse[workspace_row];
  const float delta = params.delta[workspace_row];
  if (begin < end && !(is_finite(negative_lse) && is_finite(delta))) return;

  const int key_head = head / params.heads_per_group;
  const uint16_t* const q = sequence.query(params.q, query, head);
  const uint16_t* const grad_out = sequence.query(params.grad_out, query, head);
  GradientRow<kElement> dq;
#pragma unroll 1
  for (int first = begin; first < end; first += 32) {
    float ds = 0.f;
    if (first + lane < end) {
      ds = weights_of<kElement>(params, q, sequence.key(params.k, first + lane, key_head), grad_out,
                                sequence.key(params.v, first + lane, key_head), negative_lse, delta)
               .y;
    }
    dq.add(ds, sequence.key(params.k, first, key_head), params.k.stride_seq, min(32, end - first),
           params.head_dim, lane);
  }
  dq.store(sequence.query(params.dq, query, head), params.scale, params.head_dim, lane);
}

template <Element kElement>
__device__ __forceinline__ bool row_is_finite(const uint16_t* row, int head_dim, int lane) {
  bool finite = true;
#pragma unroll 1
  for (int d = lane; d < head_dim; d += 32)
    finite = finite && is_finite(to_float<kElement>(row[d]));
  return __all_sync(~0u, finite);
}

// Queries [begin, end) of one head that see a key.
struct SeenBy {
  int head, begin, end;
  const float* negative_lse;  // of the head's first query
  const float* delta;

  __device__ __forceinline__ SeenBy(const BackwardParams& params, const Sequence& sequence,
                                    int head, int key)
      : head(head) {
    const int diagonal = key - (sequence.seq_k - sequence.seq_q);
    begin = max(0, diagonal - params.window_right);
    end = min(sequence.seq_q, diagonal + params.window_left + 1);
    const int64_t row = workspace_row(params, sequence.number, head, sequence.q_start);
    negative_lse = params.negative_lse + row;
    delta = params.delta + row;
  }

  // Whether dK (or else dV) is made of something that is not finite. Rows of which only O is not
  // count for dK alone.
  template <Element kElement>
  __device__ __forceinline__ bool is_spoilt(const BackwardParams& params, const Sequence& sequence,
                                            bool is_dk, int lane) const {
#pragma unroll 1
    for (int first = begin; first < end; first += 32) {
      const int query = first + lane;
      const bool lse_is_nan = query < end && isnan(negative_lse[query]);
      uint32_t suspects = __ballot_sync(~0u, query < end && !is_finite(delta[query]));
      if (__any_sync(~0u, lse_is_nan) || (is_dk && suspects != 0)) return true;
#pragma unroll 1
      for (; suspects != 0; suspects &= suspects - 1) {
        const int suspect = first + __ffs(suspects) - 1;
        const uint16_t* const grad_out = sequence.query(params.grad_out, suspect, head);
        if (!row_is_finite<kElement>(grad_out, params.head_dim, lane)) return true;
      }
    }
    return false;
  }
};

// Of rows with NaN: dK or dV of a key.
template <Element kElement>
__device__ __forceinline__ void repair_key(const BackwardParams& params, const Sequence& sequence,
                                           int key_head, int key, bool is_dk, int lane) {
  const int first_head = key_head * params.heads_per_group;
#pragma unroll 1
  for (int i = 0; i < params.heads_per_group; ++i) {
    const SeenBy queries(params, sequence, first_head + i, key);
    if (queries.is_spoilt<kElement>(params, sequence, is_dk, lane)) return;
  }

  const uint16_t* const k = sequence.key(params.k, key, key_head);
  const uint16_t* const v = sequence.key(params.v, key, key_head);
  const TensorView& rows = is_dk ? params.q : params.grad_out;
  GradientRow<kElement> gradient;
#pragma unroll 1
  for (int i = 0; i < params.heads_per_group; ++i) {
    const SeenBy queries(params, sequence, first_head + i, key);
#pragma unroll 1
    for (int first = queries.begin; first < queries.end; first += 32) {
      const int query = first + lane;
      float weight = 0.f;
      if (query < queries.end) {
        const float2 weights =
            weights_of<kElement>(params, sequence.query(params.q, query, queries.head), k,
                                 sequence.query(params.grad_out, query, queries.head), v,
                                 queries.negative_lse[query], queries.delta[query]);
        weight = is_dk ? weights.y : weights.x;
      }
      gradient.add(weight, sequence.query(rows, first, queries.head), rows.stride_seq,
                   min(32, queries.end - first), params.head_dim, lane);
    }
  }
  gradient.store(sequence.key(is_dk ? params.dk : params.dv, key, key_head),
                 is_dk ? params.scale : 1.f, params.head_dim, lane);
}

// All rows of dK and dV with NaN, by all warps of a grid.
template <Element kElement>
__device__ __forceinline__ void repair_keys(const BackwardParams& params, int warp, int warps,
                                            int lane) {
  const int64_t keys = static_cast<int64_t>(params.seq_k) * params.heads_k * params.batch;
#pragma unroll 1
  for (int64_t i = warp; i < keys; i += warps) {
    const int64_t sequence_head = i / params.seq_k;
    const int key = static_cast<int>(i - sequence_head * params.seq_k);
    const int number = static_cast<int>(sequence_head / params.heads_k);
    const int key_head = static_cast<int>(sequence_head - int64_t{number} * params.heads_k);
    const Sequence sequence(params, number);
    if (key >= sequence.seq_k) continue;
#pragma unroll 1
    for (int gradient = 0; gradient < 2; ++gradient) {
      const bool is_dk = gradient == 0;
      NanWatch<kElement> watch;
      if (8 * lane < params.head_dim) {
        const uint4 columns =
            load_16_bytes(sequence.key(is_dk ? params.dk : params.dv, key, key_head) + 8 * lane);
        watch.see(columns.x);
        watch.see(columns.y);
        watch.see(columns.z);
        watch.see(columns.w);
      }
      if (__any_sync(~0u, watch.found()))
        repair_key<kElement>(params, sequence, key_head, key, is_dk, lane);
    }
  }
}

}  // namespace fa4
