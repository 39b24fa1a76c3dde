// A block's kernels in a row: addresses and sizes, no arithmetic of its own.
#include "block.h"

#include "attention_plan.h"
#include "gemm_plan.h"
#include "row_groups.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace gptk {
namespace {

using Forward = gptk_block_forward_args;
using Backward = gptk_block_backward_args;

constexpr int32_t ACC = GPTK_FLOAT32;  // float64 blocks are not made here

int64_t bytes_of(int32_t dtype) {
  return dtype == GPTK_FLOAT64 ? 8 : dtype == GPTK_FLOAT32 ? 4 : 2;
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Cuts memory into pieces, each on cache lines of its own; without memory it only measures.
class Pieces {
public:
  explicit Pieces(const void* memory) : begin_(reinterpret_cast<uintptr_t>(memory)) {}
  void* take(int64_t elements, int32_t dtype) {
    const uintptr_t piece = begin_ + used_;
    used_ += (elements * bytes_of(dtype) + 63) / 64 * 64;
    return reinterpret_cast<void*>(piece);
  }
  int64_t used() const { return used_; }

private:
  uintptr_t begin_;
  int64_t used_ = 0;
};

struct Shape {
  int64_t B, T, C, H, hidden;
  int64_t rows() const { return B * T; }
};

template <typename Args> Shape shape_of(const Args& a) { return {a.B, a.T, a.C, a.H, a.hidden}; }

struct Saved {
  void *h1, *y1, *mean1, *rstd1, *qkv, *a, *lse, *y2, *mean2, *rstd2, *pre;
  Saved(Pieces& p, const Shape& s, bool with_branch, int32_t compute, int32_t h1_dtype)
      : h1(with_branch ? p.take(s.rows() * s.C, h1_dtype) : nullptr),
        y1(p.take(s.rows() * s.C, compute)), mean1(p.take(s.rows(), ACC)),
        rstd1(p.take(s.rows(), ACC)), qkv(p.take(3 * s.rows() * s.C, compute)),
        a(p.take(s.rows() * s.C, compute)), lse(p.take(s.rows() * s.H, ACC)),
        y2(p.take(s.rows() * s.C, compute)), mean2(p.take(s.rows(), ACC)),
        rstd2(p.take(s.rows(), ACC)), pre(p.take(s.rows() * s.hidden, compute)) {}
};

struct ForwardScratch {
  void *projected, *activated, *kernel;
  ForwardScratch(Pieces& p, const Shape& s, int32_t compute, int64_t threads)
      : projected(p.take(s.rows() * s.C, compute)), activated(p.take(s.rows() * s.hidden, compute)),
        kernel(p.take(elements(s, threads), ACC)) {}
  static int64_t elements(const Shape& s, int64_t threads) {
    using gemm_plan::gemm_scratch;
    const int64_t M = s.rows(), D = s.C / s.H;
    int64_t most = threads * attention_plan::attention_forward_scratch(s.T, D, D);
    most = larger(most, gemm_scratch(M, 3 * s.C, s.C, threads));
    most = larger(most, gemm_scratch(M, s.C, s.C, threads));
    most = larger(most, gemm_scratch(M, s.hidden, s.C, threads));
    return larger(most, gemm_scratch(M, s.C, s.hidden, threads));
  }
};

// Two generations share one piece: the MLP's gradients, then the attention's.
struct BackwardScratch {
  void *dprojected, *dh1, *dy2, *dpre, *activated, *da, *dqkv, *dy1, *kernel;
  BackwardScratch(Pieces& p, const Shape& s, int32_t compute, int32_t h1_dtype, int64_t threads)
      : dprojected(p.take(s.rows() * s.C, compute)), dh1(p.take(s.rows() * s.C, h1_dtype)) {
    Pieces mlp = p, attention = p;
    dy2 = mlp.take(s.rows() * s.C, compute);
    dpre = mlp.take(s.rows() * s.hidden, compute);
    activated = mlp.take(s.rows() * s.hidden, compute);
    da = attention.take(s.rows() * s.C, compute);
    dqkv = attention.take(3 * s.rows() * s.C, compute);
    dy1 = attention.take(s.rows() * s.C, compute);
    p = mlp.used() > attention.used() ? mlp : attention;
    kernel = p.take(elements(s, threads), ACC);
  }
  static int64_t elements(const Shape& s, int64_t threads) {
    using gemm_plan::gemm_scratch;
    const int64_t M = s.rows(), D = s.C / s.H, widest = larger(larger(s.hidden, 3 * s.C), 2 * s.C);
    int64_t most = row_groups(M) * widest;  // sums over rows
    most = larger(
        most, attention_plan::attention_backward_scratch(s.B, s.H, s.H, s.T, s.T, D, D, threads));
    for (const int64_t N : {s.C, 3 * s.C, s.hidden}) {  // the other side of each matrix is C
      most = larger(most, gemm_scratch(M, s.C, N, threads));
      most = larger(most, gemm_scratch(M, N, s.C, threads));
      most = larger(most, gemm_scratch(N, s.C, M, threads));
      most = larger(most, gemm_scratch(s.C, N, M, threads));
    }
    return most;
  }
};

// --- products ------------------------------------------------------------------------------
// The three of a linear layer y = x weight^T, weight (N, K).

template <typename Args> gptk_gemm_args product(const Args& a, void* scratch) {
  gptk_gemm_args g = {};
  g.scratch = scratch;
  g.compute = g.c_dtype = g.a_dtype = g.b_dtype = a.compute;
  g.threads = a.threads;
  return g;
}

gptk_gemm_args forward_product(const Forward& a, void* scratch, void* y, const void* x, int64_t K,
                               const void* weight, const void* bias, int64_t N) {
  gptk_gemm_args g = product(a, scratch);
  g.c = y, g.a = x, g.b = weight, g.bias = bias;
  g.M = a.B * a.T, g.N = N, g.K = K;
  g.a_m = K, g.a_k = 1, g.b_k = 1, g.b_n = K;
  g.b_dtype = a.matrix_dtype, g.bias_dtype = a.bias_dtype;
  return g;
}

gptk_gemm_args input_gradient(const Backward& a, void* scratch, void* dx, const void* dy, int64_t N,
                              const void* weight, int64_t K) {
  gptk_gemm_args g = product(a, scratch);
  g.c = dx, g.a = dy, g.b = weight;
  g.M = a.B * a.T, g.N = K, g.K = N;
  g.a_m = N, g.a_k = 1, g.b_k = K, g.b_n = 1;
  g.b_dtype = a.matrix_dtype;
  return g;
}

void parameter_gradients(const Backward& a, void* scratch, void* dweight, void* dbias,
                         const void* dy, int64_t N, const void* x, int64_t K) {
  const int64_t M = a.B * a.T;
  if (dweight) {
    gptk_gemm_args g = product(a, scratch);
    g.c = dweight, g.a = dy, g.b = x;
    g.M = N, g.N = K, g.K = M;
    g.a_m = 1, g.a_k = N, g.b_k = K, g.b_n = 1;
    g.c_dtype = a.matrix_dtype;
    gptk_gemm(&g);
  }
  if (dbias) {
    gptk_activation_backward_args s = {};
    s.dbias = dbias, s.partial = scratch, s.dy = dy;
    s.M = M, s.N = N, s.groups = row_groups(M);
    s.activation = GPTK_IDENTITY, s.dbias_dtype = a.bias_dtype, s.dy_dtype = a.compute;
    s.threads = a.threads;
    gptk_activation_backward(&s);
  }
}

// --- norms ---------------------------------------------------------------------------------

// y = norm(h), h = residual + dropout(x); without residual h is x.
void norm(const Forward& a, void* y, void* h, int32_t h_dtype, void* mean, void* rstd,
          const void* x, int32_t x_dtype, const void* residual, int32_t residual_dtype,
          const void* weight, const void* bias, double eps, uint64_t seed) {
  gptk_layer_norm_forward_args n = {};
  n.y = y, n.h = h, n.mean = mean, n.rstd = rstd;
  n.x = x, n.residual = residual, n.weight = weight, n.bias = bias;
  n.M = a.B * a.T, n.N = a.C, n.eps = eps;
  n.dropout_p = residual ? a.dropout_p : 0, n.seed = seed;
  n.y_dtype = a.compute, n.x_dtype = x_dtype, n.residual_dtype = residual_dtype;
  n.h_dtype = h_dtype, n.weight_dtype = n.bias_dtype = a.norm_dtype;
  n.threads = a.threads;
  gptk_layer_norm_forward(&n);
}

// The gradients of one norm; dx, dresidual as in gptk.h.
struct NormGradients {
  void *dx, *dresidual, *dweight, *dbias;
  int32_t x_dtype, residual_dtype;
};

void norm_backward(const Backward& a, const NormGradients& to, void* scratch, const void* dy,
                   const void* dh, const void* h, int32_t h_dtype, const void* weight,
                   const void* mean, const void* rstd, double dropout_p, uint64_t seed) {
  gptk_layer_norm_backward_args n = {};
  n.dx = to.dx, n.dresidual = to.dresidual, n.dweight = to.dweight, n.dbias = to.dbias;
  n.partial = scratch, n.dy = dy, n.dh = dh, n.h = h, n.weight = weight;
  n.mean = mean, n.rstd = rstd;
  n.M = a.B * a.T, n.N = a.C, n.groups = row_groups(n.M);
  n.dropout_p = dropout_p, n.seed = seed;
  n.x_dtype = to.x_dtype, n.residual_dtype = to.residual_dtype, n.dy_dtype = a.compute;
  n.h_dtype = h_dtype, n.weight_dtype = a.norm_dtype;
  n.threads = a.threads;
  gptk_layer_norm_backward(&n);
}

// --- attention -----------------------------------------------------------------------------
// q, k and v are three parts of each row of qkv; a has the layout (B, T, H, D).

const char* part(const void* qkv, int64_t index, int64_t C, int32_t dtype) {
  return static_cast<const char*>(qkv) + index * C * bytes_of(dtype);
}

// Keys or values of the new tokens behind those of the cache.
void append(const Forward& a, void* cache, const void* from) {
  const int64_t D = a.C / a.H, bytes = D * bytes_of(a.compute), row = 3 * a.C * bytes_of(a.compute);
  for (int64_t b = 0; b < a.B; b++)
    for (int64_t h = 0; h < a.H; h++)
      for (int64_t t = 0; t < a.T; t++)
        std::memcpy(static_cast<char*>(cache) + ((b * a.H + h) * a.capacity + a.past + t) * bytes,
                    static_cast<const char*>(from) + (b * a.T + t) * row + h * bytes, bytes);
}

void attention(const Forward& a, const Saved& s, void* scratch) {
  const int64_t D = a.C / a.H, row = 3 * a.C;
  gptk_attention_forward_args f = {};
  f.out = s.a, f.lse = s.lse, f.scratch = scratch;
  f.q = part(s.qkv, 0, a.C, a.compute), f.k = part(s.qkv, 1, a.C, a.compute);
  f.v = part(s.qkv, 2, a.C, a.compute);
  f.B = a.B, f.H = f.Hkv = a.H, f.Tq = f.Tk = a.T, f.D = f.Dv = D;
  f.q_b = f.k_b = f.v_b = a.T * row;
  f.q_h = f.k_h = f.v_h = D;
  f.q_t = f.k_t = f.v_t = row;
  if (a.cache_k) {
    append(a, a.cache_k, f.k);
    append(a, a.cache_v, f.v);
    f.k = a.cache_k, f.v = a.cache_v, f.Tk = a.past + a.T;
    f.k_b = f.v_b = a.H * a.capacity * D;
    f.k_h = f.v_h = a.capacity * D;
    f.k_t = f.v_t = D;
  }
  f.scale = 1.0 / std::sqrt(static_cast<double>(D));
  f.dropout_p = a.dropout_p, f.seed = a.seed_attention;
  f.causal = 1, f.dtype = a.compute;
  f.threads = a.threads;
  gptk_attention_forward(&f);
}

void attention_backward(const Backward& a, const Saved& s, const BackwardScratch& t) {
  const int64_t D = a.C / a.H, row = 3 * a.C;
  gptk_attention_backward_args g = {};
  g.dq = const_cast<char*>(part(t.dqkv, 0, a.C, a.compute));
  g.dk = const_cast<char*>(part(t.dqkv, 1, a.C, a.compute));
  g.dv = const_cast<char*>(part(t.dqkv, 2, a.C, a.compute));
  g.scratch = t.kernel, g.dout = t.da, g.out = s.a, g.lse = s.lse;
  g.q = part(s.qkv, 0, a.C, a.compute), g.k = part(s.qkv, 1, a.C, a.compute);
  g.v = part(s.qkv, 2, a.C, a.compute);
  g.B = a.B, g.H = g.Hkv = a.H, g.Tq = g.Tk = a.T, g.D = g.Dv = D;
  g.dq_b = g.dk_b = g.dv_b = g.q_b = g.k_b = g.v_b = a.T * row;
  g.dq_h = g.dk_h = g.dv_h = g.q_h = g.k_h = g.v_h = D;
  g.dq_t = g.dk_t = g.dv_t = g.q_t = g.k_t = g.v_t = row;
  g.dout_b = g.out_b = a.T * a.C, g.dout_h = g.out_h = D, g.dout_t = g.out_t = a.C;
  g.scale = 1.0 / std::sqrt(static_cast<double>(D));
  g.dropout_p = a.dropout_p, g.seed = a.seed_attention;
  g.causal = 1, g.dtype = a.compute;
  g.threads = a.threads;
  gptk_attention_backward(&g);
}

// --- the block -----------------------------------------------------------------------------

void forward(const Forward& a) {
  const Shape shape = shape_of(a);
  Pieces saved_pieces(a.saved), scratch_pieces(a.scratch);
  const Saved s(saved_pieces, shape, a.branch != nullptr, a.compute, a.h1_dtype);
  const ForwardScratch t(scratch_pieces, shape, a.compute, a.threads);
  const void* h1 = a.branch ? s.h1 : a.x;
  if (a.branch)
    norm(a, s.y1, s.h1, a.h1_dtype, s.mean1, s.rstd1, a.branch, a.branch_dtype, a.x, a.x_dtype,
         a.w1, a.b1, a.eps1, a.seed_branch);
  else
    norm(a, s.y1, nullptr, a.x_dtype, s.mean1, s.rstd1, a.x, a.x_dtype, nullptr, 0, a.w1, a.b1,
         a.eps1, 0);
  const gptk_gemm_args to_qkv =
      forward_product(a, t.kernel, s.qkv, s.y1, a.C, a.w_qkv, a.b_qkv, 3 * a.C);
  gptk_gemm(&to_qkv);
  attention(a, s, t.kernel);
  const gptk_gemm_args project =
      forward_product(a, t.kernel, t.projected, s.a, a.C, a.w_o, a.b_o, a.C);
  gptk_gemm(&project);
  norm(a, s.y2, a.h2, a.h2_dtype, s.mean2, s.rstd2, t.projected, a.compute, h1, a.h1_dtype, a.w2,
       a.b2, a.eps2, a.seed_projection);
  gptk_gemm_args up =
      forward_product(a, t.kernel, t.activated, s.y2, a.C, a.w_fc, a.b_fc, a.hidden);
  up.pre = s.pre, up.activation = a.activation;
  gptk_gemm(&up);
  const gptk_gemm_args down =
      forward_product(a, t.kernel, a.out, t.activated, a.hidden, a.w_p, a.b_p, a.C);
  gptk_gemm(&down);
}

void backward(const Backward& a) {
  const Shape shape = shape_of(a);
  Pieces saved_pieces(a.saved), scratch_pieces(a.scratch);
  const bool with_branch = a.with_branch != 0;
  const Saved s(saved_pieces, shape, with_branch, a.compute, a.h1_dtype);
  const BackwardScratch t(scratch_pieces, shape, a.compute, a.h1_dtype, a.threads);
  const void* h1 = with_branch ? s.h1 : a.x;

  gptk_gemm_args down = input_gradient(a, t.kernel, t.dpre, a.dout, a.C, a.w_p, a.hidden);
  down.slope_of = s.pre, down.activation = a.activation;
  down.value = a.dw_p ? t.activated : nullptr;
  gptk_gemm(&down);
  parameter_gradients(a, t.kernel, a.dw_p, a.db_p, a.dout, a.C, t.activated, a.hidden);
  const gptk_gemm_args up = input_gradient(a, t.kernel, t.dy2, t.dpre, a.hidden, a.w_fc, a.C);
  gptk_gemm(&up);
  parameter_gradients(a, t.kernel, a.dw_fc, a.db_fc, t.dpre, a.hidden, s.y2, a.C);

  void* dh1 = with_branch ? t.dh1 : a.dh1;
  const bool same = a.dropout_p == 0 && a.compute == a.h1_dtype;
  norm_backward(a, {same ? nullptr : t.dprojected, dh1, a.dw2, a.db2, a.compute, a.h1_dtype},
                t.kernel, t.dy2, a.dh2, a.h2, a.h2_dtype, a.w2, s.mean2, s.rstd2, a.dropout_p,
                a.seed_projection);
  const void* dprojected = same ? dh1 : t.dprojected;
  const gptk_gemm_args project = input_gradient(a, t.kernel, t.da, dprojected, a.C, a.w_o, a.C);
  gptk_gemm(&project);
  parameter_gradients(a, t.kernel, a.dw_o, a.db_o, dprojected, a.C, s.a, a.C);
  attention_backward(a, s, t);
  const gptk_gemm_args to_qkv = input_gradient(a, t.kernel, t.dy1, t.dqkv, 3 * a.C, a.w_qkv, a.C);
  gptk_gemm(&to_qkv);
  parameter_gradients(a, t.kernel, a.dw_qkv, a.db_qkv, t.dqkv, 3 * a.C, s.y1, a.C);

  if (with_branch)
    norm_backward(a, {a.dbranch, a.dx, a.dw1, a.db1, a.branch_dtype, a.x_dtype}, t.kernel, t.dy1,
                  dh1, h1, a.h1_dtype, a.w1, s.mean1, s.rstd1, a.dropout_p, a.seed_branch);
  else
    norm_backward(a, {a.dx, nullptr, a.dw1, a.db1, a.x_dtype, 0}, t.kernel, t.dy1, nullptr, h1,
                  a.h1_dtype, a.w1, s.mean1, s.rstd1, 0, 0);
}

}  // namespace
}  // namespace gptk

extern "C" {

void gptk_block_forward(const gptk_block_forward_args* args) { gptk::forward(*args); }
void gptk_block_backward(const gptk_block_backward_args* args) { gptk::backward(*args); }

int64_t gptk_block_saved(int64_t B, int64_t T, int64_t C, int64_t H, int64_t hidden,
                         int32_t with_branch, int32_t compute, int32_t h1_dtype) {
  gptk::Pieces pieces(nullptr);
  gptk::Saved(pieces, {B, T, C, H, hidden}, with_branch != 0, compute, h1_dtype);
  return pieces.used();
}

int64_t gptk_block_forward_scratch(int64_t B, int64_t T, int64_t C, int64_t H, int64_t hidden,
                                   int32_t compute, int32_t threads) {
  gptk::Pieces pieces(nullptr);
  gptk::ForwardScratch(pieces, {B, T, C, H, hidden}, compute, threads);
  return pieces.used();
}

int64_t gptk_block_backward_scratch(int64_t B, int64_t T, int64_t C, int64_t H, int64_t hidden,
                                    int32_t compute, int32_t h1_dtype, int32_t threads) {
  gptk::Pieces pieces(nullptr);
  gptk::BackwardScratch(pieces, {B, T, C, H, hidden}, compute, h1_dtype, threads);
  return pieces.used();
}

}  // extern "C"
