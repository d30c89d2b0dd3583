// Cuts a call into tasks: whole windows where there are enough of them, else parts of the phases of each window.
#include <algorithm>

#include "cga.h"

namespace edgeattn {
namespace {

// A part with less work (multiply-adds, all phases) loses more to the hand-over between threads than it gains.
constexpr double kWorthAPart = 5e5;

const CgaKernels& kernels_of(Isa isa) {
  switch (isa) {
#ifdef EDGEATTN_WITH_X86
    case Isa::kAvx2:
      return cga_avx2;
    case Isa::kAvx512:
      return cga_avx512;
#endif
#ifdef EDGEATTN_WITH_NEON
    case Isa::kNeon:
      return cga_neon;
#endif
    default:
      return cga_scalar;
  }
}

double multiply_adds(const CgaPlan& p) {
  const double d = p.key_dim, v = p.value_dim, n = p.tokens, taps = double(p.kernel) * p.kernel;
  return n * (p.num_heads * ((2 * d + v) * v + d * taps + (d + v) * n) + double(p.channels) * p.channels);
}

struct Job {
  const CgaPlan& plan;
  const CgaKernels& kernels;
  const float* x;
  float* y;
  CgaGrid grid;
  int cols, windows_per_image;
  std::size_t windows, tasks;
  float* scratch;
  int parts;
  int phase;

  CgaWindow window(std::size_t index, std::size_t scratch_set) const {
    const std::size_t image = index / windows_per_image;
    const int place = int(index % windows_per_image);
    const std::size_t offset = image * plan.channels * grid.height * grid.width;
    return {x + offset,
            y + offset,
            grid.height,
            grid.width,
            place / cols * plan.window_height,
            place % cols * plan.window_width,
            scratch + scratch_set * plan.scratch_size};
  }

  int phases() const { return 2 * plan.num_heads + 2; }

  void run_phase(int at, const CgaWindow& window, CgaPart part) const {
    if (at == 0) return kernels.load(plan, window, part);
    if (at == phases() - 1) return kernels.project_out(plan, window, part);
    const int head = (at - 1) / 2;
    (at % 2 == 1 ? kernels.project_qkv : kernels.attend)(plan, window, head, part);
  }
};

void run_windows(void* argument, std::size_t task) {
  const Job& job = *static_cast<const Job*>(argument);
  for (std::size_t w = task * job.windows / job.tasks; w < (task + 1) * job.windows / job.tasks; ++w) {
    const CgaWindow window = job.window(w, task);
    for (int phase = 0; phase < job.phases(); ++phase) job.run_phase(phase, window, {0, 1});
  }
}

void run_part(void* argument, std::size_t task) {
  const Job& job = *static_cast<const Job*>(argument);
  const std::size_t window = task / job.parts;
  job.run_phase(job.phase, job.window(window, window), {int(task % job.parts), job.parts});
}

// 1: whole windows keep `width` threads busy, or a part would be too small.
int parts_per_window(const CgaPlan& plan, std::size_t windows, int width) {
  const std::size_t rounds = (windows + width - 1) / width;
  if (windows * 5 >= rounds * width * 4) return 1;
  const int wanted = std::clamp(int((width + windows - 1) / windows), 2, kMaxParts);
  return std::max(1, std::min(wanted, int(multiply_adds(plan) / kWorthAPart)));
}

}  // namespace

void cga_forward(Isa isa, const CgaWeights& weights, const float* x, float* y, const CgaGrid& grid, Scratch& scratch,
                 const ParallelFor& parallel_for) {
  const CgaPlan& plan = weights.plan();
  const int rows = (grid.height + plan.window_height - 1) / plan.window_height;
  const int cols = (grid.width + plan.window_width - 1) / plan.window_width;
  Job job{plan, kernels_of(isa), x, y, grid, cols, rows * cols, std::size_t(grid.batch) * rows * cols,
          0,    nullptr,         1, 0};
  if (job.windows == 0) return;
  const int width = std::max(1, parallel_for.width);
  job.parts = parts_per_window(plan, job.windows, width);
  // Scratch belongs to a task, not to a thread: which thread runs a task is the caller's business.
  job.tasks = job.parts > 1 ? job.windows : std::min(job.windows, std::size_t(4) * width);
  job.scratch = scratch.reserve(weights.shape(), job.tasks * plan.scratch_size);
  if (job.parts == 1) return parallel_for.run(parallel_for.context, job.tasks, run_windows, &job);
  for (job.phase = 0; job.phase < job.phases(); ++job.phase) {
    parallel_for.run(parallel_for.context, job.windows * job.parts, run_part, &job);
  }
}

}  // namespace edgeattn
