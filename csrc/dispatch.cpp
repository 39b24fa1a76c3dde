// Chooses the table of the best instruction set once, when the library is loaded; a call is then
// one indirect jump. Built with no ISA flags, so that nothing here can fault on an older CPU.
#include "dispatch.h"

#include "cpu_features.h"

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

}  // namespace
}  // namespace gptk

extern "C" {

#define GPTK_DEFINE(op) \
  void gptk_##op(const gptk_##op##_args* args) { gptk::kernels->op(*args); }
GPTK_OPS(GPTK_DEFINE)
#undef GPTK_DEFINE

int gptk_isa_count(void) { return gptk::table.count; }

const char* gptk_isa_name(int level) { return gptk::table.levels[level].isa; }

const char* gptk_isa_selected(void) { return gptk::kernels->isa; }

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
