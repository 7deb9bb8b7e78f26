// A 3x3 convolution by Winograd's F(4x4, 3x3), at one instruction set (vectors.h).
//
// 4x4 outputs of a channel are A^T ((G g G^T) * (B^T d B)) A, of a 3x3 kernel g and 6x6 inputs d (Lavin and Gray,
// arXiv 1509.09308): 36 products for 144. Over all channels these are 36 matrix products, of the tiles' transformed
// inputs (tiles, C) with the transformed weight (C, N). Tiles go through in blocks that stay in the outer caches.

#include "conv3x3_kernel.h"

#include "sums.h"

namespace bevt_kernels {
namespace BEVT_INSTRUCTIONS {
namespace {

constexpr int kSide = 6, kOut = kTile;

// G, B^T and A^T by one axis: of 3, 6 and 6 numbers that lie `stride` apart.
BEVT_INLINE void transform_kernel(const Vector* g, int stride, Vector* u) {
  const Vector outer = (g[0] + g[2 * stride]) * (-1.0f / 6), middle = g[stride] * (1.0f / 6);
  const Vector far = g[0] * (1.0f / 24) + g[2 * stride] * (1.0f / 6), half = g[stride] * (1.0f / 12);
  u[0] = g[0] * 0.25f;
  u[1] = outer - middle;
  u[2] = outer + middle;
  u[3] = far + half;
  u[4] = far - half;
  u[5] = g[2 * stride];
}

BEVT_INLINE void transform_input(const Vector* d, int stride, Vector* v) {
  const Vector d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride], d4 = d[4 * stride];
  const Vector even = d4 - d2 * 4.0f, odd = d3 - d1 * 4.0f, near = d4 - d2, twice = (d3 - d1) * 2.0f;
  v[0] = d[0] * 4.0f - d2 * 5.0f + d4;
  v[1] = even + odd;
  v[2] = even - odd;
  v[3] = near + twice;
  v[4] = near - twice;
  v[5] = d1 * 4.0f - d3 * 5.0f + d[5 * stride];
}

BEVT_INLINE void transform_output(const Vector* m, int stride, Vector* y) {
  const Vector sum = m[stride] + m[2 * stride], difference = m[stride] - m[2 * stride];
  const Vector far_sum = m[3 * stride] + m[4 * stride], far_difference = m[3 * stride] - m[4 * stride];
  y[0] = m[0] + sum + far_sum;
  y[1] = difference + far_difference * 2.0f;
  y[2] = sum + far_sum * 4.0f;
  y[3] = difference + far_difference * 8.0f + m[5 * stride];
}

// The transformed weight is (kPoints, panels of kColumns outputs, C, kColumns), zero past the last output.
int64_t panels(const Conv3x3& p) { return (p.outputs + kColumns - 1) / kColumns; }

int64_t weight_size(const Conv3x3& p) { return kPoints * panels(p) * p.channels * kColumns; }

void transform_weight(const Conv3x3& p, int64_t first, int64_t last, float* transformed) {
  const int64_t point = panels(p) * p.channels * kColumns;
  for (int64_t c = first; c < last; ++c) {
    for (int64_t n = 0; n < panels(p) * kColumns; n += kLanes) {
      Vector g[9] = {}, rows[3 * kSide];
      if (n < p.outputs) {
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i) g[i] = load(p.weight + (c * 9 + i) * p.all_outputs + n);
      }
      float* target = transformed + (n / kColumns * p.channels + c) * kColumns + n % kColumns;
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) transform_kernel(g + 3 * i, 1, rows + kSide * i);
#pragma GCC unroll 6
      for (int j = 0; j < kSide; ++j) {
        Vector u[kSide];
        transform_kernel(rows + j, kSide, u);
#pragma GCC unroll 6
        for (int i = 0; i < kSide; ++i) store(target + (kSide * i + j) * point, u[i]);
      }
    }
  }
}

// Where a tile's outputs begin.
struct Place {
  int64_t image, row, column;
};

Place place(const Conv3x3& p, int64_t tile) {
  const int64_t of_image = tile % (p.tile_rows * p.tile_columns);
  return {tile / (p.tile_rows * p.tile_columns), of_image / p.tile_columns * kOut, of_image % p.tile_columns * kOut};
}

// Channels first .. first + channels - 1 of a tile's inputs, transformed, into target[point * stride + c].
template <bool kRelu>
void read_tile(const Conv3x3& p, int64_t tile, int64_t first, int64_t channels, float* target, int64_t stride) {
  const Place at = place(p, tile);
  const float* pixels[kPoints];  // null outside of the image
  for (int i = 0; i < kSide; ++i) {
    for (int j = 0; j < kSide; ++j) {
      const int64_t row = at.row + i - 1, column = at.column + j - 1;
      const bool inside = 0 <= row && row < p.height && 0 <= column && column < p.width;
      pixels[kSide * i + j] =
          inside ? p.x + ((at.image * p.height + row) * p.width + column) * p.channels + first : nullptr;
    }
  }
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vector rows[kPoints];
#pragma GCC unroll 6
    for (int i = 0; i < kSide; ++i) {
      Vector d[kSide];
#pragma GCC unroll 6
      for (int j = 0; j < kSide; ++j) {
        const float* pixel = pixels[kSide * i + j];
        d[j] = pixel == nullptr ? Vector{} : load(pixel + c);
        if (kRelu) d[j] = maximum(Vector{}, d[j]);
      }
      transform_input(d, 1, rows + kSide * i);
    }
#pragma GCC unroll 6
    for (int j = 0; j < kSide; ++j) {
      Vector v[kSide];
      transform_input(rows + j, kSide, v);
#pragma GCC unroll 6
      for (int i = 0; i < kSide; ++i) store(target + (kSide * i + j) * stride + c, v[i]);
    }
  }
}

// A tile's outputs of source[point * stride + n], with the bias.
void write_tile(const Conv3x3& p, int64_t tile, const float* source, int64_t stride) {
  const Place at = place(p, tile);
  const int64_t height = minimum(kOut, p.height - at.row), width = minimum(kOut, p.width - at.column);
  float* out = p.out + ((at.image * p.height + at.row) * p.width + at.column) * p.all_outputs;
  for (int64_t n = 0; n < p.outputs; n += kLanes) {
    Vector rows[kSide * kOut];
#pragma GCC unroll 6
    for (int i = 0; i < kSide; ++i) {
      Vector m[kSide];
#pragma GCC unroll 6
      for (int j = 0; j < kSide; ++j) m[j] = load(source + (kSide * i + j) * stride + n);
      transform_output(m, 1, rows + kOut * i);
    }
    const Vector bias = load(p.bias + n);
#pragma GCC unroll 4
    for (int j = 0; j < kOut; ++j) {
      if (j >= width) break;
      Vector y[kOut];
      transform_output(rows + j, kOut, y);
#pragma GCC unroll 4
      for (int i = 0; i < kOut; ++i) {
        if (i < height) store(out + (i * p.width + j) * p.all_outputs + n, y[i] + bias);
      }
    }
  }
}

// Rows of inputs and products are padded: channels are powers of two, whose lines would share the sets of a cache.
int64_t input_row(const Conv3x3& p) { return p.block_channels + kLanes; }
int64_t output_row(const Conv3x3& p) { return panels(p) * kColumns + kLanes; }

int64_t scratch_size(const Conv3x3& p) {
  return kPoints * round_up(p.block_tiles, kRows) * (input_row(p) + output_row(p));
}

// target += (rows, depth) inputs times one panel; rows are a multiple of kRows.
void multiply(int64_t rows, int64_t depth, const float* inputs, int64_t input_row, const float* panel, bool add,
              float* target, int64_t target_row) {
  for (int64_t r = 0; r < rows; r += kRows) {
    for (int64_t k = 0; k < depth; k += kBlock) {
      Sums<kWide> sums;
      sum_products<kWide, false>(minimum(kBlock, depth - k), inputs + r * input_row + k, input_row,
                                 panel + k * kColumns, kColumns, sums);
      accumulate<kWide>(sums, !add && k == 0, target + r * target_row, target_row);
    }
  }
}

void convolve(const Conv3x3& p, const float* transformed, int64_t first, int64_t last, float* scratch) {
  const int64_t rows = round_up(p.block_tiles, kRows), from_row = input_row(p), to_row = output_row(p);
  float *inputs = scratch, *products = scratch + kPoints * rows * from_row;
  for (int64_t tile = first; tile < last; tile += p.block_tiles) {
    const int64_t tiles = minimum(p.block_tiles, last - tile), padded = round_up(tiles, kRows);
    for (int64_t c = 0; c < p.channels; c += p.block_channels) {
      const int64_t depth = minimum(p.block_channels, p.channels - c);
      for (int64_t t = 0; t < padded; ++t) {
        const int64_t source = tile + minimum(t, tiles - 1);  // rows past the last repeat it, and go nowhere
        if (p.relu) {
          read_tile<true>(p, source, c, depth, inputs + t * from_row, rows * from_row);
        } else {
          read_tile<false>(p, source, c, depth, inputs + t * from_row, rows * from_row);
        }
      }
      for (int point = 0; point < kPoints; ++point) {
        for (int64_t panel = 0; panel < panels(p); ++panel) {
          multiply(padded, depth, inputs + point * rows * from_row, from_row,
                   transformed + ((point * panels(p) + panel) * p.channels + c) * kColumns, c > 0,
                   products + point * rows * to_row + panel * kColumns, to_row);
        }
      }
    }
    for (int64_t t = 0; t < tiles; ++t) write_tile(p, tile + t, products + t * to_row, rows * to_row);
  }
}

}  // namespace

const Conv3x3Kernels conv3x3 = {weight_size, scratch_size, transform_weight, convolve};

}  // namespace BEVT_INSTRUCTIONS
}  // namespace bevt_kernels
