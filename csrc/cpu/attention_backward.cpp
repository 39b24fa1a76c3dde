// Attention backward: dq, dk, dv from q, k, v, out, dout and the saved lse (FlashAttention-2).
//
//   p_ij = exp(s_ij - lse_i)          dv_j = sum_i dropout(p_ij) dout_i
//   delta_i = dout_i . out_i          ds_ij = p_ij (dropout(dout_i . v_j) - delta_i)
//   dk_j = scale sum_i ds_ij q_i      dq_i = scale sum_j ds_ij k_j
//
// A work item is one key head, or a part of its keys where there are few heads. It walks over tiles
// of keys, and within each over all tiles of queries that see them: dk and dv of a tile stay in
// scratch until they are whole, dq is summed over the item's keys. Where heads are split, each part
// keeps its own dq; a second pass adds the parts in order. No atomics: the shape alone fixes every
// order of summation, so threads change no bit. Memory: O(T x D), never Tq x Tk.
//
// Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning" (2023).
#include "attention_operands.h"
#include "gptk.h"
#include "parallel.h"
#include "vec_math.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

using Args = gptk_attention_backward_args;
using namespace attention_plan;

constexpr int64_t KEYS = BACKWARD_KEYS, QUERIES = BACKWARD_QUERIES;

template <typename E> struct Scratch {
  using A = typename ElementOf<E>::acc;
  E* k;            // (KEYS, D)
  E* k_panels;     // panels of (KEYS, D)
  E* v;            // (KEYS, Dv)
  A* dk;           // (KEYS, ldd)
  A* dv;           // (KEYS, ldv)
  E* q;            // (panels, D, PANEL): transposed
  E* q_panels;     // panels of (QUERIES, D)
  E* dout;         // (panels, Dv, PANEL): transposed
  E* dout_panels;  // panels of (QUERIES, Dv)
  E* out;          // (Dv, PANEL): transposed
  A* p;            // (KEYS, QUERIES): scores
  A* ds;           // (KEYS, QUERIES): dout . v
  A* converted;    // of Weights<E>
  A* keep;         // (KEYS, PANEL)
  A* lse;          // (QUERIES,)
  A* delta;        // (QUERIES,)
  int64_t ldd, ldv;

  Scratch(const Args& a, int thread) {
    static_assert(sizeof(E) == sizeof(A), "scratch is counted in either");
    const int64_t d = padded(a.D), e = padded(a.Dv);
    ldd = round_up(a.D, Panel<A>::value);
    ldv = round_up(a.Dv, Panel<A>::value);
    k = static_cast<E*>(a.scratch) + thread * backward_scratch_per_thread(a.D, a.Dv);
    k_panels = k + KEYS * d;
    v = k_panels + KEYS * d;
    dk = reinterpret_cast<A*>(v + KEYS * e);
    dv = dk + KEYS * d;
    q = reinterpret_cast<E*>(dv + KEYS * e);
    q_panels = q + QUERIES * d;
    dout = q_panels + QUERIES * d;
    dout_panels = dout + QUERIES * e;
    out = dout_panels + QUERIES * e;
    p = reinterpret_cast<A*>(out + WIDEST_PANEL * e);
    ds = p + KEYS * QUERIES;
    converted = ds + KEYS * QUERIES;
    keep = converted + 2 * KEYS * QUERIES;
    lse = keep + KEYS * WIDEST_PANEL;
    delta = lse + QUERIES;
  }

  Weights<E> weights() const { return Weights<E>(p, ds, converted, KEYS, QUERIES); }
};

template <typename A> void fill_zero(A* dst, int64_t n) {
  for (int64_t i = 0; i < n; i++) dst[i] = 0;
}

// One (head, key tile, query tile).
struct Tile {
  int64_t b, h, key0, keys, query0, queries;
};

// delta (PANEL,) = sum over columns of x y (columns, PANEL), in the order in which gemm() forms
// dout . v: where a query sees one key, out = v and ds is exactly 0.
template <typename E, typename A = typename ElementOf<E>::acc>
void column_products(const E* x, const E* y, int64_t columns, A* delta) {
  constexpr int W = Lanes<A>::value, PANEL = Panel<A>::value;
  using Element = ElementOf<E>;
  Vec<A> total[2] = {};
  for (int64_t begin = 0; begin < columns; begin += DEPTH) {
    Vec<A> sum[2] = {};
    for (int64_t c = begin; c < smaller(columns, begin + DEPTH); c++)
      for (int v = 0; v < 2; v++)
        sum[v] = Element::multiply_add(Element::row(x + c * PANEL + v * W),
                                       Element::row(y + c * PANEL + v * W), sum[v]);
    for (int v = 0; v < 2; v++) total[v] += sum[v];
  }
  for (int v = 0; v < 2; v++) store(delta + v * W, total[v]);
}

// Packs q, dout, lse, delta of a query tile. Returns whether q and dout are finite.
template <typename T, typename E, typename A = typename ElementOf<E>::acc>
bool pack_queries(const Args& a, const Tile& t, const Scratch<E>& s) {
  constexpr int PANEL = Panel<A>::value;
  const int64_t D = elements<E>(a.D), Dv = elements<E>(a.Dv);
  const T* q = static_cast<const T*>(a.q) + t.b * a.q_b + t.h * a.q_h + t.query0 * a.q_t;
  const T* dout =
      static_cast<const T*>(a.dout) + t.b * a.dout_b + t.h * a.dout_h + t.query0 * a.dout_t;
  const T* out = static_cast<const T*>(a.out) + t.b * a.out_b + t.h * a.out_h + t.query0 * a.out_t;
  const A* lse = static_cast<const A*>(a.lse) + (t.b * a.H + t.h) * a.Tq + t.query0;
  for (int64_t r = 0; r < t.queries; r += PANEL) {
    const int64_t rows = smaller(PANEL, t.queries - r);
    pack_transposed(q + r * a.q_t, a.q_t, rows, a.D, s.q + r * D);
    pack_transposed(dout + r * a.dout_t, a.dout_t, rows, a.Dv, s.dout + r * Dv);
    pack_transposed(out + r * a.out_t, a.out_t, rows, a.Dv, s.out);
    column_products(s.out, s.dout + r * Dv, Dv, s.delta + r);
  }
  for (int64_t r = 0; r < round_up(t.queries, PANEL); r++)  // p = 0 in absent rows
    s.lse[r] = r < t.queries ? lse[r] : static_cast<A>(__builtin_inf());
  const bool q_finite = pack_panels(q, a.q_t, t.queries, a.D, s.q_panels);
  return pack_panels(dout, a.dout_t, t.queries, a.Dv, s.dout_panels) && q_finite;
}

// p: scores -> dropout(softmax). ds: dout . v -> gradient of the scores. Hidden pairs get 0. `at`:
// the panel's first query.
template <typename E, typename A = typename ElementOf<E>::acc>
void softmax_backward(const Scratch<E>& s, int64_t at, const A* keep, const PanelMask<A>& mask) {
  constexpr int W = Lanes<A>::value, PANEL = Panel<A>::value;
  const Weights<E> made = s.weights();
  for (int64_t j = mask.keys.begin; j < mask.keys.end; j++) {
    for (int v = 0; v < 2; v++) {
      const int64_t i = at + v * W, place = j * QUERIES + i;
      const Vec<A> weight = exp_flush(load(s.p + place) - load(s.lse + i));
      Vec<A> dropped = weight, dp = load(s.ds + place);
      if (keep) {
        const Vec<A> kept = load(keep + j * PANEL + v * W);
        dropped *= kept;
        dp *= kept;
      }
      Vec<A> grad = weight * (dp - load(s.delta + i));
      if (!mask.all) {
        dropped = mask.apply(v, j, dropped, zero<A>());
        grad = mask.apply(v, j, grad, zero<A>());
      }
      made.set(place, dropped, grad);
    }
  }
}

// p and ds of a whole tile, panel of queries by panel of queries.
template <typename E, typename A = typename ElementOf<E>::acc>
void scores_backward(const Args& a, const Tile& t, const Visibility& see, const Dropout& dropout,
                     const Scratch<E>& s) {
  constexpr int W = Lanes<A>::value, PANEL = Panel<A>::value;
  const int64_t D = elements<E>(a.D), Dv = elements<E>(a.Dv);
  const Weights<E> made = s.weights();
  for (int64_t r = 0; r < t.queries; r += PANEL) {
    const PanelMask<A> mask(see, t.query0 + r, smaller(PANEL, t.queries - r), t.key0, t.keys);
    for (int64_t j = 0; j < t.keys; j++) {
      if (j >= mask.keys.begin && j < mask.keys.end) continue;
      for (int v = 0; v < 2; v++) made.set(j * QUERIES + r + v * W, zero<A>(), zero<A>());
    }
    if (mask.keys.begin >= mask.keys.end) continue;
    gemm<E, Adjacent::columns>(mask.keys, PANEL, s.k, D, s.q + r * D, D, s.p + r, QUERIES,
                               {static_cast<A>(a.scale), false}, KERNEL_ROWS,
                               [&](int64_t, int64_t) { return Range{0, D}; });
    gemm<E, Adjacent::columns>(mask.keys, PANEL, s.v, Dv, s.dout + r * Dv, Dv, s.ds + r, QUERIES,
                               {A(1), false}, KERNEL_ROWS,
                               [&](int64_t, int64_t) { return Range{0, Dv}; });
    if (a.dropout_p > 0) {
      const uint64_t row = static_cast<uint64_t>((t.b * a.H + t.h) * a.Tq + t.query0 + r);
      keep_tile(dropout, row, t.key0, mask.keys, s.keep);
    }
    softmax_backward<E>(s, r, a.dropout_p > 0 ? s.keep : nullptr, mask);
  }
  if (a.dq) made.finish(t.keys);
}

// Adds a tile's part to dk, dv (scratch) and dq (the item's sums, at the tile's first query).
template <typename E, typename A = typename ElementOf<E>::acc>
void add_gradients(const Args& a, const Tile& t, const Visibility& see, bool finite,
                   const Scratch<E>& s, A* dq) {
  const Range keys = {0, t.keys}, queries = {0, t.queries};
  const Weights<E> made = s.weights();
  const auto queries_of = [&](int64_t first, int64_t last) {
    return Range{larger(0, see.queries(t.key0 + first).begin - t.query0),
                 smaller(t.queries, see.queries(t.key0 + last).end - t.query0)};
  };
  const auto keys_of = [&](int64_t first, int64_t last) {
    return Range{larger(0, see.keys(t.query0 + first).begin - t.key0),
                 smaller(t.keys, see.keys(t.query0 + last).end - t.key0)};
  };
  if (a.dv)
    product<E, Adjacent::columns>(finite, keys, a.Dv, made.rows_of_p(), made.row_elements(),
                                  s.dout_panels, t.queries, s.dv, s.ldv, queries_of);
  if (a.dk)
    product<E, Adjacent::columns>(finite, keys, a.D, made.rows_of_ds(), made.row_elements(),
                                  s.q_panels, t.queries, s.dk, s.ldd, queries_of);
  if (a.dq)
    product<E, Adjacent::rows>(finite, queries, a.D, made.columns_of_ds(), QUERIES, s.k_panels,
                               t.keys, dq, s.ldd, keys_of);
}

// dst (rows, columns) of T, rows dst_stride apart = scale * src (rows, src_stride).
template <typename T, typename A>
void write_rows(const A* src, int64_t src_stride, int64_t rows, int64_t columns, A scale, T* dst,
                int64_t dst_stride) {
  constexpr int W = Lanes<A>::value;
  const Vec<A> factor = broadcast(scale);
  for (int64_t r = 0; r < rows; r++, src += src_stride, dst += dst_stride) {
    for (int64_t c = 0; c < columns; c += W) {
      const Vec<A> x = load(src + c) * factor;
      if (columns - c >= W)
        store(dst + c, x);
      else
        store(dst + c, x, static_cast<int>(columns - c));
    }
  }
}

// dq (Tq, D) of head h of batch entry b = scale * sums (Tq, ldd).
template <typename T, typename A>
void write_dq(const Args& a, int64_t b, int64_t h, const A* sums, int64_t ldd) {
  T* dq = static_cast<T*>(a.dq) + b * a.dq_b + h * a.dq_h;
  write_rows(sums, ldd, a.Tq, a.D, static_cast<A>(a.scale), dq, a.dq_t);
}

// Keys [key_begin, key_end) of key head kv_head of batch entry b; dq (H / Hkv, Tq, ldd) are sums.
template <typename T, typename E, typename A = typename ElementOf<E>::acc>
void backward_item(const Args& a, int64_t b, int64_t kv_head, int64_t key_begin, int64_t key_end,
                   const Scratch<E>& s, A* dq) {
  const int64_t group = a.H / a.Hkv;
  const T* k = static_cast<const T*>(a.k) + b * a.k_b + kv_head * a.k_h;
  const T* v = static_cast<const T*>(a.v) + b * a.v_b + kv_head * a.v_h;
  T* dk = static_cast<T*>(a.dk) + b * a.dk_b + kv_head * a.dk_h;
  T* dv = static_cast<T*>(a.dv) + b * a.dv_b + kv_head * a.dv_h;
  const Visibility see = visibility(a);
  const Dropout dropout = {a.seed, gptk_keep_threshold(a.dropout_p), a.dropout_p};

  if (a.dq) fill_zero(dq, group * a.Tq * s.ldd);
  for (int64_t key0 = key_begin; key0 < key_end; key0 += KEYS) {
    const int64_t keys = smaller(KEYS, key_end - key0);
    pack_rows(k + key0 * a.k_t, a.k_t, keys, a.D, s.k);
    pack_rows(v + key0 * a.v_t, a.v_t, keys, a.Dv, s.v);
    const bool k_finite = pack_panels(k + key0 * a.k_t, a.k_t, keys, a.D, s.k_panels);
    fill_zero(s.dk, KEYS * s.ldd);
    fill_zero(s.dv, KEYS * s.ldv);
    const Range seen = {see.queries(key0).begin, see.queries(key0 + keys - 1).end};
    for (int64_t g = 0; g < group; g++) {
      for (int64_t query0 = seen.begin; query0 < seen.end; query0 += QUERIES) {
        const Tile t = {
            b, kv_head * group + g, key0, keys, query0, smaller(QUERIES, seen.end - query0)};
        if (!see.any(t.query0, t.queries, key0, keys)) continue;
        const bool finite = pack_queries<T>(a, t, s) && k_finite;
        scores_backward(a, t, see, dropout, s);
        add_gradients(a, t, see, finite, s, dq + (g * a.Tq + query0) * s.ldd);
      }
    }
    if (a.dk)
      write_rows(s.dk, s.ldd, keys, a.D, static_cast<A>(a.scale), dk + key0 * a.dk_t, a.dk_t);
    if (a.dv) write_rows(s.dv, s.ldv, keys, a.Dv, A(1), dv + key0 * a.dv_t, a.dv_t);
  }
}

// dq of one query head from the parts of its keys, added in order into the first part's sums.
template <typename T, typename A>
void sum_parts(const Args& a, int64_t b, int64_t h, int64_t parts, A* dq_sums, int64_t ldd) {
  const int64_t group = a.H / a.Hkv, item_size = backward_dq_size(a.H, a.Hkv, a.Tq, a.D);
  A* sums = dq_sums + (b * a.Hkv + h / group) * parts * item_size + h % group * a.Tq * ldd;
  for (int64_t part = 1; part < parts; part++) {
    const A* more = sums + part * item_size;
    for (int64_t i = 0; i < a.Tq * ldd; i += Lanes<A>::value)
      store(sums + i, load(sums + i) + load(more + i));
  }
  write_dq<T>(a, b, h, sums, ldd);
}

template <typename T> void backward(const Args& a) {
  using A = Acc<T>;
  const int64_t key_step = backward_keys(a.B * a.Hkv, a.Tk);
  const int64_t parts = (a.Tk + key_step - 1) / key_step;
  const int64_t dq_size = backward_dq_size(a.H, a.Hkv, a.Tq, a.D);
  const int threads = attention_threads(a.B, a.H, a.Tq, a.Tk, a.D, a.threads);
  A* dq_sums = static_cast<A*>(a.scratch) + a.threads * backward_scratch_per_thread(a.D, a.Dv);
  parallel_for_threads(a.B * a.Hkv * parts, threads, [&](int64_t item, int thread) {
    const int64_t b = item / parts / a.Hkv, kv_head = item / parts % a.Hkv;
    const int64_t key_begin = item % parts * key_step;
    const int64_t key_end = smaller(a.Tk, key_begin + key_step);
    const Scratch<Operand<T>> s(a, thread);
    A* dq = dq_sums + (parts > 1 ? item : thread) * dq_size;
    backward_item<T>(a, b, kv_head, key_begin, key_end, s, dq);
    if (parts > 1 || !a.dq) return;
    const int64_t group = a.H / a.Hkv;
    for (int64_t g = 0; g < group; g++)
      write_dq<T>(a, b, kv_head * group + g, dq + g * a.Tq * s.ldd, s.ldd);
  });
  if (parts > 1 && a.dq)
    parallel_for(a.B * a.H, threads, [&](int64_t head) {
      sum_parts<T>(a, head / a.H, head % a.H, parts, dq_sums, round_up(a.D, Panel<A>::value));
    });
}

}  // namespace

void attention_backward(const gptk_attention_backward_args& a) {
  switch (a.dtype) {
  case GPTK_FLOAT32:
    return backward<float>(a);
  case GPTK_BFLOAT16:
    return backward<bf16>(a);
  case GPTK_FLOAT16:
    return backward<fp16>(a);
  case GPTK_FLOAT64:
    return backward<double>(a);
  }
}

}  // namespace GPTK_ISA
}  // namespace gptk
