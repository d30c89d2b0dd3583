// CascadedGroupAttention with vectors of kLanes floats, written once; each cga_<isa>.cpp compiles it with its own
// flags.
//
// Everything is channel-major, as NCHW is: vectors run over the tokens of a window, so that the softmax over keys needs
// no horizontal sums and one matrix product serves qkv, logits, attention times values and the projection. Only q goes
// token-major between its projection and its depthwise convolution, whose vectors run over channels.
//
// Set before inclusion: EDGEATTN_LANES, and kTileRows[vectors], how many rows of accumulators fit the registers.

namespace {

constexpr int kLanes = EDGEATTN_LANES;
constexpr int kMaxVectors = sizeof(kTileRows) / sizeof(kTileRows[0]) - 1;

typedef float Vec __attribute__((vector_size(4 * EDGEATTN_LANES)));
typedef int VecInt __attribute__((vector_size(4 * EDGEATTN_LANES)));
typedef float VecMem __attribute__((vector_size(4 * EDGEATTN_LANES), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16)));
typedef float QuadMem __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__)
#define EDGEATTN_UNROLL _Pragma("clang loop unroll(full)")
#define EDGEATTN_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define EDGEATTN_UNROLL _Pragma("GCC unroll 16")
typedef int QuadInt __attribute__((vector_size(16)));
#define EDGEATTN_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, QuadInt{__VA_ARGS__})
#endif

inline Vec load_vec(const float* from) { return *reinterpret_cast<const VecMem*>(from); }
inline void store_vec(float* to, Vec value) { *reinterpret_cast<VecMem*>(to) = value; }
inline Quad load_quad(const float* from) { return *reinterpret_cast<const QuadMem*>(from); }
inline void store_quad(float* to, Quad value) { *reinterpret_cast<QuadMem*>(to) = value; }
inline Vec splat(float value) { return value - Vec{}; }  // x - 0 is x in every case: no instruction is left
inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int smaller(int a, int b) { return a < b ? a : b; }

// Written so that a NaN stays one.
inline Vec at_least(float low, Vec v) { return v < low ? splat(low) : v; }

// exp for v <= 0: 2^n times a polynomial on [-ln2/2, ln2/2]; relative error below 3e-7, and exp(-87) is still normal.
inline Vec exp_negative(Vec v) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves n in the low bits
  v = at_least(-87.0f, v);
  const Vec shifted = v * 1.44269504f + kRound, n = shifted - kRound;
  const Vec r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec poly = r * (1.0f / 720) + 1.0f / 120;
  poly = poly * r + 1.0f / 24;
  poly = poly * r + 1.0f / 6;
  poly = poly * r + 0.5f;
  poly = poly * r + 1.0f;
  poly = poly * r + 1.0f;
  const VecInt exponent = (reinterpret_cast<VecInt>(shifted) << 23) + 0x3f800000;
  return poly * reinterpret_cast<Vec>(exponent);
}

// Matrix product. C[m][:] = sum over k of A[m][k] * B[k][:] plus row_bias[m] or start[m][:] (one may be given).
struct Product {
  const float* a;
  std::ptrdiff_t a_row, a_k;
  const float* b;
  std::ptrdiff_t b_k;
  int depth;
  const float* row_bias;
  const float* start;
  std::ptrdiff_t start_row;
  float* c;
  std::ptrdiff_t c_row;
};

template <int kRows, int kVectors>
void tile(const Product& p, int row, int column) {
  Vec sum[kRows][kVectors];
  EDGEATTN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    EDGEATTN_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = p.start ? load_vec(p.start + (row + i) * p.start_row + column + j * kLanes)
                          : splat(p.row_bias ? p.row_bias[row + i] : 0.0f);
    }
  }
  const float *a = p.a + row * p.a_row, *b = p.b + column;
  const std::ptrdiff_t a_row = p.a_row, a_k = p.a_k, b_k = p.b_k;
  for (int k = 0; k < p.depth; ++k, a += a_k, b += b_k) {
    Vec values[kVectors];
    EDGEATTN_UNROLL
    for (int j = 0; j < kVectors; ++j) values[j] = load_vec(b + j * kLanes);
    EDGEATTN_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const Vec weight = splat(a[i * a_row]);
      EDGEATTN_UNROLL
      for (int j = 0; j < kVectors; ++j) sum[i][j] += weight * values[j];
    }
  }
  EDGEATTN_UNROLL
  for (int i = 0; i < kRows; ++i) {
    EDGEATTN_UNROLL
    for (int j = 0; j < kVectors; ++j) store_vec(p.c + (row + i) * p.c_row + column + j * kLanes, sum[i][j]);
  }
}

template <int kRows, int kVectors>
void last_rows(const Product& p, int row, int rows, int column) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return tile<kRows, kVectors>(p, row, column);
    last_rows<kRows - 1, kVectors>(p, row, rows, column);
  }
}

template <int kVectors>
void multiply_columns(const Product& p, int rows, int column, int vectors) {
  if constexpr (kVectors > 0) {
    if (vectors != kVectors) return multiply_columns<kVectors - 1>(p, rows, column, vectors);
    constexpr int kRows = kTileRows[kVectors];
    int row = 0;
    for (; row + kRows <= rows; row += kRows) tile<kRows, kVectors>(p, row, column);
    last_rows<kRows - 1, kVectors>(p, row, rows - row, column);
  }
}

// `vectors` wide columns in even blocks that fit the registers.
void multiply(const Product& p, int rows, int vectors) {
  const int blocks = ceil_div(vectors, kMaxVectors);
  for (int block = 0; block < blocks; ++block) {
    const int begin = block * vectors / blocks, end = (block + 1) * vectors / blocks;
    multiply_columns<kMaxVectors>(p, rows, begin * kLanes, end - begin);
  }
}

// One column of the product, vectors running over k (so a_k is 1). Any grouping of rows gives the same bits.
template <int kRows>
void dot_rows(const Product& p, int row, int column, const float* b) {
  Vec sum[kRows] = {};
  const float* a = p.a + row * p.a_row;
  int k = 0;
  for (; k + kLanes <= p.depth; k += kLanes) {
    const Vec values = load_vec(b + k);
    EDGEATTN_UNROLL
    for (int i = 0; i < kRows; ++i) sum[i] += load_vec(a + i * p.a_row + k) * values;
  }
  for (int i = 0; i < kRows; ++i) {
    float lanes[kLanes];
    store_vec(lanes, sum[i]);
    Quad folded = load_quad(lanes);
    for (int j = 4; j < kLanes; j += 4) folded += load_quad(lanes + j);
    float total = (folded[0] + folded[1]) + (folded[2] + folded[3]) + p.row_bias[row + i];
    for (int rest = k; rest < p.depth; ++rest) total += a[i * p.a_row + rest] * b[rest];
    p.c[(row + i) * p.c_row + column] = total;
  }
}

// Columns of all tokens. One token over full vectors (7 x 7 is 49) would cost as much as a vector of them, hence dots;
// `column_copy` is room for p.depth floats.
void multiply_tokens(const Product& p, int rows, int tokens, float* column_copy) {
  const int full = tokens / kLanes, over = tokens % kLanes;
  if (over != 1 || full == 0) return multiply(p, rows, ceil_div(tokens, kLanes));
  multiply(p, rows, full);
  for (int k = 0; k < p.depth; ++k) column_copy[k] = p.b[k * p.b_k + tokens - 1];
  int row = 0;
  for (; row + 4 <= rows; row += 4) dot_rows<4>(p, row, tokens - 1, column_copy);
  for (; row < rows; ++row) dot_rows<1>(p, row, tokens - 1, column_copy);
}

inline void copy_row(const float* from, float* to, int count) {
  if (count < 4) {
    for (int i = 0; i < count; ++i) to[i] = from[i];
    return;
  }
  for (int i = 0; i + 4 < count; i += 4) store_quad(to + i, load_quad(from + i));
  store_quad(to + count - 4, load_quad(from + count - 4));
}

struct Extent {
  int height, width;
};

// The part of the window that lies in the grid.
inline Extent visible(const CgaPlan& p, const CgaWindow& w) {
  return {smaller(p.window_height, w.height - w.row), smaller(p.window_width, w.width - w.col)};
}

inline float* column_room(const CgaPlan& p, const CgaWindow& w, CgaPart part) {
  return w.scratch + p.column_at + std::ptrdiff_t(part.index) * p.channels;
}

void load(const CgaPlan& p, const CgaWindow& w, CgaPart part) {
  const Extent seen = visible(p, w);
  const bool partial = seen.height < p.window_height || seen.width < p.window_width;
  for (int c = p.channels * part.index / part.count; c < p.channels * (part.index + 1) / part.count; ++c) {
    float* to = w.scratch + p.map_at + std::ptrdiff_t(c) * p.token_pad;
    const float* from = w.x + (std::ptrdiff_t(c) * w.height + w.row) * w.width + w.col;
    for (int t = partial ? 0 : p.tokens / 4 * 4; t < p.token_pad; t += 4) store_quad(to + t, Quad{});
    for (int y = 0; y < seen.height; ++y)
      copy_row(from + std::ptrdiff_t(y) * w.width, to + y * p.window_width, seen.width);
  }
}

// Four tokens of four channels, token-major to channel-major.
inline void transpose_quads(const float* from, std::ptrdiff_t from_row, float* to, std::ptrdiff_t to_row) {
  const Quad a = load_quad(from), b = load_quad(from + from_row);
  const Quad c = load_quad(from + 2 * from_row), d = load_quad(from + 3 * from_row);
  const Quad ab_low = EDGEATTN_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = EDGEATTN_SHUFFLE(a, b, 2, 6, 3, 7);
  const Quad cd_low = EDGEATTN_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = EDGEATTN_SHUFFLE(c, d, 2, 6, 3, 7);
  store_quad(to, EDGEATTN_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5));
  store_quad(to + to_row, EDGEATTN_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7));
  store_quad(to + 2 * to_row, EDGEATTN_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5));
  store_quad(to + 3 * to_row, EDGEATTN_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7));
}

// Depthwise convolution of q at kCount neighbours from (y, x) for one vector of channels, written channel-major.
// Neighbours share each weight; rows outside the window are skipped, columns outside are the zeros of the halo.
template <int kCount>
void depthwise(const CgaPlan& p, const float* halo, const float* weight, const float* bias, float* query, int y,
               int x) {
  Vec sum[kCount];
  EDGEATTN_UNROLL
  for (int t = 0; t < kCount; ++t) sum[t] = load_vec(bias);
  const int border = p.kernel / 2, pad = p.key_pad;
  for (int i = y < border ? border - y : 0; i < smaller(p.kernel, p.window_height + border - y); ++i) {
    const float* q = halo + ((y + i - border) * p.halo_width + x) * pad;
    for (int j = 0; j < p.kernel; ++j) {
      const Vec tap = load_vec(weight + (i * p.kernel + j) * pad);
      EDGEATTN_UNROLL
      for (int t = 0; t < kCount; ++t) sum[t] += tap * load_vec(q + (j + t) * pad);
    }
  }
  float tokens[kCount][kLanes];
  for (int t = 0; t < kCount; ++t) store_vec(tokens[t], sum[t]);
  float* to = query + y * p.window_width + x;
  if constexpr (kCount >= 4) {
    // The last four overlap the ones before: writing past the row would race with the next row's part.
    for (int t = 0;; t = t + 8 <= kCount ? t + 4 : kCount - 4) {
      for (int c = 0; c < kLanes; c += 4) transpose_quads(tokens[t] + c, kLanes, to + c * p.token_pad + t, p.token_pad);
      if (t == kCount - 4) break;
    }
  } else {
    for (int t = 0; t < kCount; ++t) {
      for (int c = 0; c < kLanes; ++c) to[c * p.token_pad + t] = tokens[t][c];
    }
  }
}

using Depthwise = void (*)(const CgaPlan&, const float*, const float*, const float*, float*, int, int);
constexpr int kMaxNeighbours = 8;
constexpr Depthwise kDepthwise[kMaxNeighbours + 1] = {nullptr,      depthwise<1>, depthwise<2>,
                                                      depthwise<3>, depthwise<4>, depthwise<5>,
                                                      depthwise<6>, depthwise<7>, depthwise<8>};

void project_query(const CgaPlan& p, const CgaWindow& w, int head) {
  const int pad = p.key_pad, vectors = ceil_div(p.key_dim, kLanes), border = p.kernel / 2;
  float* halo = w.scratch + p.halo_at;
  Product q{};
  q.a_row = 1;
  q.a_k = p.token_pad;
  q.b = p.query_weight + std::ptrdiff_t(head) * p.value_dim * pad;
  q.b_k = pad;
  q.depth = p.value_dim;
  q.start = p.query_bias + head * pad;
  q.c_row = pad;
  for (int y = 0; y < p.window_height; ++y) {
    q.a = w.scratch + p.map_at + std::ptrdiff_t(head) * p.value_dim * p.token_pad + y * p.window_width;
    q.c = halo + (y * p.halo_width + border) * pad;
    multiply(q, p.window_width, vectors);
  }
  const int blocks = ceil_div(p.window_width, kMaxNeighbours);
  for (int c = 0; c < vectors * kLanes; c += kLanes) {
    const float* weight = p.query_dw_weight + std::ptrdiff_t(head) * p.kernel * p.kernel * pad + c;
    for (int y = 0; y < p.window_height; ++y) {
      for (int block = 0; block < blocks; ++block) {
        const int begin = block * p.window_width / blocks, end = (block + 1) * p.window_width / blocks;
        kDepthwise[end - begin](p, halo + c, weight, p.query_dw_bias + head * pad + c,
                                w.scratch + p.query_at + c * p.token_pad, y, begin);
      }
    }
  }
}

// The first part makes q; rows of k and v go where they even the parts out.
void project_qkv(const CgaPlan& p, const CgaWindow& w, int head, CgaPart part) {
  const int rows = p.key_dim + p.value_dim, width = p.key_dim + rows;
  const float q_in_rows = p.key_dim * (1.0f + float(p.kernel * p.kernel) / p.value_dim);
  auto row_at = [&](int index) {
    if (index == 0 || index == part.count) return index == 0 ? 0 : rows;
    const int row = int((q_in_rows + rows) * index / part.count - q_in_rows);
    return row < 0 ? 0 : row / 4 * 4;
  };
  const int begin = row_at(part.index), end = row_at(part.index + 1);
  if (part.index == 0) project_query(p, w, head);
  Product kv{};
  const std::ptrdiff_t first = std::ptrdiff_t(head) * width + p.key_dim + begin;
  kv.a = p.qkv_weight + first * p.value_dim;
  kv.a_row = p.value_dim;
  kv.a_k = 1;
  kv.b = w.scratch + p.map_at + std::ptrdiff_t(head) * p.value_dim * p.token_pad;
  kv.b_k = p.token_pad;
  kv.depth = p.value_dim;
  kv.row_bias = p.qkv_bias + first;
  kv.c = w.scratch + p.kv_at + std::ptrdiff_t(begin) * p.token_pad;
  kv.c_row = p.token_pad;
  multiply_tokens(kv, end - begin, p.tokens, column_room(p, w, part));
}

// exp(logits - max over keys) in place, for one vector of queries; returns 1 / sum.
Vec softmax_column(float* logits, int tokens, std::ptrdiff_t row) {
  Vec largest = load_vec(logits), sum = Vec{};
  for (int n = 1; n < tokens; ++n) {
    const Vec value = load_vec(logits + n * row);
    largest = value > largest ? value : largest;
  }
  for (int n = 0; n < tokens; ++n) {
    const Vec value = exp_negative(load_vec(logits + n * row) - largest);
    sum += value;
    store_vec(logits + n * row, value);
  }
  return 1.0f / sum;
}

// Divide by the softmax sum, add to the next head's input, and leave the ReLU for the projection.
void finish_column(float* map, float* next, int value_dim, std::ptrdiff_t row, Vec inverse) {
  for (int v = 0; v < value_dim; ++v) {
    const Vec out = load_vec(map + v * row) * inverse;
    if (next) store_vec(next + v * row, load_vec(next + v * row) + out);
    store_vec(map + v * row, at_least(0.0f, out));
  }
}

void attend(const CgaPlan& p, const CgaWindow& w, int head, CgaPart part) {
  const int all = ceil_div(p.tokens, kLanes), begin = all * part.index / part.count;
  const int vectors = all * (part.index + 1) / part.count - begin, column = begin * kLanes;
  if (vectors == 0) return;
  const std::ptrdiff_t row = p.token_pad;
  float *kv = w.scratch + p.kv_at, *prob = w.scratch + p.prob_at + column;
  float* map = w.scratch + p.map_at + head * p.value_dim * row + column;
  Product logits{};
  logits.a = kv;
  logits.a_row = 1;
  logits.a_k = row;
  logits.b = w.scratch + p.query_at + column;
  logits.b_k = row;
  logits.depth = p.key_dim;
  logits.start = p.key_query_bias + head * p.tokens * row + column;
  logits.start_row = row;
  logits.c = prob;
  logits.c_row = row;
  multiply(logits, p.tokens, vectors);

  Product average{};
  average.a = kv + p.key_dim * row;
  average.a_row = row;
  average.a_k = 1;
  average.b_k = row;
  average.depth = p.tokens;
  average.c_row = row;
  for (int first = 0; first < vectors; first += kMaxVectors) {
    const int count = smaller(kMaxVectors, vectors - first);
    Vec inverse[kMaxVectors];
    for (int j = 0; j < count; ++j) inverse[j] = softmax_column(prob + (first + j) * kLanes, p.tokens, row);
    average.b = prob + first * kLanes;
    average.c = map + first * kLanes;
    multiply(average, p.value_dim, count);
    for (int j = 0; j < count; ++j) {
      float* at = map + (first + j) * kLanes;
      finish_column(at, head + 1 < p.num_heads ? at + p.value_dim * row : nullptr, p.value_dim, row, inverse[j]);
    }
  }
}

void project_out(const CgaPlan& p, const CgaWindow& w, CgaPart part) {
  constexpr int kRowsAtOnce = 24;  // of output: still in the first cache when they are copied out
  const Extent seen = visible(p, w);
  Product out{};
  out.a_row = p.channels;
  out.a_k = 1;
  out.b = w.scratch + p.map_at;
  out.b_k = p.token_pad;
  out.depth = p.channels;
  out.c_row = p.token_pad;
  const int end = p.channels * (part.index + 1) / part.count;
  for (int first = p.channels * part.index / part.count; first < end; first += kRowsAtOnce) {
    const int rows = smaller(kRowsAtOnce, end - first);
    out.a = p.proj_weight + std::ptrdiff_t(first) * p.channels;
    out.row_bias = p.proj_bias + first;
    out.c = w.scratch + p.out_at + std::ptrdiff_t(first) * p.token_pad;
    multiply_tokens(out, rows, p.tokens, column_room(p, w, part));
    for (int r = 0; r < rows; ++r) {
      float* to = w.y + (std::ptrdiff_t(first + r) * w.height + w.row) * w.width + w.col;
      for (int y = 0; y < seen.height; ++y) {
        copy_row(out.c + r * out.c_row + y * p.window_width, to + std::ptrdiff_t(y) * w.width, seen.width);
      }
    }
  }
}

}  // namespace
