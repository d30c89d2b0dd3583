#include "cga_inputs.h"

#include <map>
#include <stdexcept>

namespace edgeattn {
namespace {

std::string text(const Dims& dims) {
  std::string out = "(";
  for (std::size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + (dims[i] < 0 ? "?" : std::to_string(dims[i]));
  return out + (dims.size() == 1 ? ",)" : ")");
}

bool fits(const Dims& found, const Dims& expected) {
  if (found.empty()) return true;
  if (found.size() != expected.size()) return false;
  for (std::size_t i = 0; i < found.size(); ++i) {
    if (found[i] >= 0 && expected[i] >= 0 && found[i] != expected[i]) return false;
  }
  return true;
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("CascadedGroupAttention: " + what); }

}  // namespace

const std::vector<std::string>& input_names(bool quantized) {
  static const std::vector<std::string> plain = {"x",       "qkv_weight",     "qkv_bias",    "dw_weight",
                                                 "dw_bias", "attention_bias", "proj_weight", "proj_bias"};
  static const std::vector<std::string> int8 = {"x",           "qkv_weight", "qkv_scale", "qkv_bias",
                                                "dw_weight",   "dw_scale",   "dw_bias",   "attention_bias",
                                                "proj_weight", "proj_scale", "proj_bias"};
  return quantized ? int8 : plain;
}

bool is_int8_input(bool quantized, std::size_t index) {
  const std::string& name = input_names(quantized)[index];
  return quantized && name.size() > 7 && name.compare(name.size() - 7, 7, "_weight") == 0;
}

void check_attributes(const CgaAttributes& a) {
  const std::map<std::string, std::int64_t> sizes = {{"num_heads", a.num_heads},
                                                     {"key_dim", a.key_dim},
                                                     {"window[0]", a.window_height},
                                                     {"window[1]", a.window_width}};
  for (const auto& [name, value] : sizes) {
    if (value < 1 || value > 1 << 16) refuse(name + " is " + std::to_string(value) + ", expected 1 to 65536.");
  }
}

void check_shapes(bool quantized, const CgaAttributes& a, const std::vector<Dims>& shapes) {
  const auto& names = input_names(quantized);
  if (shapes.size() != names.size()) {
    refuse(std::to_string(shapes.size()) + " inputs, expected " + std::to_string(names.size()) + ".");
  }
  std::map<std::string, Dims> given;
  for (std::size_t i = 0; i < names.size(); ++i) given[names[i]] = shapes[i];
  const Dims& x = given["x"];
  const std::int64_t channels = x.size() == 4 && x[1] >= 0   ? x[1]
                                : given["proj_bias"].empty() ? -1
                                                             : given["proj_bias"][0];
  if ((!x.empty() && x.size() != 4) || (channels >= 0 && channels % a.num_heads != 0)) {
    refuse("x is " + text(x) + "; expected (B, C, H, W) with C divisible by " + std::to_string(a.num_heads) +
           " heads.");
  }
  const std::int64_t value_dim = channels < 0 ? -1 : channels / a.num_heads, keys = a.num_heads * a.key_dim;
  const std::int64_t width = channels < 0 ? -1 : 2 * keys + channels, tokens = a.window_height * a.window_width;
  const std::int64_t side = given["dw_weight"].empty() ? -1 : given["dw_weight"].back();
  const std::map<std::string, Dims> expected = {{"x", {-1, channels, -1, -1}},
                                                {"qkv_weight", {width, value_dim, 1, 1}},
                                                {"qkv_scale", {width}},
                                                {"qkv_bias", {width}},
                                                {"dw_weight", {keys, 1, side, side}},
                                                {"dw_scale", {keys}},
                                                {"dw_bias", {keys}},
                                                {"attention_bias", {a.num_heads, tokens, tokens}},
                                                {"proj_weight", {channels, channels, 1, 1}},
                                                {"proj_scale", {channels}},
                                                {"proj_bias", {channels}}};
  for (const auto& name : names) {
    if (fits(given[name], expected.at(name))) continue;
    refuse(name + " is " + text(given[name]) + ", expected " + text(expected.at(name)) + " for x " + text(x) + ", " +
           std::to_string(a.num_heads) + " heads, key width " + std::to_string(a.key_dim) + ", window (" +
           std::to_string(a.window_height) + ", " + std::to_string(a.window_width) + ").");
  }
  if (side >= 0 && side % 2 == 0) {
    refuse("depthwise kernel side " + std::to_string(side) + " is even; pad it with zeros to an odd side.");
  }
}

}  // namespace edgeattn
