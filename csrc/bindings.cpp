// The operators' schemas, their registration, and the Python module. torch's stable ABI only: one binary for every
// torch from 2.11 on and every Python from 3.11 on.

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY(cuma_ds, m) {
  m.def(
      "gate(Tensor hidden_logits, Tensor? profile_logits, Tensor profile_index, int top_k, int norm) -> "
      "(Tensor weight, Tensor expert, Tensor load, Tensor weight_sum, Tensor entropy, Tensor invalid)");
  m.def(
      "gate_backward(Tensor hidden_logits, Tensor? profile_logits, Tensor profile_index, Tensor weight, Tensor expert, "
      "Tensor? d_weight, Tensor? d_weight_sum, int norm) -> (Tensor d_hidden_logits, Tensor d_profile_logits)");
  m.def("gate_scale(Tensor z, Tensor weight, Tensor expert, int num_experts, float scale) -> Tensor");
  m.def(
      "gate_scale_backward(Tensor d_out, Tensor z, Tensor weight, Tensor expert, float scale) -> "
      "(Tensor d_z, Tensor d_weight)");
}

#define CUMA_IMPLEMENT(m)                                   \
  m.impl("gate", TORCH_BOX(&cuma::gate));                   \
  m.impl("gate_backward", TORCH_BOX(&cuma::gate_backward)); \
  m.impl("gate_scale", TORCH_BOX(&cuma::gate_scale));       \
  m.impl("gate_scale_backward", TORCH_BOX(&cuma::gate_scale_backward))

STABLE_TORCH_LIBRARY_IMPL(cuma_ds, CPU, m) { CUMA_IMPLEMENT(m); }
#ifdef CUMA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(cuma_ds, CUDA, m) { CUMA_IMPLEMENT(m); }
#endif

// An empty module. Importing it registers the operators above.
static PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                        nullptr};

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&module_definition);
  if (module != nullptr) {
    PyModule_AddIntConstant(module, "SCHEMAS", 3);  // raise it with every change of a schema above
    PyModule_AddStringConstant(module, "CUDA_ARCHITECTURES", CUMA_CUDA_ARCHITECTURES);
  }
  return module;
}
