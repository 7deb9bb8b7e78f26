// Window attention: the map is cut into boxes of tokens that attend to each other, and each head of a box is given to
// the kernel of the best instruction set. The mathematics is in bevt_kernels/window_attention/README.md.

#include "window_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "instructions.h"
#include "window_attention_kernel.h"

namespace bevt_kernels {
namespace {

const WindowAttentionKernels& kernels() {
  static const WindowAttentionKernels& chosen = BEVT_CHOOSE(window_attention);
  return chosen;
}

Element element(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kFloat16;
    default:
      TORCH_CHECK(false, "window_attention: takes float32, bfloat16 and float16, not ", tensor.scalar_type());
  }
}

// (start, length) of an axis' segments: windows, or, shifted, what a cut at shift, shift + window, ... leaves.
std::vector<std::pair<int64_t, int64_t>> segments(int64_t size, int64_t window, int64_t shift) {
  std::vector<std::pair<int64_t, int64_t>> result;
  for (int64_t start = 0, end = shift > 0 ? shift : window; start < size;
       start = end, end = std::min(end + window, size)) {
    result.emplace_back(start, end - start);
  }
  return result;
}

std::vector<Box> cut(at::IntArrayRef grid, at::IntArrayRef window, at::IntArrayRef shift, int64_t clips) {
  std::vector<Box> boxes;
  for (int64_t clip = 0; clip < clips; ++clip) {
    for (const auto& [d, depth] : segments(grid[0], window[0], shift[0])) {
      for (const auto& [h, height] : segments(grid[1], window[1], shift[1])) {
        for (const auto& [w, width] : segments(grid[2], window[2], shift[2])) {
          boxes.push_back({clip, {d, h, w}, {depth, height, width}});
        }
      }
    }
  }
  return boxes;
}

// What both directions need; `bias` receives the memory behind the table.
void describe(WindowAttention& p, const at::Tensor& qkv, const at::Tensor& bias_table, int64_t heads,
              at::IntArrayRef table_window, const std::vector<Box>& boxes, double scale, bool reversed,
              std::vector<float>& bias) {
  for (int axis = 0; axis < 3; ++axis) {
    p.grid[axis] = qkv.size(axis + 1);
    p.table[axis] = 2 * table_window[axis] - 1;
  }
  p.heads = heads;
  p.head_dim = qkv.size(4) / (3 * heads);
  p.box_tokens = 0;
  for (const Box& box : boxes) {
    p.box_tokens = std::max(p.box_tokens, box.length[0] * box.length[1] * box.length[2]);
  }
  p.scale = static_cast<float>(scale);
  p.element = element(qkv);
  p.qkv = qkv.const_data_ptr();

  const at::Tensor table = bias_table.contiguous();
  const float* source = table.const_data_ptr<float>();
  const int64_t rows = table.size(0);
  bias.assign(heads * (rows + kTableSlack), 0.0f);
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t row = 0; row < rows; ++row) {
      bias[head * (rows + kTableSlack) + row] = source[(reversed ? rows - 1 - row : row) * heads + head];
    }
  }
  p.bias = bias.data();
}

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

// Calls body(unit, scratch) for each unit, on whichever thread is free: units differ in size. What a unit computes must
// not depend on its thread.
template <class Body>
void for_units(int64_t units, int64_t scratch_bytes, const Body& body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(units, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const std::unique_ptr<void, Free> scratch(::operator new(scratch_bytes, std::align_val_t(64)));
    for (int64_t unit = next++; unit < units; unit = next++) body(unit, scratch.get());
  });
}

// The table's gradient is summed over groups of boxes, at most about this many times heads, and then over groups: few
// enough for their memory, enough for many threads. A constant, so that the sums' order is one.
constexpr int64_t kGroups = 512;

}  // namespace

std::tuple<at::Tensor, at::Tensor> window_attention_forward(const at::Tensor& qkv, const at::Tensor& bias_table,
                                                            int64_t heads, at::IntArrayRef window,
                                                            at::IntArrayRef shift, at::IntArrayRef table_window,
                                                            double scale) {
  const at::Tensor x = qkv.contiguous();
  const at::IntArrayRef sizes = x.sizes();
  const at::Tensor out = at::empty({sizes[0], sizes[1], sizes[2], sizes[3], sizes[4] / 3}, x.options());
  const at::Tensor lse = at::empty({sizes[0], heads, sizes[1], sizes[2], sizes[3]}, x.options().dtype(at::kFloat));

  const std::vector<Box> boxes = cut(sizes.slice(1, 3), window, shift, sizes[0]);
  std::vector<float> bias;
  WindowAttentionForward p;
  describe(p, x, bias_table, heads, table_window, boxes, scale, /*reversed=*/true, bias);
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();

  const WindowAttentionKernels& kernel = kernels();
  for_units(boxes.size() * heads, kernel.forward_scratch(p),
            [&](int64_t unit, void* scratch) { kernel.forward(p, boxes[unit / heads], unit % heads, scratch); });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor> window_attention_backward(const at::Tensor& grad_out, const at::Tensor& qkv,
                                                             const at::Tensor& bias_table, const at::Tensor& out,
                                                             const at::Tensor& lse, int64_t heads,
                                                             at::IntArrayRef window, at::IntArrayRef shift,
                                                             at::IntArrayRef table_window, double scale,
                                                             bool train_table) {
  const at::Tensor x = qkv.contiguous(), y = out.contiguous(), grad_y = grad_out.contiguous(),
                   statistics = lse.contiguous();
  const at::Tensor grad_x = at::empty(x.sizes(), x.options());

  const std::vector<Box> boxes = cut(x.sizes().slice(1, 3), window, shift, x.size(0));
  std::vector<float> bias;
  WindowAttentionBackward p;
  describe(p, x, bias_table, heads, table_window, boxes, scale, /*reversed=*/false, bias);
  p.grad_out = grad_y.const_data_ptr();
  p.out = y.const_data_ptr();
  p.lse = statistics.const_data_ptr<float>();
  p.grad_qkv = grad_x.mutable_data_ptr();

  const int64_t count = boxes.size(), rows = bias_table.size(0);
  const int64_t group = (count * heads + kGroups - 1) / kGroups, groups = group > 0 ? (count + group - 1) / group : 0;
  const std::unique_ptr<float[]> partial(train_table ? new float[groups * heads * rows] : nullptr);
  const WindowAttentionKernels& kernel = kernels();
  for_units(groups * heads, kernel.backward_scratch(p), [&](int64_t unit, void* scratch) {
    float* grad_table = train_table ? partial.get() + unit * rows : nullptr;
    if (train_table) std::fill_n(grad_table, rows, 0.0f);
    const int64_t first = unit / heads * group;
    for (int64_t box = first; box < std::min(first + group, count); ++box) {
      kernel.backward(p, boxes[box], unit % heads, grad_table, scratch);
    }
  });

  if (!train_table) return {grad_x, at::empty({0}, bias_table.options())};
  const at::Tensor grad_table = at::empty({rows, heads}, bias_table.options());
  float* target = grad_table.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1 + (1 << 16) / (1 + groups * heads), [&](int64_t first, int64_t last) {
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t row = first; row < last; ++row) {
        double sum = 0;
        for (int64_t g = 0; g < groups; ++g) sum += partial[(g * heads + head) * rows + row];
        target[row * heads + head] = static_cast<float>(sum);
      }
    }
  });
  return {grad_x, grad_table};
}

}  // namespace bevt_kernels
