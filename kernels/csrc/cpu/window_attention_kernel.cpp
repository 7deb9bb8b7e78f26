// Attention inside one box of the map, for one head: forward and backward, at one instruction set.
//
// This file is compiled once for each instruction set, as vectors.h says: nothing here may have external linkage but
// the table of functions at the end.
//
// All products go through `sum_products` (sums.h). Letters: N tokens of the box, d channels.
//
// Forward, for tiles of queries: scores with all keys of the box, maximum, exponentials, times v. Backward, for tiles
// of keys: p and ds with all queries, transposed, so that dk and dv are finished with the tile and dq alone is
// accumulated; there lse, known, replaces the maximum.
//
// Bias. On the rows' side of a tile tokens are ordered with the box's first axis running fastest, on the columns' side
// slowest. Then for all rows with equal (b, c) the bias lies in one array over (distance on the first axis, columns' b,
// columns' c): the row at a reads it from (A - 1 - a) * B * C on, contiguously. A table is expanded into this `strip`
// once for A rows, and a strip of gradients is folded back once for A rows.

#include "window_attention_kernel.h"

#include <cstdint>

#include "sums.h"

namespace bevt_kernels {
namespace BEVT_INSTRUCTIONS {
namespace {

// Rows of a tile: a box of up to kOneTile tokens is one tile, else a tile of p or ds is 37 KB for N = 392.
constexpr int64_t kTileRows = 4 * kRows, kOneTile = 64, kMostRows = (kOneTile + kRows - 1) / kRows * kRows;
BEVT_INLINE int64_t maximum(int64_t a, int64_t b) { return a < b ? b : a; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

BEVT_INLINE float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

BEVT_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

BEVT_INLINE float to_float(float x) { return x; }

BEVT_INLINE float to_float(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

BEVT_INLINE float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = static_cast<uint32_t>(x.bits & 0x7fff)
                                                                             << 13;
  const uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;  // infinity and NaN keep the largest exponent
  return as_float(as_bits(as_float(rest) * 0x1p112f) | special | sign);   // the product moves the exponent's bias
}

// kLanes numbers as float32.
template <class T>
BEVT_INLINE Vector load(const T* source) {
  Vector x;
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = to_float(source[lane]);
  return x;
}

BEVT_INLINE void from_float(float x, float& target) { target = x; }

BEVT_INLINE void from_float(float x, BFloat16& target) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  target.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

BEVT_INLINE void from_float(float x, Float16& target) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000, bits = as_bits(x) & 0x7fffffff;
  // Normal numbers round to nearest even on the bits that fall away; below 2^-14 the sum with 1/2 rounds, as its last
  // place is half precision's smallest number.
  const uint32_t normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const uint32_t small = as_bits(as_float(bits) + 0.5f) - 0x3f000000;
  const uint32_t large = bits > 0x7f800000 ? 0x7e00 : 0x7c00;  // from 65520 on infinity
  target.bits = static_cast<uint16_t>(sign | (bits >= 0x477ff000 ? large : bits < 0x38800000 ? small : normal));
}

template <class T>
BEVT_INLINE void store(T* target, Vector x) {
  for (int lane = 0; lane < kLanes; ++lane) from_float(x[lane], target[lane]);
}

template <int kCount>
struct Vectors {
  static constexpr int value = kCount;
};

// Calls body(Vectors<2 or 1>, first column) over `columns`, a multiple of kLanes.
template <class Body>
BEVT_INLINE void for_columns(int64_t columns, Body body) {
  int64_t column = 0;
  for (; column + kWide * kLanes <= columns; column += kWide * kLanes) body(Vectors<kWide>(), column);
  if (column < columns) body(Vectors<1>(), column);
}

// target = left * right: (rows, columns) = (rows, depth) (depth, columns), where `right` and `target` have row stride
// `columns`; rows are a multiple of kRows, columns of kLanes. A block of `right` stays in the L1 cache for all rows.
void multiply(int64_t rows, int64_t depth, int64_t columns, const float* left, int64_t left_stride, const float* right,
              float* target) {
  for_columns(columns, [&](auto vectors, int64_t column) BEVT_INLINED {
    constexpr int kVectors = decltype(vectors)::value;
    for (int64_t k = 0; k < depth; k += kBlock) {
      for (int64_t row = 0; row < rows; row += kRows) {
        Sums<kVectors> sums;
        sum_products<kVectors, false>(minimum(kBlock, depth - k), left + row * left_stride + k, left_stride,
                                      right + k * columns + column, columns, sums);
        accumulate<kVectors>(sums, k == 0, target + row * columns + column, columns);
      }
    }
  });
}

// The sums of whole blocks of a transposed product. A function of its own: its registers are not those of `product`.
template <int kVectors>
__attribute__((noinline)) void sum_blocks(int64_t depth, const float* left, int64_t left_stride, const float* right,
                                          int64_t right_stride, float* totals) {
  for (int64_t k = 0; k < depth; k += kBlock) {
    Sums<kVectors> sums;
    sum_products<kVectors, true>(kBlock, left + k * left_stride, left_stride, right + k * right_stride, right_stride,
                                 sums);
    accumulate<kVectors>(sums, k == 0, totals, kVectors * kLanes);
  }
}

// The sums over k < depth, above 0, of left[k][r] * right[k][column], given to finish(r, first column, sums).
template <int kVectors, class Finish>
BEVT_INLINE void product(int64_t depth, const float* left, int64_t left_stride, const float* right,
                         int64_t right_stride, Finish finish) {
  alignas(64) float totals[kRows * kVectors * kLanes];
  const int64_t whole = (depth - 1) / kBlock * kBlock;
  if (whole > 0) sum_blocks<kVectors>(whole, left, left_stride, right, right_stride, totals);
  Sums<kVectors> sums;
  sum_products<kVectors, true>(depth - whole, left + whole * left_stride, left_stride, right + whole * right_stride,
                               right_stride, sums);
  if (whole > 0) {
    for_sums<kVectors>([&](int r, int v) BEVT_INLINED { sums[r][v] += load(totals + (r * kVectors + v) * kLanes); });
  }
  for_sums<kVectors>([&](int r, int v) BEVT_INLINED { finish(r, v * kLanes, sums[r][v]); });
}

// A box with its axes (a, b, c); a flat box's first axis is its height.
struct View {
  int64_t a, b, c, tokens;   // lengths and their product
  int64_t first;             // the first token, counted through the batch
  int64_t token_a, token_b;  // from token to token on an axis; 1 on the last
  int64_t table_a, table_b;  // from row to row of the table likewise
  int64_t centre;            // the table's row for distance zero
};

View view(const WindowAttention& p, const Box& box) {
  const int64_t height = p.grid[1], width = p.grid[2];
  const bool flat = box.length[0] == 1;
  View v;
  v.a = box.length[flat ? 1 : 0];
  v.b = box.length[flat ? 0 : 1];
  v.c = box.length[2];
  v.tokens = v.a * v.b * v.c;
  v.first = ((box.clip * p.grid[0] + box.start[0]) * height + box.start[1]) * width + box.start[2];
  v.token_a = flat ? width : height * width;
  v.token_b = flat ? height * width : width;
  v.table_a = flat ? p.table[2] : p.table[1] * p.table[2];
  v.table_b = flat ? p.table[1] * p.table[2] : p.table[2];
  v.centre = p.table[0] * p.table[1] * p.table[2] / 2;
  return v;
}

// The tokens in the columns' order (a, b, c) and in the rows' order (b, c, a), counted through the batch.
void list_tokens(const View& v, int64_t* columns, int64_t* rows) {
  for (int64_t a = 0; a < v.a; ++a) {
    for (int64_t b = 0; b < v.b; ++b) {
      for (int64_t c = 0; c < v.c; ++c) {
        const int64_t token = v.first + a * v.token_a + b * v.token_b + c;
        columns[(a * v.b + b) * v.c + c] = token;
        rows[(b * v.c + c) * v.a + a] = token;
      }
    }
  }
}

// Strips are indexed by column minus row: the table itself where rows are keys, the reversed one where they are
// queries.
struct Strips {
  int64_t stride;  // of a strip
  int64_t first;   // the tile's first strip
  int64_t count;
};

int64_t strip_stride(const View& v) { return round_up((2 * v.a - 1) * v.b * v.c + kWide * kLanes, 16); }

Strips tile_strips(const View& v, int64_t row, int64_t rows) {
  const int64_t first = row / v.a;
  return {strip_stride(v), first, (row + rows - 1) / v.a - first + 1};
}

// Where the strip's row is, in the strips.
int64_t strip_row(const View& v, const Strips& strips, int64_t row) {
  return (row / v.a - strips.first) * strips.stride + (v.a - 1 - row % v.a) * v.b * v.c;
}

// Calls body(offset in the strips, row of the table) for each run of c values, in order.
template <class Body>
BEVT_INLINE void for_runs(const View& v, const Strips& strips, Body body) {
  for (int64_t strip = 0; strip < strips.count; ++strip) {
    const int64_t row_b = (strips.first + strip) / v.c, row_c = (strips.first + strip) % v.c;
    int64_t offset = strip * strips.stride;
    for (int64_t a = 1 - v.a; a < v.a; ++a) {
      for (int64_t b = 0; b < v.b; ++b, offset += v.c) {
        body(offset, v.centre + a * v.table_a + (b - row_b) * v.table_b - row_c);
      }
    }
  }
}

// Whole vectors are copied; what lies past a run is overwritten by the next one, or never used.
void expand(const View& v, const Strips& strips, const float* table, float* target) {
  for_runs(v, strips, [&](int64_t offset, int64_t row) BEVT_INLINED {
    for (int64_t c = 0; c < v.c; c += kLanes) store(target + offset + c, load(table + row + c));
  });
  const int64_t length = (2 * v.a - 1) * v.b * v.c;  // what columns past the last token read must be a number
  for (int64_t strip = 0; strip < strips.count; ++strip) {
    for (int64_t n = length; n < strips.stride; ++n) target[strip * strips.stride + n] = 0;
  }
}

void fold(const View& v, const Strips& strips, const float* source, float* table) {
  const int64_t whole = v.c / kLanes * kLanes;
  Mask rest;
  for (int lane = 0; lane < kLanes; ++lane) rest[lane] = whole + lane < v.c ? -1 : 0;
  for_runs(v, strips, [&](int64_t offset, int64_t row) BEVT_INLINED {
    const float* from = source + offset;
    float* to = table + row;
    int64_t c = 0;
    for (; c < whole; c += kLanes) store(to + c, load(to + c) + load(from + c));
    store(to + c, load(to + c) + reinterpret_cast<Vector>(reinterpret_cast<Mask>(load(from + c)) & rest));
  });
}

// Hands out pieces of the caller's scratch; with a null scratch it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// Row strides: of matrices over channels, and of tiles over the box's tokens. A tile has room for whole vectors and for
// kRows past its last token; 16 more keep its rows out of one cache set where N is a power of two.
int64_t channel_stride(const WindowAttention& p) { return round_up(p.head_dim, kLanes); }
int64_t tile_stride(int64_t tokens) { return round_up(tokens, 16) + 16; }

int64_t tile_rows(int64_t tokens) { return tokens <= kOneTile ? kMostRows : kTileRows; }

// The most floats of a tile, and of a tile's strips: a strip has less than 2 * a * b * c values, and at most
// (rows - 1) / a + 2 strips belong to a tile.
int64_t tile_size(const WindowAttention& p) {
  return maximum(kTileRows * tile_stride(p.box_tokens), kMostRows * tile_stride(kOneTile));
}
int64_t strips_size(const WindowAttention& p) {
  return maximum((kTileRows + 3) * p.box_tokens, (kMostRows + 3) * kOneTile) + (kMostRows + 1) * (kWide * kLanes + 16);
}

// Reads `count` tokens of one head into float32 rows, zero padded, and zero rows up to `rows`.
// `source` points to the head of token 0, `token_stride` is in elements.
template <class T>
void load_rows(const WindowAttention& p, const T* source, int64_t token_stride, const int64_t* tokens, int64_t count,
               int64_t rows, float* __restrict target) {
  const int64_t stride = channel_stride(p);
  for (int64_t n = 0; n < rows; ++n, target += stride) {
    int64_t c = 0;
    if (n < count) {
      const T* row = source + tokens[n] * token_stride;
      __builtin_prefetch(source + tokens[minimum(n + 8, count - 1)] * token_stride);  // rows lie far apart
      for (; c + kLanes <= p.head_dim; c += kLanes) store(target + c, load(row + c));
      for (; c < p.head_dim; ++c) target[c] = to_float(row[c]);
    }
    for (; c < stride; ++c) target[c] = 0;
  }
}

// Writes float32 rows, times `factor`, to `count` tokens of one head.
template <class T>
void store_rows(const WindowAttention& p, const float* source, const int64_t* tokens, int64_t count, float factor,
                T* __restrict target, int64_t token_stride) {
  const int64_t stride = channel_stride(p);
  for (int64_t n = 0; n < count; ++n, source += stride) {
    T* row = target + tokens[n] * token_stride;
    int64_t c = 0;
    for (; c + kLanes <= p.head_dim; c += kLanes) store(row + c, load(source + c) * factor);
    for (; c < p.head_dim; ++c) from_float(source[c] * factor, row[c]);
  }
}

// Rows in groups of kWidth become (group, d, kWidth): the groups' columns side by side.
template <int kWidth>
void transpose(const WindowAttention& p, const float* source, int64_t rows, float* target) {
  const int64_t stride = channel_stride(p);
  for (int64_t row = 0; row < rows; row += kWidth, source += kWidth * stride) {
    for (int64_t c = 0; c < p.head_dim; ++c, target += kWidth) {
      for (int lane = 0; lane < kWidth; ++lane) target[lane] = source[lane * stride + c];
    }
  }
}

// The same with the groups that `for_columns` takes.
void transpose_columns(const WindowAttention& p, const float* source, int64_t columns, float* target) {
  const int64_t stride = channel_stride(p);
  for_columns(columns, [&](auto vectors, int64_t column) {
    constexpr int kWidth = decltype(vectors)::value * kLanes;
    transpose<kWidth>(p, source + column * stride, kWidth, target + column * p.head_dim);
  });
}

// scores[n]: maximum, exponentials in place, and their sum, for n < columns, a multiple of kLanes.
struct Softmax {
  float top, sum;  // the maximum over log 2
};

Softmax exponentials(float* scores, int64_t columns) {
  Vector top = load(scores);
  for (int64_t n = kLanes; n < columns; n += kLanes) top = maximum(top, load(scores + n));
  float highest = top[0];
  for (int lane = 1; lane < kLanes; ++lane) highest = highest < top[lane] ? top[lane] : highest;
  Vector sums = {};
#pragma GCC unroll 2
  for (int64_t n = 0; n < columns; n += kLanes) {
    const Vector x = exp2((load(scores + n) - highest) * kLog2E);  // exact however large, where a rounded top is not
    sums += x;
    store(scores + n, x);
  }
  return {highest * kLog2E, sum(sums)};
}

struct ForwardScratch {
  int64_t *columns, *rows;
  float *k, *v, *q_rows, *q, *strips, *scores, *out;
  int64_t size;

  ForwardScratch(const WindowAttention& p, void* scratch) {
    const int64_t n = round_up(p.box_tokens, kLanes), stride = channel_stride(p);
    Arena arena{static_cast<char*>(scratch)};
    columns = arena.take<int64_t>(p.box_tokens);
    rows = arena.take<int64_t>(p.box_tokens);
    k = arena.take<float>(n * p.head_dim);
    v = arena.take<float>(n * stride);
    q_rows = arena.take<float>(kMostRows * stride);
    q = arena.take<float>(kMostRows * p.head_dim);
    strips = arena.take<float>(strips_size(p));
    scores = arena.take<float>(tile_size(p));
    out = arena.take<float>(kMostRows * stride);
    size = arena.used;
  }
};

template <class T>
void forward_box(const WindowAttentionForward& p, const Box& box, int64_t head, void* scratch) {
  const View v = view(p, box);
  const ForwardScratch s(p, scratch);
  const int64_t d = p.head_dim, stride = channel_stride(p), ld = tile_stride(v.tokens),
                columns = round_up(v.tokens, kLanes);
  const int64_t token = 3 * p.heads * d, map = p.grid[0] * p.grid[1] * p.grid[2];
  const T* q = static_cast<const T*>(p.qkv) + head * d;
  const T *k = q + p.heads * d, *value = k + p.heads * d;
  const float* table = p.bias + head * (p.table[0] * p.table[1] * p.table[2] + kTableSlack);
  T* out = static_cast<T*>(p.out) + head * d;
  float* lse = p.lse + (box.clip * p.heads + head - box.clip) * map;  // tokens count through the batch

  list_tokens(v, s.columns, s.rows);
  load_rows(p, k, token, s.columns, v.tokens, columns, s.v);
  transpose_columns(p, s.v, columns, s.k);
  load_rows(p, value, token, s.columns, v.tokens, v.tokens, s.v);

  for (int64_t first = 0; first < v.tokens; first += tile_rows(v.tokens)) {
    const int64_t rows = minimum(tile_rows(v.tokens), v.tokens - first), padded = round_up(rows, kRows);
    load_rows(p, q, token, s.rows + first, rows, padded, s.q_rows);
    transpose<kRows>(p, s.q_rows, padded, s.q);
    const Strips strips = tile_strips(v, first, rows);
    expand(v, strips, table, s.strips);
    const float* bias[kMostRows];
    for (int64_t r = 0; r < padded; ++r) bias[r] = s.strips + strip_row(v, strips, first + minimum(r, rows - 1));

    for_columns(columns, [&](auto vectors, int64_t column) {
      constexpr int kVectors = decltype(vectors)::value;
      for (int64_t row = 0; row < padded; row += kRows) {
        product<kVectors>(d, s.q + row * d, kRows, s.k + column * d, kVectors * kLanes,
                          [&](int r, int x, Vector y) BEVT_INLINED {
                            const int64_t n = column + x;
                            store(s.scores + (row + r) * ld + n, y * p.scale + load(bias[row + r] + n));
                          });
      }
    });

    float total[kMostRows];
    for (int64_t r = 0; r < rows; ++r) {
      float* scores = s.scores + r * ld;
      for (int64_t n = v.tokens; n < columns; ++n) scores[n] = -__builtin_inff();
      const Softmax softmax = exponentials(scores, columns);
      total[r] = softmax.sum;
      lse[s.rows[first + r]] = softmax.top + __builtin_log2f(softmax.sum);
    }

    multiply(padded, v.tokens, stride, s.scores, ld, s.v, s.out);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = r * stride; c < (r + 1) * stride; c += kLanes) store(s.out + c, load(s.out + c) / total[r]);
    }
    store_rows(p, s.out, s.rows + first, rows, 1, out, p.heads * d);
  }
}

struct BackwardScratch {
  int64_t *columns, *rows;
  float *q, *q_columns, *grad, *grad_columns, *lse, *delta, *grad_q;                     // of all queries
  float *k_rows, *k, *v, *p, *ds, *grad_k, *grad_v, *strips, *grad_strips, *grad_table;  // of a tile of keys
  int64_t size;

  BackwardScratch(const WindowAttention& p_, void* scratch) {
    const int64_t n = round_up(p_.box_tokens, kLanes), stride = channel_stride(p_);
    Arena arena{static_cast<char*>(scratch)};
    columns = arena.take<int64_t>(p_.box_tokens);
    rows = arena.take<int64_t>(p_.box_tokens);
    q = arena.take<float>(n * stride);
    q_columns = arena.take<float>(n * p_.head_dim);
    grad = arena.take<float>(n * stride);
    grad_columns = arena.take<float>(n * p_.head_dim);
    lse = arena.take<float>(n);
    delta = arena.take<float>(n);
    grad_q = arena.take<float>(round_up(p_.box_tokens, kRows) * stride);
    k_rows = arena.take<float>(kMostRows * stride);
    k = arena.take<float>(kMostRows * p_.head_dim);
    v = arena.take<float>(kMostRows * p_.head_dim);
    p = arena.take<float>(tile_size(p_));
    ds = arena.take<float>(tile_size(p_));
    grad_k = arena.take<float>(kMostRows * stride);
    grad_v = arena.take<float>(kMostRows * stride);
    strips = arena.take<float>(strips_size(p_));
    grad_strips = arena.take<float>(strips_size(p_));
    grad_table = arena.take<float>(p_.table[0] * p_.table[1] * p_.table[2] + kTableSlack);
    size = arena.used;
  }
};

// Where p and ds = dp are those of all keys of the box: makes p sum to 1, takes delta from both, makes ds of dp, and
// adds it to the strips of the first `summed` rows.
void finish_tile(const BackwardScratch& s, const int64_t* strip, int64_t rows, int64_t summed, int64_t columns,
                 int64_t ld) {
  for (int64_t n = 0; n < columns; n += kLanes) {
    Vector total = {}, delta = {};
    for (int64_t r = 0; r < rows; ++r) total += load(s.p + r * ld + n);
    total = maximum(broadcast(1e-30f), total);  // zero past the last query
    for (int64_t r = 0; r < rows; ++r) {
      const Vector p = load(s.p + r * ld + n) / total;
      store(s.p + r * ld + n, p);
      delta += p * load(s.ds + r * ld + n);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Vector ds = load(s.p + r * ld + n) * (load(s.ds + r * ld + n) - delta);
      store(s.ds + r * ld + n, ds);
      if (r < summed) store(s.grad_strips + strip[r] + n, load(s.grad_strips + strip[r] + n) + ds);
    }
  }
}

template <class T>
void backward_box(const WindowAttentionBackward& p, const Box& box, int64_t head, float* grad_table, void* scratch) {
  const View v = view(p, box);
  const BackwardScratch s(p, scratch);
  const int64_t d = p.head_dim, stride = channel_stride(p), ld = tile_stride(v.tokens),
                columns = round_up(v.tokens, kLanes);
  const int64_t channels = p.heads * d, token = 3 * channels, map = p.grid[0] * p.grid[1] * p.grid[2];
  const T* q = static_cast<const T*>(p.qkv) + head * d;
  const T *out = static_cast<const T*>(p.out) + head * d, *grad_out = static_cast<const T*>(p.grad_out) + head * d;
  T* grad_q = static_cast<T*>(p.grad_qkv) + head * d;
  const float* table = p.bias + head * (p.table[0] * p.table[1] * p.table[2] + kTableSlack);
  const float* lse = p.lse + (box.clip * p.heads + head - box.clip) * map;  // tokens count through the batch

  list_tokens(v, s.columns, s.rows);
  load_rows(p, grad_out, channels, s.columns, v.tokens, columns, s.grad);
  transpose_columns(p, s.grad, columns, s.grad_columns);
  // With all keys in one tile delta is taken from p and dp there, and p made to sum to 1. In such small boxes p comes
  // close to 1, where dp - delta cancels, and so do the rounding errors if they are the same ones.
  const bool one_tile = v.tokens <= kOneTile;
  if (!one_tile) {
    load_rows(p, out, channels, s.columns, v.tokens, v.tokens, s.q);
    for (int64_t n = 0; n < v.tokens; ++n) {
      Vector products = {};
      for (int64_t c = n * stride; c < (n + 1) * stride; c += kLanes) products += load(s.q + c) * load(s.grad + c);
      s.delta[n] = sum(products);
    }
    for (int64_t n = v.tokens; n < columns; ++n) s.delta[n] = 0;
  }
  for (int64_t n = 0; n < v.tokens; ++n) s.lse[n] = lse[s.columns[n]];
  for (int64_t n = v.tokens; n < columns; ++n) s.lse[n] = __builtin_inff();  // p = 0 past the last query
  load_rows(p, q, token, s.columns, v.tokens, columns, s.q);
  transpose_columns(p, s.q, columns, s.q_columns);
  for (int64_t n = 0; n < round_up(v.tokens, kRows) * stride; ++n) s.grad_q[n] = 0;

  // The table's gradient of this box: added up by itself, for the sums' rounding.
  const int64_t reach = (v.a - 1) * v.table_a + (v.b - 1) * v.table_b + v.c - 1;
  const int64_t least_row = v.centre - reach, most_row = v.centre + reach;
  const bool frozen = grad_table == nullptr;
  if (!frozen) {
    for (int64_t row = least_row; row <= most_row + kTableSlack; ++row) s.grad_table[row] = 0;
  }

  for (int64_t first = 0; first < v.tokens; first += tile_rows(v.tokens)) {
    const int64_t rows = minimum(tile_rows(v.tokens), v.tokens - first), padded = round_up(rows, kRows);
    const int64_t* tokens = s.rows + first;
    load_rows(p, q + 2 * channels, token, tokens, rows, padded, s.k_rows);
    transpose<kRows>(p, s.k_rows, padded, s.v);
    load_rows(p, q + channels, token, tokens, rows, padded, s.k_rows);
    transpose<kRows>(p, s.k_rows, padded, s.k);
    const Strips strips = tile_strips(v, first, rows);
    expand(v, strips, table, s.strips);
    const int64_t summed = frozen ? 0 : rows;  // whose ds are added to the strips of gradients
    if (!frozen) {
      for (int64_t n = 0; n < strips.count * strips.stride; ++n) s.grad_strips[n] = 0;
    }
    int64_t strip[kMostRows];
    for (int64_t r = 0; r < padded; ++r) strip[r] = strip_row(v, strips, first + minimum(r, rows - 1));

    for_columns(columns, [&](auto vectors, int64_t column) {
      constexpr int kVectors = decltype(vectors)::value;
      for (int64_t row = 0; row < padded; row += kRows) {
        product<kVectors>(d, s.k + row * d, kRows, s.q_columns + column * d, kVectors * kLanes,
                          [&](int r, int x, Vector y) BEVT_INLINED {
                            const int64_t n = column + x;
                            store(s.p + (row + r) * ld + n, y * p.scale + load(s.strips + strip[row + r] + n));
                          });
      }
      // All rows' exponentials in one go hide each other's latency: 2 % of the backward.
      Vector lse_of[kVectors];
      for (int x = 0; x < kVectors; ++x) lse_of[x] = load(s.lse + column + x * kLanes);
      for (int64_t row = 0; row < padded; ++row) {
#pragma GCC unroll 2
        for (int x = 0; x < kVectors; ++x) {
          float* at = s.p + row * ld + column + x * kLanes;
          store(at, exp2(load(at) * kLog2E - lse_of[x]));
        }
      }
      for (int64_t row = 0; row < padded; row += kRows) {
        product<kVectors>(d, s.v + row * d, kRows, s.grad_columns + column * d, kVectors * kLanes,
                          [&](int r, int x, Vector y) BEVT_INLINED {
                            const int64_t n = column + x, at = (row + r) * ld + n;
                            if (one_tile) return store(s.ds + at, y);
                            const Vector ds = load(s.p + at) * (y - load(s.delta + n));
                            store(s.ds + at, ds);
                            float* grad_bias = s.grad_strips + strip[row + r] + n;
                            if (row + r < summed) store(grad_bias, load(grad_bias) + ds);
                          });
      }
    });
    if (one_tile) finish_tile(s, strip, rows, summed, columns, ld);
    if (!frozen) fold(v, strips, s.grad_strips, s.grad_table);

    multiply(padded, v.tokens, stride, s.p, ld, s.grad, s.grad_v);
    multiply(padded, v.tokens, stride, s.ds, ld, s.q, s.grad_k);
    for_columns(stride, [&](auto vectors, int64_t column) {
      constexpr int kVectors = decltype(vectors)::value;
      for (int64_t query = 0; query < v.tokens; query += kRows) {
        float* target = s.grad_q + query * stride + column;
        product<kVectors>(rows, s.ds + query, ld, s.k_rows + column, stride, [&](int r, int x, Vector y) BEVT_INLINED {
          float* at = target + r * stride + x;
          store(at, load(at) + y);
        });
      }
    });
    store_rows(p, s.grad_k, tokens, rows, p.scale, grad_q + channels, token);
    store_rows(p, s.grad_v, tokens, rows, 1, grad_q + 2 * channels, token);
  }
  store_rows(p, s.grad_q, s.columns, v.tokens, p.scale, grad_q, token);
  if (frozen) return;
  for (int64_t row = least_row; row <= most_row; ++row) grad_table[row] += s.grad_table[row];
}

int64_t forward_scratch(const WindowAttention& p) { return ForwardScratch(p, nullptr).size; }

int64_t backward_scratch(const WindowAttention& p) { return BackwardScratch(p, nullptr).size; }

void forward(const WindowAttentionForward& p, const Box& box, int64_t head, void* scratch) {
  switch (p.element) {
    case Element::kFloat32:
      return forward_box<float>(p, box, head, scratch);
    case Element::kBFloat16:
      return forward_box<BFloat16>(p, box, head, scratch);
    case Element::kFloat16:
      return forward_box<Float16>(p, box, head, scratch);
  }
}

void backward(const WindowAttentionBackward& p, const Box& box, int64_t head, float* grad_table, void* scratch) {
  switch (p.element) {
    case Element::kFloat32:
      return backward_box<float>(p, box, head, grad_table, scratch);
    case Element::kBFloat16:
      return backward_box<BFloat16>(p, box, head, grad_table, scratch);
    case Element::kFloat16:
      return backward_box<Float16>(p, box, head, grad_table, scratch);
  }
}

}  // namespace

const WindowAttentionKernels window_attention = {forward_scratch, backward_scratch, forward, backward};

}  // namespace BEVT_INSTRUCTIONS
}  // namespace bevt_kernels
