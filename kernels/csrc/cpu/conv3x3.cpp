// A 3x3 convolution by Winograd's F(4x4, 3x3), for some of the outputs at a time: their weight is transformed, then
// tiles are shared out among threads.

#include "conv3x3.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

#include "blocks.h"
#include "conv3x3_kernel.h"
#include "instructions.h"

namespace bevt_kernels {
namespace {

// Outputs at a time: as many as have a transformed weight that stays in the L3 cache, and a multiple of all panels.
constexpr int64_t kMostWeight = 20 << 20, kOutputUnit = 32;
// Tiles and channels at a time: transformed inputs of 1.8 MB.
constexpr int64_t kMostTiles = 48, kMostChannels = 256;

const Conv3x3Kernels& kernels() {
  static const Conv3x3Kernels& chosen = BEVT_CHOOSE(conv3x3);
  return chosen;
}

int64_t missing(int64_t channels) { return (kChannelUnit - channels % kChannelUnit) % kChannelUnit; }

}  // namespace

at::Tensor conv3x3(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, bool relu) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t images = x.size(0), height = x.size(2), width = x.size(3), outputs = weight.size(0);
  const int64_t more_channels = missing(weight.size(1)), more_outputs = missing(outputs);
  at::Tensor image = x.permute({0, 2, 3, 1}), kernel = weight.permute({1, 2, 3, 0}), offset = bias;
  if (more_channels > 0) {
    image = at::constant_pad_nd(image, {0, more_channels});
    kernel = at::constant_pad_nd(kernel, {0, 0, 0, 0, 0, 0, 0, more_channels});
  }
  if (more_outputs > 0) {
    kernel = at::constant_pad_nd(kernel, {0, more_outputs});
    offset = at::constant_pad_nd(offset, {0, more_outputs});
  }
  image = image.contiguous();
  kernel = kernel.contiguous();
  offset = offset.contiguous();
  const at::Tensor out = at::empty({images, height, width, kernel.size(3)}, x.options());

  Conv3x3 p = {.height = height,
               .width = width,
               .channels = kernel.size(0),
               .outputs = 0,
               .all_outputs = kernel.size(3),
               .tile_rows = (height + kTile - 1) / kTile,
               .tile_columns = (width + kTile - 1) / kTile,
               .block_tiles = 0,
               .block_channels = std::min(kernel.size(0), kMostChannels),
               .x = image.const_data_ptr<float>(),
               .weight = kernel.const_data_ptr<float>(),
               .bias = offset.const_data_ptr<float>(),
               .out = out.mutable_data_ptr<float>(),
               .relu = relu};
  const int64_t tiles = images * p.tile_rows * p.tile_columns;
  p.block_tiles = block_size(tiles, 1, kMostTiles);
  const int64_t fitting = kMostWeight / (kPoints * std::max<int64_t>(p.channels, 1) * sizeof(float));
  const int64_t block = std::min(std::max(fitting / kOutputUnit, int64_t{1}) * kOutputUnit, p.all_outputs);
  at::Tensor transformed;
  for (int64_t done = 0; done < p.all_outputs && tiles > 0; done += p.outputs) {
    p.outputs = std::min(block, p.all_outputs - done);
    if (done == 0) transformed = at::empty({kernels().weight_size(p)}, x.options());
    float* transformed_data = transformed.mutable_data_ptr<float>();
    at::parallel_for(0, p.channels, 8, [&](int64_t first, int64_t last) {
      kernels().transform_weight(p, first, last, transformed_data);
    });
    at::parallel_for(0, (tiles + p.block_tiles - 1) / p.block_tiles, 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView worker;  // a worker thread starts without the caller's dispatch state
      const at::Tensor scratch = at::empty({kernels().scratch_size(p)}, x.options());
      kernels().convolve(p, transformed_data, begin * p.block_tiles, std::min(end * p.block_tiles, tiles),
                         scratch.mutable_data_ptr<float>());
    });
    p.weight += p.outputs;
    p.bias += p.outputs;
    p.out += p.outputs;
  }
  return out.narrow(3, 0, outputs).permute({0, 3, 1, 2});
}

}  // namespace bevt_kernels
