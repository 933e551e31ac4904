// louver_llama._cuda: the index over arrays in a GPU's memory. Python's DeviceIndex checks what it was given.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.h"
#include "cuda/device_index.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace louver {
namespace {

using cuda::DeviceIndex;
using cuda::Memory;

const char * const kTypes[] = {"f32", "f16", "bf16"};

// Lets go of a Python object wherever the last user of it is.
std::shared_ptr<const void> shared(nb::object object) {
    return {new nb::object(std::move(object)), [](const void * held) {
                const nb::gil_scoped_acquire gil;
                delete static_cast<const nb::object *>(held);
            }};
}

// An array in a device's memory, of 1 to 3 dimensions; what is ahead of its last two counts as heads.
struct Array {
    std::shared_ptr<const void> owner;
    int device = 0;
    std::vector<int64_t> shape;
    StridedKeys view;  // strides in bytes

    Array(int on, const void * data, const std::string & dtype, std::vector<int64_t> sizes, const std::vector<int64_t> & strides,
          std::shared_ptr<const void> holder)
        : owner(std::move(holder)), device(on), shape(std::move(sizes)) {
        require(!shape.empty() && shape.size() <= 3 && strides.size() == shape.size(),
                "it has " + std::to_string(shape.size()) + " dimensions and " + std::to_string(strides.size()) +
                    " strides, accepted are 1 to 3");
        const size_t n = shape.size();
        // The step of a dimension of one means nothing.
        const auto step = [&](size_t i) { return shape[i] > 1 ? strides[i] : 0; };
        view.base = static_cast<const std::byte *>(data);
        view.type = dtype_named(dtype);
        view.dim = static_cast<int>(shape[n - 1]);
        view.element_stride = strides[n - 1];
        view.n = n > 1 ? shape[n - 2] : 1;
        view.row_stride = n > 1 ? step(n - 2) : 0;
        view.n_head_kv = n > 2 ? static_cast<int>(shape[n - 3]) : 1;
        view.head_stride = n > 2 ? step(n - 3) : 0;
    }

    // Whether the kernels can read it where it lies.
    bool in_rows() const {
        const auto unit = static_cast<int64_t>(row_bytes(view.type, 1));
        const auto bits = reinterpret_cast<uintptr_t>(view.base) | static_cast<uintptr_t>(view.row_stride) |
                          static_cast<uintptr_t>(view.head_stride);
        return view.element_stride == unit && bits % 16 == 0;
    }

    // The same without gaps, in memory of its own.
    Array without_gaps() const {
        auto copy = std::make_shared<Memory>(cuda::packed(device, view));
        const auto unit = static_cast<int64_t>(row_bytes(view.type, 1));
        Array array(*this);
        array.view.base = copy->as<std::byte>();
        array.view.element_stride = unit;
        array.view.row_stride = view.dim * unit;
        array.view.head_stride = view.n * view.dim * unit;
        array.owner = std::move(copy);
        return array;
    }
};

Array from_dlpack(const nb::ndarray<nb::ro> & array) {
    const int type = array.device_type();
    require(type == nb::device::cuda::value || type == nb::device::cuda_managed::value,
            "it is on DLPack device type " + std::to_string(type) + ", accepted is CUDA's 2 or 13");
    const nb::dlpack::dtype dtype = array.dtype();
    const bool is_bf16 = dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16;
    const bool is_float = dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float);
    if (dtype.lanes != 1 || !(is_bf16 || (is_float && (dtype.bits == 16 || dtype.bits == 32)))) {
        throw nb::type_error("it is not of float32, float16 or bfloat16");
    }
    const int64_t unit = dtype.bits / 8;
    std::vector<int64_t> shape;
    std::vector<int64_t> strides;
    for (size_t i = 0; i < array.ndim(); ++i) {
        shape.push_back(static_cast<int64_t>(array.shape(i)));
        strides.push_back(array.stride(i) * unit);
    }
    return {array.device_id(),
            array.data(),
            is_bf16 ? "bf16" : kTypes[dtype.bits == 16],
            std::move(shape),
            strides,
            std::shared_ptr<const void>(new nb::ndarray<nb::ro>(array), [](const void * held) {
                const nb::gil_scoped_acquire gil;
                delete static_cast<const nb::ndarray<nb::ro> *>(held);
            })};
}

// What __cuda_array_interface__ describes; work on the stream, if there is one, is waited for.
Array from_interface(uintptr_t address, const std::string & dtype, std::vector<int64_t> shape,
                     const std::vector<int64_t> & strides, std::optional<uintptr_t> stream, nb::object owner) {
    const auto * data = reinterpret_cast<const void *>(address);
    int device = 0;
    if (data == nullptr) {  // an empty array
        cuda::check(cudaGetDevice(&device), "cudaGetDevice");
    } else {
        cudaPointerAttributes attributes{};
        cuda::check(cudaPointerGetAttributes(&attributes, data), "cudaPointerGetAttributes");
        require(attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged,
                "it is not in a device's memory");
        device = attributes.device;
    }
    if (stream) {
        const nb::gil_scoped_release released;
        const cuda::OnDevice on(device);
        cuda::check(cudaStreamSynchronize(reinterpret_cast<cudaStream_t>(*stream)), "cudaStreamSynchronize");
    }
    return {device, data, dtype, std::move(shape), strides, shared(std::move(owner))};
}

// The elements in host memory: float32, or the bits of a type of 2 bytes.
nb::object to_host(const Array & array) {
    const size_t n = static_cast<size_t>(array.view.n_head_kv * array.view.n) * static_cast<size_t>(array.view.dim);
    const auto fetch = [&]<class T>(T) {
        std::vector<T> host(n);
        if (n > 0) {
            const nb::gil_scoped_release released;
            const Memory packed = cuda::packed(array.device, array.view);
            cuda::check(cudaMemcpy(host.data(), packed.as<T>(), n * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
        }
        return nb::cast(to_numpy(std::move(host), n));
    };
    return array.view.type == DType::f32 ? fetch(float{}) : fetch(uint16_t{});
}

// An array over the memory: it speaks DLPack. With its address, for __cuda_array_interface__.
template <class T> using OnGpu = nb::ndarray<nb::array_api, T, nb::device::cuda>;
template <class T> using PyResult = std::tuple<OnGpu<T>, uintptr_t>;

template <class T> PyResult<T> to_python(Memory memory, int device, const std::vector<size_t> & shape) {
    if (memory.bytes() == 0) {  // no library has to know what to do with an array at null
        const cuda::OnDevice on(device);
        memory = Memory(sizeof(T));
    }
    auto owned = std::make_unique<Memory>(std::move(memory));
    T * first = owned->as<T>();
    const nb::capsule owner(owned.release(), [](void * p) noexcept { delete static_cast<Memory *>(p); });
    return {OnGpu<T>(first, shape.size(), shape.data(), owner, nullptr, nb::dtype<T>(), nb::device::cuda::value, device),
            reinterpret_cast<uintptr_t>(first)};
}

// copy: none means if the array cannot be read where it lies.
struct Index {
    bool is_borrowed;
    DeviceIndex index;

    static std::unique_ptr<Index> build(const Array & keys, std::optional<bool> copy) {
        require(copy.value_or(true) || keys.in_rows(),
                "keys do not lie in rows that are aligned to 16 bytes; accepted with a copy");
        const nb::gil_scoped_release released;
        const bool borrows = !copy.value_or(!keys.in_rows());
        const Array array = borrows ? keys : keys.without_gaps();
        return std::unique_ptr<Index>(new Index{borrows, {array.device, array.view, array.owner}});
    }
};

using PyMatches = std::tuple<Out<int64_t, 1>, PyResult<int64_t>, PyResult<double>, std::tuple<int64_t, int64_t, int64_t>>;

PyMatches search(Index & self, const In<float, 2> & queries, const In<double, 1> & tau) {
    cuda::DeviceMatches found;
    {
        const nb::gil_scoped_release released;
        found = self.index.search({queries.data(), queries.size()}, {tau.data(), tau.size()});
    }
    const size_t n = static_cast<size_t>(found.offsets.back());
    const size_t n_offsets = found.offsets.size();
    const int device = self.index.device();
    return {to_numpy(std::move(found.offsets), n_offsets),
            to_python<int64_t>(std::move(found.ids), device, {n}),
            to_python<double>(std::move(found.scores), device, {n}),
            {found.stats.n_bounded, found.stats.n_scored, found.stats.n_exact}};
}

// tau, n_bounded, n_scored, bytes_read, delta, error_bound, dense.
using PyCertificate = std::tuple<double, int64_t, int64_t, int64_t, double, double, bool>;

// shape: of the queries, without their last dimension.
std::tuple<PyResult<float>, std::vector<PyCertificate>> attend(Index & self, const In<float, 2> & queries,
                                                               std::vector<size_t> shape, const Array & values, double epsilon,
                                                               double scale, bool compensate) {
    require(values.device == self.index.device(), "values are on GPU " + std::to_string(values.device) +
                                                      ", accepted is the index's " + std::to_string(self.index.device()));
    cuda::DeviceAttention result;
    {
        const nb::gil_scoped_release released;
        const Array array = values.in_rows() ? values : values.without_gaps();
        result = self.index.attend({queries.data(), queries.size()}, array.view, epsilon, scale, compensate);
    }
    const auto per_key = static_cast<int64_t>(self.index.index_bytes_per_key());
    const auto per_row = static_cast<int64_t>(row_bytes(self.index.keys().type, self.index.keys().dim));
    std::vector<PyCertificate> certificates;
    for (size_t i = 0; i < result.certificates.size(); ++i) {
        const HeadCertificate & one = result.certificates[i];
        certificates.push_back({one.tau, one.n_scanned, one.n_attended, one.n_scanned * per_key + one.n_attended * per_row,
                                one.delta, one.error_bound, result.dense[i] != 0});
    }
    shape.push_back(static_cast<size_t>(values.view.dim));
    return {to_python<float>(std::move(result.output), self.index.device(), shape), std::move(certificates)};
}

// What the device refused is not left behind for the next one who asks.
void raise_cuda_error(const std::exception_ptr & thrown, void *) {
    try {
        std::rethrow_exception(thrown);
    } catch (const cuda::Error & error) {
        const bool no_memory = cudaGetLastError() == cudaErrorMemoryAllocation;
        PyErr_SetString(no_memory ? PyExc_MemoryError : PyExc_RuntimeError, error.what());
    }
}

void bind(nb::module_ & m) {
    nb::register_exception_translator(raise_cuda_error);

    nb::class_<Array>(m, "Array")
        .def_static("from_dlpack", &from_dlpack, "capsule"_a, nb::sig("def from_dlpack(capsule: object) -> Array"))
        .def_static("from_interface", &from_interface, "address"_a, "dtype"_a, "shape"_a, "strides"_a, "stream"_a.none(),
                    "owner"_a)
        .def("to_host", &to_host, nb::sig("def to_host(self) -> typing.Any"))
        .def_ro("device", &Array::device)
        .def_ro("shape", &Array::shape)
        .def_prop_ro("dtype", [](const Array & array) { return kTypes[static_cast<size_t>(array.view.type)]; });

    nb::class_<Index>(m, "Index")
        .def_static("build", &Index::build, "keys"_a, "copy"_a.none())
        .def("search", &search, "queries"_a, "tau"_a,
             nb::sig("def search(self, queries: typing.Any, tau: typing.Any) -> tuple[typing.Any, tuple[typing.Any, int], "
                     "tuple[typing.Any, int], tuple[int, int, int]]"))
        .def("attend", &attend, "queries"_a, "shape"_a, "values"_a, "epsilon"_a, "scale"_a, "compensate"_a,
             nb::sig("def attend(self, queries: typing.Any, shape: collections.abc.Sequence[int], values: Array, "
                     "epsilon: float, scale: float, compensate: bool) -> tuple[tuple[typing.Any, int], list[tuple[float, int, "
                     "int, int, float, float, bool]]]"))
        .def(
            "poison", [](Index & self) { self.index.poison(); }, nb::call_guard<nb::gil_scoped_release>())
        .def("memory_usage",
             [](const Index & self) -> std::tuple<size_t, size_t, size_t> {
                 const nb::gil_scoped_release released;
                 const StridedKeys & keys = self.index.keys();
                 const size_t bytes = static_cast<size_t>(keys.n_head_kv * keys.n) * row_bytes(keys.type, keys.dim);
                 return {self.is_borrowed ? 0 : bytes, self.index.index_bytes(), self.index.other_bytes()};
             })
        .def_prop_ro("dtype", [](const Index & self) { return kTypes[static_cast<size_t>(self.index.keys().type)]; })
        .def_prop_ro("n_head_kv", [](const Index & self) { return self.index.keys().n_head_kv; })
        .def_prop_ro("dim", [](const Index & self) { return self.index.keys().dim; })
        .def_prop_ro("n_positions", [](const Index & self) { return self.index.keys().n; })
        .def_prop_ro("n_live", [](const Index & self) { return self.index.keys().n; })
        .def_prop_ro("device", [](const Index & self) { return self.index.device(); })
        .def_ro("is_borrowed", &Index::is_borrowed);
}

}  // namespace
}  // namespace louver

NB_MODULE(_cuda, m) {
    m.doc() = "Louver's index on a GPU: build, search, attention.";
    louver::bind(m);
}
