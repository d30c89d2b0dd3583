#include "cga_plan.h"

#define EDGEATTN_LANES 8

namespace edgeattn {
namespace avx2 {
namespace {
// Of sixteen registers, rows * vectors hold sums, `vectors` hold values and one a weight.
constexpr int kTileRows[] = {0, 12, 6, 4};
}  // namespace

#include "cga_simd.inl"

}  // namespace avx2

const CgaKernels cga_avx2{avx2::load, avx2::project_qkv, avx2::attend, avx2::project_out};

}  // namespace edgeattn
