// CascadedGroupAttention in plain loops over the unpacked weights: the oracle of the vector versions.
#include <algorithm>
#include <cmath>

#include "cga_plan.h"

namespace edgeattn {
namespace {

struct Range {
  int begin, end;
};

Range share(int count, CgaPart part) {
  return {int(std::ptrdiff_t(count) * part.index / part.count),
          int(std::ptrdiff_t(count) * (part.index + 1) / part.count)};
}

void load(const CgaPlan& p, const CgaWindow& w, CgaPart part) {
  const Range channels = share(p.channels, part);
  for (int c = channels.begin; c < channels.end; ++c) {
    for (int t = 0; t < p.tokens; ++t) {
      const int row = w.row + t / p.window_width, col = w.col + t % p.window_width;
      const bool inside = row < w.height && col < w.width;
      w.scratch[p.map_at + std::size_t(c) * p.token_pad + t] =
          inside ? w.x[(std::size_t(c) * w.height + row) * w.width + col] : 0.0f;
    }
  }
}

float dot(const float* weights, const float* values, int count, int stride) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += weights[i] * values[std::size_t(i) * stride];
  return sum;
}

// q of one channel to the depthwise result times scale. The halo area holds q as [key_dim][tokens] here.
void depthwise(const CgaPlan& p, const float* weight, float bias, const float* q, float* out) {
  const int border = p.kernel / 2;
  for (int t = 0; t < p.tokens; ++t) {
    float sum = bias;
    for (int i = 0; i < p.kernel; ++i) {
      for (int j = 0; j < p.kernel; ++j) {
        const int row = t / p.window_width + i - border, col = t % p.window_width + j - border;
        if (row < 0 || row >= p.window_height || col < 0 || col >= p.window_width) continue;
        sum += weight[i * p.kernel + j] * q[row * p.window_width + col];
      }
    }
    out[t] = sum * p.scale;
  }
}

void project_qkv(const CgaPlan& p, const CgaWindow& w, int head, CgaPart part) {
  const int width = 2 * p.key_dim + p.value_dim;
  const float* input = w.scratch + p.map_at + std::size_t(head) * p.value_dim * p.token_pad;
  const Range rows = share(width, part);
  for (int r = rows.begin; r < rows.end; ++r) {
    const std::size_t row = std::size_t(head) * width + r;
    float* q = w.scratch + p.halo_at + std::size_t(r) * p.tokens;
    float* out = r < p.key_dim ? q : w.scratch + p.kv_at + std::size_t(r - p.key_dim) * p.token_pad;
    for (int t = 0; t < p.tokens; ++t) {
      out[t] = p.qkv_bias[row] + dot(p.qkv_weight + row * p.value_dim, input + t, p.value_dim, p.token_pad);
    }
    if (r < p.key_dim) {
      const std::size_t key = std::size_t(head) * p.key_dim + r;
      depthwise(p, p.dw_weight + key * p.kernel * p.kernel, p.dw_bias[key], q,
                w.scratch + p.query_at + std::size_t(r) * p.token_pad);
    }
  }
}

void softmax(float* values, int count) {
  const float largest = *std::max_element(values, values + count);
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - largest);
  for (int i = 0; i < count; ++i) values[i] /= sum;
}

void attend(const CgaPlan& p, const CgaWindow& w, int head, CgaPart part) {
  const std::size_t stride = p.token_pad;
  const float *query = w.scratch + p.query_at, *key = w.scratch + p.kv_at, *value = key + p.key_dim * stride;
  float* map = w.scratch + p.map_at + head * p.value_dim * stride;
  const Range queries = share(p.tokens, part);
  for (int t = queries.begin; t < queries.end; ++t) {
    float* prob = w.scratch + p.prob_at + t * stride;
    const float* bias = p.attention_bias + (std::size_t(head) * p.tokens + t) * p.tokens;
    for (int n = 0; n < p.tokens; ++n) {
      prob[n] = bias[n];
      for (int d = 0; d < p.key_dim; ++d) prob[n] += query[d * stride + t] * key[d * stride + n];
    }
    softmax(prob, p.tokens);
    for (int v = 0; v < p.value_dim; ++v) {
      const float out = dot(prob, value + v * stride, p.tokens, 1);
      if (head + 1 < p.num_heads) map[(p.value_dim + v) * stride + t] += out;
      map[v * stride + t] = out < 0.0f ? 0.0f : out;
    }
  }
}

void project_out(const CgaPlan& p, const CgaWindow& w, CgaPart part) {
  const Range channels = share(p.channels, part);
  for (int c = channels.begin; c < channels.end; ++c) {
    for (int t = 0; t < p.tokens; ++t) {
      const int row = w.row + t / p.window_width, col = w.col + t % p.window_width;
      if (row >= w.height || col >= w.width) continue;
      w.y[(std::size_t(c) * w.height + row) * w.width + col] =
          p.proj_bias[c] +
          dot(p.proj_weight + std::size_t(c) * p.channels, w.scratch + p.map_at + t, p.channels, p.token_pad);
    }
  }
}

}  // namespace

const CgaKernels cga_scalar{load, project_qkv, attend, project_out};

}  // namespace edgeattn
