// What one instruction set offers: a table of functions, filled by the files compiled for it and
// chosen by dispatch.cpp. All of them are serial and work on the range that they are given; threads
// are the caller's (torch_ops.cpp, torch's own pool).
#pragma once
#include <cstdint>

#include "../block_format.h"
#include "../dtype.h"

namespace qlk {

// A packed weight as one run of values; see block_format.h.
struct Weight {
  const uint8_t* packed;
  Scales scales;
  const float* codebook;  // [16]
  int block_log2;
};

// A linear layer on few rows. `x` holds m rows of floats (or bf16): in pair order for the decode
// kernels, plain and padded with zeros to a multiple of 64 for the tile kernels. The LoRA part is
// S B^T with S already scaled, B in its own dtype.
struct LinearArgs {
  Weight w;
  int64_t n, k;   // weight [n, k]
  int64_t m;      // rows of x
  const void* x;  // [m, ldx]
  int64_t ldx;
  const float* s;  // decode: [m, rank] scaled S, or null; tile: not null when x's rows end in
  int64_t lds;     // lds more elements, S padded with zeros
  const void* b;   // [n, rank]
  DType b_dtype;
  DType b_round;  // what B is rounded to before it is used
  int64_t rank;
  const void* bias;  // [n] or null
  DType bias_dtype;
  DType bias_round;
  void* y;  // [m, n]
  DType y_dtype;
};

struct Kernels {
  const char* name;
  bool bf16_dots;  // the 16-bit variants below exist

  // Blocks [begin, end) of a [count] tensor. begin * blocksize is a multiple of 32.
  void (*quantize)(const void* a, DType dtype, int64_t count, const float* thresholds,
                   const uint8_t* codes, int block_log2, int64_t begin, int64_t end,
                   uint8_t* packed, float* absmax);
  // Groups [begin, end) of 256 scales.
  void (*quantize_absmax)(const float* absmax, int64_t count, float offset, const float* thresholds,
                          int64_t begin, int64_t end, uint8_t* codes, float* nested_absmax);
  // Values [begin, end) of the run, to `out` (which points at value `begin`). `stream`: with stores
  // that bypass the cache, for results larger than it.
  void (*dequantize)(const Weight& w, int64_t begin, int64_t end, DType dtype, void* out,
                     bool stream);
  // Rows [begin, end), columns [col, col + cols) of a weight with rows of row_length values, to
  // elements (fp32 or bf16) at out + (row - begin) * ld; fp32 elements are rounded to `round`
  // first.
  void (*decode_panel)(const Weight& w, int64_t row_length, int64_t col, int64_t begin, int64_t end,
                       int64_t cols, DType round, void* out, DType element, int64_t ld);
  // [rows, cols] from one dtype to another, rounded to `round` on the way; padded with zeros to
  // ld_out columns when pad is set.
  void (*convert)(const void* in, DType in_dtype, int64_t ld_in, DType round, void* out,
                  DType out_dtype, int64_t ld_out, int64_t rows, int64_t cols, bool pad,
                  float scale);
  // out = round(acc + bias): rows of floats or bf16 to the result's dtype.
  void (*finish)(const void* acc, DType acc_dtype, int64_t ld_acc, const void* bias,
                 DType bias_dtype, DType bias_round, void* out, DType out_dtype, int64_t ld_out,
                 int64_t rows, int64_t cols);

  // a . x over `count` values, a rounded to `round` first; fp32 sums.
  float (*dot)(const void* a, DType dtype, DType round, const float* x, int64_t count);

  // x for the decode kernels: [rows, k] with groups of 64 in the order that their lookups produce.
  void (*pair_order)(const void* x, DType dtype, DType round, int64_t rows, int64_t k, void* out,
                     bool as_bf16);
  // Output rows [begin, end) of the weight.
  void (*decode)(const LinearArgs& a, int64_t begin, int64_t end);
  void (*decode_bf16)(const LinearArgs& a, int64_t begin, int64_t end);
  void (*tile)(const LinearArgs& a, int64_t begin, int64_t end);
  void (*tile_bf16)(const LinearArgs& a, int64_t begin, int64_t end);

  // activations.cpp. Rows [begin, end) of x [m, k]; rstd [m] is written, then read.
  void (*rms_norm)(const void* x, const void* weight, DType dtype, float eps, int64_t k,
                   int64_t begin, int64_t end, void* y, float* rstd);
  void (*rms_norm_backward)(const void* dy, const void* x, const void* weight, DType dtype,
                            const float* rstd, int64_t k, int64_t begin, int64_t end, void* dx);
  // Elements [begin, end) of y = silu(gate) * up.
  void (*swiglu)(const void* gate, const void* up, DType dtype, int64_t begin, int64_t end,
                 void* y);
  void (*swiglu_backward)(const void* dy, const void* gate, const void* up, DType dtype,
                          int64_t begin, int64_t end, void* dgate, void* dup);
};

}  // namespace qlk
