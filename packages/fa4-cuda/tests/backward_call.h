// A backward call for the programs that run its device code on the host: dense, or packed if it
// has several sequences' lengths, and the parameters that follow from its sizes.
#pragma once

#include <algorithm>
#include <cstdio>
#include <vector>

#include "backward_params.h"
#include "backward_tiles.h"

// Parameters point into it.
struct SizedCall {
  int batch, heads_q, heads_k, window_left, window_right, is_windowed;
  std::vector<int> seq_q, seq_k;  // of each sequence; one number if they are not packed
  std::vector<int> q_starts, k_starts;

  bool is_packed() const { return seq_q.size() > 1; }

  // The lengths, behind their number: the end of an input line.
  bool read_lengths() {
    size_t count;
    if (std::scanf("%zu", &count) != 1) return false;
    seq_q.resize(count);
    seq_k.resize(count);
    q_starts = k_starts = {0};
    for (size_t i = 0; i < count; ++i) {
      if (std::scanf("%d %d", &seq_q[i], &seq_k[i]) != 2) return false;
      q_starts.push_back(q_starts.back() + seq_q[i]);
      k_starts.push_back(k_starts.back() + seq_k[i]);
    }
    return true;
  }

  fa4::BackwardParams params() const {
    fa4::BackwardParams params{};
    params.batch = batch;
    params.heads_q = heads_q;
    params.heads_k = heads_k;
    params.heads_per_group = heads_q / heads_k;
    params.seq_q = *std::max_element(seq_q.begin(), seq_q.end());
    params.seq_k = *std::max_element(seq_k.begin(), seq_k.end());
    params.window_left = window_left;
    params.window_right = window_right;
    if (is_packed()) {
      params.cu_seqlens_q = q_starts.data();
      params.cu_seqlens_k = k_starts.data();
    }
    const int rows = is_packed() ? q_starts.back() + batch * fa4::kRowAlignment : params.seq_q;
    params.workspace_rows =
        (rows + fa4::kRowAlignment - 1) / fa4::kRowAlignment * fa4::kRowAlignment;
    return params;
  }
};
