#include <array>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>

#include "cuda/ptx.cuh"

namespace louver::cuda {
namespace {

constexpr size_t kMostThreads = 1024;
struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> batches;
};
std::array<Copies, kMostThreads> under_way;
std::map<const Arrival *, Copy> of_arrivals;

void demand(bool holds, const char * what) {
    if (!holds) {
        std::fprintf(stderr, "%s\n", what);
        std::abort();
    }
}

}  // namespace

void Arrival::copy(void * to, const void * from, int bytes) {
    __syncwarp();  // the same for all lanes
    demand((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | static_cast<uintptr_t>(bytes)) % 16 == 0,
           "a copy that is not aligned");
    if (simt::lane() == 0) {
        std::memset(to, 0xff, static_cast<size_t>(bytes));
        of_arrivals[this] = {static_cast<std::byte *>(to), static_cast<const std::byte *>(from), bytes};
        demand(!asked_, "a copy before the one before it was waited for");
        asked_ = true;
    }
}

void Arrival::wait(uint32_t phase) {
    __syncwarp();
    demand(phase == phase_ && asked_, "a wait for another phase than the one that is open");
    __syncwarp();
    if (simt::lane() == 0) {
        const Copy & copy = of_arrivals.at(this);
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
        of_arrivals.erase(this);
        phase_ ^= 1;
        asked_ = false;
    }
    __syncwarp();
}

void begin_copy(const Copy & copy) {
    std::memset(copy.to, 0xff, static_cast<size_t>(copy.bytes));
    under_way[threadIdx.x].open.push_back(copy);
}

void end_batch() {
    Copies & copies = under_way[threadIdx.x];
    copies.batches.push_back(std::move(copies.open));
    copies.open.clear();
}

void end_copies(int n_batches) {
    std::deque<std::vector<Copy>> & batches = under_way[threadIdx.x].batches;
    for (; batches.size() > static_cast<size_t>(n_batches); batches.pop_front()) {
        for (const Copy & copy : batches.front()) {
            if (copy.from == nullptr) {
                std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
            } else {
                std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
            }
        }
    }
}

}  // namespace louver::cuda
