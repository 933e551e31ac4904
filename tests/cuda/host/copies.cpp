#include <array>
#include <deque>

#include "cuda/ptx.cuh"

namespace louver::cuda {
namespace {

constexpr size_t kMostThreads = 1024;
struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> batches;
};
std::array<Copies, kMostThreads> under_way;

}  // namespace

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
