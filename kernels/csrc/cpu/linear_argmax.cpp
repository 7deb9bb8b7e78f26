// argmax of x W^T + b over the rows of W, one row of x at a time, without the (M, V) products.
//
// Row blocks are shared out among threads; a thread multiplies its block by one block of W at a time into a scratch
// tile that stays in its L2 cache, and folds the tile into each row's running maximum. Letters: M rows, C channels, V
// classes.

#include "linear_argmax.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "instructions.h"
#include "product.h"

namespace bevt_kernels {
namespace {

// A tile is 256 x 256 float32 = 256 KB. Shorter ones copy the weight more often, larger ones leave L2.
constexpr int64_t kTileRows = 256;
constexpr int64_t kTileClasses = 256;

struct Best {
  float value = -std::numeric_limits<float>::infinity();
  int64_t index = 0;
  bool nan = false;  // the first NaN of a row wins, as in torch.argmax
};

struct Maximum {
  float value;
  bool nan;
};

// The largest of products[j] + bias[j], and whether any is NaN.
BEVT_VECTORISED Maximum maximum(const float* products, const float* bias, int64_t n) {
  constexpr int64_t kLanes = 32;
  float top[kLanes];
  int32_t nan[kLanes] = {};
  std::fill(top, top + kLanes, -std::numeric_limits<float>::infinity());
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = products[j + lane] + bias[j + lane];
      top[lane] = value > top[lane] ? value : top[lane];
      nan[lane] |= static_cast<int32_t>(value != value);
    }
  }
  for (int64_t lane = 0; j < n; ++j, ++lane) {
    const float value = products[j] + bias[j];
    top[lane] = value > top[lane] ? value : top[lane];
    nan[lane] |= static_cast<int32_t>(value != value);
  }
  Maximum result{top[0], nan[0] != 0};
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    result.value = std::max(result.value, top[lane]);
    result.nan |= nan[lane] != 0;
  }
  return result;
}

// Fold one row of a tile, whose first class is `offset`, into the row's best.
void fold(const float* products, const float* bias, int64_t n, int64_t offset, Best& best) {
  if (best.nan) return;
  const Maximum tile = maximum(products, bias, n);
  if (!tile.nan && !(tile.value > best.value)) return;
  int64_t j = 0;
  if (tile.nan) {
    while (products[j] + bias[j] == products[j] + bias[j]) ++j;
  } else {
    while (products[j] + bias[j] != tile.value) ++j;
  }
  best = {tile.value, offset + j, tile.nan};
}

// Whether rows of `tensor` are float32 and adjacent numbers, as products read them.
bool readable(const at::Tensor& tensor) { return tensor.scalar_type() == at::kFloat && tensor.stride(1) == 1; }

// `tensor` so: itself, or written to `scratch`, whose leading rows are used.
at::Tensor as_float(const at::Tensor& tensor, const at::Tensor& scratch) {
  return readable(tensor) ? tensor : scratch.narrow(0, 0, tensor.size(0)).copy_(tensor);
}

}  // namespace

at::Tensor linear_argmax(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const int64_t rows = x.size(0), channels = x.size(1), classes = weight.size(0);
  const at::Tensor codes = at::empty({rows}, x.options().dtype(at::kLong));
  const at::Tensor bias_float = bias.to(at::kFloat).contiguous();
  const float* bias_data = bias_float.const_data_ptr<float>();
  int64_t* codes_data = codes.mutable_data_ptr<int64_t>();

  const int64_t threads = at::get_num_threads();
  const int64_t tile_rows = std::clamp<int64_t>((rows + threads - 1) / threads, 1, kTileRows);
  const int64_t tile_classes = std::min(classes, kTileClasses);
  const int64_t blocks = (rows + tile_rows - 1) / tile_rows;

  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // a worker thread starts without the caller's dispatch state
    const auto options = x.options().dtype(at::kFloat);
    const at::Tensor tile = at::empty({tile_rows * tile_classes}, options);
    const at::Tensor x_scratch = readable(x) ? at::Tensor() : at::empty({tile_rows, channels}, options);
    const at::Tensor weight_scratch = readable(weight) ? at::Tensor() : at::empty({tile_classes, channels}, options);
    std::vector<Best> best(tile_rows);

    for (int64_t block = first; block < last; ++block) {
      const int64_t row = block * tile_rows, m = std::min(tile_rows, rows - row);
      const at::Tensor x_block = as_float(x.narrow(0, row, m), x_scratch);
      std::fill(best.begin(), best.end(), Best());
      for (int64_t offset = 0; offset < classes; offset += tile_classes) {
        const int64_t n = std::min(tile_classes, classes - offset);
        const at::Tensor weight_block = as_float(weight.narrow(0, offset, n), weight_scratch);
        const at::Tensor products = tile.narrow(0, 0, m * n).view({m, n});
        multiply_alone(product_of(products, x_block, weight_block.t()));
        const float* data = products.const_data_ptr<float>();
        for (int64_t i = 0; i < m; ++i) fold(data + i * n, bias_data + offset, n, offset, best[i]);
      }
      for (int64_t i = 0; i < m; ++i) codes_data[row + i] = best[i].index;
    }
  });
  return codes;
}

}  // namespace bevt_kernels
