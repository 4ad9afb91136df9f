// The attention ops that have a native kernel.
#pragma once

#include "arguments.h"

namespace fa4::glue {

struct Op {
  const char* name;  // without aten::
  // Letters as for release_arguments, then "->" and the results: T tensor, i int. An op whose
  // schema reads otherwise in some version of torch has no native kernel there, or another row.
  const char* signature;
  // Runs a call and fills in its results, or returns false: then nothing has happened. Borrows the
  // arguments.
  bool (*serve)(const Arguments& arguments, Results& results);
};

bool serve_sdpa_flash(const Arguments& arguments, Results& results);
bool serve_sdpa_cudnn(const Arguments& arguments, Results& results);
bool serve_flash_forward(const Arguments& arguments, Results& results);
bool serve_flash_forward_with_pages(const Arguments& arguments, Results& results);
bool serve_flash_forward_inplace(const Arguments& arguments, Results& results);

bool serve_sdpa_flash_backward(const Arguments& arguments, Results& results);
bool serve_sdpa_cudnn_backward(const Arguments& arguments, Results& results);
bool serve_flash_backward(const Arguments& arguments, Results& results);

// Where in its storage the seed of a served cuDNN forward stands, by which its backward is known
// (sdpa/cudnn.py).
inline constexpr int64_t kSeedMark = 2;

inline constexpr Op kOps[] = {
    {"_scaled_dot_product_flash_attention", "TTTfbbf?->TTTTiiTTT", serve_sdpa_flash},
    {"_scaled_dot_product_cudnn_attention", "TTTT?bfbbf?->TTTTiiTTT", serve_sdpa_cudnn},
    // torch 2.11, and with pages and splits 2.12 and newer
    {"_flash_attention_forward", "TTTT?T?iifbbf?i?i?T?T?->TTTTT", serve_flash_forward},
    {"_flash_attention_forward", "TTTT?T?iifbbf?i?i?T?T?T?i?->TTTTT",
     serve_flash_forward_with_pages},
    {"_flash_attention_forward_no_dropout_inplace", "TTTTT?T?iifbbf?i?i?T?T?T?i?->T",
     serve_flash_forward_inplace},
    {"_scaled_dot_product_flash_attention_backward", "TTTTTTTTiifbTTf?->TTT",
     serve_sdpa_flash_backward},
    {"_scaled_dot_product_cudnn_attention_backward", "TTTTTTTTTTTiifbf?->TTT",
     serve_sdpa_cudnn_backward},
    {"_flash_attention_backward", "TTTTTTTTiifbTTf?i?i?->TTT", serve_flash_backward},
};
inline constexpr int kOpCount = sizeof(kOps) / sizeof(kOps[0]);

}  // namespace fa4::glue
