// SPDX-License-Identifier: Apache-2.0
// `import fastrec._C` loads this library, and loading it registers the CPU kernels of every file.
#include <Python.h>

#include <cstdlib>

#include "bf16_products.h"
#include "simd.h"

extern "C" PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                   nullptr,               nullptr, nullptr, nullptr};
  if (fastrec::asked_vector_bytes() == 0) {
    // Not an ImportError, for which the reference would take over.
    PyErr_Format(PyExc_ValueError,
                 "FASTREC_CPU_CAPABILITY must be amx, avx512_bf16, avx512, avx2 or default, got %s",
                 std::getenv("FASTREC_CPU_CAPABILITY"));
    return nullptr;
  }
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  const char* names[] = {"", "avx512_bf16", "amx"};  // of `Bf16`
  PyModule_AddIntConstant(module, "vector_bytes", fastrec::vector_bytes());
  PyModule_AddStringConstant(module, "bf16", names[static_cast<int>(fastrec::bf16_products())]);
  return module;
}
