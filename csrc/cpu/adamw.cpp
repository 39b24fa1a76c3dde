// AdamW for all parameters of a model in one call, and the norm of all their gradients.
//
//   p *= 1 - lr weight_decay                     the decay is decoupled from the moments
//   m = beta1 m + (1 - beta1) g                  v = beta2 v + (1 - beta2) g^2
//   p -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
//
// p is the float master where there is one; the parameter is then its rounding. Where it is not, it
// was changed since the last update, and its value is taken. A bfloat16 parameter that has none may
// be rounded stochastically instead, by the rule of philox.h.
// Threads: one parallel region over pieces of GPTK_NORM_BLOCK elements of all tensors together. An
// element depends on itself alone; the norm adds pieces, then their sums in order, in double: 1e20
// squared does not overflow.
// Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2.
#include "blocks.h"
#include "dropout.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

using Tensor = gptk_adamw_tensor;

int64_t pieces_of(const Tensor& t) { return (t.numel + GPTK_NORM_BLOCK - 1) / GPTK_NORM_BLOCK; }

// f(tensor, piece) for every piece of every tensor; piece counts through all of them. Threads take
// runs of 8 pieces.
template <typename F>
void for_pieces(const Tensor* tensors, int64_t count, int threads, const F& f) {
  int64_t pieces = 0, elements = 0;
  for (int64_t t = 0; t < count; t++) {
    pieces += pieces_of(tensors[t]);
    elements += tensors[t].numel;
  }
  parallel_chunks(pieces, 8, threads_for(elements, threads),
                  [&](int64_t, int64_t first, int64_t last) {
                    int64_t tensor = 0, start = 0;  // start: number of the tensor's first piece
                    while (start + pieces_of(tensors[tensor]) <= first)
                      start += pieces_of(tensors[tensor++]);
                    for (int64_t piece = first; piece < last; piece++) {
                      while (piece >= start + pieces_of(tensors[tensor]))
                        start += pieces_of(tensors[tensor++]);
                      f(tensors[tensor], piece - start, piece);
                    }
                  });
}

template <typename A> struct Step {
  A decay, beta1, beta2, one_minus_beta1, one_minus_beta2, step_size, inverse_root2, eps,
      multiplier;
  uint32_t t;  // the number of this update, for random numbers
};

double power(double base, double exponent) { return __builtin_pow(base, exponent); }

// The scalars of one tensor's step t = step + 1, formed in double.
template <typename A> Step<A> step_scalars(const gptk_adamw_update_args& a, const Tensor& t) {
  const double step = static_cast<double>(*t.step) + 1;
  Step<A> s;
  s.decay = static_cast<A>(1 - t.lr * t.weight_decay);
  s.beta1 = static_cast<A>(a.beta1);
  s.beta2 = static_cast<A>(a.beta2);
  s.one_minus_beta1 = static_cast<A>(1 - a.beta1);
  s.one_minus_beta2 = static_cast<A>(1 - a.beta2);
  s.step_size = static_cast<A>(t.lr / (1 - power(a.beta1, step)));
  s.inverse_root2 = static_cast<A>(1 / __builtin_sqrt(1 - power(a.beta2, step)));
  s.eps = static_cast<A>(a.eps);
  s.multiplier = static_cast<A>(a.grad_multiplier);
  s.t = static_cast<uint32_t>(static_cast<int64_t>(step));
  return s;
}

// n values of the master, or of the parameter where that is not the master's rounding, in `out`.
template <typename A>
const A* current_values(const Tensor& t, int64_t begin, int64_t n, const A* master, A* out) {
  A stored[BLOCK];  // room for values of the parameter's dtype
  A rounded_scratch[BLOCK], param_scratch[BLOCK];
  write_block(stored, t.param_dtype, 0, n, master);
  const A* rounded = read_block<A>(stored, t.param_dtype, 0, n, rounded_scratch);
  const A* param = read_block(t.param, t.param_dtype, begin, n, param_scratch);
  for (int64_t i = 0; i < n; i++) out[i] = rounded[i] == param[i] ? master[i] : param[i];
  return out;
}

// x in bfloat16, up or down by the low 16 bits of `word`: with the probability of its distance from
// the other neighbour. Above the largest finite value plain rounding decides; NaN stays NaN.
GPTK_INLINE VecU16 narrow_at_random(VecF x, VecU32 word) {
  const VecU32 u = (VecU32)x;
  const VecI32 magnitude = (VecI32)(u & 0x7fffffffu);
  const VecU32 added = magnitude < 0x7f7f0000 ? word & 0xffffu : VecU32{} + 0x8000u;
  const VecU32 quiet_nan = (u >> 16) | 0x40u;
  const VecU32 kept = magnitude > 0x7f800000 ? quiet_nan : (u + added) >> 16;
  return __builtin_convertvector(kept, VecU16);
}

GPTK_INLINE void store_bits(bf16* to, VecU16 h, All) { __builtin_memcpy(to, &h, sizeof h); }
GPTK_INLINE void store_bits(bf16* to, VecU16 h, int n) { __builtin_memcpy(to, &h, n * sizeof *to); }

// n new values of the parameter from element `begin` on, a multiple of 4.
void round_block(const Tensor& t, uint64_t seed, uint32_t step, int64_t begin, int64_t n,
                 const float* p) {
  bf16* out = static_cast<bf16*>(t.param) + begin;
  for (int64_t first = 0; first < n; first += WORDS) {
    uint32_t words[WORDS];
    random_words(seed, t.row, static_cast<uint32_t>((begin + first) >> 2), step, words);
    for_lanes<float>(
        min(n - first, WORDS), GPTK_LANES {
          VecU32 word;
          __builtin_memcpy(&word, words + i, sizeof word);
          const VecF value = load(p + first + i, lanes);
          store_bits(out + first + i, narrow_at_random(value, word), lanes);
        });
  }
}

template <typename A, bool STOCHASTIC>
void update_block(const Tensor& t, const Step<A>& s, uint64_t seed, int64_t begin, int64_t n) {
  A g_scratch[BLOCK], m_scratch[BLOCK], v_scratch[BLOCK], p_scratch[BLOCK], m_out[BLOCK],
      v_out[BLOCK], p_out[BLOCK];
  void* parameter = t.master ? t.master : t.param;
  const int32_t parameter_dtype = t.master ? static_cast<int32_t>(GPTK_FLOAT32) : t.param_dtype;
  const A* grad = read_block(t.grad, t.grad_dtype, begin, n, g_scratch);
  const A* m_old = read_block(t.exp_avg, t.state_dtype, begin, n, m_scratch);
  const A* v_old = read_block(t.exp_avg_sq, t.state_dtype, begin, n, v_scratch);
  const A* p_old = read_block(parameter, parameter_dtype, begin, n, p_scratch);
  if (t.master) p_old = current_values(t, begin, n, p_old, p_scratch);
  A* m_new = target_block(t.exp_avg, t.state_dtype, begin, m_out);
  A* v_new = target_block(t.exp_avg_sq, t.state_dtype, begin, v_out);
  A* p_new = target_block(parameter, parameter_dtype, begin, p_out);
  for_lanes<A>(
      n, GPTK_LANES {
        const Vec<A> g = load(grad + i, lanes) * s.multiplier;
        const Vec<A> m = load(m_old + i, lanes) * s.beta1 + g * s.one_minus_beta1;
        const Vec<A> v = load(v_old + i, lanes) * s.beta2 + g * g * s.one_minus_beta2;
        const Vec<A> denominator = sqrt(v) * s.inverse_root2 + s.eps;
        store(m_new + i, m, lanes);
        store(v_new + i, v, lanes);
        store(p_new + i, load(p_old + i, lanes) * s.decay - m / denominator * s.step_size, lanes);
      });
  write_block(t.exp_avg, t.state_dtype, begin, n, m_new);
  write_block(t.exp_avg_sq, t.state_dtype, begin, n, v_new);
  if constexpr (STOCHASTIC) {
    round_block(t, seed, s.t, begin, n, p_new);
  } else {
    write_block(parameter, parameter_dtype, begin, n, p_new);
    if (t.master) write_block(t.param, t.param_dtype, begin, n, p_new);
  }
}

template <typename A, bool STOCHASTIC>
void update_piece(const gptk_adamw_update_args& a, const Tensor& t, int64_t piece) {
  const Step<A> s = step_scalars<A>(a, t);
  const int64_t begin = piece * GPTK_NORM_BLOCK, end = min(begin + GPTK_NORM_BLOCK, t.numel);
  for (int64_t i = begin; i < end; i += BLOCK)
    update_block<A, STOCHASTIC>(t, s, a.seed, i, min(end - i, BLOCK));
}

// Of floats, each widened in a register; the accumulators are as many as below.
double sum_of_squares(const float* g, int64_t n) {
  constexpr int L = Lanes<double>::value;
  typedef float Half __attribute__((vector_size(L * sizeof(float))));
  VecD part[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      Half h;
      __builtin_memcpy(&h, g + i + k * L, sizeof h);
      const VecD v = __builtin_convertvector(h, VecD);
      part[k] = fma(v, v, part[k]);
    }
  }
  double rest = 0;
  for (; i < n; i++) rest += static_cast<double>(g[i]) * g[i];
  return hsum((part[0] + part[1]) + (part[2] + part[3])) + rest;
}

double sum_of_squares(const Tensor& t, int64_t piece) {
  double scratch[BLOCK];
  double total = 0;
  const int64_t begin = piece * GPTK_NORM_BLOCK, end = min(begin + GPTK_NORM_BLOCK, t.numel);
  if (t.grad_dtype == GPTK_FLOAT32)
    return sum_of_squares(static_cast<const float*>(t.grad) + begin, end - begin);
  for (int64_t at = begin; at < end; at += BLOCK) {
    const int64_t n = min(end - at, BLOCK);
    const double* g = read_block(t.grad, t.grad_dtype, at, n, scratch);
    Accumulators<double> sum;
    for_lanes<double>(
        n, GPTK_LANES {
          const VecD v = load(g + i, lanes);
          sum.part[k] = fma(v, v, sum.part[k]);
        });
    total += sum.total();
  }
  return total;
}

}  // namespace

void adamw_update(const gptk_adamw_update_args& a) {
  for_pieces(a.tensors, a.count, a.threads, [&](const Tensor& t, int64_t piece, int64_t) {
    if (t.param_dtype == GPTK_FLOAT64)
      update_piece<double, false>(a, t, piece);
    else if (t.stochastic)
      update_piece<float, true>(a, t, piece);
    else
      update_piece<float, false>(a, t, piece);
  });
  for (int64_t t = 0; t < a.count; t++) *a.tensors[t].step += 1;  // after all pieces have read it
}

void adamw_norm(const gptk_adamw_norm_args& a) {
  int64_t pieces = 0;
  for (int64_t t = 0; t < a.count; t++) pieces += pieces_of(a.tensors[t]);
  for_pieces(a.tensors, a.count, a.threads, [&](const Tensor& t, int64_t piece, int64_t number) {
    a.partial[number] = sum_of_squares(t, piece);
  });
  double total = 0;
  for (int64_t piece = 0; piece < pieces; piece++) total += a.partial[piece];
  *a.norm = __builtin_sqrt(total);
}

}  // namespace GPTK_ISA
}  // namespace gptk
