#include "cga.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace edgeattn {
namespace {

int round_up(int value) { return (value + kPad - 1) / kPad * kPad; }
std::size_t round_up(std::size_t value) { return (value + kPad - 1) / kPad * kPad; }

std::unique_ptr<float[]> zeros(std::size_t count) { return std::unique_ptr<float[]>(new float[count]()); }

void check(const CgaShape& s) {
  const struct {
    const char* name;
    int value;
  } sizes[] = {{"channels", s.channels}, {"num_heads", s.num_heads},         {"key_dim", s.key_dim},
               {"kernel", s.kernel},     {"window height", s.window_height}, {"window width", s.window_width}};
  for (const auto& size : sizes) {
    if (size.value < 1)
      throw std::invalid_argument(std::string(size.name) + " is " + std::to_string(size.value) +
                                  ", expected at least 1");
  }
  if (s.channels % s.num_heads != 0) {
    throw std::invalid_argument(std::to_string(s.channels) + " channels do not divide by " +
                                std::to_string(s.num_heads) + " heads");
  }
  if (s.kernel % 2 == 0)
    throw std::invalid_argument("depthwise kernel side " + std::to_string(s.kernel) + " is even, expected odd");
}

void lay_out_scratch(CgaPlan& p) {
  const std::size_t row = p.token_pad;
  std::size_t at = 0;
  auto place = [&at](std::size_t& where, std::size_t size) {
    where = at;
    at += round_up(size);
  };
  place(p.map_at, p.channels * row);
  place(p.halo_at, std::size_t(p.window_height) * p.halo_width * p.key_pad);
  place(p.query_at, p.key_pad * row);
  place(p.kv_at, (p.key_dim + p.value_dim) * row);
  place(p.prob_at, p.tokens * row);
  place(p.out_at, p.channels * row);
  place(p.column_at, std::size_t(kMaxParts) * p.channels);
  p.scratch_size = at;
}

}  // namespace

bool CgaShape::operator==(const CgaShape& o) const {
  return channels == o.channels && num_heads == o.num_heads && key_dim == o.key_dim && kernel == o.kernel &&
         window_height == o.window_height && window_width == o.window_width && scale == o.scale;
}

CgaWeights::CgaWeights(const CgaShape& shape, const CgaTensors& tensors) : shape_(shape) {
  check(shape);
  CgaPlan& p = plan_;
  p.channels = shape.channels;
  p.num_heads = shape.num_heads;
  p.key_dim = shape.key_dim;
  p.value_dim = shape.channels / shape.num_heads;
  p.kernel = shape.kernel;
  p.window_height = shape.window_height;
  p.window_width = shape.window_width;
  p.key_pad = round_up(p.key_dim);
  p.tokens = p.window_height * p.window_width;
  p.token_pad = round_up(p.tokens);
  p.halo_width = p.window_width + p.kernel - 1;
  p.scale = shape.scale;

  const std::size_t heads = p.num_heads, channels = p.channels, keys = heads * p.key_dim;
  const std::size_t qkv_rows = heads * (2 * p.key_dim + p.value_dim);
  p.qkv_weight = keep(tensors.qkv_weight, qkv_rows * p.value_dim);
  p.qkv_bias = keep(tensors.qkv_bias, qkv_rows);
  p.dw_weight = keep(tensors.dw_weight, keys * p.kernel * p.kernel);
  p.dw_bias = keep(tensors.dw_bias, keys);
  p.attention_bias = keep(tensors.attention_bias, heads * p.tokens * p.tokens);
  p.proj_weight = keep(tensors.proj_weight, channels * channels);
  p.proj_bias = keep(tensors.proj_bias, channels);
  pack_query(tensors);
  pack_attention_bias();
  lay_out_scratch(p);
}

const float* CgaWeights::keep(const float* values, std::size_t count) {
  storage_.push_back(zeros(count));
  std::copy(values, values + count, storage_.back().get());
  return storage_.back().get();
}

void CgaWeights::pack_query(const CgaTensors& tensors) {
  CgaPlan& p = plan_;
  const std::size_t heads = p.num_heads, pad = p.key_pad, taps = std::size_t(p.kernel) * p.kernel;
  auto weight = zeros(heads * p.value_dim * pad), bias = zeros(heads * pad);
  auto dw_weight = zeros(heads * taps * pad), dw_bias = zeros(heads * pad);
  for (std::size_t h = 0; h < heads; ++h) {
    for (std::size_t d = 0; d < std::size_t(p.key_dim); ++d) {
      const std::size_t row = h * (2 * p.key_dim + p.value_dim) + d, key = h * p.key_dim + d;
      bias[h * pad + d] = tensors.qkv_bias[row];
      dw_bias[h * pad + d] = tensors.dw_bias[key] * p.scale;
      for (std::size_t k = 0; k < std::size_t(p.value_dim); ++k) {
        weight[(h * p.value_dim + k) * pad + d] = tensors.qkv_weight[row * p.value_dim + k];
      }
      for (std::size_t t = 0; t < taps; ++t) {
        dw_weight[(h * taps + t) * pad + d] = tensors.dw_weight[key * taps + t] * p.scale;
      }
    }
  }
  p.query_weight = weight.get();
  p.query_bias = bias.get();
  p.query_dw_weight = dw_weight.get();
  p.query_dw_bias = dw_bias.get();
  for (auto* packed : {&weight, &bias, &dw_weight, &dw_bias}) storage_.push_back(std::move(*packed));
}

void CgaWeights::pack_attention_bias() {
  CgaPlan& p = plan_;
  const std::size_t heads = p.num_heads, tokens = p.tokens, row = p.token_pad;
  auto packed = zeros(heads * tokens * row);
  for (std::size_t h = 0; h < heads; ++h) {
    for (std::size_t query = 0; query < tokens; ++query) {
      for (std::size_t key = 0; key < tokens; ++key) {
        packed[(h * tokens + key) * row + query] = p.attention_bias[(h * tokens + query) * tokens + key];
      }
    }
  }
  p.key_query_bias = packed.get();
  storage_.push_back(std::move(packed));
}

float* Scratch::reserve(const CgaShape& shape, std::size_t count) {
  if (count > capacity_) {
    memory_.reset();
    capacity_ = 0;
    memory_ = zeros(count + kPad);
    capacity_ = count;
  } else if (!(shape == shape_)) {
    std::fill_n(memory_.get(), capacity_ + kPad, 0.0f);
  }
  shape_ = shape;
  const std::size_t bytes = kPad * sizeof(float), past = reinterpret_cast<std::size_t>(memory_.get()) % bytes;
  return memory_.get() + (past == 0 ? 0 : (bytes - past) / sizeof(float));
}

std::unique_ptr<Scratch> ScratchPool::take() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) return std::make_unique<Scratch>();
  std::unique_ptr<Scratch> scratch = std::move(free_.back());
  free_.pop_back();
  return scratch;
}

void ScratchPool::give_back(std::unique_ptr<Scratch> scratch) {
  std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(scratch));
}

}  // namespace edgeattn
