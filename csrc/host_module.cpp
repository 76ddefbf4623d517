// What is not a tensor op: what the machine can do, and which kernel a shape gets, on the CPU and
// on any GPU, present or not.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "cuda/dispatch.h"

namespace py = pybind11;

namespace {

using namespace qlk::cuda;

py::dict as_dict(const Plan& p) {
  py::dict d;
  d["route"] = route_name(p.route);
  d["tile_m"] = p.tile_m, d["tile_n"] = p.tile_n, d["tile_k"] = p.tile_k;
  d["warps"] = p.warps, d["stages"] = p.stages, d["splits"] = p.splits;
  d["shared_bytes"] = p.shared_bytes, d["workspace_bytes"] = p.workspace_bytes;
  return d;
}

void bind_cuda(py::module_& m) {
  py::class_<DeviceLimits>(m, "CudaDevice", "What a choice of CUDA kernels depends on")
      .def(py::init([](int major, int minor, int sms, int shared_optin, int shared_per_sm,
                       int threads_per_sm, int64_t l2_bytes) {
             return DeviceLimits{major,         minor,          sms,     shared_optin,
                                 shared_per_sm, threads_per_sm, l2_bytes};
           }),
           py::arg("major"), py::arg("minor"), py::arg("sms"), py::arg("shared_optin"),
           py::arg("shared_per_sm"), py::arg("threads_per_sm"), py::arg("l2_bytes"));
  py::class_<Shape>(m, "CudaShape",
                    "A linear layer [n, k] on m rows; dtype 1 is bf16, 2 f16, 0 f32")
      .def(py::init([](bool backward, int64_t m, int64_t n, int64_t k, int64_t rank, bool s_given,
                       int dtype, int block_log2, int scales) {
             return Shape{backward ? Pass::input_grad : Pass::forward,
                          m,
                          n,
                          k,
                          rank,
                          s_given,
                          static_cast<qlk::DType>(dtype),
                          block_log2,
                          static_cast<qlk::ScaleKind>(scales)};
           }),
           py::arg("backward"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("rank") = 0,
           py::arg("s_given") = false, py::arg("dtype") = 1, py::arg("block_log2") = 6,
           py::arg("scales") = 1);
  m.def(
      "cuda_choose",
      [](const DeviceLimits& device, const Shape& shape, unsigned disabled) {
        const Choice choice = choose(device, shape, disabled);
        return py::make_tuple(as_dict(choice.plan), choice.why);
      },
      py::arg("device"), py::arg("shape"), py::arg("disabled") = 0,
      "The plan of a linear layer and why, as csrc/cuda/dispatch.cpp chooses it");
  m.def(
      "cuda_candidates",
      [](const DeviceLimits& device, const Shape& shape) {
        py::list found;
        for (const Plan& plan : candidates(device, shape)) found.append(as_dict(plan));
        return found;
      },
      py::arg("device"), py::arg("shape"), "Every plan that is compiled and fits, `large` last");
  py::list routes, built;
  for (int i = 0; i < kRoutes; ++i) {
    routes.append(route_name(static_cast<Route>(i)));
    if (kBuilt & (1u << i)) built.append(route_name(static_cast<Route>(i)));
  }
  m.attr("cuda_routes") = py::tuple(routes);
  m.attr("cuda_routes_built") = py::tuple(built);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What runs where: qlora_kernels.cpu and qlora_kernels.cuda";
  m.def("available_isas", &qlk::available_isas, "Instruction sets that can run here, lowest first");
  m.def(
      "linear_route",
      [](int64_t m, int64_t n, int64_t k, int64_t blocksize, bool bf16) {
        int log2 = 0;
        while ((int64_t{1} << log2) < blocksize) ++log2;
        return qlk::route_name(qlk::linear_route(m, n, k, log2, bf16));
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("blocksize") = 64, py::arg("bf16") = false,
      "The kernel of a linear layer [n, k] on m rows: 'decode', 'tile' or 'panel'");
  m.attr("max_tile_rows") = qlk::kMaxTileRows;
  bind_cuda(m);
}
