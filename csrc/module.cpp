// The extension module megatron_ring._C: importing it registers torch.ops.megatron_ring, each op in its own file.
#include <Python.h>
#include <torch/library.h>

#include <string>

#include "rows.h"

TORCH_LIBRARY(megatron_ring, m) {
  m.def("instruction_set() -> str", [] { return std::string(megatron_ring::instruction_set()); });
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.megatron_ring.", -1, nullptr};
  return PyModule_Create(&module);
}
