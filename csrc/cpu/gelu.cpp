// Bias + activation forward, and its backward with the bias gradient: the epilogues of linear and
// mlp; gelu itself is the case without bias.
//
//   pre = x + bias      y = activation(pre)            x, pre, y, dy (M, N), bias (N,)
//   dpre = dy * activation'(pre)      dbias = sum over rows of dpre
//
// Threads: pieces of rows; with dbias, `groups` of rows (a function of M) into `partial`, then over
// groups in order.
#include "activation.h"
#include "blocks.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

using Forward = gptk_activation_forward_args;
using Backward = gptk_activation_backward_args;

template <typename A, typename Activation>
void forward_piece(const Forward& a, int64_t row, int64_t begin, int64_t n) {
  A x_scratch[BLOCK], bias_scratch[BLOCK], pre_scratch[BLOCK], y_scratch[BLOCK];
  const int64_t offset = row * a.N + begin;
  const A* x = read_block(a.x, a.x_dtype, offset, n, x_scratch);
  const A* bias = a.bias ? read_block(a.bias, a.bias_dtype, begin, n, bias_scratch) : nullptr;
  A* pre = a.pre ? target_block(a.pre, a.y_dtype, offset, pre_scratch) : nullptr;
  A* y = target_block(a.y, a.y_dtype, offset, y_scratch);
  for_lanes<A>(
      n, GPTK_LANES {
        Vec<A> z = load(x + i, lanes);
        if (bias) z += load(bias + i, lanes);
        if (pre) store(pre + i, z, lanes);
        store(y + i, Activation::template at<A>(z).value, lanes);
      });
  if (pre) write_block(a.pre, a.y_dtype, offset, n, pre);
  write_block(a.y, a.y_dtype, offset, n, y);
}

template <typename A, typename Activation> void forward_with(const Forward& a) {
  const int64_t per_row = (a.N + BLOCK - 1) / BLOCK;
  parallel_rows(a.M * per_row, threads_for(a.M * a.N, a.threads), [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; piece++) {
      const int64_t row = piece / per_row, begin = piece % per_row * BLOCK;
      forward_piece<A, Activation>(a, row, begin, min(a.N - begin, BLOCK));
    }
  });
}

// dbias: this group's sums (N,), or null.
template <typename A, typename Activation>
void backward_piece(const Backward& a, int64_t row, int64_t begin, int64_t n, A* dbias) {
  A dy_scratch[BLOCK], pre_scratch[BLOCK], dpre_scratch[BLOCK], y_scratch[BLOCK];
  const int64_t offset = row * a.N + begin;
  const A* dy = read_block(a.dy, a.dy_dtype, offset, n, dy_scratch);
  const A* pre = a.pre ? read_block(a.pre, a.pre_dtype, offset, n, pre_scratch)
                       : dy;  // identity: not looked at
  A* dpre = a.dpre ? target_block(a.dpre, a.dpre_dtype, offset, dpre_scratch) : nullptr;
  A* y = a.y ? target_block(a.y, a.dpre_dtype, offset, y_scratch) : nullptr;
  A* db = dbias ? dbias + begin : nullptr;
  for_lanes<A>(
      n, GPTK_LANES {
        const ValueSlope<A> f = Activation::template at<A>(load(pre + i, lanes));
        const Vec<A> d = load(dy + i, lanes) * f.slope;
        if (y) store(y + i, f.value, lanes);
        if (dpre) store(dpre + i, d, lanes);
        if (db) store(db + i, load(db + i, lanes) + d, lanes);
      });
  if (dpre) write_block(a.dpre, a.dpre_dtype, offset, n, dpre);
  if (y) write_block(a.y, a.dpre_dtype, offset, n, y);
}

template <typename A, typename Activation> void backward_with(const Backward& a) {
  const int threads = threads_for(a.M * a.N, a.threads);
  if (!a.dbias) {
    const int64_t per_row = (a.N + BLOCK - 1) / BLOCK;
    parallel_rows(a.M * per_row, threads, [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; piece++) {
        const int64_t row = piece / per_row, begin = piece % per_row * BLOCK;
        backward_piece<A, Activation>(a, row, begin, min(a.N - begin, BLOCK), nullptr);
      }
    });
    return;
  }
  A* partial = static_cast<A*>(a.partial);  // (groups, N)
  parallel_for(a.groups, threads, [&](int64_t group) {
    A* dbias = partial + group * a.N;
    for (int64_t j = 0; j < a.N; j++) dbias[j] = 0;
    const int64_t end = group_begin(a.M, a.groups, group + 1);
    for (int64_t row = group_begin(a.M, a.groups, group); row < end; row++)
      for (int64_t begin = 0; begin < a.N; begin += BLOCK)
        backward_piece<A, Activation>(a, row, begin, min(a.N - begin, BLOCK), dbias);
  });
  sum_groups<A>(a.dbias, a.dbias_dtype, partial, a.groups, a.N, a.threads);
}

template <typename A> void forward(const Forward& a) {
  if (a.activation == GPTK_GELU)
    forward_with<A, GeluErf>(a);
  else if (a.activation == GPTK_GELU_TANH)
    forward_with<A, GeluTanh>(a);
  else
    forward_with<A, Identity>(a);
}

template <typename A> void backward(const Backward& a) {
  if (a.activation == GPTK_GELU)
    backward_with<A, GeluErf>(a);
  else if (a.activation == GPTK_GELU_TANH)
    backward_with<A, GeluTanh>(a);
  else
    backward_with<A, Identity>(a);
}

}  // namespace

void activation_forward(const gptk_activation_forward_args& a) {
  GPTK_WITH_ACC(a.x_dtype, forward, a);
}
void activation_backward(const gptk_activation_backward_args& a) {
  GPTK_WITH_ACC(a.dy_dtype, backward, a);
}

}  // namespace GPTK_ISA
}  // namespace gptk
