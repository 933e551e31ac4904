// Arrays between numpy and the core, and the checks of arguments that Python gave.
#pragma once

#include <nanobind/ndarray.h>

#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "louver/types.h"

namespace louver {

template <class T, int kDims> using In =
    nanobind::ndarray<nanobind::numpy, const T, nanobind::ndim<kDims>, nanobind::c_contig, nanobind::device::cpu>;
template <class T, int kDims> using Out = nanobind::ndarray<nanobind::numpy, T, nanobind::ndim<kDims>>;

inline void require(bool holds, const std::string & message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

inline DType dtype_named(const std::string & name) {
    const char * const names[] = {"f32", "f16", "bf16", "q8_0", "q4_0"};
    for (size_t i = 0; i < std::size(names); ++i) {
        if (name == names[i]) {
            return static_cast<DType>(i);
        }
    }
    throw std::invalid_argument("dtype is \"" + name + "\", accepted are f32, f16, bf16, q8_0, q4_0");
}

// A numpy array that owns what was in `values`.
template <class T, class... Size> Out<T, sizeof...(Size)> to_numpy(std::vector<T> values, Size... shape) {
    auto owned = std::make_unique<std::vector<T>>(std::move(values));
    T * first = owned->data();
    const nanobind::capsule owner(owned.release(), [](void * p) noexcept { delete static_cast<std::vector<T> *>(p); });
    return Out<T, sizeof...(Size)>(first, {static_cast<size_t>(shape)...}, owner);
}

}  // namespace louver
