// Python to C: positional arguments in the struct's field order, addresses as integers (0 = NULL).
// Knows no maths and checks nothing: gptk/ops/<op>/cpp_impl.py has already chosen shapes and
// dtypes. The GIL is released while a kernel runs.
#include "attention_plan.h"
#include "block.h"
#include "gemm_plan.h"
#include "gptk.h"
#include "row_groups.h"

#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace py = pybind11;

namespace {

// A pointer field travels as an integer, anything else as itself.
template <typename Field>
using Wire = std::conditional_t<std::is_pointer_v<Field>, uintptr_t, Field>;

template <typename Field> Field from_wire(Wire<Field> value) {
  if constexpr (std::is_pointer_v<Field>)
    return reinterpret_cast<Field>(value);
  else
    return value;
}

template <typename Args, typename... Fields>
void bind(py::module_& m, const char* name, void (*kernel)(const Args*), Fields Args::*... fields) {
  m.def(name, [=](Wire<Fields>... values) {
    Args args;
    ((args.*fields = from_wire<Fields>(values)), ...);
    py::gil_scoped_release unlocked;
    kernel(&args);
  });
}

void select_isa(const std::string& name) {
  if (gptk_isa_select(name.c_str()) == 0) return;
  std::string allowed;
  for (int level = 0; level < gptk_isa_count(); ++level)
    allowed += std::string(level ? ", " : "") + gptk_isa_name(level);
  throw py::value_error(
      "GPTK_ISA='" + name +
      "' is not among the instruction sets that this build and this CPU have: " + allowed);
}

py::tuple isa_levels() {
  py::tuple names(gptk_isa_count());
  for (int level = 0; level < gptk_isa_count(); ++level) names[level] = gptk_isa_name(level);
  return names;
}

// Kernel -> (seconds, calls, floating-point operations), for those called while counting was on.
py::dict counted() {
  py::dict found;
#define GPTK_ADD(op)                              \
  if (gptk_counts c = gptk_counted(#op); c.calls) \
    found[#op] = py::make_tuple(c.seconds, c.calls, c.flops);
  GPTK_OPS(GPTK_ADD)
#undef GPTK_ADD
  return found;
}

// A hint: where the system has none on request, nothing changes.
void ask_for_huge_pages([[maybe_unused]] uintptr_t address, [[maybe_unused]] uintptr_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "gptk's native kernels; the argument structs are documented in csrc/gptk.h";
  py::options options;
  options.disable_function_signatures();

  m.def("isa", &gptk_isa_selected);
  m.def("isa_levels", &isa_levels);
  m.def("select_isa", &select_isa);
  m.def("count", [](bool on) { gptk_count(on); });
  m.def("counted", &counted);
  m.def("ask_for_huge_pages", &ask_for_huge_pages);
  m.def("row_groups", &gptk::row_groups);
  m.attr("NORM_BLOCK") = static_cast<int>(GPTK_NORM_BLOCK);
  m.attr("ADAMW_TENSOR_BYTES") = sizeof(gptk_adamw_tensor);

  {
    using A = gptk_layer_norm_forward_args;
    bind(m, "layer_norm_forward", gptk_layer_norm_forward, &A::y, &A::h, &A::mean, &A::rstd, &A::x,
         &A::residual, &A::weight, &A::bias, &A::M, &A::N, &A::eps, &A::dropout_p, &A::seed,
         &A::y_dtype, &A::x_dtype, &A::residual_dtype, &A::h_dtype, &A::weight_dtype,
         &A::bias_dtype, &A::threads);
  }
  {
    using A = gptk_layer_norm_backward_args;
    bind(m, "layer_norm_backward", gptk_layer_norm_backward, &A::dx, &A::dresidual, &A::dweight,
         &A::dbias, &A::partial, &A::dy, &A::dh, &A::h, &A::weight, &A::mean, &A::rstd, &A::M,
         &A::N, &A::groups, &A::dropout_p, &A::seed, &A::x_dtype, &A::residual_dtype, &A::dy_dtype,
         &A::h_dtype, &A::weight_dtype, &A::threads);
  }
  {
    using A = gptk_activation_forward_args;
    bind(m, "activation_forward", gptk_activation_forward, &A::y, &A::pre, &A::x, &A::bias, &A::M,
         &A::N, &A::activation, &A::y_dtype, &A::x_dtype, &A::bias_dtype, &A::threads);
  }
  {
    using A = gptk_activation_backward_args;
    bind(m, "activation_backward", gptk_activation_backward, &A::dpre, &A::y, &A::dbias,
         &A::partial, &A::dy, &A::pre, &A::M, &A::N, &A::groups, &A::activation, &A::dpre_dtype,
         &A::dbias_dtype, &A::dy_dtype, &A::pre_dtype, &A::threads);
  }
  {
    using A = gptk_gemm_args;
    bind(m, "gemm", gptk_gemm, &A::c, &A::pre, &A::value, &A::scratch, &A::a, &A::b, &A::bias,
         &A::slope_of, &A::M, &A::N, &A::K, &A::a_m, &A::a_k, &A::b_k, &A::b_n, &A::add,
         &A::activation, &A::compute, &A::c_dtype, &A::a_dtype, &A::b_dtype, &A::bias_dtype,
         &A::threads);
    m.def("gemm_scratch", &gptk::gemm_plan::gemm_scratch);
  }
  {
    using A = gptk_cross_entropy_forward_args;
    bind(m, "cross_entropy_forward", gptk_cross_entropy_forward, &A::loss, &A::lse, &A::logits,
         &A::target, &A::N, &A::V, &A::logits_stride, &A::ignore_index, &A::label_smoothing,
         &A::softcap, &A::z_loss, &A::logits_dtype, &A::threads);
  }
  {
    using A = gptk_cross_entropy_backward_args;
    bind(m, "cross_entropy_backward", gptk_cross_entropy_backward, &A::dlogits, &A::dloss,
         &A::logits, &A::target, &A::lse, &A::N, &A::V, &A::dlogits_stride, &A::logits_stride,
         &A::ignore_index, &A::label_smoothing, &A::softcap, &A::z_loss, &A::dlogits_dtype,
         &A::logits_dtype, &A::threads);
  }
  {
    using A = gptk_attention_forward_args;
    bind(m, "attention_forward", gptk_attention_forward, &A::out, &A::lse, &A::scratch, &A::q,
         &A::k, &A::v, &A::key_low, &A::key_high, &A::B, &A::H, &A::Hkv, &A::Tq, &A::Tk, &A::D,
         &A::Dv, &A::q_b, &A::q_h, &A::q_t, &A::k_b, &A::k_h, &A::k_t, &A::v_b, &A::v_h, &A::v_t,
         &A::window, &A::scale, &A::dropout_p, &A::seed, &A::causal, &A::dtype, &A::threads);
    m.def("attention_forward_scratch", &gptk::attention_plan::attention_forward_scratch);
  }
  {
    using A = gptk_attention_backward_args;
    bind(m, "attention_backward", gptk_attention_backward, &A::dq, &A::dk, &A::dv, &A::scratch,
         &A::dout, &A::q, &A::k, &A::v, &A::out, &A::lse, &A::key_low, &A::key_high, &A::query_low,
         &A::query_high, &A::B, &A::H, &A::Hkv, &A::Tq, &A::Tk, &A::D, &A::Dv, &A::dq_b, &A::dq_h,
         &A::dq_t, &A::dk_b, &A::dk_h, &A::dk_t, &A::dv_b, &A::dv_h, &A::dv_t, &A::dout_b,
         &A::dout_h, &A::dout_t, &A::q_b, &A::q_h, &A::q_t, &A::k_b, &A::k_h, &A::k_t, &A::v_b,
         &A::v_h, &A::v_t, &A::out_b, &A::out_h, &A::out_t, &A::window, &A::scale, &A::dropout_p,
         &A::seed, &A::causal, &A::dtype, &A::threads);
    m.def("attention_backward_scratch", &gptk::attention_plan::attention_backward_scratch);
  }
  {
    using A = gptk_adamw_update_args;
    bind(m, "adamw_update", gptk_adamw_update, &A::tensors, &A::count, &A::beta1, &A::beta2,
         &A::eps, &A::grad_multiplier, &A::seed, &A::threads);
  }
  {
    using A = gptk_adamw_norm_args;
    bind(m, "adamw_norm", gptk_adamw_norm, &A::norm, &A::partial, &A::tensors, &A::count,
         &A::threads);
  }
  {
    using A = gptk_block_forward_args;
    bind(m, "block_forward", gptk_block_forward, &A::out, &A::h2, &A::saved, &A::cache_k,
         &A::cache_v, &A::scratch, &A::x, &A::branch, &A::w1, &A::b1, &A::w_qkv, &A::b_qkv, &A::w_o,
         &A::b_o, &A::w2, &A::b2, &A::w_fc, &A::b_fc, &A::w_p, &A::b_p, &A::B, &A::T, &A::C, &A::H,
         &A::hidden, &A::past, &A::capacity, &A::eps1, &A::eps2, &A::dropout_p, &A::seed_branch,
         &A::seed_attention, &A::seed_projection, &A::activation, &A::compute, &A::x_dtype,
         &A::branch_dtype, &A::h1_dtype, &A::h2_dtype, &A::matrix_dtype, &A::bias_dtype,
         &A::norm_dtype, &A::threads);
    m.def("block_saved", &gptk_block_saved);
    m.def("block_forward_scratch", &gptk_block_forward_scratch);
  }
  {
    using A = gptk_block_backward_args;
    bind(m, "block_backward", gptk_block_backward, &A::dx, &A::dbranch, &A::dh1, &A::dw1, &A::db1,
         &A::dw_qkv, &A::db_qkv, &A::dw_o, &A::db_o, &A::dw2, &A::db2, &A::dw_fc, &A::db_fc,
         &A::dw_p, &A::db_p, &A::scratch, &A::dout, &A::dh2, &A::h2, &A::saved, &A::x, &A::w1,
         &A::w_qkv, &A::w_o, &A::w2, &A::w_fc, &A::w_p, &A::B, &A::T, &A::C, &A::H, &A::hidden,
         &A::dropout_p, &A::seed_branch, &A::seed_attention, &A::seed_projection, &A::with_branch,
         &A::activation, &A::compute, &A::x_dtype, &A::branch_dtype, &A::h1_dtype, &A::h2_dtype,
         &A::matrix_dtype, &A::bias_dtype, &A::norm_dtype, &A::threads);
    m.def("block_backward_scratch", &gptk_block_backward_scratch);
  }
  {
    using A = gptk_keep_mask_args;
    bind(m, "keep_mask", gptk_keep_mask, &A::keep, &A::rows, &A::cols, &A::dropout_p, &A::seed,
         &A::threads);
  }
}
