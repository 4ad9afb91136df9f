// The C ABI of the library. No torch, no Python: plain structs, sizes and an int status.
//
// Everything returns FA4_OK or a status that fa4_error_string turns into a sentence. A call that
// this library does not serve gets FA4_UNSUPPORTED_...: nothing was launched, another kernel may
// take it. Negative statuses are CUDA's own errors, negated.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FA4_ABI_VERSION 2

// The library hides everything else.
#define FA4_API __attribute__((visibility("default")))

enum fa4_status {
  FA4_OK = 0,
  FA4_INVALID_ARGUMENT = 1,      // sizes that contradict each other, a missing pointer
  FA4_UNSUPPORTED_HEAD_DIM = 2,  // not a multiple of 8 from 8 to 256
  FA4_UNSUPPORTED_STRIDE =
      3,  // an address or stride that is no multiple of 16 bytes, negative, or over 2^40 bytes
  FA4_UNSUPPORTED_SIZE =
      4,  // more than 2^31 - 1 rows, tiles or elements of a sequence, here or in the backward
  FA4_UNSUPPORTED_DEVICE = 5,         // not a Hopper GPU (compute capability 9.0)
  FA4_WORKSPACE_TOO_SMALL = 6,        // the plan says how much is needed
  FA4_DRIVER_WITHOUT_TENSOR_MAP = 7,  // the driver is older than CUDA 12
};

enum fa4_element { FA4_HALF = 0, FA4_BFLOAT16 = 1 };

// A tensor [batch, seq, heads, head_dim], or [total, heads, head_dim] if sequences are packed.
// Strides in elements; the last dimension is contiguous. The stride of a dimension of size one does
// not matter.
typedef struct fa4_tensor {
  void* data;
  int64_t stride_batch;  // ignored if sequences are packed
  int64_t stride_seq;
  int64_t stride_head;
} fa4_tensor;

// O = softmax(scale * Q K^T + mask) V, and lse, the natural logarithm of the softmax's denominator.
// Query i of a sequence sees key j if  i + seq_k - seq_q - window_left <= j <= i + seq_k - seq_q +
// window_right (bottom-right alignment). A negative window is unbounded on its side.
typedef struct fa4_forward_args {
  fa4_tensor q, k, v, out;
  float* lse;  // dense: [batch, heads_q, seq_q]; packed: [heads_q, total_q]; rows contiguous
  int64_t lse_stride_batch;  // in elements; ignored if sequences are packed
  int64_t lse_stride_head;
  const int32_t* cu_seqlens_q;  // device, [batch + 1]: packed sequences; both or neither
  const int32_t* cu_seqlens_k;
  const int32_t* seqused_k;  // device, [batch], or null: keys of each sequence that count
  int32_t element;           // fa4_element
  int32_t batch;             // sequences
  int32_t heads_q;           // a multiple of heads_k
  int32_t heads_k;
  int32_t head_dim;
  int32_t seq_q;  // dense: rows of every sequence; packed: of the longest
  int32_t seq_k;
  int32_t total_q;  // packed: rows of all sequences; else ignored
  int32_t total_k;
  int32_t causal;  // as window_right = 0
  int32_t window_left;
  int32_t window_right;
  float scale;      // any number, zero and negative ones too
  float empty_lse;  // lse of rows that see no key; their output is zero
  void* workspace;  // device, fa4_forward_workspace_bytes, 16-byte aligned; not shared by launches
                    // that may overlap
  size_t workspace_bytes;
  int32_t
      workspace_is_zero;  // its first 16 bytes are zero; the launch leaves them so. Saves a memset
  void* stream;           // cudaStream_t, of the current device
} fa4_forward_args;

// How a forward call is served: a pure function of sizes. Fields may be changed before
// fa4_forward_with_plan, to try another tile, say.
typedef struct fa4_forward_plan {
  int32_t tile;          // row of the tile table
  int32_t packed_heads;  // query heads of a group that share a tile: 1, or all of them
  int32_t tile_queries;  // queries of a tile
  int32_t tiles;         // of the launch; packed sequences: at most
  int32_t grid;          // thread blocks
  int32_t section_keys;  // see Schedule in forward_params.h
  int32_t dynamic;
  int64_t workspace_bytes;
} fa4_forward_plan;

// dQ, dK and dV of one forward call, of fa4_forward_args' meaning where names are the same.
// Gradients of rows that see no key, and of keys that no row sees, are zero.
typedef struct fa4_backward_args {
  fa4_tensor q, k, v, out, grad_out;  // as in the forward
  // As the forward left it, this library's or torch's; rows without keys: inf of either sign.
  const float* lse;
  int64_t lse_stride_batch;
  int64_t lse_stride_head;
  fa4_tensor dq, dk, dv;  // written whole
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  const int32_t* seqused_k;  // must be null
  int32_t element;
  int32_t batch;
  int32_t heads_q;
  int32_t heads_k;
  int32_t head_dim;
  int32_t seq_q;
  int32_t seq_k;
  int32_t total_q;
  int32_t total_k;
  int32_t causal;
  int32_t window_left;
  int32_t window_right;
  float scale;
  int32_t deterministic;  // the same bits in every run
  void* workspace;        // device, as large as the plan says, 128-byte aligned; not shared by
                          // launches that may overlap
  size_t workspace_bytes;
  void* stream;
} fa4_backward_args;

// How a backward call is served: a pure function of sizes.
typedef struct fa4_backward_plan {
  int32_t tile;  // row of the tile table
  int32_t grid;  // thread blocks
  int32_t deterministic;
  int32_t query_grid;  // of dQ's own kernel, where the main kernel does not sum dQ; else 0
  int64_t workspace_bytes;  // fp32 dQ if it is summed, two numbers a row, counters; in whole tiles
} fa4_backward_plan;

// A row of the tile table.
typedef struct fa4_forward_tile {
  int32_t head_dim, mask, block_m, block_n, q_stages, kv_stages, shared_bytes;
} fa4_forward_tile;

// A row of the backward's.
typedef struct fa4_backward_tile {
  int32_t head_dim, mask;
  int32_t split;  // 0: the warp groups divide the keys; 1: a gradient each
  int32_t block_m, block_n, q_stages, do_stages;
  int32_t k_stages, v_stages;  // of dQ's own kernel; 0 if there is none
  int32_t shared_bytes, query_shared_bytes;
} fa4_backward_tile;

FA4_API int fa4_abi_version(void);
FA4_API const char* fa4_error_string(int status);

// Pure: no GPU needed. `tile` is out of range: FA4_INVALID_ARGUMENT.
FA4_API int fa4_forward_tile_at(int tile, fa4_forward_tile* result);
FA4_API int fa4_backward_tile_at(int tile, fa4_backward_tile* result);
FA4_API int fa4_plan_forward(const fa4_forward_args* args, int multiprocessors,
                             fa4_forward_plan* plan);
FA4_API int fa4_plan_backward(const fa4_backward_args* args, int multiprocessors,
                              fa4_backward_plan* plan);

// For the current device.
FA4_API int fa4_forward_workspace_bytes(const fa4_forward_args* args, size_t* bytes);
FA4_API int fa4_forward(const fa4_forward_args* args);
FA4_API int fa4_forward_with_plan(const fa4_forward_args* args, const fa4_forward_plan* plan);
FA4_API int fa4_backward_with_plan(const fa4_backward_args* args, const fa4_backward_plan* plan);

#ifdef __cplusplus
}
#endif
