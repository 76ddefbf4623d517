// Linear layers on the CPU: which kernel, its workspace, and the route of many rows, where panels
// of the weight are decoded into cache and multiplied by torch's own matmul.
#pragma once
#include "cpu/kernels.h"

namespace qlk {

struct Matrix {
  const void* data;  // null: not given
  DType dtype;
};

struct LinearProblem {
  Weight w;
  int64_t m, n, k, rank;
  Matrix x;     // [m, k]
  Matrix bias;  // [n]
  Matrix a;     // [rank, k]; or
  Matrix s;     // [m, rank]
  Matrix b;     // [n, rank]
  float scaling;
  DType compute;
  float* s_out;  // [m, rank], x A^T unscaled; null unless a is given
  void* y;       // [m, n]
  DType y_dtype;
};

struct GradProblem {
  Weight w;
  int64_t m, n, k, rank;
  Matrix dy;  // [m, n]
  Matrix x;   // [m, k], for da
  Matrix a;   // [rank, k]
  Matrix b;   // [n, rank]
  Matrix s;   // [m, rank], for db
  float scaling;
  DType compute;
  void* dx;  // [m, k] or null
  DType dx_dtype;
  void* da;   // [rank, k] in a's dtype, or null
  void* db;   // [n, rank] in b's dtype, or null
  float* ds;  // [m, rank]: scaling * dy B
};

void linear_forward(const LinearProblem& p);
void linear_backward(const GradProblem& p);

}  // namespace qlk
