// Chooses the table of the best instruction set once, when the library is loaded; a call is then
// one indirect jump. Built with no ISA flags, so that nothing here can fault on an older CPU.
#include "dispatch.h"

#include "cpu_features.h"

#include <chrono>
#include <cstring>

namespace gptk {
namespace {

struct Table {
  Kernels levels[8];
  int count = 0;
};

// The levels that were compiled in and that this CPU can run, lowest first.
Table supported_levels() {
  const CpuFeatures cpu = cpu_features();
  Table table;
#define GPTK_ENTRY(op) level.op = op;
#define GPTK_LEVEL(name, runs)                    \
  if (runs) {                                     \
    using namespace name;                         \
    Kernels& level = table.levels[table.count++]; \
    level.isa = #name;                            \
    GPTK_OPS(GPTK_ENTRY)                          \
  }
  GPTK_ISAS(GPTK_LEVEL)
#undef GPTK_LEVEL
#undef GPTK_ENTRY
  (void)cpu;
  return table;
}

const Table table = supported_levels();
const Kernels* kernels = &table.levels[table.count - 1];

// --- counting ------------------------------------------------------------------------------

// Floating-point operations of the matrix products in a call; the other kernels move bytes.
template <typename Args> double flops(const Args&) { return 0; }
double flops(const gptk_gemm_args& a) { return 2.0 * a.M * a.N * a.K; }
// Scores of one head: half of them where causal, those in the ranges where there are any.
template <typename Args> double scores(const Args& a) {
  if (!a.key_low) return static_cast<double>(a.Tq) * a.Tk / (a.causal ? 2 : 1);
  double seen = 0;
  for (int64_t i = 0; i < a.Tq; i++) seen += a.key_high[i] - a.key_low[i];
  return seen;
}
// q k^T and p v
double flops(const gptk_attention_forward_args& a) {
  return 2.0 * a.B * a.H * scores(a) * (a.D + a.Dv);
}
// q k^T once more, dq, dk, then p and dv
double flops(const gptk_attention_backward_args& a) {
  return 2.0 * a.B * a.H * scores(a) * (3 * a.D + 2 * a.Dv);
}

bool counting = false;
#define GPTK_COUNT(op) gptk_counts op;
struct {
  GPTK_OPS(GPTK_COUNT)
} counts;
#undef GPTK_COUNT

template <typename Args>
void call(void (*kernel)(const Args&), const Args& args, gptk_counts& count) {
  if (!counting) return kernel(args);
  const auto start = std::chrono::steady_clock::now();
  kernel(args);
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
  count.seconds += spent.count();
  count.flops += flops(args);
  count.calls++;
}

}  // namespace
}  // namespace gptk

extern "C" {

#define GPTK_DEFINE(op)                                    \
  void gptk_##op(const gptk_##op##_args* args) {           \
    gptk::call(gptk::kernels->op, *args, gptk::counts.op); \
  }
GPTK_OPS(GPTK_DEFINE)
#undef GPTK_DEFINE

int gptk_isa_count(void) { return gptk::table.count; }

const char* gptk_isa_name(int level) { return gptk::table.levels[level].isa; }

const char* gptk_isa_selected(void) { return gptk::kernels->isa; }

void gptk_count(int on) {
  if (on && !gptk::counting) gptk::counts = {};
  gptk::counting = on != 0;
}

#define GPTK_DEFINE(op) \
  if (std::strcmp(name, #op) == 0) return gptk::counts.op;
gptk_counts gptk_counted(const char* name) {
  GPTK_OPS(GPTK_DEFINE)
  return {};
}
#undef GPTK_DEFINE

int gptk_isa_select(const char* name) {
  for (int level = 0; level < gptk::table.count; ++level) {
    if (std::strcmp(gptk::table.levels[level].isa, name) == 0) {
      gptk::kernels = &gptk::table.levels[level];
      return 0;
    }
  }
  return -1;
}

}  // extern "C"
