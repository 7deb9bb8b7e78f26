// What the instruction sets' kernels and their caller share: plain data only. The kernels are one source compiled
// several times; a function defined here would be merged by the linker, perhaps into its AVX-512 form.
// Letters as in bevt_kernels/window_attention/README.md: B clips, D x H x W tokens, h heads of d channels.

#pragma once

#include <cstdint>

namespace bevt_kernels {

enum class Element { kFloat32, kBFloat16, kFloat16 };

// Floats past the end of a head's table that kernels may read.
constexpr int64_t kTableSlack = 16;

struct WindowAttention {
  int64_t grid[3];     // D, H, W
  int64_t table[3];    // the table's rows on each axis: 2 Td - 1, 2 Th - 1, 2 Tw - 1
  int64_t heads;       // h
  int64_t head_dim;    // d
  int64_t box_tokens;  // the most tokens of a box
  float scale;         // of q k^T
  Element element;     // of qkv, out and their gradients
  const void* qkv;     // (B, D, H, W, 3, h, d)
  const float* bias;   // (h, rows + kTableSlack); for forward reversed, from the last row to the first
};

struct WindowAttentionForward : WindowAttention {
  void* out;   // (B, D, H, W, h, d)
  float* lse;  // (B, h, D, H, W), log 2 of each query's sum of exponentials
};

struct WindowAttentionBackward : WindowAttention {
  const void* grad_out;  // as out
  const void* out;
  const float* lse;
  void* grad_qkv;  // as qkv
};

// Tokens that attend to each other and to no other.
struct Box {
  int64_t clip;
  int64_t start[3];   // on the map
  int64_t length[3];  // at least 1
};

// One instruction set's kernels. Scratch is given by the caller: aligned to 64 bytes, with any content.
struct WindowAttentionKernels {
  int64_t (*forward_scratch)(const WindowAttention&);  // bytes
  int64_t (*backward_scratch)(const WindowAttention&);
  // Write one head of a box.
  void (*forward)(const WindowAttentionForward&, const Box&, int64_t head, void* scratch);
  // Write one head of a box, and add to the head's table gradient, (rows), unless that is null.
  void (*backward)(const WindowAttentionBackward&, const Box&, int64_t head, float* grad_table, void* scratch);
};

// One for each way of compiling window_attention_kernel.cpp; on other machines than x86-64 there is only the baseline.
namespace baseline {
extern const WindowAttentionKernels window_attention;
}
namespace avx2 {
extern const WindowAttentionKernels window_attention;
}
namespace avx512 {
extern const WindowAttentionKernels window_attention;
}

}  // namespace bevt_kernels
