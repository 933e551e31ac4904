// Errors and memory of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

namespace louver::cuda {

class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

inline void check(cudaError_t status, const char * what) {
    if (status != cudaSuccess) {
        throw Error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

// Makes a device the current one while it lives.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice &) = delete;
    OnDevice & operator=(const OnDevice &) = delete;

  private:
    int before_ = 0;
};

// Bytes of shared memory that a thread block may have: 99 KB to 227 KB.
inline size_t most_shared_of(int device) {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
    return static_cast<size_t>(bytes);
}

// Device memory of the current device, filled with zeros. They are there when the constructor returns, for every stream: ggml's
// are not ordered with the legacy one.
class Memory {
  public:
    Memory() = default;
    explicit Memory(size_t bytes) : bytes_(bytes) {
        if (bytes > 0) {
            check(cudaMalloc(&data_, bytes), "cudaMalloc");
            if (const cudaError_t status = clear(); status != cudaSuccess) {
                cudaFree(data_);  // there will be no destructor
                check(status, "cudaMemset");
            }
        }
    }
    Memory(Memory && other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
    Memory & operator=(Memory && other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Memory() { cudaFree(data_); }

    template <class T> T * as(size_t offset = 0) const { return reinterpret_cast<T *>(static_cast<std::byte *>(data_) + offset); }
    size_t bytes() const { return bytes_; }

  private:
    cudaError_t clear() {
        cudaStream_t stream = nullptr;
        if (const cudaError_t status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking); status != cudaSuccess) {
            return status;
        }
        const cudaError_t asked = cudaMemsetAsync(data_, 0, bytes_, stream);
        const cudaError_t done = cudaStreamSynchronize(stream);
        cudaStreamDestroy(stream);
        return asked != cudaSuccess ? asked : done;
    }

    void * data_ = nullptr;
    size_t bytes_ = 0;
};

// Hands out aligned parts of a block of memory, or only counts them.
class Parts {
  public:
    explicit Parts(std::byte * base) : base_(base) {}

    template <class T> T * take(size_t count) {
        T * part = reinterpret_cast<T *>(base_ + bytes_);
        bytes_ += (count * sizeof(T) + 255) / 256 * 256;
        return part;
    }
    size_t bytes() const { return bytes_; }

  private:
    std::byte * base_;
    size_t bytes_ = 0;
};

}  // namespace louver::cuda
