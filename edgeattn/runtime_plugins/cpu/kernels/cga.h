// CascadedGroupAttention on the CPU: float32, NCHW in and out. Knows no runtime and no library but the C++ one.
//
// Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention", CVPR 2023
// (arXiv 2305.07027), section 2.2, equations 3-5, in inference form. Shapes are those of the op's definition in
// edgeattn/ops/cascaded_group_attention.py.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "cga_plan.h"
#include "isa.h"

namespace edgeattn {

// What is fixed once the weights are known. `kernel` is the side of the depthwise kernel (odd).
struct CgaShape {
  int channels, num_heads, key_dim, kernel, window_height, window_width;
  float scale;

  bool operator==(const CgaShape& other) const;
};

struct CgaGrid {
  int batch, height, width;
};

// The op's weight inputs in their ONNX layouts.
struct CgaTensors {
  const float *qkv_weight, *qkv_bias, *dw_weight, *dw_bias, *attention_bias, *proj_weight, *proj_bias;
};

// Runs task(argument, i) for i in [0, count), in any order, on any threads; returns when all are done.
// `width` is the number of threads worth splitting work for.
struct ParallelFor {
  void (*run)(void* context, std::size_t count, void (*task)(void* argument, std::size_t index), void* argument);
  void* context;
  int width;
};

// Weights copied and packed; immutable, so that any number of threads may share them.
class CgaWeights {
 public:
  // Throws std::invalid_argument if a size is not positive, the heads do not divide the channels or `kernel` is even.
  CgaWeights(const CgaShape& shape, const CgaTensors& tensors);

  const CgaShape& shape() const { return shape_; }
  const CgaPlan& plan() const { return plan_; }

 private:
  void pack_query(const CgaTensors& tensors);
  void pack_attention_bias();
  const float* keep(const float* values, std::size_t count);

  CgaShape shape_;
  CgaPlan plan_{};
  std::vector<std::unique_ptr<float[]>> storage_;
};

// Working memory of one call at a time, always with the same Isa. New memory is zero, which kernels rely on for borders
// that they never write.
class Scratch {
 public:
  float* reserve(const CgaShape& shape, std::size_t count);

 private:
  CgaShape shape_{};
  std::unique_ptr<float[]> memory_;
  std::size_t capacity_ = 0;
};

// Scratch sets for concurrent calls; a set is used again before a new one is made.
class ScratchPool {
 public:
  std::unique_ptr<Scratch> take();
  void give_back(std::unique_ptr<Scratch> scratch);

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Scratch>> free_;
};

// y = op(x). `isa` must be one that this machine runs (see isa.h).
void cga_forward(Isa isa, const CgaWeights& weights, const float* x, float* y, const CgaGrid& grid, Scratch& scratch,
                 const ParallelFor& parallel_for);

}  // namespace edgeattn
