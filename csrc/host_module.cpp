// What is not a tensor op: what the machine can do, and which kernel a shape gets.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "Instruction sets of this machine and the routes of linear layers (qlora_kernels.cpu)";
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
}
