// What the kernels use of CUDA C++, and what their callers use of its runtime, on the CPU (simt.h).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __noinline__

#define threadIdx louver::simt::thread_index
#define blockIdx louver::simt::block_index
#define blockDim louver::simt::block_size
#define gridDim louver::simt::grid_size

using std::isfinite;
using std::isnan;
using std::max;
using std::min;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

template <class To, class From> To as_bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline uint32_t __float_as_uint(float x) { return as_bits_of<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return as_bits_of<float>(x); }
inline float __int_as_float(int x) { return as_bits_of<float>(x); }
inline double __longlong_as_double(long long x) { return as_bits_of<double>(x); }
inline int __float_as_int(float x) { return as_bits_of<int>(x); }
inline double __hiloint2double(int high, int low) {
    return __longlong_as_double(
        static_cast<long long>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low)));
}
inline long long __double_as_longlong(double x) { return as_bits_of<long long>(x); }

template <class T> T __ldg(const T * from) { return *from; }
template <class T> T __ldcg(const T * from) { return *from; }
inline void __threadfence() {}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(long long x) { return __builtin_popcountll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned long long __brevll(unsigned long long x) {
    unsigned long long reversed = 0;
    for (int bit = 0; bit < 64; ++bit) {
        reversed |= (x >> bit & 1) << (63 - bit);
    }
    return reversed;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        out |= static_cast<uint32_t>(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
    }
    return out;
}
inline uint32_t __vcmpgeu4(uint32_t a, uint32_t b) {
    uint32_t out = 0;
    for (int i = 0; i < 32; i += 8) {
        out |= (a >> i & 0xff) >= (b >> i & 0xff) ? 0xffu << i : 0u;
    }
    return out;
}

// Threads of a block run one after another, so that nothing comes between.
template <class T> T replace(T * at, T value) {
    const T before = *at;
    *at = value;
    return before;
}
template <class T> T atomicAdd(T * at, std::type_identity_t<T> value) { return replace(at, static_cast<T>(*at + value)); }
template <class T> T atomicMax(T * at, std::type_identity_t<T> value) { return replace(at, std::max(*at, value)); }
template <class T> T atomicOr(T * at, std::type_identity_t<T> value) { return replace(at, *at | value); }
template <class T> T atomicAnd(T * at, std::type_identity_t<T> value) { return replace(at, *at & value); }
template <class T> T atomicExch(T * at, std::type_identity_t<T> value) { return replace(at, value); }

inline void __syncthreads() { louver::simt::meet_block(false); }
inline int __syncthreads_or(int value) { return louver::simt::meet_block(value != 0).any ? 1 : 0; }
inline int __syncthreads_and(int value) { return louver::simt::meet_block(value != 0).all ? 1 : 0; }
inline void __syncwarp() { louver::simt::Exchange<char> all(0); }
template <class T> T __shfl_sync(unsigned, T value, int from) {
    return louver::simt::Exchange<T>(value).of(from & (louver::simt::kWarp - 1));
}
template <class T> T __shfl_xor_sync(unsigned, T value, int bits) {
    return louver::simt::Exchange<T>(value).of(louver::simt::lane() ^ bits);
}
template <class T> T __shfl_up_sync(unsigned, T value, int by) {
    const louver::simt::Exchange<T> all(value);
    return louver::simt::lane() < by ? value : all.of(louver::simt::lane() - by);
}
inline unsigned __ballot_sync(unsigned, bool value) {
    const louver::simt::Exchange<bool> all(value);
    unsigned votes = 0;
    for (int lane = 0; lane < louver::simt::kWarp; ++lane) {
        votes |= (all.of(lane) ? 1u : 0u) << lane;
    }
    return votes;
}
inline int __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline int __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == ~0u; }
template <class T, class F> T reduce_warp(T value, F && f) {
    const louver::simt::Exchange<T> all(value);
    T out = all.of(0);
    for (int lane = 1; lane < louver::simt::kWarp; ++lane) {
        out = f(out, all.of(lane));
    }
    return out;
}
template <class T> T __reduce_add_sync(unsigned, T value) {
    return reduce_warp(value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T> T __reduce_max_sync(unsigned, T value) {
    return reduce_warp(value, [](T a, T b) { return std::max(a, b); });
}
template <class T> T __reduce_min_sync(unsigned, T value) {
    return reduce_warp(value, [](T a, T b) { return std::min(a, b); });
}

// The runtime: one device, whose memory is the host's.
using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char * cudaGetErrorString(cudaError_t) { return "none"; }

inline cudaError_t cudaGetDevice(int * device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int * n) {
    *n = 1;
    return cudaSuccess;
}
struct cudaDeviceProp {
    char name[32] = "no GPU: threads on the CPU";
    int major = 8;
    int minor = 0;
    int multiProcessorCount = 3;
};
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp * properties, int) {
    *properties = {};
    return cudaSuccess;
}
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin
};
inline cudaError_t cudaDeviceGetAttribute(int * value, cudaDeviceAttr which, int) {
    switch (which) {
        case cudaDevAttrMultiProcessorCount: *value = cudaDeviceProp{}.multiProcessorCount; break;
        case cudaDevAttrComputeCapabilityMajor: *value = cudaDeviceProp{}.major; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 * 1024; break;
    }
    return cudaSuccess;
}

template <class T> cudaError_t cudaMalloc(T ** data, size_t bytes) {
    *data = static_cast<T *>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    return *data != nullptr ? cudaSuccess : 2;
}
inline cudaError_t cudaFree(void * data) {
    std::free(data);
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void * data, int value, size_t bytes) {
    std::memset(data, value, bytes);
    return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpy(void * to, const void * from, size_t bytes, cudaMemcpyKind) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy2D(void * to, size_t to_stride, const void * from, size_t from_stride, size_t width, size_t height,
                                cudaMemcpyKind) {
    for (size_t row = 0; row < height; ++row) {
        std::memcpy(static_cast<std::byte *>(to) + row * to_stride, static_cast<const std::byte *>(from) + row * from_stride,
                    width);
    }
    return cudaSuccess;
}

// A stream is where launches go: into the graph that is being captured, or else they run at once.
using CapturedGraph = std::vector<std::function<void()>>;
using cudaGraph_t = CapturedGraph *;
using cudaGraphExec_t = CapturedGraph *;
using cudaStream_t = struct Stream *;
inline const cudaStream_t cudaStreamPerThread = nullptr;
inline const cudaStream_t cudaStreamLegacy = nullptr;
inline cudaError_t cudaMemcpyAsync(void * to, const void * from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemcpy2DAsync(void * to, size_t to_stride, const void * from, size_t from_stride, size_t width,
                                     size_t height, cudaMemcpyKind kind, cudaStream_t) {
    return cudaMemcpy2D(to, to_stride, from, from_stride, width, height, kind);
}
inline cudaError_t cudaMemsetAsync(void * data, int value, size_t bytes, cudaStream_t) { return cudaMemset(data, value, bytes); }
inline CapturedGraph * graph_in_capture = nullptr;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
inline void launch_on_stream(std::function<void()> launch) {
    if (graph_in_capture != nullptr) {
        graph_in_capture->push_back(std::move(launch));
    } else {
        launch();
    }
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamCreate(cudaStream_t *) { return cudaSuccess; }
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *, unsigned) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    graph_in_capture = new CapturedGraph;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t * graph) {
    *graph = graph_in_capture;
    graph_in_capture = nullptr;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t * executable, cudaGraph_t graph, unsigned) {
    *executable = new CapturedGraph(*graph);
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
    for (const auto & launch : *executable) {
        launch();
    }
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    return cudaSuccess;
}
