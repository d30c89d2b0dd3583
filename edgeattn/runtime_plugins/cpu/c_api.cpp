#include "c_api.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cga.h"

namespace {

using edgeattn::Isa;

// A fresh thread per share: enough for tests, too slow for serving, where the runtime's own pool is used.
void run_on_threads(void* context, std::size_t count, void (*task)(void*, std::size_t), void* argument) {
  const std::size_t threads = std::min(count, *static_cast<const std::size_t*>(context));
  auto share = [=](std::size_t index) {
    for (std::size_t i = index; i < count; i += threads) task(argument, i);
  };
  std::vector<std::thread> others;
  for (std::size_t index = 1; index < threads; ++index) others.emplace_back(share, index);
  if (count > 0) share(0);
  for (auto& thread : others) thread.join();
}

}  // namespace

const char* edgeattn_version() { return EDGEATTN_VERSION; }

int edgeattn_abi_version() { return EDGEATTN_ABI_VERSION; }

const char* edgeattn_compiled_isas() {
  static const std::string names = [] {
    std::string text;
    for (Isa isa : edgeattn::compiled_isas()) text += std::string(text.empty() ? "" : ",") + edgeattn::isa_name(isa);
    return text;
  }();
  return names.c_str();
}

const char* edgeattn_best_isa() { return edgeattn::isa_name(edgeattn::best_isa()); }

int edgeattn_runs_here(const char* isa) {
  const auto isas = edgeattn::compiled_isas();
  return std::any_of(isas.begin(), isas.end(), [isa](Isa each) {
    return std::strcmp(isa, edgeattn::isa_name(each)) == 0 && edgeattn::runs_here(each);
  });
}

int edgeattn_cga_f32(const char* isa, int threads, const edgeattn_cga_size* size, const float* x,
                     const float* qkv_weight, const float* qkv_bias, const float* dw_weight, const float* dw_bias,
                     const float* attention_bias, const float* proj_weight, const float* proj_bias, float* y,
                     char* message, size_t message_size) {
  try {
    if (size->batch < 0 || size->height < 0 || size->width < 0 || threads < 1) {
      throw std::invalid_argument("batch, height and width must not be negative, and threads must be at least 1");
    }
    const Isa use = isa && *isa ? edgeattn::isa_from_name(isa) : edgeattn::active_isa();
    const edgeattn::CgaWeights weights(
        {size->channels, size->num_heads, size->key_dim, size->kernel, size->window_height, size->window_width,
         size->scale},
        {qkv_weight, qkv_bias, dw_weight, dw_bias, attention_bias, proj_weight, proj_bias});
    edgeattn::Scratch scratch;
    std::size_t count = threads;
    edgeattn::cga_forward(use, weights, x, y, {size->batch, size->height, size->width}, scratch,
                          {run_on_threads, &count, threads});
    return 0;
  } catch (const std::exception& error) {
    const std::string text = std::string("edgeattn_cga_f32: ") + error.what();
    if (message_size > 0) message[text.copy(message, message_size - 1)] = '\0';
    return 1;
  }
}
