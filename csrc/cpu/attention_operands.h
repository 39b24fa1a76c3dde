// Operands of attention's products in the element type E that they are multiplied in.
//
// float, double: any storage type T, by gemm_tile.h. Pair (AVX-512 BF16): T = bf16, two neighbours
// along k to an element; the same three packings, and softmax weights are rounded to bf16.
#pragma once

#include "attention_tile.h"
#include "gemm_pack.h"

namespace gptk {
namespace GPTK_ISA {
namespace {

// The element type for operands of storage type T.
template <typename T> struct OperandOf {
  typedef Acc<T> type;
};
#if defined(__AVX512BF16__)
template <> struct OperandOf<bf16> {
  typedef Pair type;
};
#endif
template <typename T> using Operand = typename OperandOf<T>::type;

// Elements for n values along k.
template <typename E> GPTK_INLINE int64_t elements(int64_t n) {
  return (n + ElementOf<E>::DEPTH - 1) / ElementOf<E>::DEPTH;
}
template <typename E> GPTK_INLINE Range elements(Range values) {
  return {values.begin / ElementOf<E>::DEPTH, elements<E>(values.end)};
}

// Takes those halves of a panel's elements away, as long as it lives, that lie outside of `values`.
template <typename E> struct HiddenHalves {
  HiddenHalves(E*, Range) {}
};

// C += A B, by gemm(), with ranges of k in values, not in elements: values_of(first, last row).
// Where B is not finite, no row of C meets a value outside of its own range: 0 times NaN is NaN.
template <typename E, Adjacent SIDE, typename Values, typename A = typename ElementOf<E>::acc>
void product(bool finite, Range rows, int64_t N, const E* a, int64_t lda, E* b, int64_t b_values,
             A* c, int64_t ldc, const Values& values_of) {
  constexpr int64_t PANEL = Panel<A>::value;
  const int64_t b_rows = elements<E>(b_values);
  const auto range = [&](int64_t first, int64_t last) {
    return elements<E>(values_of(first, last));
  };
  if (finite)
    return gemm<E, SIDE>(rows, N, a, lda, b, b_rows, c, ldc, {A(1), true}, KERNEL_ROWS, range);
  for (int64_t row = rows.begin; row < rows.end; row++) {
    for (int64_t n = 0; n < N; n += PANEL) {
      const HiddenHalves<E> hidden(b + n * b_rows, values_of(row, row));
      gemm<E, SIDE>({row, row + 1}, smaller(PANEL, N - n), a, lda, b + n * b_rows, b_rows, c + n,
                    ldc, {A(1), true}, 1, range);
    }
  }
}

// The forward's weights as an A operand with adjacent rows: p (keys, PANEL) times the keep factors,
// if there are any. `room` (keys, PANEL) may be `keep`.
template <typename A>
const A* weights(A* p, const A* keep, const PanelMask<A>& mask, A*, const A* /* element */) {
  constexpr int PANEL = Panel<A>::value;
  if (keep)
    for (int64_t i = mask.keys.begin * PANEL; i < mask.keys.end * PANEL; i += Lanes<A>::value)
      store(p + i, load(p + i) * load(keep + i));
  return p;
}

// The backward's weights (p) and score gradients (ds) of a tile, (keys, QUERIES), as A operands:
// p and ds with adjacent queries, ds with adjacent keys.
template <typename E> struct Weights;

template <typename A> struct PlainWeights {  // where the products left them
  A *p, *ds;
  int64_t queries;
  GPTK_INLINE void set(int64_t at, Vec<A> p_values, Vec<A> ds_values) const {
    store(p + at, p_values);
    store(ds + at, ds_values);
  }
  void finish(int64_t) const {}
  const A* rows_of_p() const { return p; }
  const A* rows_of_ds() const { return ds; }
  const A* columns_of_ds() const { return ds; }
  int64_t row_elements() const { return queries; }
};
template <> struct Weights<float> : PlainWeights<float> {
  Weights(float* p, float* ds, float*, int64_t, int64_t queries) : PlainWeights{p, ds, queries} {}
};
template <> struct Weights<double> : PlainWeights<double> {
  Weights(double* p, double* ds, double*, int64_t, int64_t queries)
      : PlainWeights{p, ds, queries} {}
};

#if defined(__AVX512BF16__)

template <> struct HiddenHalves<Pair> {
  static constexpr int PANEL = Panel<Pair>::value;
  Pair* row[2] = {};  // elements that hold the value before the range, and the one after it
  Pair kept[2][PANEL];

  HiddenHalves(Pair* panel, Range values) {
    if (values.begin >= values.end) return;
    if (values.begin % 2) row[0] = panel + values.begin / 2 * PANEL;
    if (values.end % 2) row[1] = panel + values.end / 2 * PANEL;
    for (int side = 0; side < 2; side++) {
      for (int i = 0; row[side] && i < PANEL; i++) {
        kept[side][i] = row[side][i];
        row[side][i].bits &= side ? 0x0000ffffu : 0xffff0000u;
      }
    }
  }
  ~HiddenHalves() {
    for (int side = 1; side >= 0; side--)  // they may be one
      for (int i = 0; row[side] && i < PANEL; i++) row[side][i] = kept[side][i];
  }
  HiddenHalves(const HiddenHalves&) = delete;
  HiddenHalves& operator=(const HiddenHalves&) = delete;
};

inline bool pack_rows(const bf16* src, int64_t row_stride, int64_t rows, int64_t cols, Pair* dst) {
  pack_a_rows(src, row_stride, rows, cols, elements<Pair>(cols), dst);
  return true;
}

inline void pack_transposed(const bf16* src, int64_t row_stride, int64_t rows, int64_t cols,
                            Pair* dst) {
  pack_b_panel(src, 1, row_stride, cols, rows, dst);
}

inline bool is_finite(const bf16* src, int64_t row_stride, int64_t rows, int64_t cols) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  uint32_t found = 0;
  for (int64_t r = 0; r < rows; r++, src += row_stride) {
    for (int64_t c = 0; c < cols; c += 32) {
      const __m512i x =
          cols - c >= 32 ? pairs(src + c) : pairs(src + c, static_cast<int>(cols - c));
      found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
    }
  }
  return found == 0;
}

inline bool pack_panels(const bf16* src, int64_t row_stride, int64_t rows, int64_t cols,
                        Pair* dst) {
  constexpr int64_t PANEL = Panel<Pair>::value;
  for (int64_t n = 0; n < cols; n += PANEL, dst += elements<Pair>(rows) * PANEL)
    pack_b_panel(src + n, row_stride, 1, rows, smaller(PANEL, cols - n), dst);
  return is_finite(src, row_stride, rows, cols);
}

// One key's weights and the next one's, in a pair.
GPTK_INLINE void store_pair(Pair* to, VecF even, VecF odd) {
  _mm512_storeu_si512(to, join(bits_of(narrow(even, bf16())), bits_of(narrow(odd, bf16()))));
}

inline const Pair* weights(float* p, const float* keep, const PanelMask<float>& mask, float* room,
                           const Pair* /* element */) {
  constexpr int W = Lanes<float>::value, PANEL = Panel<float>::value;
  Pair* out = reinterpret_cast<Pair*>(room);
  const auto value = [&](int64_t j, int v) __attribute__((always_inline)) {
    if (j < mask.keys.begin || j >= mask.keys.end) return zero<float>();
    const int64_t at = j * PANEL + v * W;
    return keep ? load(p + at) * load(keep + at) : load(p + at);
  };
  for (int64_t j = mask.keys.begin / 2 * 2; j < mask.keys.end; j += 2)
    for (int v = 0; v < 2; v++)
      store_pair(out + j / 2 * PANEL + v * W, value(j, v), value(j + 1, v));
  return out;
}

template <> struct Weights<Pair> {
  bf16 *p, *ds;   // (keys, queries)
  Pair* by_keys;  // (keys / 2, queries)
  int64_t queries;

  // room: 3 / 2 x keys x queries floats
  Weights(float*, float*, float* room, int64_t keys, int64_t queries) : queries(queries) {
    p = reinterpret_cast<bf16*>(room);
    ds = p + keys * queries;
    by_keys = reinterpret_cast<Pair*>(ds + keys * queries);
  }
  GPTK_INLINE void set(int64_t at, VecF p_values, VecF ds_values) const {
    store(p + at, p_values);
    store(ds + at, ds_values);
  }
  // After the last set(): keys are those of the tile.
  void finish(int64_t keys) const {
    for (int64_t j = 0; j < keys; j += 2) {
      const bf16* even = ds + j * queries;
      for (int64_t i = 0; i < queries; i += Lanes<float>::value) {
        const __m512i odd = j + 1 < keys ? halves(even + queries + i) : _mm512_setzero_si512();
        _mm512_storeu_si512(by_keys + j / 2 * queries + i, join(halves(even + i), odd));
      }
    }
  }
  const Pair* rows_of_p() const { return reinterpret_cast<const Pair*>(p); }
  const Pair* rows_of_ds() const { return reinterpret_cast<const Pair*>(ds); }
  const Pair* columns_of_ds() const { return by_keys; }
  int64_t row_elements() const { return queries / 2; }
};

#endif

}  // namespace
}  // namespace GPTK_ISA
}  // namespace gptk
