// The extension module megatron_ring._C: importing it registers torch.ops.megatron_ring.
#include <Python.h>
#include <torch/library.h>

#include "tensors.h"

namespace megatron_ring {

Tensor token_logprob_partials(const Tensor&, const Tensor&, int64_t, double);
void token_logprob_gradient(const Tensor&, const Tensor&, int64_t, double, const Tensor&, const Tensor&,
                            const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&);
Tensor permute_rows(const Tensor&, const Tensor&, const Tensor&);
Tensor combine_rows(const Tensor&, const Tensor&, const OptionalTensor&);
std::tuple<Tensor, Tensor> combine_rows_backward(const Tensor&, const Tensor&, const Tensor&,
                                                 const OptionalTensor&, const OptionalTensor&, int64_t);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route(const Tensor&, int64_t, bool, const OptionalTensor&, int64_t,
                                                         int64_t, double, const OptionalTensor&,
                                                         const OptionalTensor&);
Tensor route_backward(const Tensor&, const Tensor&, bool, double, const OptionalTensor&, const OptionalTensor&,
                      const OptionalTensor&, const OptionalTensor&);
std::tuple<Tensor, Tensor, Tensor> route_index(const Tensor&, int64_t);
std::tuple<Tensor, Tensor> rms_norm(const Tensor&, const Tensor&, double);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&);

TORCH_LIBRARY(megatron_ring, m) {
  m.def("token_logprob_partials(Tensor logits, Tensor local, int columns, float temperature) -> Tensor");
  m.def(
      "token_logprob_gradient(Tensor logits, Tensor local, int columns, float temperature, Tensor max, "
      "Tensor log_sum, Tensor entropy, Tensor dlogp, Tensor? dentropy, Tensor(a!) out) -> ()");
  m.def("permute_rows(Tensor x, Tensor gather, Tensor offsets) -> Tensor");
  m.def("combine_rows(Tensor y, Tensor position, Tensor? weights) -> Tensor");
  m.def(
      "combine_rows_backward(Tensor dout, Tensor position, Tensor offsets, Tensor? weights, Tensor? y, "
      "int num_rows) "
      "-> (Tensor, Tensor)");
  m.def(
      "route(Tensor logits, int topk, bool sigmoid, Tensor? bias, int num_groups, int group_topk, float scaling, "
      "Tensor? valid, Tensor? replay) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "route_backward(Tensor logits, Tensor experts, bool sigmoid, float scaling, Tensor? valid, Tensor? dprobs, "
      "Tensor? dprob_sum, Tensor? dz_sum) -> Tensor");
  m.def("route_index(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor r) -> (Tensor, Tensor)");
  m.def("instruction_set() -> str", [] { return std::string(instruction_set()); });
}

TORCH_LIBRARY_IMPL(megatron_ring, CPU, m) {
  m.impl("token_logprob_partials", token_logprob_partials);
  m.impl("token_logprob_gradient", token_logprob_gradient);
  m.impl("permute_rows", permute_rows);
  m.impl("combine_rows", combine_rows);
  m.impl("combine_rows_backward", combine_rows_backward);
  m.impl("route", route);
  m.impl("route_backward", route_backward);
  m.impl("route_index", route_index);
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
}

}  // namespace megatron_ring

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.megatron_ring.", -1, nullptr};
  return PyModule_Create(&module);
}
