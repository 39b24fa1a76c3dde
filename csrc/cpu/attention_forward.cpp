// Attention forward: out = softmax(scale q k^T) v, one pass over the keys (FlashAttention-2).
//
//   m' = max(m, max_j s_j)    p_j = exp(s_j - m')    l' = exp(m - m') l + sum_j p_j
//   o' = exp(m - m') o + sum_j dropout(p_j) v_j      at the end   out = o / l,  lse = m + log l
//
// A work item is one head and a run of its queries. It walks over the keys in blocks, packs a block
// of k and v once, and brings every panel of its queries up to date. Memory: O(queries x D), never
// Tq x Tk. Work items write rows of their own and are cut by shape, so threads change no bit. A few
// queries go one by one (attention_few.h).
//
// Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning" (2023);
// Milakov, Gimelshein, "Online normalizer calculation for softmax" (2018).
#include "attention_few.h"
#include "attention_operands.h"
#include "gptk.h"
#include "parallel.h"
#include "vec_math.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

using Args = gptk_attention_forward_args;
using namespace attention_plan;

template <typename E> struct Scratch {
  using A = typename ElementOf<E>::acc;
  E* q;        // (panels, D, PANEL): transposed
  A* out;      // (queries, padded Dv): not yet divided by sum
  A* max;      // (queries,)
  A* sum;      // (queries,)
  E* k;        // (FORWARD_KEYS, D)
  E* v;        // panels of (FORWARD_KEYS, Dv)
  A* p;        // (FORWARD_KEYS, PANEL)
  A* keep;     // (FORWARD_KEYS, PANEL)
  A* rescale;  // (PANEL,)

  Scratch(const Args& a, int thread) {
    static_assert(sizeof(E) == sizeof(A), "scratch is counted in either");
    const int64_t queries = padded(smaller(a.Tq, FORWARD_QUERIES));
    A* own = static_cast<A*>(a.scratch) + thread * attention_forward_scratch(a.Tq, a.D, a.Dv);
    q = reinterpret_cast<E*>(own);
    out = own + queries * padded(a.D);
    max = out + queries * padded(a.Dv);
    sum = max + queries;
    k = reinterpret_cast<E*>(sum + queries);
    v = k + FORWARD_KEYS * padded(a.D);
    p = reinterpret_cast<A*>(v + FORWARD_KEYS * padded(a.Dv));
    keep = p + FORWARD_KEYS * WIDEST_PANEL;
    rescale = keep + FORWARD_KEYS * WIDEST_PANEL;
  }
};

// Scores in p become exp(score - max); max, sum (PANEL,) move on; rescale = exp(old max - new max).
template <typename A>
void online_softmax(A* p, const PanelMask<A>& mask, A* max, A* sum, A* rescale) {
  constexpr int W = Lanes<A>::value, PANEL = Panel<A>::value;
  const Vec<A> minus_inf = broadcast(static_cast<A>(-__builtin_inf()));
  const Vec<A> old_max[2] = {load(max), load(max + W)};
  Vec<A> new_max[2] = {old_max[0], old_max[1]};
  for (int64_t j = mask.keys.begin; j < mask.keys.end; j++) {
    for (int v = 0; v < 2; v++) {
      A* p_j = p + j * PANEL + v * W;
      if (!mask.all) store(p_j, mask.apply(v, j, load(p_j), minus_inf));
      new_max[v] = gptk::GPTK_ISA::max(load(p_j), new_max[v]);
    }
  }
  // A row that has seen no key yet keeps max = -inf; exp(-inf - 0) is 0, exp(-inf + inf) is NaN.
  Vec<A> shift[2], total[2];
  for (int v = 0; v < 2; v++) {
    shift[v] = select(new_max[v] == minus_inf, zero<A>(), new_max[v]);
    total[v] = zero<A>();
  }
  for (int64_t j = mask.keys.begin; j < mask.keys.end; j++) {
    for (int v = 0; v < 2; v++) {
      A* p_j = p + j * PANEL + v * W;
      const Vec<A> e = exp_flush(load(p_j) - shift[v]);
      store(p_j, e);
      total[v] += e;
    }
  }
  for (int v = 0; v < 2; v++) {
    const Vec<A> factor = exp_flush(old_max[v] - shift[v]);
    store(max + v * W, new_max[v]);
    store(sum + v * W, fma(load(sum + v * W), factor, total[v]));
    store(rescale + v * W, factor);
  }
}

// out (queries, ldo) *= rescale, row by row.
template <typename A> void rescale_rows(const A* rescale, int64_t queries, int64_t ldo, A* out) {
  for (int64_t r = 0; r < queries; r++, out += ldo) {
    if (rescale[r] == A(1)) continue;
    const Vec<A> factor = broadcast(rescale[r]);
    for (int64_t c = 0; c < ldo; c += Lanes<A>::value) store(out + c, load(out + c) * factor);
  }
}

template <typename T, typename E, typename A = typename ElementOf<E>::acc>
void write_out(const Args& a, int64_t b, int64_t h, int64_t query0, int64_t queries,
               const Visibility& see, const Scratch<E>& s) {
  constexpr int W = Lanes<A>::value;
  const int64_t ldo = round_up(a.Dv, Panel<A>::value);
  A* lse = static_cast<A*>(a.lse) + (b * a.H + h) * a.Tq + query0;
  T* out = static_cast<T*>(a.out) + ((b * a.Tq + query0) * a.H + h) * a.Dv;
  for (int64_t r = 0; r < queries; r++, out += a.H * a.Dv) {
    const Range keys = see.keys(query0 + r);
    const bool no_keys = keys.begin >= keys.end;  // seen keys whose scores are all -inf give NaN
    lse[r] = no_keys ? static_cast<A>(-__builtin_inf()) : s.max[r] + log(s.sum[r]);
    const Vec<A> factor = broadcast(no_keys ? A(0) : A(1) / s.sum[r]);
    for (int64_t c = 0; c < a.Dv; c += W) {
      const Vec<A> y = load(s.out + r * ldo + c) * factor;
      if (a.Dv - c >= W)
        store(out + c, y);
      else
        store(out + c, y, static_cast<int>(a.Dv - c));
    }
  }
}

// Queries [query0, query0 + queries) of head h of batch entry b.
template <typename T, typename E, typename A = typename ElementOf<E>::acc>
void forward_item(const Args& a, int64_t b, int64_t h, int64_t query0, int64_t queries,
                  const Scratch<E>& s) {
  constexpr int PANEL = Panel<A>::value;
  const int64_t kv_head = h / (a.H / a.Hkv), ldo = round_up(a.Dv, PANEL), D = elements<E>(a.D);
  const T* q = static_cast<const T*>(a.q) + b * a.q_b + h * a.q_h + query0 * a.q_t;
  const T* k = static_cast<const T*>(a.k) + b * a.k_b + kv_head * a.k_h;
  const T* v = static_cast<const T*>(a.v) + b * a.v_b + kv_head * a.v_h;
  const Visibility see = visibility(a);
  const Dropout dropout = {a.seed, gptk_keep_threshold(a.dropout_p), a.dropout_p};

  for (int64_t r = 0; r < queries; r += PANEL)
    pack_transposed(q + r * a.q_t, a.q_t, smaller(PANEL, queries - r), a.D, s.q + r * D);
  for (int64_t i = 0; i < queries * ldo; i++) s.out[i] = 0;
  for (int64_t r = 0; r < round_up(queries, PANEL); r++) {
    s.max[r] = static_cast<A>(-__builtin_inf());
    s.sum[r] = 0;
  }

  const Range all_keys = {see.keys(query0).begin / FORWARD_KEYS * FORWARD_KEYS,
                          see.keys(query0 + queries - 1).end};
  for (int64_t key0 = all_keys.begin; key0 < all_keys.end; key0 += FORWARD_KEYS) {
    const int64_t keys = smaller(FORWARD_KEYS, all_keys.end - key0);
    if (!see.any(query0, queries, key0, keys)) continue;
    pack_rows(k + key0 * a.k_t, a.k_t, keys, a.D, s.k);
    const bool finite = pack_panels(v + key0 * a.v_t, a.v_t, keys, a.Dv, s.v);
    for (int64_t r = 0; r < queries; r += PANEL) {
      const int64_t rows = smaller(PANEL, queries - r), query = query0 + r;
      const PanelMask<A> mask(see, query, rows, key0, keys);
      if (mask.keys.begin >= mask.keys.end) continue;
      gemm<E, Adjacent::columns>(mask.keys, PANEL, s.k, D, s.q + r * D, D, s.p, PANEL,
                                 {static_cast<A>(a.scale), false}, KERNEL_ROWS,
                                 [&](int64_t, int64_t) { return Range{0, D}; });
      online_softmax(s.p, mask, s.max + r, s.sum + r, s.rescale);
      if (a.dropout_p > 0) {
        const uint64_t mask_row = static_cast<uint64_t>((b * a.H + h) * a.Tq + query);
        keep_tile(dropout, mask_row, key0, mask.keys, s.keep);
      }
      const E* p = weights(s.p, a.dropout_p > 0 ? s.keep : nullptr, mask, s.keep,
                           static_cast<const E*>(nullptr));
      A* out = s.out + r * ldo;
      if (key0 > all_keys.begin) rescale_rows(s.rescale, rows, ldo, out);
      // A NaN or infinite v may meet only queries that see it, not a hidden one's weight of 0.
      product<E, Adjacent::rows>(finite, {0, rows}, a.Dv, p, PANEL, s.v, keys, out, ldo,
                                 [&](int64_t first, int64_t last) {
                                   return Range{larger(0, see.keys(query + first).begin - key0),
                                                smaller(keys, see.keys(query + last).end - key0)};
                                 });
    }
  }
  write_out<T>(a, b, h, query0, queries, see, s);
}

template <typename T> void forward(const Args& a) {
  const int threads = attention_threads(a.B, a.H, a.Tq, a.Tk, a.D, a.threads);
  if (a.Tq < FEW_QUERIES) return forward_few<T>(a, threads);
  const int64_t step = forward_queries(a.B * a.H, a.Tq), steps = (a.Tq + step - 1) / step;
  parallel_for_threads(a.B * a.H * steps, threads, [&](int64_t item, int thread) {
    const int64_t head = item % (a.B * a.H);
    const int64_t query0 = (steps - 1 - item / (a.B * a.H)) * step;  // most keys first
    const int64_t b = head / a.H, h = head % a.H, queries = smaller(step, a.Tq - query0);
    forward_item<T>(a, b, h, query0, queries, Scratch<Operand<T>>(a, thread));
  });
}

}  // namespace

void attention_forward(const gptk_attention_forward_args& a) {
  switch (a.dtype) {
  case GPTK_FLOAT32:
    return forward<float>(a);
  case GPTK_BFLOAT16:
    return forward<bf16>(a);
  case GPTK_FLOAT16:
    return forward<fp16>(a);
  case GPTK_FLOAT64:
    return forward<double>(a);
  }
}

}  // namespace GPTK_ISA
}  // namespace gptk
