// A uniform sample of the live positions of an index that follows its changes.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <unordered_map>
#include <vector>

namespace louver {

// Without replacement. New positions come in by Algorithm R (Vitter, 1985), removed ones are made up for by later ones: random
// pairing (Gemulla, Lehner, Haas: A Dip in the Reservoir, VLDB 2006). The same seed and changes give the same sample anywhere.
class Reservoir {
  public:
    Reservoir(int size, uint64_t seed);

    // Positions first..first + count are live now.
    void append(int64_t first, int64_t count);
    // A removed position is live again.
    void revive(int64_t position) { append(position, 1); }
    void remove(int64_t position);

    // Samples anew from those of 0..n whose bit is set.
    void restart(const std::vector<uint64_t> & live, int64_t n);

    // In no order; fewer than the size where fewer are live, or after removals.
    std::span<const int64_t> positions() const { return sample_; }

  private:
    void insert(int64_t position);
    void put(size_t slot, int64_t position);
    // Uniform in 0..n, n >= 1.
    uint64_t draw(uint64_t n);

    size_t size_;
    std::mt19937_64 random_;
    uint64_t n_live_ = 0;
    // Removals that no new position has made up for yet: of positions in the sample, and of others.
    uint64_t gone_inside_ = 0;
    uint64_t gone_outside_ = 0;
    std::vector<int64_t> sample_;
    std::unordered_map<int64_t, size_t> slot_;  // of each position in the sample
};

}  // namespace louver
