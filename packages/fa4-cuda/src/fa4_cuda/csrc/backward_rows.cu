// Before and after the backward's main kernel, row by row.
//
// Before: delta, the row sums of dO * O, and lse in base 2, for all rows that the workspace holds,
// and zeros where dQ is summed, but for those that the main kernel makes. After: dQ from its sums;
// and what has come out NaN, once more. Where dQ has a kernel of its own nothing is summed, and
// whoever has a row with NaN repairs it.
#include "backward_launch.h"
#include "backward_repair.cuh"

namespace fa4 {
namespace {

constexpr int kUnitRows = 64;  // of a thread block
constexpr int kThreads = 128;

// 64 rows of one head of one sequence.
struct RowUnit {
  int sequence, batch, head, first_row, seq_q, q_start;
  int64_t workspace_row;

  __device__ __forceinline__ explicit RowUnit(const BackwardParams& params) {
    const int units = gridDim.x / (params.heads_q * params.batch);
    const int sequence_head = blockIdx.x / units;
    first_row = (blockIdx.x - sequence_head * units) * kUnitRows;
    sequence = batch = sequence_head / params.heads_q;
    head = sequence_head - sequence * params.heads_q;
    seq_q = params.seq_q;
    q_start = 0;
    if (params.cu_seqlens_q != nullptr) {
      batch = 0;
      q_start = params.cu_seqlens_q[sequence];
      seq_q = params.cu_seqlens_q[sequence + 1] - q_start;
    }
    workspace_row = fa4::workspace_row(params, sequence, head, q_start) + first_row;
  }

  // Whether the workspace holds these rows: it is rounded up to whole blocks of queries.
  __device__ __forceinline__ bool exists() const {
    return first_row < (seq_q + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  }

  template <class T>
  __device__ __forceinline__ T* row(const TensorView& tensor, int row) const {
    return static_cast<T*>(tensor.data) + batch * tensor.stride_batch +
           static_cast<int64_t>(q_start + row) * tensor.stride_seq + head * tensor.stride_head;
  }
};

// kLanes of a warp share a row, 16 bytes each.
template <int kHeadDim, Element kElement>
__global__ void __launch_bounds__(kThreads)
    backward_prepare(const __grid_constant__ BackwardParams params) {
  constexpr int kLanes = kHeadDim <= 64 ? 8 : kHeadDim <= 128 ? 16 : 32;
  constexpr int kRowsAtOnce = kThreads / kLanes;
  constexpr BackwardTile kTile = any_tile_of(kHeadDim);
  constexpr bool kSumsDq = !kTile.has_dq_kernel();
  const RowUnit unit(params);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (params.next_tile != nullptr) *params.next_tile = 0;
    if constexpr (kSumsDq) {
      *params.nan_keys = 0;
    } else if (params.next_query_tile != nullptr) {
      *params.next_query_tile = 0;
    }
  }
  const int key_head = unit.sequence * params.heads_k + unit.head / params.heads_per_group;
  const bool is_first = unit.first_row == 0 && unit.head % params.heads_per_group == 0;
  if (params.zeroed != nullptr && is_first && threadIdx.x == 0) params.zeroed[key_head] = 0;
  if (!unit.exists()) return;

  if (kSumsDq && !are_zeroed_ahead(params, key_head)) {
    auto* sums =
        reinterpret_cast<float4*>(params.dq_sums + dq_panel(unit.workspace_row, kHeadDim, 0));
#pragma unroll 4
    for (int i = threadIdx.x; i < kUnitRows * kHeadDim / 4; i += kThreads)
      sums[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  const int column = threadIdx.x % kLanes * 8;
#pragma unroll 4
  for (int i = threadIdx.x / kLanes; i < kUnitRows; i += kRowsAtOnce) {
    const int row = unit.first_row + i;
    float sum = 0.f;
    if (row < unit.seq_q && column < params.head_dim) {
      sum = dot<kElement>(
          *reinterpret_cast<const uint4*>(unit.row<const uint16_t>(params.out, row) + column),
          *reinterpret_cast<const uint4*>(unit.row<const uint16_t>(params.grad_out, row) + column));
    }
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (column == 0) {
      // Rows without keys have an infinite lse of either sign; their P is to be zero.
      float negative_lse = -INFINITY;
      if (row < unit.seq_q) {
        const float lse = params.lse[unit.batch * params.lse_stride_batch +
                                     unit.head * params.lse_stride_head + unit.q_start + row];
        constexpr float kLog2E = 1.44269504f;
        if (fabsf(lse) != INFINITY) negative_lse = -kLog2E * lse;
      }
      params.negative_lse[unit.workspace_row + i] = negative_lse;
      params.delta[unit.workspace_row + i] = negative_lse == -INFINITY ? 0.f : sum;
    }
  }
  if (params.turns != nullptr && threadIdx.x * kPanelColumns < kHeadDim) {
    constexpr int kPanels = (kHeadDim + kPanelColumns - 1) / kPanelColumns;
    params.turns[unit.workspace_row / kUnitRows * kPanels + threadIdx.x] = 0;
  }
}

template <int kHeadDim, Element kElement>
__device__ __forceinline__ void finish_rows(const BackwardParams& params, const RowUnit& unit) {
  const int thread = threadIdx.x, lane = thread & 31;
  const int row = unit.first_row + (thread >> 5) * 16 + (lane >> 2);
  NanWatch<kElement> watch[2];
#pragma unroll
  for (int panel = 0; panel * kPanelColumns < kHeadDim; ++panel) {
    const auto* sums = reinterpret_cast<const float4*>(
        params.dq_sums + dq_panel(unit.workspace_row, kHeadDim, panel));
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      if (panel * kPanelColumns + 32 * g >= kHeadDim) break;
      uint32_t quad[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 sum = sums[(4 * g + i) * kThreads + thread];
        quad[0][i] = ptx::pack<kElement>(sum.x * params.scale, sum.y * params.scale);
        quad[1][i] = ptx::pack<kElement>(sum.z * params.scale, sum.w * params.scale);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) watch[r].see(quad[r][i]);
        transpose_quad(quad[r], lane);
        const int column = panel * kPanelColumns + 32 * g + 8 * (lane & 3);
        if (row + 8 * r < unit.seq_q && column < params.head_dim) {
          *reinterpret_cast<uint4*>(unit.row<uint16_t>(params.dq, row + 8 * r) + column) =
              make_uint4(quad[r][0], quad[r][1], quad[r][2], quad[r][3]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t quads = __ballot_sync(~0u, row + 8 * r < unit.seq_q && watch[r].found());
    __syncwarp();  // all of a row is written before it is written again
#pragma unroll 1
    while (quads != 0) {
      const int quad = (__ffs(quads) - 1) >> 2;
      quads &= ~(0xFu << (4 * quad));
      const int i = thread / 32 * 16 + quad + 8 * r;
      repair_query<kElement>(params, unit.sequence, unit.head, unit.first_row + i,
                             unit.workspace_row + i, lane);
    }
  }
}

// Four blocks of a multiprocessor keep memory busy; for more the compiler spills registers of the
// repairs.
template <int kHeadDim, Element kElement>
__global__ void __launch_bounds__(kThreads, 4)
    backward_finish(const __grid_constant__ BackwardParams params) {
  const bool nan_keys = *params.nan_keys != 0;  // read here, for it is needed after a while
  const RowUnit unit(params);
  if (unit.first_row < unit.seq_q) finish_rows<kHeadDim, kElement>(params, unit);
  if (nan_keys) {
    constexpr int kWarps = kThreads / 32;
    repair_keys<kElement>(params, blockIdx.x * kWarps + threadIdx.x / 32, gridDim.x * kWarps,
                          threadIdx.x & 31);
  }
}

// Calls launch.operator()<head dim, element>().
template <class Launch>
cudaError_t for_tile(int head_dim, Element element, Launch launch) {
  const auto with = [&]<int kHeadDim>() {
    return element == Element::kHalf ? launch.template operator()<kHeadDim, Element::kHalf>()
                                     : launch.template operator()<kHeadDim, Element::kBfloat16>();
  };
  switch (head_dim) {
    case 64:
      return with.template operator()<64>();
    case 96:
      return with.template operator()<96>();
    case 128:
      return with.template operator()<128>();
    case 192:
      return with.template operator()<192>();
    default:
      return with.template operator()<256>();
  }
}

// Of all sequences; packed ones get as many as the longest.
int units(const BackwardParams& params, int alignment) {
  const int rows = (params.seq_q + alignment - 1) / alignment * alignment;
  return rows / kUnitRows * params.heads_q * params.batch;
}

}  // namespace

cudaError_t launch_backward_prepare(const BackwardParams& params, int tile_head_dim,
                                    Element element, cudaStream_t stream) {
  return for_tile(tile_head_dim, element, [&]<int kHeadDim, Element kElement>() {
    backward_prepare<kHeadDim, kElement>
        <<<units(params, kRowAlignment), kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
}

cudaError_t launch_backward_finish(const BackwardParams& params, int tile_head_dim, Element element,
                                   cudaStream_t stream) {
  return for_tile(tile_head_dim, element, [&]<int kHeadDim, Element kElement>() {
    if constexpr (any_tile_of(kHeadDim).has_dq_kernel()) {
      return cudaErrorInvalidValue;  // there is nothing to finish
    } else {
      backward_finish<kHeadDim, kElement>
          <<<units(params, kUnitRows), kThreads, 0, stream>>>(params);
      return cudaGetLastError();
    }
  });
}

}  // namespace fa4
