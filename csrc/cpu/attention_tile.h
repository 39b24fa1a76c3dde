// What attention's forward and backward share: who sees whom, and the dropout mask of a tile.
//
// Scores are kept transposed, (keys, queries): a vector lane is a query, so row maxima, row sums
// and everything else per query are plain vector operations with no reduction across lanes. Queries
// are taken PANEL (two vectors) at a time.
#pragma once

#include "attention_plan.h"
#include "gemm_tile.h"
#include "gptk.h"
#include "philox_vec.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

// A sliding window needs causal attention. Both ranges are empty or inside the tensor; their ends
// grow with the query (the key). Where ranges are given, they say it all.
struct Visibility {
  int64_t Tq, Tk, offset;  // offset = Tk - Tq: causal attention is aligned bottom-right
  int64_t window;          // 0: none
  bool causal;
  const int32_t *key_low, *key_high;      // (Tq,) or NULL
  const int32_t *query_low, *query_high;  // (Tk,) or NULL

  GPTK_INLINE Range keys(int64_t query) const {
    if (key_low)  // a panel may reach past the last query
      return query < Tq ? Range{key_low[query], key_high[query]} : Range{0, 0};
    if (!causal) return {0, Tk};
    const int64_t end = larger(0, query + offset + 1);
    return {window ? larger(0, end - window) : 0, end};
  }
  GPTK_INLINE Range queries(int64_t key) const {
    if (query_low) return {query_low[key], query_high[key]};
    if (!causal) return {0, Tq};
    const int64_t begin = larger(0, key - offset);
    return {begin, window ? smaller(Tq, key - offset + window) : Tq};
  }
  // Whether one of the queries sees one of the keys, for keys between the first that the first
  // query sees and the last that the last one sees: the keys of a document without queries lie
  // there and are seen by none.
  GPTK_INLINE bool any(int64_t query0, int64_t queries, int64_t key0, int64_t keys) const {
    if (!key_low) return true;
    for (int64_t i = query0; i < query0 + queries; i++)
      if (larger(key_low[i], key0) < smaller(key_high[i], key0 + keys)) return true;
    return false;
  }
};

inline Visibility visibility(const gptk_attention_forward_args& a) {
  return {a.Tq,      a.Tk,       a.Tk - a.Tq, a.window, a.causal != 0,
          a.key_low, a.key_high, nullptr,     nullptr};
}
inline Visibility visibility(const gptk_attention_backward_args& a) {
  return {a.Tq,      a.Tk,       a.Tk - a.Tq, a.window,    a.causal != 0,
          a.key_low, a.key_high, a.query_low, a.query_high};
}

// A tile of scores: keys [keys.begin, keys.end) of those from key0 on, for one panel of queries.
template <typename A> struct PanelMask {
  Range keys;                // relative to key0; seen by at least one query of the panel
  bool all;                  // every query sees all of them
  Mask<A> begin[2], end[2];  // each query's own range

  PanelMask(const Visibility& see, int64_t query0, int64_t queries, int64_t key0,
            int64_t key_count) {
    constexpr int W = Lanes<A>::value;
    typedef decltype(Mask<A>{}[0] + 0) Int;
    const Range first = see.keys(query0), last = see.keys(query0 + queries - 1);
    keys = {larger(0, first.begin - key0), smaller(key_count, last.end - key0)};
    all = last.begin - key0 <= keys.begin && first.end - key0 >= keys.end;
    if (all || keys.begin >= keys.end) return;
    for (int v = 0; v < 2; v++) {
      for (int i = 0; i < W; i++) {
        const Range own = see.keys(query0 + v * W + i);
        begin[v][i] = static_cast<Int>(own.begin - key0);
        end[v][i] = static_cast<Int>(own.end - key0);
      }
    }
  }

  // x where query vector v sees the key, else `hidden`.
  GPTK_INLINE Vec<A> apply(int v, int64_t key, Vec<A> x, Vec<A> hidden) const {
    typedef decltype(Mask<A>{}[0] + 0) Int;
    const Mask<A> j = Mask<A>{} + static_cast<Int>(key);
    return select((j >= begin[v]) & (j < end[v]), x, hidden);
  }
};

struct Dropout {
  uint64_t seed, threshold;
  double p;
};

GPTK_INLINE void store_keep(float* dst, VecI32 keep, float scale) {
  store(dst, select(keep, broadcast(scale), zero<float>()));
}
GPTK_INLINE void store_keep(double* dst, VecI32 keep, double scale) {
  for (int i = 0; i < Lanes<float>::value; i++) dst[i] = keep[i] ? scale : 0.0;
}

// keep[j * PANEL + i] = 1 / (1 - p) where key key0 + j is kept for mask row row0 + i, else 0; for j
// in `keys` at least, all of it within [0, FORWARD_KEYS). key0 is a multiple of 4.
template <typename A>
void keep_tile(const Dropout& dropout, uint64_t row0, int64_t key0, Range keys, A* keep) {
  constexpr int PANEL = Panel<A>::value, ROWS = Lanes<float>::value;
  const A scale = dropout.p < 1 ? static_cast<A>(1.0 / (1.0 - dropout.p)) : A(0);
  const bool keep_all = dropout.threshold == 0;
  const uint32_t below = static_cast<uint32_t>(dropout.threshold - 1);
  for (int64_t j = keys.begin / 4 * 4; j < keys.end; j += 4) {
    for (int i = 0; i < PANEL; i += ROWS) {
      VecU32 words[4];
      random_words_of_rows(dropout.seed, row0 + i, static_cast<uint32_t>((key0 + j) >> 2), words);
      for (int t = 0; t < 4; t++) {
        const VecI32 kept = keep_all ? ~VecI32{} : (VecI32)(words[t] > below);
        store_keep(keep + (j + t) * PANEL + i, kept, scale);
      }
    }
  }
}

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
