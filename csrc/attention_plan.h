// How attention is cut into work items, and how much scratch they need. Functions of the shape
// alone (scratch: and of the thread count), so that results never depend on the thread count.
// Shared by the kernels, which are compiled once per ISA, and by the bindings: all static.
#pragma once

#include <stdint.h>

namespace gptk {
namespace attention_plan {

// Tiles of a few 16 KiB each: two or three of them fit a first-level cache, all the second level.
enum : int64_t {
  FORWARD_KEYS = 128,     // keys per step of the online softmax
  FORWARD_QUERIES = 256,  // most queries of one forward item
  BACKWARD_KEYS = 64,
  BACKWARD_QUERIES = 64,
  WIDEST_PANEL = 32,       // columns are padded to a panel, two vectors: 32 floats with AVX-512
  ENOUGH_ITEMS = 32,       // work items that keep every core of a usual machine busy
  SERIAL_BELOW = 1 << 18,  // products below which waking other threads costs more than they save
};

// Threads of one call; they change no result.
static inline int attention_threads(int64_t B, int64_t H, int64_t Tq, int64_t Tk, int64_t D,
                                    int threads) {
  return B * H * Tq * Tk * D < SERIAL_BELOW ? 1 : threads;
}

static inline int64_t padded(int64_t columns) {
  return (columns + WIDEST_PANEL - 1) / WIDEST_PANEL * WIDEST_PANEL;
}

// Queries of one forward item: fewer where there are few heads.
static inline int64_t forward_queries(int64_t heads, int64_t Tq) {
  int64_t queries = FORWARD_QUERIES;
  while (queries > 64 && heads * ((Tq + queries - 1) / queries) < ENOUGH_ITEMS) queries /= 2;
  return queries;
}

// Elements per thread.
static inline int64_t attention_forward_scratch(int64_t Tq, int64_t D, int64_t Dv) {
  const int64_t queries = padded(Tq < FORWARD_QUERIES ? Tq : FORWARD_QUERIES);
  return queries * (padded(D) + padded(Dv) + 2)                 // q, out, running max and sum
         + FORWARD_KEYS * (padded(D) + padded(Dv))              // k, v
         + FORWARD_KEYS * 2 * WIDEST_PANEL + 2 * WIDEST_PANEL;  // scores, keep mask, rescaling
}

// Keys of one backward item: all of a head, or a part where there are few heads. Parts add their
// own dq, summed in order afterwards.
static inline int64_t backward_keys(int64_t heads, int64_t Tk) {
  const int64_t tiles = (Tk + BACKWARD_KEYS - 1) / BACKWARD_KEYS;
  const int64_t wanted = (ENOUGH_ITEMS + heads - 1) / heads;
  const int64_t parts = tiles < wanted ? tiles : wanted;
  return (tiles + parts - 1) / parts * BACKWARD_KEYS;
}

// Elements of dq sums: (H / Hkv, Tq, D), padded, per item; per thread where an item is a head.
static inline int64_t backward_dq_size(int64_t H, int64_t Hkv, int64_t Tq, int64_t D) {
  return H / Hkv * Tq * padded(D);
}

static inline int64_t backward_scratch_per_thread(int64_t D, int64_t Dv) {
  const int64_t d = padded(D), dv = padded(Dv);
  return BACKWARD_KEYS * (2 * d + dv)            // k twice, v
         + BACKWARD_KEYS * (d + dv)              // dk, dv
         + BACKWARD_QUERIES * 2 * (d + dv)       // q and dout, twice
         + WIDEST_PANEL * dv                     // out
         + BACKWARD_KEYS * 4 * BACKWARD_QUERIES  // p, ds; in pairs: p, ds, ds by keys
         + BACKWARD_KEYS * WIDEST_PANEL          // keep mask
         + 2 * BACKWARD_QUERIES;                 // lse, delta
}

static inline int64_t attention_backward_scratch(int64_t B, int64_t H, int64_t Hkv, int64_t Tq,
                                                 int64_t Tk, int64_t D, int64_t Dv,
                                                 int64_t threads) {
  const int64_t keys = backward_keys(B * Hkv, Tk), parts = (Tk + keys - 1) / keys;
  const int64_t dq_sums = parts > 1 ? B * Hkv * parts : threads;
  return threads * backward_scratch_per_thread(D, Dv) + dq_sums * backward_dq_size(H, Hkv, Tq, D);
}

}  // namespace attention_plan
}  // namespace gptk
