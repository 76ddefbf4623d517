// Many rows: y = x W^T with W decoded panel by panel, torch's matmul on each.
//
//            k            r                      k        r
//        +---------+-----+                  +---------+-----+
//   m    |    x    | s S |     panel (P rows|    W    |  B  |   decoded into cache, torch's pool
//        +---------+-----+      of the      +---------+-----+
//                               weight)
//
//   y[:, panel] = [x | s S] [W | B]^T: LoRA is r more columns of the contraction, so that it is
//   summed in the same fp32 accumulators at the matmul's own speed, and nothing is added after.
//
//   dX = [dY | dS] [W ; A] likewise, r more rows of the contraction; panels are column slices of
//   W here, so that a slice of dX is complete after one matmul and rounded once.
//
// Elements of the matmul are bf16 where the hardware multiplies bf16 (AVX-512 BF16, AMX through
// torch), else fp32, whatever the compute dtype: torch's bf16 matmul is far slower than its fp32
// one elsewhere. Cost over a dense layer: decoding (about half a byte read and an element written
// to cache for each weight, once a pass) and a copy of x where LoRA or a dtype asks for it.
//
// Numerics: fp32 elements: variant (a) for bf16 and fp16 weights (rounded to the compute dtype by
// dequantize's rule), fp32 sums; |error| <= 2 (K + r) 2^-24 sum|x w|, whatever order torch's
// matmul takes. bf16 elements: the matmul's result is rounded to bf16 before bias is added.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <vector>

#include "cpu/dispatch.h"
#include "linear_cpu.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace qlk {
namespace {

constexpr int64_t kPanelBytes = int64_t{8} << 20;
constexpr int64_t kLongSide = 2048;  // where torch's matmul has packing behind it

// Rows (or columns) of a panel whose lines are `line` bytes: what fits kPanelBytes, and with many
// rows of x as many as those, since torch's matmul wants both sides long, but no more than is long;
// a multiple of `step`.
int64_t panel_lines(int64_t line, int64_t m, int64_t step, int64_t most) {
  const int64_t wanted = m < kLongSide ? m : kLongSide;
  int64_t lines = kPanelBytes / line;
  if (lines < wanted) lines = wanted;
  lines = (lines + step - 1) / step * step;
  return lines < most ? lines : most;
}

ScalarType torch_type(DType d) {
  return d == DType::f32    ? ScalarType::Float
         : d == DType::bf16 ? ScalarType::BFloat16
                            : ScalarType::Half;
}
int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

// Memory from torch's allocator, 64-byte aligned, freed with this.
struct Workspace {
  Tensor t;
  explicit Workspace(int64_t bytes)
      : t(torch::stable::empty({bytes > 0 ? bytes : 1}, ScalarType::Byte)) {}
  void* get() { return t.mutable_data_ptr(); }
  char* at(int64_t bytes) { return static_cast<char*>(t.mutable_data_ptr()) + bytes; }
};

// A strided view of memory for torch's matmul.
Tensor view(const void* data, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
            int64_t col_stride) {
  return torch::stable::from_blob(const_cast<void*>(data), {rows, cols}, {row_stride, col_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  torch_type(dtype));
}

// out = a b
void matmul(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned handle, which is out's
}

// What values of dtype `from` are rounded to before use: f32, no rounding, where they are of the
// compute dtype already.
DType rounding(DType from, DType compute) { return from == compute ? DType::f32 : compute; }

template <typename F>
void parallel_rows(int64_t rows, int64_t work_per_row, const F& f) {
  const int64_t grain = work_per_row > 0 ? 32768 / work_per_row + 1 : 1;
  torch::stable::parallel_for(0, rows, grain, f);
}

const char* row_of(const Matrix& m, int64_t row, int64_t cols) {
  return static_cast<const char*>(m.data) + row * cols * size_of(m.dtype);
}

// [rows, cols] to elements of `out_dtype`, rounded to the compute dtype on the way.
void convert_rows(const Matrix& in, int64_t cols, DType round, void* out, DType out_dtype,
                  int64_t ld_out, int64_t rows, float scale = 1.0f, bool pad = false) {
  const Kernels& k = kernels();
  round = rounding(in.dtype, round);
  parallel_rows(rows, cols, [&](int64_t begin, int64_t end) {
    k.convert(row_of(in, begin, cols), in.dtype, cols, round,
              static_cast<char*>(out) + begin * ld_out * size_of(out_dtype), out_dtype, ld_out,
              end - begin, cols, pad, scale);
  });
}

// Whether the matmul's elements are bf16.
bool bf16_elements(DType compute) { return compute == DType::bf16 && kernels().bf16_dots; }

// Rows [first, first + rows) of the weight, columns [col, col + cols), to elements: rounded to the
// compute dtype, as dequantize does, and widened where the elements are fp32.
void decode_panel(const Weight& w, int64_t k, int64_t first, int64_t rows, int64_t col,
                  int64_t cols, DType compute, void* out, DType element, int64_t ld) {
  const Kernels& table = kernels();
  parallel_rows(rows, cols, [&](int64_t begin, int64_t end) {
    table.decode_panel(w, k, col, first + begin, first + end, cols, compute,
                       static_cast<char*>(out) + begin * ld * size_of(element), element, ld);
  });
}

// out[:, first ... first + count) = left right (+ bias), rounded to out's dtype. A result that
// needs no rounding and no bias is written where it belongs; `scratch` holds others, [rows, count].
struct PanelResult {
  void* out;
  DType dtype;
  int64_t rows, cols;
  Matrix bias;
  DType compute;

  bool direct(DType element) const { return bias.data == nullptr && dtype == element; }

  void multiply(const Tensor& left, const Tensor& right, DType element, int64_t first,
                int64_t count, void* scratch) const {
    char* to = static_cast<char*>(out) + first * size_of(dtype);
    if (direct(element)) return matmul(left, right, view(to, element, rows, count, cols, 1));
    matmul(left, right, view(scratch, element, rows, count, count, 1));
    const Kernels& k = kernels();
    const void* b = bias.data != nullptr ? row_of(bias, first, 1) : nullptr;
    parallel_rows(rows, count, [&](int64_t begin, int64_t end) {
      k.finish(static_cast<const char*>(scratch) + begin * count * size_of(element), element, count,
               b, bias.dtype, rounding(bias.dtype, compute), to + begin * cols * size_of(dtype),
               dtype, cols, end - begin, count);
    });
  }
};

// S = x A^T for few rows, in fp32, from elements of x that are fp32 already.
void small_s(const LinearProblem& p, const float* x, int64_t ldx, float* s) {
  Workspace a(p.rank * p.k * 4);
  convert_rows(p.a, p.k, p.compute, a.get(), DType::f32, p.k, p.rank);
  matmul(view(x, DType::f32, p.m, p.k, ldx, 1), view(a.get(), DType::f32, p.k, p.rank, 1, p.k),
         view(s, DType::f32, p.m, p.rank, p.rank, 1));
}

LinearArgs linear_args(const LinearProblem& p) {
  LinearArgs a{};
  a.w = p.w;
  a.n = p.n, a.k = p.k, a.m = p.m;
  a.bias = p.bias.data, a.bias_dtype = p.bias.dtype;
  a.bias_round = rounding(p.bias.dtype, p.compute);
  a.y = p.y, a.y_dtype = p.y_dtype;
  a.b = p.b.data, a.b_dtype = p.b.dtype, a.rank = p.rank;
  a.b_round = rounding(p.b.dtype, p.compute);
  return a;
}

void forward_decode(const LinearProblem& p, bool bf16) {
  const Kernels& k = kernels();
  const bool own_s = p.rank > 0 && p.a.data != nullptr;
  // x in pair order, scaled S, and where S is computed here x as it is, in fp32.
  Workspace work((p.m * p.k + p.m * p.rank + (own_s ? p.m * p.k : 0)) * 4);
  float* s = reinterpret_cast<float*>(work.at(p.m * p.k * 4));
  const DType round = rounding(p.x.dtype, p.compute);
  k.pair_order(p.x.data, p.x.dtype, round, p.m, p.k, work.get(), bf16);
  LinearArgs a = linear_args(p);
  a.x = work.get(), a.ldx = p.k;
  if (own_s) {
    float* plain = s + p.m * p.rank;
    k.convert(p.x.data, p.x.dtype, p.k, round, plain, DType::f32, p.k, p.m, p.k, false, 1.0f);
    const DType a_round = rounding(p.a.dtype, p.compute);
    parallel_rows(p.rank, p.k * p.m, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t m = 0; m < p.m; ++m) {
          const float dot = k.dot(row_of(p.a, r, p.k), p.a.dtype, a_round, plain + m * p.k, p.k);
          p.s_out[m * p.rank + r] = dot;
          s[m * p.rank + r] = p.scaling * dot;
        }
    });
    a.s = s;
  } else if (p.rank > 0) {
    k.convert(p.s.data, p.s.dtype, p.rank, DType::f32, s, DType::f32, p.rank, p.m, p.rank, false,
              p.scaling);
    a.s = s;
  }
  const auto kernel = bf16 ? k.decode_bf16 : k.decode;
  parallel_rows(p.n, p.k, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

void forward_tile(const LinearProblem& p, bool bf16) {
  const Kernels& k = kernels();
  const DType element = bf16 ? DType::bf16 : DType::f32;
  LinearArgs a = linear_args(p);
  a.lds = p.rank > 0 ? round_up(p.rank, 64) : 0;
  a.ldx = round_up(p.k, 64) + a.lds;
  Workspace x(p.m * a.ldx * size_of(element));
  if (a.lds > 0) memset(x.get(), 0, p.m * a.ldx * size_of(element));
  convert_rows(p.x, p.k, p.compute, x.get(), element, a.ldx, p.m, 1.0f, a.lds == 0);
  a.x = x.get();
  if (p.rank > 0) {
    Matrix s = p.s;
    Workspace plain(p.a.data != nullptr && bf16 ? p.m * p.k * 4 : 0);
    if (p.a.data != nullptr) {
      const float* xs = static_cast<const float*>(x.get());
      int64_t ldx = a.ldx;
      if (bf16) {
        convert_rows(p.x, p.k, p.compute, plain.get(), DType::f32, p.k, p.m);
        xs = static_cast<const float*>(plain.get());
        ldx = p.k;
      }
      small_s(p, xs, ldx, p.s_out);
      s = {p.s_out, DType::f32};
    }
    k.convert(s.data, s.dtype, p.rank, DType::f32, x.at((a.ldx - a.lds) * size_of(element)),
              element, a.ldx, p.m, p.rank, false, p.scaling);
    a.s = static_cast<const float*>(x.get());  // says that there is one; it stands in x
  }
  const auto kernel = bf16 ? k.tile_bf16 : k.tile;
  // Whole groups of 16 rows to a thread: a row's result does not depend on how they are shared out.
  const int64_t groups = (p.n + 15) / 16;
  parallel_rows(groups, 16 * p.k * p.m / 4, [&](int64_t begin, int64_t end) {
    kernel(a, begin * 16, end * 16 < p.n ? end * 16 : p.n);
  });
}

void forward_panels(const LinearProblem& p, bool bf16) {
  const Kernels& k = kernels();
  const DType element = bf16 ? DType::bf16 : DType::f32;
  const int64_t width = p.k + p.rank;
  const bool copy = p.rank > 0 || p.x.dtype != element;
  Workspace xs(copy ? p.m * width * size_of(element) : 0);
  const void* x = p.x.data;
  if (copy) {
    convert_rows(p.x, p.k, p.compute, xs.get(), element, width, p.m);
    x = xs.get();
  }
  if (p.rank > 0) {
    Matrix s = p.s;
    Workspace a(p.a.data != nullptr ? p.rank * p.k * size_of(element) : 0);
    Workspace s16(p.a.data != nullptr && bf16 ? p.m * p.rank * 2 : 0);
    if (p.a.data != nullptr) {
      convert_rows(p.a, p.k, p.compute, a.get(), element, p.k, p.rank);
      void* out = bf16 ? s16.get() : static_cast<void*>(p.s_out);
      matmul(view(x, element, p.m, p.k, width, 1), view(a.get(), element, p.k, p.rank, 1, p.k),
             view(out, element, p.m, p.rank, p.rank, 1));
      s = {out, element};
      if (bf16) convert_rows(s, p.rank, DType::f32, p.s_out, DType::f32, p.rank, p.m);
    }
    k.convert(s.data, s.dtype, p.rank, DType::f32, xs.at(p.k * size_of(element)), element, width,
              p.m, p.rank, false, p.scaling);
  }
  const int64_t rows = panel_lines(width * size_of(element), p.m, 16, p.n);
  const PanelResult y{p.y, p.y_dtype, p.m, p.n, p.bias, p.compute};
  Workspace panel(rows * width * size_of(element));
  Workspace out(y.direct(element) ? 0 : p.m * rows * size_of(element));
  const Tensor left = view(x, element, p.m, width, width, 1);
  for (int64_t n = 0; n < p.n; n += rows) {
    const int64_t count = p.n - n < rows ? p.n - n : rows;
    decode_panel(p.w, p.k, n, count, 0, p.k, p.compute, panel.get(), element, width);
    if (p.rank > 0) {
      const Matrix b{row_of(p.b, n, p.rank), p.b.dtype};
      convert_rows(b, p.rank, p.compute, panel.at(p.k * size_of(element)), element, width, count);
    }
    y.multiply(left, view(panel.get(), element, width, count, 1, width), element, n, count,
               out.get());
  }
}

}  // namespace

void linear_forward(const LinearProblem& p) {
  const bool bf16 = bf16_elements(p.compute);
  switch (linear_route(p.m, p.n, p.k, p.w.block_log2, bf16)) {
    case Route::decode:
      return forward_decode(p, bf16);
    case Route::tile:
      return forward_tile(p, bf16);
    case Route::panel:
      return forward_panels(p, bf16);
  }
}

void linear_backward(const GradProblem& p) {
  const Kernels& k = kernels();
  const bool bf16 = bf16_elements(p.compute);
  const DType element = bf16 ? DType::bf16 : DType::f32;
  const int64_t size = size_of(element), width = p.n + p.rank;
  const bool copy = p.rank > 0 || p.dy.dtype != element;
  Workspace dys(copy ? p.m * width * size : 0);
  const void* dy = p.dy.data;
  if (copy) {
    convert_rows(p.dy, p.n, p.compute, dys.get(), element, width, p.m);
    dy = dys.get();
  }
  const Tensor dy_only = view(dy, element, p.m, p.n, width, 1);

  if (p.rank > 0) {
    // dS = s dY B, behind dY in each row
    Workspace b(p.n * p.rank * size), ds(p.m * p.rank * size);
    convert_rows(p.b, p.rank, p.compute, b.get(), element, p.rank, p.n);
    matmul(dy_only, view(b.get(), element, p.n, p.rank, p.rank, 1),
           view(ds.get(), element, p.m, p.rank, p.rank, 1));
    k.convert(ds.get(), element, p.rank, DType::f32, p.ds, DType::f32, p.rank, p.m, p.rank, false,
              p.scaling);
    k.convert(p.ds, DType::f32, p.rank, DType::f32, dys.at(p.n * size), element, width, p.m, p.rank,
              false, 1.0f);
    if (p.da != nullptr) {  // dS^T x
      const bool plain = p.x.dtype == element;
      Workspace xs(plain ? 0 : p.m * p.k * size), da(p.rank * p.k * size);
      if (!plain) convert_rows(p.x, p.k, p.compute, xs.get(), element, p.k, p.m);
      matmul(view(dys.at(p.n * size), element, p.rank, p.m, 1, width),
             view(plain ? p.x.data : xs.get(), element, p.m, p.k, p.k, 1),
             view(da.get(), element, p.rank, p.k, p.k, 1));
      convert_rows({da.get(), element}, p.k, DType::f32, p.da, p.a.dtype, p.k, p.rank);
    }
    if (p.db != nullptr) {  // s dY^T S
      Workspace s(p.m * p.rank * size), db(p.n * p.rank * size);
      convert_rows(p.s, p.rank, p.compute, s.get(), element, p.rank, p.m);
      matmul(view(dy, element, p.n, p.m, 1, width), view(s.get(), element, p.m, p.rank, p.rank, 1),
             view(db.get(), element, p.n, p.rank, p.rank, 1));
      convert_rows({db.get(), element}, p.rank, DType::f32, p.db, p.b.dtype, p.rank, p.n,
                   p.scaling);
    }
  }
  if (p.dx == nullptr) return;

  // Without A (S came from outside) dS A is the caller's, and only dY W is wanted.
  const int64_t inner = p.a.data != nullptr ? width : p.n;
  const int64_t cols = panel_lines(inner * size, p.m, 64, p.k);
  const PanelResult dx{p.dx, p.dx_dtype, p.m, p.k, {}, p.compute};
  Workspace panel(inner * cols * size), out(dx.direct(element) ? 0 : p.m * cols * size);
  const Tensor left = view(dy, element, p.m, inner, width, 1);
  for (int64_t c = 0; c < p.k; c += cols) {
    const int64_t count = p.k - c < cols ? p.k - c : cols;
    decode_panel(p.w, p.k, 0, p.n, c, count, p.compute, panel.get(), element, count);
    if (inner > p.n) {
      k.convert(static_cast<const char*>(p.a.data) + c * size_of(p.a.dtype), p.a.dtype, p.k,
                rounding(p.a.dtype, p.compute), panel.at(p.n * count * size), element, count,
                p.rank, count, false, 1.0f);
    }
    dx.multiply(left, view(panel.get(), element, inner, count, count, 1), element, c, count,
                out.get());
  }
}

}  // namespace qlk
