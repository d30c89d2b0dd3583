// What one window of CascadedGroupAttention needs, as plain data. Files compiled for one instruction set include only
// this: an inline function of a shared header, compiled there, could replace the portable copy in the linked library.
#pragma once

#include <cstddef>

namespace edgeattn {

// Pads of rows and keys: the widest vector in floats.
constexpr int kPad = 16;

// Parts that a phase of a window may have.
constexpr int kMaxParts = 16;

struct CgaPlan {
  int channels, num_heads, key_dim, value_dim, kernel, window_height, window_width;
  int key_pad;  // key_dim rounded up to kPad
  int tokens;  // per window
  int token_pad;  // tokens rounded up to kPad: stride of channel-major rows in scratch
  int halo_width;  // window width plus the depthwise border on both sides
  float scale;

  // ONNX layouts.
  const float *qkv_weight, *qkv_bias, *dw_weight, *dw_bias, *attention_bias, *proj_weight, *proj_bias;
  // Packed. Heads outermost; `scale` is folded into the depthwise weights and bias.
  const float* query_weight;  // [head][value_dim][key_pad]
  const float* query_bias;  // [head][key_pad]
  const float* query_dw_weight;  // [head][kernel * kernel][key_pad]
  const float* query_dw_bias;  // [head][key_pad]
  const float* key_query_bias;  // [head][key][token_pad of queries]

  // Scratch of one window, in floats from its start; all sizes are multiples of kPad.
  std::size_t map_at;  // [channels][token_pad]: input, then per head the ReLU of its output
  std::size_t halo_at;  // [window_height][halo_width][key_pad]: q before the depthwise convolution
  std::size_t query_at;  // [key_pad][token_pad]
  std::size_t kv_at;  // [key_dim + value_dim][token_pad]
  std::size_t prob_at;  // [key][token_pad of queries]
  std::size_t out_at;  // [channels][token_pad]
  std::size_t column_at;  // [part][channels]: one token's values
  std::size_t scratch_size;
};

// One window of one image: `row` and `col` are its origin in the grid.
struct CgaWindow {
  const float* x;
  float* y;
  int height, width, row, col;
  float* scratch;
};

// Share `index` of `count` equal ones of the work of a phase.
struct CgaPart {
  int index, count;
};

// The phases of one window, in order; all parts of one are done before the next starts.
struct CgaKernels {
  void (*load)(const CgaPlan&, const CgaWindow&, CgaPart);
  void (*project_qkv)(const CgaPlan&, const CgaWindow&, int head, CgaPart);
  void (*attend)(const CgaPlan&, const CgaWindow&, int head, CgaPart);
  void (*project_out)(const CgaPlan&, const CgaWindow&, CgaPart);
};

extern const CgaKernels cga_scalar;
extern const CgaKernels cga_avx2;
extern const CgaKernels cga_avx512;
extern const CgaKernels cga_neon;

}  // namespace edgeattn
