// How work is shared out among threads. Not for the kernels' own files, as it holds a function.

#pragma once

#include <ATen/Parallel.h>

#include <cstdint>

namespace bevt_kernels {

// The size of blocks that share `size` out evenly among torch's threads: a multiple of `unit`, at most `most` (itself
// one), above 0.
inline int64_t block_size(int64_t size, int64_t unit, int64_t most) {
  const int64_t threads = at::get_num_threads();
  const int64_t blocks = threads * ((size + threads * most - 1) / (threads * most));
  return size == 0 ? unit : ((size + blocks - 1) / blocks + unit - 1) / unit * unit;
}

}  // namespace bevt_kernels
