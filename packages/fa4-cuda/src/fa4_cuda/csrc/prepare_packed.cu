#include "launch.h"
#include "scheduler.cuh"

namespace fa4 {

// Before a launch over packed sequences: their lengths are known to the device only. One thread
// block sorts them by their number of keys, within chunks of kPrepareThreads, and counts their
// tiles.
constexpr int kPrepareThreads = 1024;

__global__ void __launch_bounds__(kPrepareThreads, 1)
    prepare_packed(Schedule schedule, const int* cu_seqlens_q, const int* cu_seqlens_k,
                   const int* seqused_k) {
  __shared__ int lengths[kPrepareThreads];
  __shared__ int tiles[kPrepareThreads];  // in the order of lengths, then its running sum
  const int thread = threadIdx.x, sequences = schedule.sequences;
  int* first_tile = schedule.state + ScheduleState::kTable;
  int* order = first_tile + sequences + 1;
  int tiles_before = 0;

  for (int chunk = 0; chunk < sequences; chunk += kPrepareThreads) {
    const int count = min(kPrepareThreads, sequences - chunk), sequence = chunk + thread;
    const bool active = thread < count;
    int seq_q = 0, seq_k = 0;
    if (active) {
      seq_q = cu_seqlens_q[sequence + 1] - cu_seqlens_q[sequence];
      seq_k = seqused_k != nullptr ? seqused_k[sequence]
                                   : cu_seqlens_k[sequence + 1] - cu_seqlens_k[sequence];
    }
    lengths[thread] = seq_k;
    __syncthreads();
    int rank = 0;
    for (int i = 0; i < count; ++i)
      rank += lengths[i] > seq_k || (lengths[i] == seq_k && i < thread);
    if (active) {
      tiles[rank] = (seq_q + schedule.tile_queries - 1) / schedule.tile_queries * schedule.heads;
      order[chunk + rank] = sequence;
    } else {
      tiles[thread] = 0;
    }
    __syncthreads();
    for (int step = 1; step < kPrepareThreads; step *= 2) {
      const int left = thread >= step ? tiles[thread - step] : 0;
      __syncthreads();
      tiles[thread] += left;
      __syncthreads();
    }
    if (active) first_tile[chunk + thread] = tiles_before + (thread == 0 ? 0 : tiles[thread - 1]);
    tiles_before += tiles[kPrepareThreads - 1];
    __syncthreads();
  }
  if (thread == 0) {
    first_tile[sequences] = tiles_before;
    schedule.state[ScheduleState::kTiles] = tiles_before;
    schedule.state[ScheduleState::kNextTile] = 0;
    schedule.state[ScheduleState::kFinished] = 0;
  }
}

cudaError_t launch_prepare_packed(const ForwardParams& params, cudaStream_t stream) {
  prepare_packed<<<1, kPrepareThreads, 0, stream>>>(params.schedule, params.cu_seqlens_q,
                                                    params.cu_seqlens_k, params.seqused_k);
  return cudaGetLastError();
}

}  // namespace fa4
