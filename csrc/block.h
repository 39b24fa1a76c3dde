/* A transformer block as two calls, each a row of kernels of gptk.h (gptk/block.py has the formula
   and the order). It saves no arithmetic: what falls away is what lies between the calls when they
   are made one by one from Python.

   The rules of gptk.h hold. "rows" is B * T; compute is the dtype of the products' operands and
   results; matrices, biases of products and norms' parameters have one dtype per kind. h1 is x
   itself without a branch, else residual + dropout(branch) in h1_dtype, then part of `saved`. */
#ifndef GPTK_BLOCK_H
#define GPTK_BLOCK_H

#include "gptk.h"

/* h1 = x + dropout(branch)    y1 = norm(h1)    q, k, v = y1 w_qkv^T    a = attention(q, k, v)
   h2 = h1 + dropout(a w_o^T)  y2 = norm(h2)    out = activation(y2 w_fc^T) w_p^T */
struct gptk_block_forward_args {
  void* out;     /* (rows, C) compute */
  void* h2;      /* (rows, C) h2_dtype */
  void* saved;   /* gptk_block_saved bytes: what backward needs besides its other arguments */
  void* cache_k; /* (B, H, capacity, D) compute, or NULL: T keys are written from `past` on, and */
  void* cache_v; /* attention sees the past + T first; for decoding, dropout_p == 0 */
  void* scratch; /* gptk_block_forward_scratch bytes */
  const void* x; /* (rows, C) x_dtype */
  const void* branch;        /* (rows, C) branch_dtype, or NULL */
  const void *w1, *b1;       /* (C,) norm_dtype, or NULL */
  const void *w_qkv, *b_qkv; /* (3 C, C) matrix_dtype; (3 C,) bias_dtype, or NULL */
  const void *w_o, *b_o;     /* (C, C); (C,), or NULL */
  const void *w2, *b2;       /* (C,), or NULL */
  const void *w_fc, *b_fc;   /* (hidden, C); (hidden,), or NULL */
  const void *w_p, *b_p;     /* (C, hidden); (C,), or NULL */
  int64_t B, T, C, H, hidden, past, capacity;
  double eps1, eps2, dropout_p;
  uint64_t seed_branch, seed_attention, seed_projection;
  int32_t activation, compute, x_dtype, branch_dtype, h1_dtype, h2_dtype;
  int32_t matrix_dtype, bias_dtype, norm_dtype;
  int32_t threads;
};

/* Gradients of the forward's x, branch and parameters; NULL where not wanted. */
struct gptk_block_backward_args {
  void* dx;      /* (rows, C) x_dtype; without a branch only what comes through the norm */
  void* dbranch; /* (rows, C) branch_dtype; NULL too where it would be dx: no dropout, one dtype */
  void* dh1;     /* (rows, C) h1_dtype, without a branch only: the caller adds it to dx */
  void *dw1, *db1, *dw_qkv, *db_qkv, *dw_o, *db_o, *dw2, *db2, *dw_fc, *db_fc, *dw_p, *db_p;
  void* scratch;                                  /* gptk_block_backward_scratch bytes */
  const void* dout;                               /* (rows, C) compute */
  const void* dh2;                                /* (rows, C) h2_dtype, or NULL */
  const void* h2;                                 /* (rows, C) h2_dtype */
  const void* saved;                              /* as forward left it */
  const void* x;                                  /* (rows, C) x_dtype; not read with a branch */
  const void *w1, *w_qkv, *w_o, *w2, *w_fc, *w_p; /* as in forward */
  int64_t B, T, C, H, hidden;
  double dropout_p;
  uint64_t seed_branch, seed_attention, seed_projection;
  int32_t with_branch;
  int32_t activation, compute, x_dtype, branch_dtype, h1_dtype, h2_dtype;
  int32_t matrix_dtype, bias_dtype, norm_dtype; /* of parameters and their gradients */
  int32_t threads;
};

#ifdef __cplusplus
extern "C" {
#endif

void gptk_block_forward(const struct gptk_block_forward_args* args);
void gptk_block_backward(const struct gptk_block_backward_args* args);

/* Bytes of memory that the two calls need, for their arguments' sizes and dtypes. */
int64_t gptk_block_saved(int64_t B, int64_t T, int64_t C, int64_t H, int64_t hidden,
                         int32_t with_branch, int32_t compute, int32_t h1_dtype);
int64_t gptk_block_forward_scratch(int64_t B, int64_t T, int64_t C, int64_t H, int64_t hidden,
                                   int32_t compute, int32_t threads);
int64_t gptk_block_backward_scratch(int64_t B, int64_t T, int64_t C, int64_t H, int64_t hidden,
                                    int32_t compute, int32_t h1_dtype, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
