// How work is shared out among threads. Not for the kernels' own files, as it holds functions.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace bevt_kernels {

// The size of at most `blocks` blocks that share `size` out: a multiple of `unit`, above 0.
inline int64_t share(int64_t size, int64_t blocks, int64_t unit) {
  return size == 0 ? unit : ((size + blocks - 1) / blocks + unit - 1) / unit * unit;
}

// Of as many for each of torch's threads as make a block at most `most`, itself a multiple of `unit`.
inline int64_t block_size(int64_t size, int64_t unit, int64_t most) {
  const int64_t threads = at::get_num_threads();
  return share(size, threads * std::max<int64_t>((size + threads * most - 1) / (threads * most), 1), unit);
}

}  // namespace bevt_kernels
