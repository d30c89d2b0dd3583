// Compares the kernels of one instruction set with the scalar ones on one random case.
// Arguments: the instruction set, the integers of edgeattn_cga_size in order, the number of threads.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "c_api.h"

namespace {

std::vector<float> values(std::size_t count, float spread) {
  static unsigned state = 1;
  std::vector<float> out(count);
  for (float& value : out) {
    state = state * 1664525u + 1013904223u;
    value = spread * (float(state >> 8) / float(1 << 23) - 1.0f) * 1.7f;
  }
  return out;
}

}  // namespace

int main(int, char** argv) {
  int n[10];
  for (int i = 0; i < 10; ++i) n[i] = std::atoi(argv[i + 2]);
  const int channels = n[1], heads = n[4], key_dim = n[5], kernel = n[6], tokens = n[7] * n[8],
            value_dim = channels / heads;
  const edgeattn_cga_size size{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], 1.0f / std::sqrt(float(key_dim))};
  const std::size_t count = std::size_t(n[0]) * channels * n[2] * n[3], rows = heads * (2 * key_dim + value_dim);
  const auto x = values(count, 1), qkv = values(rows * value_dim, 1 / std::sqrt(float(value_dim))),
             qkv_bias = values(rows, 0.1f);
  const auto dw = values(std::size_t(heads) * key_dim * kernel * kernel, 1.0f / kernel),
             dw_bias = values(heads * key_dim, 0.1f);
  const auto bias = values(std::size_t(heads) * tokens * tokens, 1), proj_bias = values(channels, 0.1f);
  const auto proj = values(std::size_t(channels) * channels, 1 / std::sqrt(float(channels)));
  std::vector<float> y[2];
  const char* isas[] = {"scalar", argv[1]};
  for (int i = 0; i < 2; ++i) {
    y[i].resize(count);
    char message[200];
    if (edgeattn_cga_f32(isas[i], n[9], &size, x.data(), qkv.data(), qkv_bias.data(), dw.data(), dw_bias.data(),
                         bias.data(), proj.data(), proj_bias.data(), y[i].data(), message, sizeof message)) {
      return std::puts(message), 2;
    }
  }
  float worst = 0;
  for (std::size_t i = 0; i < count; ++i) worst = std::fmax(worst, std::fabs(y[0][i] - y[1][i]));
  std::printf("largest difference %g\n", worst);
  return worst < 2e-5f ? 0 : 1;
}
