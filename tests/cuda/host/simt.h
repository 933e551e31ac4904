// Runs the threads of a thread block on the CPU, so that the kernels can be tested where there is no GPU: one fiber to a thread,
// one thread block after another. Threads of a warp meet wherever CUDA makes them exchange something; between those places they
// run in any order, which is what CUDA allows. What this cannot show is a race.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

namespace louver::simt {

inline constexpr int kWarp = 32;

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

// Of the thread that runs.
extern Index thread_index;
extern Index block_index;
extern Index block_size;
extern Index grid_size;

std::byte * dynamic_memory();

// Every thread block of the grid.
void run(Index grid, unsigned threads, size_t shared_bytes, const std::function<void()> & kernel);

// Returns once all threads of the block are here; whether `value` was true for any, and for all of them.
struct Votes {
    bool any;
    bool all;
};
Votes meet_block(bool value);

inline constexpr int kWords = 8;
using Words = uint64_t[kWords];

// The same for the threads of a warp: [kWarp] what each of them brought. Valid until two meetings later.
const Words * meet_warp(const void * brought, size_t bytes);

// `of(lane)` is what that lane brought.
template <class T> class Exchange {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(Words));

  public:
    explicit Exchange(const T & value) : words_(meet_warp(&value, sizeof(T))) {}
    T of(int lane) const {
        T value;
        std::memcpy(&value, words_[lane], sizeof(T));
        return value;
    }

  private:
    const Words * words_;
};

inline int lane() { return static_cast<int>(thread_index.x % kWarp); }

}  // namespace louver::simt
