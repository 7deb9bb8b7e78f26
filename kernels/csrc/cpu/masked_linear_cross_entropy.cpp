// Loss, accuracy and gradients of a linear layer with cross-entropy, a chunk of used slots at a time: three
// products with one pass over the logits between them. The mathematics is in
// bevt_kernels/masked_linear_cross_entropy/README.md. Letters as there: M rows, C channels, V classes, K slots.

#include "masked_linear_cross_entropy.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "instructions.h"
#include "masked_linear_cross_entropy_kernel.h"
#include "product.h"

namespace bevt_kernels {
namespace {

// Slots of a chunk, where scratch allows: products of fewer are slower, of more no faster.
constexpr int64_t kLeastSlots = 16, kMostSlots = 768;
// Bytes that any problem may take: an eighth of the logits of few classes is little, and each chunk packs the weight.
constexpr int64_t kLeastScratch = 4 << 20;
// Classes of the weight that are converted at a time, 1 MB for 1024 channels; columns that are divided at a time.
constexpr int64_t kClassBlock = 256, kColumnBlock = 256;

const MaskedLinearCrossEntropyKernels& kernels() {
  static const MaskedLinearCrossEntropyKernels& chosen = BEVT_CHOOSE(masked_linear_cross_entropy);
  return chosen;
}

struct Slot {
  int64_t row, target;
};

// The used slots, those of one row of hidden side by side, and one of no row.
std::vector<Slot> used_slots(const at::Tensor& targets, const at::Tensor& index, int64_t rows, int64_t classes) {
  const at::Tensor all_rows = index.contiguous(), all_targets = targets.contiguous();
  const int64_t *row = all_rows.const_data_ptr<int64_t>(), *target = all_targets.const_data_ptr<int64_t>();
  const int64_t slots = index.size(0);
  std::vector<Slot> used;
  used.reserve(slots - std::count(row, row + slots, -1) + 1);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (row[slot] == -1) continue;
    TORCH_CHECK_VALUE(0 <= row[slot] && row[slot] < rows && 0 <= target[slot] && target[slot] < classes, "slot ", slot,
                      " has index ", row[slot], " and target ", target[slot],
                      ": an index must be -1 (unused) or a row 0..", rows - 1, " of hidden, a target a class 0..",
                      classes - 1);
    used.push_back({row[slot], target[slot]});
  }
  std::stable_sort(used.begin(), used.end(), [](const Slot& a, const Slot& b) { return a.row < b.row; });
  used.push_back({-1, 0});
  return used;
}

// A weight in float32, converted some classes at a time where products could not read it as it is.
class Weight {
 public:
  explicit Weight(const at::Tensor& weight) : weight_(weight) {
    if (weight.scalar_type() == at::kFloat && (weight.stride(0) == 1 || weight.stride(1) == 1)) return;
    scratch_ = at::empty({std::min(kClassBlock, weight.size(0)), weight.size(1)}, weight.options().dtype(at::kFloat));
  }

  int64_t scratch_bytes() const { return scratch_.defined() ? scratch_.nbytes() : 0; }

  // z = x weight^T.
  void logits(const at::Tensor& x, const at::Tensor& z) const {
    for_blocks([&](int64_t first, const at::Tensor& block) {
      multiply(product_of(z.narrow(1, first, block.size(0)), x, block.t()));
    });
  }

  // target = dz weight.
  void gradient(const at::Tensor& dz, const at::Tensor& target) const {
    for_blocks([&](int64_t first, const at::Tensor& block) {
      multiply(product_of(target, dz.narrow(1, first, block.size(0)), block, first > 0));
    });
  }

 private:
  // Calls body(first class, (n, C)) with all classes, or with converted ones, in order.
  template <class Body>
  void for_blocks(const Body& body) const {
    if (!scratch_.defined()) return body(0, weight_);
    const int64_t classes = weight_.size(0);
    for (int64_t first = 0; first < classes; first += kClassBlock) {
      const int64_t n = std::min(kClassBlock, classes - first);
      body(first, scratch_.narrow(0, 0, n).copy_(weight_.narrow(0, first, n)));
    }
  }

  at::Tensor weight_, scratch_;
};

// Slots of a chunk: as many as fit, so that all scratch is at most an eighth of what the used slots' logits would be,
// or kLeastScratch where that is more.
int64_t chunk_size(int64_t used, int64_t classes, int64_t bytes_a_slot, int64_t other_bytes) {
  const int64_t budget = std::max(used * classes * 4 / 8, kLeastScratch) - other_bytes;
  const int64_t most = std::clamp(budget / bytes_a_slot, kLeastSlots, kMostSlots);
  const int64_t chunks = std::max<int64_t>((used + most - 1) / most, 1);
  return (used + chunks - 1) / chunks;
}

// What a pass over the logits keeps of each slot.
struct Result {
  double loss;
  float sum;  // of exponentials
  bool correct;
};

// The products z become exponentials, less their sum at the target: softmax minus one-hot, times that sum.
void exponentials(const at::Tensor& z, const at::Tensor& bias, const Slot* slots, Result* results) {
  const int64_t classes = z.size(1), stride = z.stride(0);
  float* data = z.mutable_data_ptr<float>();
  const float* bias_data = bias.const_data_ptr<float>();
  at::parallel_for(0, z.size(0), 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const RowStatistics row = kernels().exponentials(data + s * stride, bias_data, classes, slots[s].target);
      const double loss = std::log(static_cast<double>(row.sum)) - (static_cast<double>(row.logit) - row.top);
      results[s] = {loss, row.sum, row.is_first};
    }
  });
}

// Divides each row of z by its sum of exponentials, and adds the rows to `totals`.
void divide(const at::Tensor& z, const std::vector<float>& sums, std::vector<double>& totals) {
  const int64_t rows = z.size(0), stride = z.stride(0), columns = totals.size();
  float* data = z.mutable_data_ptr<float>();
  at::parallel_for(0, (columns + kColumnBlock - 1) / kColumnBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kColumnBlock; first < std::min(end * kColumnBlock, columns); first += kColumnBlock) {
      const int64_t n = std::min(kColumnBlock, columns - first);
      kernels().divide(data + first, stride, rows, n, sums.data(), totals.data() + first);
    }
  });
}

// Adds up the rows of `source`, one a slot, that belong to one row of `target`, and writes the sum there. `sums`, zeros
// at first, keeps a sum that goes on in the next chunk.
template <class T>
void sum_rows(const at::Tensor& source, const Slot* slots, const at::Tensor& target, std::vector<float>& sums) {
  const int64_t channels = source.size(1);
  const float* from = source.const_data_ptr<float>();
  T* to = target.mutable_data_ptr<T>();
  at::parallel_for(0, channels, 64, [&](int64_t first, int64_t last) {
    for (int64_t s = 0; s < source.size(0); ++s) {
      for (int64_t c = first; c < last; ++c) sums[c] += from[s * channels + c];
      if (slots[s].row == slots[s + 1].row) continue;
      for (int64_t c = first; c < last; ++c) {
        to[slots[s].row * channels + c] = static_cast<T>(sums[c]);
        sums[c] = 0;
      }
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> masked_linear_cross_entropy(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& targets,
    const at::Tensor& index, std::array<bool, 3> output_mask) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto [train_hidden, train_weight, train_bias] = output_mask;
  const int64_t channels = hidden.size(1), classes = weight.size(0);
  const bool low = hidden.scalar_type() != at::kFloat;
  const std::vector<Slot> slots = used_slots(targets, index, hidden.size(0), classes);
  const int64_t used = slots.size() - 1;

  const auto options = hidden.options().dtype(at::kFloat);
  const auto gradient = [&](const at::Tensor& x, bool wanted, const at::TensorOptions& own) {
    return wanted ? at::zeros(x.sizes(), own) : at::empty({0}, own);
  };
  const at::Tensor grad_hidden = gradient(hidden, train_hidden, hidden.options());
  // The first chunk writes it.
  at::Tensor grad_weight =
      used > 0 && train_weight ? at::empty(weight.sizes(), options) : gradient(weight, train_weight, options);
  const at::Tensor grad_bias = gradient(bias, train_bias, options);

  const Weight float_weight(weight);
  const at::Tensor float_bias = bias.to(at::kFloat).contiguous();
  const int64_t columns = (classes + kRowUnit - 1) / kRowUnit * kRowUnit;
  const int64_t stride = columns + kRowUnit;  // a power of two would put a column's lines into one set of a cache
  const int64_t chunk =
      chunk_size(used, classes,
                 4 * (stride + channels) + (low ? 2 * channels : 0) + sizeof(Result) + sizeof(float) + sizeof(int64_t),
                 float_weight.scratch_bytes() + 12 * stride + 4 * channels + slots.size() * sizeof(Slot));
  const at::Tensor x_scratch = at::empty({chunk, channels}, options), z_scratch = at::empty({chunk, stride}, options);
  const at::Tensor row_scratch = at::empty({chunk}, index.options());
  std::vector<Result> results(chunk);
  std::vector<float> sums(chunk), row_sums(channels);
  std::vector<double> column_sums(columns);

  double loss = 0;
  int64_t correct = 0;
  for (int64_t first = 0; first < used; first += chunk) {
    const int64_t n = std::min(chunk, used - first);
    const Slot* chunk_slots = slots.data() + first;
    at::Tensor x = x_scratch.narrow(0, 0, n);
    const at::Tensor z = z_scratch.narrow(0, 0, n).narrow(1, 0, classes), rows = row_scratch.narrow(0, 0, n);
    std::transform(chunk_slots, chunk_slots + n, rows.mutable_data_ptr<int64_t>(), [](Slot slot) { return slot.row; });
    if (low) {
      x.copy_(at::index_select(hidden, 0, rows));
    } else {
      at::index_select_out(x, hidden, 0, rows);
    }
    float_weight.logits(x, z);
    exponentials(z, float_bias, chunk_slots, results.data());
    for (int64_t s = 0; s < n; ++s) {
      loss += results[s].loss;
      correct += results[s].correct;
      sums[s] = results[s].sum;
    }
    if (!train_hidden && !train_weight && !train_bias) continue;

    divide(z, sums, column_sums);
    if (train_weight) multiply(product_of(grad_weight, z.t(), x, first > 0));
    if (train_hidden) {  // takes the place of x
      float_weight.gradient(z, x);
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "masked_linear_cross_entropy",
                                      [&] { sum_rows<scalar_t>(x, chunk_slots, grad_hidden, row_sums); });
    }
  }
  if (train_bias) std::copy_n(column_sums.begin(), classes, grad_bias.mutable_data_ptr<float>());
  const double count = std::max<int64_t>(used, 1);
  return {at::full({}, loss / count, options), at::full({}, correct / count, options), grad_hidden, grad_weight,
          grad_bias};
}

}  // namespace bevt_kernels
