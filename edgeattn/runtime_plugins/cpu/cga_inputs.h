// The node's side of the op: attributes, names and shapes of the inputs. Same rule as `infer_shape` in
// edgeattn/ops/cascaded_group_attention.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace edgeattn {

using Dims = std::vector<std::int64_t>;  // empty: unknown rank; negative: unknown size

struct CgaAttributes {
  std::int64_t num_heads, key_dim, window_height, window_width;
  float scale;
};

// ONNX inputs of CascadedGroupAttention, or of QCascadedGroupAttention, where a scale follows each int8 weight.
const std::vector<std::string>& input_names(bool quantized);
bool is_int8_input(bool quantized, std::size_t index);

// Throws std::invalid_argument that names the attribute, what was found and what was expected.
void check_attributes(const CgaAttributes& attributes);

// Shapes in the order of input_names; what is unknown is not checked. Throws std::invalid_argument.
void check_shapes(bool quantized, const CgaAttributes& attributes, const std::vector<Dims>& shapes);

}  // namespace edgeattn
