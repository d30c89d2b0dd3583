#include "cga_plan.h"

#define EDGEATTN_LANES 16

namespace edgeattn {
namespace avx512 {
namespace {
// Of thirty-two registers, rows * vectors hold sums, `vectors` hold values and one a weight.
constexpr int kTileRows[] = {0, 12, 10, 8, 6};
}  // namespace

#include "cga_simd.inl"

}  // namespace avx512

const CgaKernels cga_avx512{avx512::load, avx512::project_qkv, avx512::attend, avx512::project_out};

}  // namespace edgeattn
