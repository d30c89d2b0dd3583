#include "cga_plan.h"

#define EDGEATTN_LANES 4

namespace edgeattn {
namespace neon {
namespace {
// Of thirty-two registers, rows * vectors hold sums, `vectors` hold values and one a weight.
constexpr int kTileRows[] = {0, 12, 10, 8, 6};
}  // namespace

#include "cga_simd.inl"

}  // namespace neon

const CgaKernels cga_neon{neon::load, neon::project_qkv, neon::attend, neon::project_out};

}  // namespace edgeattn
