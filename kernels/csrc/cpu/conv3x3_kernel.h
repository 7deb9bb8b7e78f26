// What the instruction sets' 3x3 convolutions and their caller share: plain data only, as in window_attention_kernel.h.
// Letters: M images of H x W pixels, C channels in, N out, both multiples of kChannelUnit; tiles of 4 x 4 pixels.

#pragma once

#include <cstdint>

namespace bevt_kernels {

constexpr int64_t kChannelUnit = 16;
constexpr int64_t kTile = 4, kPoints = 36;  // a tile's side; products of a tile for a channel in and out

struct Conv3x3 {
  int64_t height, width;                // H, W
  int64_t channels, outputs;            // C, and those of the N that are computed
  int64_t all_outputs;                  // N: the stride of weight and out
  int64_t tile_rows, tile_columns;      // tiles of an image
  int64_t block_tiles, block_channels;  // at most so many at a time
  const float* x;                       // (M, H, W, C)
  const float* weight;                  // (C, 3, 3, N), from the first output on, as the next two
  const float* bias;                    // (N)
  float* out;                           // (M, H, W, N)
  bool relu;                            // of x, before everything else
};

struct Conv3x3Kernels {
  int64_t (*weight_size)(const Conv3x3&);   // floats of a transformed weight
  int64_t (*scratch_size)(const Conv3x3&);  // floats that `convolve` needs
  // Transforms the weight's input channels first <= c < last.
  void (*transform_weight)(const Conv3x3&, int64_t first, int64_t last, float* transformed);
  // Writes the outputs of tiles first <= tile < last, counted through the batch.
  void (*convolve)(const Conv3x3&, const float* transformed, int64_t first, int64_t last, float* scratch);
};

namespace baseline {
extern const Conv3x3Kernels conv3x3;
}
namespace avx2 {
extern const Conv3x3Kernels conv3x3;
}
namespace avx512 {
extern const Conv3x3Kernels conv3x3;
}

}  // namespace bevt_kernels
