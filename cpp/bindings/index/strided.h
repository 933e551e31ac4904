// Arrays of keys or values from Python, in whatever layout they are: read where they lie.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "arrays.h"
#include "louver/index.h"

namespace louver {

// Holds the buffer of a Python object; created and destroyed with the GIL.
class Strided {
  public:
    // array: (n_head_kv, n, dim) of elements of that type; bfloat16 comes as any type of two bytes. what: its name in errors.
    Strided(nanobind::handle array, const std::string & dtype, const char * what) {
        if (PyObject_GetBuffer(array.ptr(), &buffer_, PyBUF_STRIDES) != 0) {
            throw nanobind::python_error();
        }
        const DType type = dtype_named(dtype);
        const bool fits = buffer_.ndim == 3 && buffer_.itemsize == static_cast<Py_ssize_t>(row_bytes(type, 1));
        if (!fits) {
            PyBuffer_Release(&buffer_);
        }
        require(fits, std::string(what) + " is not a (n_head_kv, n, dim) array of " + dtype);
        const auto size = [&](int i) { return static_cast<int64_t>(buffer_.shape[i]); };
        keys_ = {static_cast<const std::byte *>(buffer_.buf),
                 type,
                 static_cast<int>(size(0)),
                 size(1),
                 static_cast<int>(size(2)),
                 buffer_.strides[0],
                 buffer_.strides[1],
                 buffer_.strides[2]};
    }
    Strided(const Strided &) = delete;
    Strided & operator=(const Strided &) = delete;
    ~Strided() { PyBuffer_Release(&buffer_); }

    const StridedKeys & keys() const { return keys_; }

  private:
    Py_buffer buffer_;
    StridedKeys keys_;
};

}  // namespace louver
