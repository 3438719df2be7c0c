// SPDX-License-Identifier: Apache-2.0
// `import fastrec._C` loads this library, and loading it registers the CPU kernels of every file.
#include <Python.h>

#include "simd.h"

extern "C" PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr,
                                   nullptr,               nullptr, nullptr, nullptr};
  if (fastrec::asked_vector_bytes() == 0) {
    PyErr_SetString(PyExc_ImportError,
                    "FASTREC_CPU_CAPABILITY must be avx512, avx2 or default");
    return nullptr;
  }
  PyObject* module = PyModule_Create(&definition);
  if (module) PyModule_AddIntConstant(module, "vector_bytes", fastrec::vector_bytes());
  return module;
}
