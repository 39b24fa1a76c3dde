/* The native contract: one POD argument struct and one entry point per kernel. Plain C, no torch,
   no pybind.

   Rules that hold for every struct:
   - Field order: outputs, scratch, inputs, sizes, scalars, dtypes, threads. NULL means "not given"
     or "not wanted" where a comment says "or NULL".
   - Tensors are contiguous, row-major, unless a stride is given; strides and sizes count elements.
   - A void* field has the dtype named beside it: a GPTK_* code field, or "acc" = double when the
     main input is GPTK_FLOAT64, else float. Sums, statistics and softmax are carried in acc.
   - Outputs are written whole, inputs never; an output aliases an input only where this file says
     that it may.
   - Results do not depend on `threads`: every reduction tree is fixed by the sizes (and by
     `groups`, itself a function of the sizes).
   - Dropout keeps (row, column) by the Philox rule of philox.h and scales what it keeps by
     1 / (1 - dropout_p). */
#ifndef GPTK_H
#define GPTK_H

#include <stdint.h>

enum { GPTK_FLOAT32 = 0, GPTK_BFLOAT16 = 1, GPTK_FLOAT16 = 2, GPTK_FLOAT64 = 3 };
enum { GPTK_IDENTITY = 0, GPTK_GELU = 1, GPTK_GELU_TANH = 2 };

/* h = residual + dropout(x), y = (h - mean) * rstd * weight + bias; without residual h is x and is
   not written. */
struct gptk_layer_norm_forward_args {
  void* y;              /* (M, N) y_dtype */
  void* h;              /* (M, N) h_dtype, or NULL without residual */
  void* mean;           /* (M,) acc */
  void* rstd;           /* (M,) acc */
  const void* x;        /* (M, N) x_dtype */
  const void* residual; /* (M, N) residual_dtype, or NULL */
  const void* weight;   /* (N,) weight_dtype, or NULL: ones */
  const void* bias;     /* (N,) bias_dtype, or NULL: zeros */
  int64_t M, N;
  double eps, dropout_p; /* dropout_p in [0, 1]; acts on x, with residual only */
  uint64_t seed;
  int32_t y_dtype, x_dtype, residual_dtype, h_dtype, weight_dtype, bias_dtype;
  int32_t threads;
};

/* dresidual = d(layer norm)/dh . dy + dh, dx = dropout mask * dresidual, dweight = sum_rows dy *
   xhat, dbias = sum_rows dy */
struct gptk_layer_norm_backward_args {
  void* dx;           /* (M, N) x_dtype, or NULL */
  void* dresidual;    /* (M, N) residual_dtype, or NULL */
  void* dweight;      /* (N,) weight_dtype, or NULL */
  void* dbias;        /* (N,) weight_dtype, or NULL */
  void* partial;      /* scratch (2, groups, N) acc; unused when dweight and dbias are NULL */
  const void* dy;     /* (M, N) dy_dtype */
  const void* dh;     /* (M, N) h_dtype: gradient of the output h, or NULL */
  const void* h;      /* (M, N) h_dtype */
  const void* weight; /* (N,) weight_dtype, or NULL */
  const void* mean;   /* (M,) acc */
  const void* rstd;   /* (M,) acc */
  int64_t M, N, groups;
  double dropout_p;
  uint64_t seed;
  int32_t x_dtype, residual_dtype, dy_dtype, h_dtype, weight_dtype;
  int32_t threads;
};

/* pre = x + bias, y = activation(pre) */
struct gptk_activation_forward_args {
  void* y;          /* (M, N) y_dtype */
  void* pre;        /* (M, N) y_dtype, or NULL; may be x itself when the dtypes agree */
  const void* x;    /* (M, N) x_dtype */
  const void* bias; /* (N,) bias_dtype, or NULL */
  int64_t M, N;
  int32_t activation, y_dtype, x_dtype, bias_dtype;
  int32_t threads;
};

/* dpre = dy * activation'(pre), y = activation(pre) once more, dbias = sum_rows dpre (before dpre
   is rounded) */
struct gptk_activation_backward_args {
  void* dpre;      /* (M, N) dpre_dtype, or NULL; may be dy itself when the dtypes agree */
  void* y;         /* (M, N) dpre_dtype, or NULL */
  void* dbias;     /* (N,) dbias_dtype, or NULL */
  void* partial;   /* scratch (groups, N) acc; unused when dbias is NULL */
  const void* dy;  /* (M, N) dy_dtype */
  const void* pre; /* (M, N) pre_dtype, or NULL with GPTK_IDENTITY */
  int64_t M, N, groups;
  int32_t activation, dpre_dtype, dbias_dtype, dy_dtype, pre_dtype;
  int32_t threads;
};

/* c = activation(a b + bias): the matrix product with its epilogue. Operands are rounded to
   `compute` first (a float32 weight under bf16 autocast is packed as bf16 in the same pass) and
   products are summed in acc, whatever the instruction set. a[m, k] = a[m * a_m + k * a_k], one of
   the two strides is 1; b likewise.
   With slope_of: c = (a b) * activation'(slope_of), and value = activation(slope_of). */
struct gptk_gemm_args {
  void* c;              /* (M, N) c_dtype */
  void* pre;            /* (M, N) c_dtype: a b + bias, or NULL */
  void* value;          /* (M, N) c_dtype: activation(slope_of), or NULL */
  void* scratch;        /* gemm_scratch(M, N, K, threads) acc, 64-byte aligned */
  const void* a;        /* (M, K) a_dtype */
  const void* b;        /* (K, N) b_dtype */
  const void* bias;     /* (N,) bias_dtype, or NULL */
  const void* slope_of; /* (M, N) c_dtype, or NULL */
  int64_t M, N, K, a_m, a_k, b_k, b_n;
  int32_t add; /* 1: c += a b, for a c of acc and no epilogue */
  int32_t activation, compute, c_dtype, a_dtype, b_dtype, bias_dtype;
  int32_t threads;
};

/* loss = lse - (1 - s) * z[target] - s / V * sum(z) + z_loss * lse^2, lse = log sum exp z;
   z = softcap * tanh(logits / softcap), or the logits themselves where softcap is 0. The loss is 0
   where target == ignore_index, NaN for any other target outside [0, V) */
struct gptk_cross_entropy_forward_args {
  void* loss;            /* (N,) acc */
  void* lse;             /* (N,) acc, natural logarithm */
  const void* logits;    /* (N, V) logits_dtype, rows logits_stride apart, columns adjacent */
  const int64_t* target; /* (N,) */
  int64_t N, V, logits_stride, ignore_index;
  double label_smoothing;
  double softcap; /* 0: none */
  double z_loss;
  int32_t logits_dtype;
  int32_t threads;
};

/* dz = dloss * ((1 + 2 * z_loss * lse) * exp(z - lse) - (1 - s) * [column == target] - s / V);
   dlogits = dz * (1 - (z / softcap)^2), or dz where softcap is 0; exactly 0 in ignored rows.
   dlogits_dtype is logits_dtype, or 16 bits in place of acc. In place: dlogits may be the
   logits themselves, row for row, in their dtype with their stride, or in 16 bits at the front of
   each row, with twice their stride. */
struct gptk_cross_entropy_backward_args {
  void* dlogits;         /* (N, V) dlogits_dtype, rows dlogits_stride apart */
  const void* dloss;     /* (N,) acc */
  const void* logits;    /* (N, V) logits_dtype, rows logits_stride apart */
  const int64_t* target; /* (N,) */
  const void* lse;       /* (N,) acc */
  int64_t N, V, dlogits_stride, logits_stride, ignore_index;
  double label_smoothing;
  double softcap; /* 0: none */
  double z_loss;
  int32_t dlogits_dtype, logits_dtype;
  int32_t threads;
};

/* out = dropout(softmax(scale q k^T, masked)) v, never storing Tq x Tk. Query head h reads key head
    h / (H / Hkv). causal: query i sees keys j <= i + Tk - Tq; window > 0: only the last `window` of
    those. A row without keys: out 0, lse -inf. Dropout row (b * H + h) * Tq + i, column j.
    q, k, v: columns adjacent, strides <x>_b, <x>_h, <x>_t.
    Ranges (packed documents), for every batch entry: query i sees keys key_low[i] <= j <
    key_high[i], and key j is seen by queries query_low[j] <= i < query_high[j]; causal and window
    are then not read. 0 <= low <= high, high at most Tk (Tq), neither ever falls. */
struct gptk_attention_forward_args {
  void* out;     /* (B, Tq, H, Dv) dtype */
  void* lse;     /* (B, H, Tq) acc: log of the sum of exponentials, before dropout */
  void* scratch; /* (threads, attention_forward_scratch) acc: see attention_plan.h */
  const void* q; /* (B, H, Tq, D) dtype */
  const void* k; /* (B, Hkv, Tk, D) dtype */
  const void* v; /* (B, Hkv, Tk, Dv) dtype */
  const int32_t *key_low, *key_high; /* (Tq,), or both NULL */
  int64_t B, H, Hkv, Tq, Tk, D, Dv;
  int64_t q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t;
  int64_t window; /* 0: none */
  double scale, dropout_p;
  uint64_t seed;
  int32_t causal, dtype;
  int32_t threads;
};

struct gptk_attention_backward_args {
  void* dq;         /* (B, H, Tq, D) dtype, or NULL; columns adjacent, as in dk and dv */
  void* dk;         /* (B, Hkv, Tk, D) dtype, or NULL */
  void* dv;         /* (B, Hkv, Tk, Dv) dtype, or NULL */
  void* scratch;    /* (attention_backward_scratch,) acc: see attention_plan.h */
  const void* dout; /* (B, H, Tq, Dv) dtype */
  const void* q;    /* (B, H, Tq, D) dtype */
  const void* k;    /* (B, Hkv, Tk, D) dtype */
  const void* v;    /* (B, Hkv, Tk, Dv) dtype */
  const void* out;  /* (B, H, Tq, Dv) dtype */
  const void* lse;  /* (B, H, Tq) acc */
  const int32_t *key_low, *key_high;     /* (Tq,), or both NULL */
  const int32_t *query_low, *query_high; /* (Tk,), NULL where key_low is */
  int64_t B, H, Hkv, Tq, Tk, D, Dv;
  int64_t dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t;
  int64_t dout_b, dout_h, dout_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, out_b, out_h, out_t;
  int64_t window; /* 0: none */
  double scale, dropout_p;
  uint64_t seed;
  int32_t causal, dtype;
  int32_t threads;
};

/* One parameter of an AdamW update. acc is double when param_dtype is GPTK_FLOAT64. */
struct gptk_adamw_tensor {
  void* param;      /* (numel,) param_dtype */
  void* exp_avg;    /* (numel,) state_dtype */
  void* exp_avg_sq; /* (numel,) state_dtype */
  float* master; /* (numel,) the parameter that is updated and then rounded into param, or NULL */
  float* step;   /* updates done so far; advanced by one */
  const void* grad; /* (numel,) grad_dtype */
  int64_t numel;
  uint64_t row; /* of its random numbers; read with stochastic */
  double lr, weight_decay;
  int32_t param_dtype, state_dtype, grad_dtype;
  int32_t stochastic; /* 1: rounded by the rule of philox.h; for GPTK_BFLOAT16 without master */
};

struct gptk_adamw_update_args {
  const struct gptk_adamw_tensor* tensors; /* (count,) */
  int64_t count;
  double beta1, beta2, eps,
      grad_multiplier; /* each gradient is multiplied by grad_multiplier first */
  uint64_t seed;       /* read where a tensor is rounded stochastically */
  int32_t threads;
};

/* norm = sqrt(sum over all gradients of g * g), in double, block by block in a fixed order */
struct gptk_adamw_norm_args {
  double* norm;    /* () */
  double* partial; /* scratch: one double per block of GPTK_NORM_BLOCK elements of each tensor */
  const struct gptk_adamw_tensor* tensors; /* (count,); only grad, numel and grad_dtype are read */
  int64_t count;
  int32_t threads;
};
enum { GPTK_NORM_BLOCK = 8192 };

struct gptk_keep_mask_args {
  uint8_t* keep; /* (rows, cols), 1 = keep */
  int64_t rows, cols;
  double dropout_p;
  uint64_t seed;
  int32_t threads;
};

/* Every kernel, once. X(op) stands for: struct gptk_<op>_args, the C entry point gptk_<op> below,
   and one function gptk::<isa>::<op> per instruction set in csrc/cpu. */
#define GPTK_OPS(X)         \
  X(layer_norm_forward)     \
  X(layer_norm_backward)    \
  X(activation_forward)     \
  X(activation_backward)    \
  X(gemm)                   \
  X(cross_entropy_forward)  \
  X(cross_entropy_backward) \
  X(attention_forward)      \
  X(attention_backward)     \
  X(adamw_update)           \
  X(adamw_norm)             \
  X(keep_mask)

#ifdef __cplusplus
extern "C" {
#endif

#define GPTK_DECLARE(op) void gptk_##op(const struct gptk_##op##_args* args);
GPTK_OPS(GPTK_DECLARE)
#undef GPTK_DECLARE

/* Instruction sets, lowest first: those compiled in and supported by this CPU and operating system.
 */
int gptk_isa_count(void);
const char* gptk_isa_name(int level); /* 0 <= level < gptk_isa_count() */

/* Uses the named instruction set from now on. Returns 0, or -1 (and changes nothing) for a name not
   listed above. The best one is in use before the first call. Not to be called while a kernel runs.
 */
int gptk_isa_select(const char* name);
const char* gptk_isa_selected(void);

/* What the calls of one kernel have cost while counting was on: wall-clock seconds, and the
   floating-point operations of their matrix products. */
struct gptk_counts {
  double seconds, flops;
  int64_t calls;
};

/* Counts from now on, from zero, or no longer. For one thread that calls kernels. */
void gptk_count(int on);
/* Of a kernel of GPTK_OPS, by name, since counting was last switched on. */
struct gptk_counts gptk_counted(const char* name);

#ifdef __cplusplus
}
#endif
#endif
